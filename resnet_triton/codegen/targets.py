"""GPUs that need not be here: what the compiler calls them, and what a multiprocessor holds.

`config/device.py` has the facts that shape kernels; what is here only compiles for a GPU, so no launch depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config.device import KNOWN, DeviceFacts


@dataclass(frozen=True)
class Multiprocessor:
    """What one streaming multiprocessor (AMD: compute unit) can hold at a time. Shared memory in bytes.

    `reserved` is the shared memory the system takes for every program. Registers lie in four equal parts, one for each
    scheduler, and a warp's registers come from one of them.
    """

    warps: int
    programs: int
    shared_memory: int
    reserved: int = 1024
    registers: int = 65536
    warp_size: int = 32


@dataclass(frozen=True)
class Target:
    """One GPU: what shapes its kernels, Triton's `GPUTarget` arguments, its limits."""

    facts: DeviceFacts
    compiler: tuple[str, int | str, int]
    sm: Multiprocessor

    @property
    def name(self) -> str:
        """As compilers call the architecture: "sm_90", "gfx942"."""
        arch = self.compiler[1]
        return f"sm_{arch}" if isinstance(arch, int) else arch


KB = 1024

# CUDA programming guide, "Technical Specifications per Compute Capability"; AMD: 8 waves for each of four SIMDs (LLVM,
# "AMDGPU occupancy calculator") and a register file of 512 KB (CDNA 3 white paper).
_SM = {
    80: Multiprocessor(warps=64, programs=32, shared_memory=164 * KB),
    86: Multiprocessor(warps=48, programs=16, shared_memory=100 * KB),
    89: Multiprocessor(warps=48, programs=24, shared_memory=100 * KB),
    90: Multiprocessor(warps=64, programs=32, shared_memory=228 * KB),
    100: Multiprocessor(warps=64, programs=32, shared_memory=228 * KB),
    120: Multiprocessor(warps=48, programs=24, shared_memory=100 * KB),
}

TARGETS: dict[int | str, Target] = {
    **{arch: Target(facts, ("cuda", arch, 32), _SM[arch]) for arch, facts in KNOWN.items()},
    # Compiled to keep the pointer kernels portable; at run time AMD stays on PyTorch. It has no compute capability.
    "gfx942": Target(
        DeviceFacts("AMD Instinct MI300X", 0, 304, 64 * KB),
        ("hip", "gfx942", 64),
        Multiprocessor(warps=32, programs=32, shared_memory=64 * KB, reserved=0, registers=131072, warp_size=64),
    ),
}
"""By architecture as Triton names it: 90 for sm_90, "gfx942"."""


def target(arch: int | str) -> Target:
    """The target of an architecture: 90, "90", "sm_90" or "gfx942". ValueError for one we have no facts of."""
    digits = str(arch).removeprefix("sm_")
    key = int(digits) if digits.isdecimal() else digits
    if key not in TARGETS:
        raise ValueError(f"cannot compile for {arch!r}, expected one of {', '.join(t.name for t in TARGETS.values())}")
    return TARGETS[key]
