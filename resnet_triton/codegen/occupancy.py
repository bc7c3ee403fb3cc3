"""How many programs of a launch a GPU holds at a time."""

from __future__ import annotations

from ..config.table import Facts
from ..config.targets import Target
from ..kernels.launch import cdiv
from ..machine_code import Code


def programs_per_sm(code: Code, num_warps: int, gpu: Facts) -> int:
    """Programs a multiprocessor holds at a time; 0 if not even one fits.

    Registers are given to a warp in steps of 8 a thread, shared memory to a program in steps of 128 bytes, and the
    system takes 1 KB for every program (CUDA occupancy calculator). The 65536 registers lie in four equal parts, one
    for each scheduler, and a warp's come from one of them. Tensor memory (sm_100) is not counted.
    """
    warp = _round_up(max(code.registers, 1), 8) * 32
    by_registers = 4 * (65536 // 4 // warp) // num_warps
    by_memory = gpu.sm_shared_memory // (_round_up(code.shared_memory, 128) + 1024)
    return min(by_registers, by_memory, gpu.sm_warps // num_warps, gpu.sm_programs)


def waves(programs: int, resident: int, target: Target) -> float:
    """How often the GPU has to be filled to run every program of a launch, `resident` a multiprocessor at a time."""
    return programs / (max(resident, 1) * target.facts.sm_count)


def _round_up(value: int, step: int) -> int:
    return cdiv(value, step) * step
