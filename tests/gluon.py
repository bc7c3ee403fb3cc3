"""Kernels in Gluon, which no interpreter runs: compiled, and executed by `simulator`."""

from __future__ import annotations

from typing import Any

from triton.language import core, math

from resnet_triton.codegen.compiler import specialise, triton_compile
from resnet_triton.kernels.launch import Launch

_LANGUAGE = [
    (part, name, value)
    for part in (core, core.tensor, core.tensor_descriptor_base, math)
    for name, value in vars(part).items()
    if callable(value)
]
"""As a compiler needs it. The interpreter does not put back all that it has changed, once a kernel calls a function."""


def ptx(launch: Launch) -> str:
    """What a launch compiles to for sm_90."""
    return compiled(launch).asm["ptx"]


def compiled(launch: Launch) -> Any:
    """Triton's compiled kernel for sm_90. Gluon compiles here, too, where plain Triton interprets."""
    interpreted = [(part, name, vars(part)[name]) for part, name, _ in _LANGUAGE]
    _become(_LANGUAGE)
    try:
        return triton_compile(specialise(launch), 90)
    finally:
        _become(interpreted)


def _become(language: list[tuple[object, str, object]]) -> None:
    for part, name, value in language:
        if vars(part)[name] is not value:
            setattr(part, name, value)
