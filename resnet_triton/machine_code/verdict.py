"""Whether a launch may go ahead on the GPU that is here, as far as its PTX and machine code tell.

Where products are asynchronous (wgmma, compute capability 9.0), no number of right answers shows that the next one is
right: `products.py` has to find no hazard, and `ordering.py` a barrier before what several groups of four warps have
multiplied is overwritten, which Triton may leave out (triton#11047). The checks before a release have asked it of the
kernels that `config` chooses for ResNet-18, compiled by the pairs in JUDGED; with these its tiles are trusted for other
shapes, too. Every other kernel is asked here before its first launch, once, which takes 0.5 s: the verdict is kept
beside it in Triton's cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from ..kernels.launch import Launch
from . import groups, ordering, products

JUDGED = frozenset({("3.6.0", "12.8"), ("3.7.1", "12.8"), ("3.9.0", "13.4")})
"""Versions of Triton and of the ptxas in its wheel with which `make codegen` (CI; the newest: `make verify`) passed."""

_known: dict[str, tuple[str, ...]] = {}  # hazards of kernels, by Triton's hash of each
_warned: set[bool] = set()  # of a kernel that was judged, of one that could not be


def unsafe_reason(launch: Launch) -> str | None:
    """Why `launch` must not go ahead on a GPU of compute capability 9.0; None if it may.

    Warns of the first hazard in a process, and of the first kernel that cannot be judged.
    """
    if launch.trusted and compilers() in JUDGED:
        return None
    judged = True
    try:
        found = hazards(launch.compile())
    except NotJudged as error:
        judged, found = False, (str(error),)
    if not found:
        return None
    reason = f"{launch.kernel.__name__} may give wrong answers: {found[0]}"
    if judged not in _warned:
        _warned.add(judged)
        warnings.warn(f"{reason}; such kernels are not launched (resnet-triton doctor says more)", stacklevel=2)
    return reason


@functools.cache
def compilers() -> tuple[str, str]:
    """Versions of Triton and of the ptxas in its wheel that it asks for compute capability 9.0.

    "" stands for a ptxas from elsewhere, with options from the environment, or none. As they are at the first question.
    """
    import triton

    try:
        from triton import knobs
        from triton.backends.nvidia.compiler import get_ptxas

        ptxas = get_ptxas(90)
        options = knobs.nvidia.ptxas_options or knobs.nvidia.disable_ptxas_opt
        usual = not options and Path(triton.__file__).parent in Path(ptxas.path).parents
        return triton.__version__, str(ptxas.version) if usual else ""
    except (ImportError, RuntimeError):
        return triton.__version__, ""


class NotJudged(Exception):
    """A kernel's machine code could not be read."""


def hazards(compiled: Any) -> tuple[str, ...]:
    """What may go wrong with a compiled kernel of Triton's (compute capability 9.0). NotJudged if it cannot be read."""
    if getattr(compiled, "hash", None) is None:
        raise NotJudged("Triton has compiled nothing to read")
    known = _known.get(compiled.hash)
    if known is None:
        known = _known[compiled.hash] = _remembered(compiled)
    return known


def _remembered(compiled: Any) -> tuple[str, ...]:
    from triton.runtime.cache import get_cache_manager

    cache, name = get_cache_manager(compiled.hash), f"hazards-{_edition()}.json"
    if (path := cache.get_file(name)) is not None:
        with contextlib.suppress(OSError, ValueError):
            return tuple(map(str, json.loads(Path(path).read_text(encoding="utf-8"))))
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise NotJudged("nobody has judged it, and a graph is being captured; call it once before")
    try:
        text = disassemble(compiled.asm["cubin"])
        ptx = compiled.asm["ptx"]
        found = products.follow(text, expected="wgmma.mma_async" in ptx).hazards
        if groups.threads(ptx) != 128:  # of four warps, each knows that all have multiplied
            found += ordering.broken(groups.ptx(ptx), [ordering.AFTER_PRODUCT])
    except (KeyError, ValueError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        # Triton kept no such text, or it says what no kernel said before; or the disassembler is missing, or fails
        raise NotJudged(f"its machine code cannot be read ({type(error).__name__}: {error})") from None
    with contextlib.suppress(OSError):
        cache.put(json.dumps(found), name, binary=False)
    return found


def disassemble(cubin: bytes) -> str:
    """Machine code as text, by the disassembler of Triton's wheel."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(cubin)
        command = knobs.nvidia.nvdisasm.path, "-ndf", "-c", binary  # -ndf: no data-flow analysis
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def _edition() -> str:
    """The edition of the judge: another one judges anew."""
    judges = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(judges).hexdigest()[:12]
