"""Warp-specialised kernels, which no interpreter runs: compiled, and executed by `simulator`."""

from __future__ import annotations

from resnet_triton.codegen.compiler import specialise, triton_compile
from resnet_triton.kernels.launch import Launch


def ptx(launch: Launch) -> str:
    """What a launch compiles to for sm_90. Gluon compiles here, too, where plain Triton interprets."""
    return triton_compile(specialise(launch), 90).asm["ptx"]
