"""GPUs that need not be here: what the compiler calls them, and what a multiprocessor holds.

`config/device.py` has the facts that shape kernels; what is here only compiles for a GPU, so no launch depends on it.
"""

from __future__ import annotations

from typing import NamedTuple

from ..config.device import KNOWN, DeviceFacts


class Multiprocessor(NamedTuple):
    """What one streaming multiprocessor can hold at a time. Shared memory in bytes."""

    warps: int
    programs: int
    shared_memory: int


class Target(NamedTuple):
    """One GPU: what shapes its kernels, its limits."""

    facts: DeviceFacts
    sm: Multiprocessor

    @property
    def name(self) -> str:
        """As compilers call the architecture: "sm_90"."""
        return f"sm_{self.facts.arch}"


KB = 1024

# CUDA programming guide, "Technical Specifications per Compute Capability".
_SM = {
    80: Multiprocessor(warps=64, programs=32, shared_memory=164 * KB),
    86: Multiprocessor(warps=48, programs=16, shared_memory=100 * KB),
    89: Multiprocessor(warps=48, programs=24, shared_memory=100 * KB),
    90: Multiprocessor(warps=64, programs=32, shared_memory=228 * KB),
    100: Multiprocessor(warps=64, programs=32, shared_memory=228 * KB),
    120: Multiprocessor(warps=48, programs=24, shared_memory=100 * KB),
}

TARGETS = {arch: Target(facts, _SM[arch]) for arch, facts in KNOWN.items()}
"""By compute capability: 90 for sm_90."""


def target(arch: int | str) -> Target:
    """The target of an architecture: 90, "90" or "sm_90". ValueError for one we have no facts of."""
    digits = str(arch).removeprefix("sm_")
    if not digits.isdecimal() or int(digits) not in TARGETS:
        raise ValueError(f"cannot compile for {arch!r}, expected one of {', '.join(t.name for t in TARGETS.values())}")
    return TARGETS[int(digits)]
