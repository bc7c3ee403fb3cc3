"""How many programs of a launch a GPU holds at a time."""

from __future__ import annotations

from ..machine_code import Code
from .targets import Multiprocessor, Target


def programs_per_sm(code: Code, num_warps: int, sm: Multiprocessor) -> int:
    """Programs a multiprocessor holds at a time; 0 if not even one fits.

    Registers are given to a warp in steps of 8 a thread, shared memory to a program in steps of 128 bytes (CUDA
    occupancy calculator; AMD's vector registers come in steps of 8 as well). Tensor memory (sm_100) is not counted.
    """
    warp = _round_up(max(code.registers, 1), 8) * sm.warp_size
    by_registers = 4 * (sm.registers // 4 // warp) // num_warps
    memory = _round_up(code.shared_memory, 128) + sm.reserved
    by_memory = sm.shared_memory // memory if memory else sm.programs
    return min(by_registers, by_memory, sm.warps // num_warps, sm.programs)


def waves(programs: int, resident: int, target: Target) -> float:
    """How often the GPU has to be filled to run every program of a launch, `resident` a multiprocessor at a time."""
    return programs / (max(resident, 1) * target.facts.sm_count)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
