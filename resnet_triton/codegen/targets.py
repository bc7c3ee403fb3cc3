"""GPUs that need not be here: what the compiler calls them, what a multiprocessor holds, how fast they are.

`device.py` has the facts that shape kernels; what is here only compiles for a GPU, so no launch depends on it. Rates
are per second and dense; None stands where no figure with a source is known.
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
class Ceilings:
    """What a GPU can do at best, in FLOP/s and, of `dram`, in B/s; `half` is fp16 and bf16, accumulated in fp32."""

    source: str
    half: float | None = None
    tf32: float | None = None
    single: float | None = None
    dram: float | None = None

    def flops(self, dtype: str) -> float | None:
        """FLOP/s of matrix products in a dtype as `codegen` names it; "float32" means IEEE, without tensor cores."""
        return {"tf32": self.tf32, "float32": self.single}.get(dtype, self.half)


@dataclass(frozen=True)
class Target:
    """One GPU: what shapes its kernels, Triton's `GPUTarget` arguments, its limits and its ceilings."""

    facts: DeviceFacts
    compiler: tuple[str, int | str, int]
    sm: Multiprocessor
    ceilings: Ceilings

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
_CEILINGS = {
    80: Ceilings("data sheet (80 GB, SXM)", half=312e12, tf32=156e12, single=19.5e12, dram=2.039e12),
    86: Ceilings("data sheet", half=154.8e12, tf32=77.4e12, single=38.7e12, dram=0.768e12),
    89: Ceilings("white paper of the Ada architecture", half=165.2e12, tf32=82.6e12, single=82.6e12, dram=1.008e12),
    90: Ceilings(
        "16-bit products and DRAM copy measured; tf32 and fp32 from the data sheet",
        half=790e12, tf32=494e12, single=67e12, dram=4.3e12,
    ),
    100: Ceilings("data sheet", half=2250e12, dram=8.0e12),
    120: Ceilings(
        "white paper of the RTX Blackwell architecture", half=209.5e12, tf32=104.8e12, single=104.8e12, dram=1.792e12
    ),
}  # fmt: skip

TARGETS: dict[int | str, Target] = {
    **{arch: Target(facts, ("cuda", arch, 32), _SM[arch], _CEILINGS[arch]) for arch, facts in KNOWN.items()},
    # Compiled to keep the pointer kernels portable; at run time AMD stays on PyTorch. It has no compute capability.
    "gfx942": Target(
        DeviceFacts("AMD Instinct MI300X", 0, 304, 64 * KB),
        ("hip", "gfx942", 64),
        Multiprocessor(warps=32, programs=32, shared_memory=64 * KB, reserved=0, registers=131072, warp_size=64),
        Ceilings("data sheet", half=1307.4e12, tf32=653.7e12, single=163.4e12, dram=5.3e12),
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
