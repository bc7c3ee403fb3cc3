"""Predictions: how fast a launch could be, and what keeps it from that. Arithmetic only; nothing here was measured.

Each figure stands by itself and none is a running time: the floor assumes full overlap of arithmetic and memory and no
other cost, the rest say what each cost might add or cap.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from ..kernels.cost import Cost
from ..kernels.launch import Launch
from ..machine_code import Code
from .targets import Multiprocessor, Target
from .traffic import loaded_bytes

ARRIVAL_US = 1.5
"""A store, a barrier, an atomic and the first load back, one after the other: estimated from latencies."""


@dataclass(frozen=True)
class Prediction:
    """What a launch might cost, in microseconds; None where a ceiling is unknown.

    floor_us: FLOPs over the matrix rate or bytes over the DRAM rate, whichever is longer. It is the whole operator's:
        of several launches the first has it, the others 0.
    l2_us: what all programs load, over the L2 rate.
    wave_loss: the share of the multiprocessors' places that stand empty while the launch runs, 0 to 1.
    launch_gap_us: between this launch and the next in a CUDA graph.
    split_k_tail_us: for the last arriver to read and sum the shares of its tile.
    """

    floor_us: float | None
    l2_us: float | None
    wave_loss: float
    launch_gap_us: float | None
    split_k_tail_us: float | None


def predict(work: Cost | None, launch: Launch, code: Code, ttir: str, target: Target, dtype: str) -> Prediction:
    """Predict a launch that was compiled to `code` by way of `ttir` and has `work` to do (None: unknown)."""
    ceilings = target.ceilings
    split = launch.arguments.get("SPLIT_K", 1)
    integers = {name: value for name, value in launch.arguments.items() if isinstance(value, int)}
    loaded = loaded_bytes(ttir, integers, launch.grid, split) if ceilings.l2 else None
    return Prediction(
        floor_us=None if work is None else floor_us(work, ceilings.flops(dtype), ceilings.dram),
        l2_us=_us(loaded, ceilings.l2),
        wave_loss=wave_loss(waves(launch, code, target)),
        launch_gap_us=None if ceilings.graph_gap is None else ceilings.graph_gap * 1e6,
        split_k_tail_us=split_k_tail_us(launch, split, ceilings.l2, target.facts.sm_count),
    )


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


def waves(launch: Launch, code: Code, target: Target) -> float:
    """How often the GPU has to be filled to run every program of a launch."""
    resident = programs_per_sm(code, launch.num_warps, target.sm)
    return prod(launch.grid) / (max(resident, 1) * target.facts.sm_count)


def wave_loss(filled: float) -> float:
    """The share of places left empty over all waves: 2.2 waves take the time of 3, so 0.8 of 3 are lost."""
    return 1 - filled / ceil(filled) if filled else 0.0


def split_k_tail_us(launch: Launch, split: int, l2: float | None, sm_count: int) -> float | None:
    """Reading `split` shares back by one program, and summing while they come, after handing in its own."""
    if split == 1:
        return 0.0
    workspace = launch.arguments.get("partials_ptr")
    if l2 is None or workspace is None:
        return None
    share = workspace.numel() * workspace.element_size() / prod(launch.grid)
    return ARRIVAL_US + share * (split + 1) / (l2 / sm_count) * 1e6


def floor_us(work: Cost, flops: float | None, dram: float | None) -> float | None:
    """Microseconds below which `work` cannot be done; None without the rates it needs."""
    if dram is None or (flops is None and work.flops):
        return None
    return work.floor(flops or 1.0, dram) * 1e6


def _us(amount: float | None, rate: float | None) -> float | None:
    return None if amount is None or rate is None else amount / rate * 1e6


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
