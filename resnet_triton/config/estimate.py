"""The cost model: what a convolution's launch might take, from shape, configuration and device facts alone."""

from __future__ import annotations

from typing import NamedTuple

from ..kernels.launch import cdiv
from ..kernels.values import CONV, CONV64, FEW, ConvConfig
from .conv import ConvShape, shared_memory, steps, taps, tiles
from .device import DeviceFacts

_MATRIX = {16: 0.2, 32: 0.4, 64: 0.8}  # share of the matrix rate by columns: narrow products read more operands
_COLUMN = 0.88  # the same where pixels are loaded for a column of taps: a fifth fewer bytes; stated, not timed


class Rates(NamedTuple):
    """What an SM does: times in ns, rates per ns, shares and factors. Fitted by `benchmarks/fit_estimate.py`."""

    flops_per_ns: float = 6230
    bytes_per_ns: float = 86  # from L2
    launch_ns: float = 1660
    program_ns: float = 600  # batch norm's loads and the first tile's arrival
    turn_ns: float = 150  # at least, of a main loop, of 64 channels
    pointer_turn_ns: float = 219
    pointer_factor: float = 2.08  # of a turn whose loads spend instructions on addresses and masks
    element_ns: float = 0.138  # of the result
    split_ns: float = 840  # a store, a barrier, an atomic
    specialised_flops_per_ns: float = 7260
    specialised_turn_ns: float = 44  # besides its products: barriers
    exposed_share: float = 0.65  # of a result's time that nothing hides, where an accumulator has 4,096 elements
    residual_factor: float = 1.32  # of a result's time, with one


RATES = Rates()


class Latencies(NamedTuple):
    """What a dependent launch is a chain of, and `hopper_few`: times in ns. Stated, not fitted: none has run yet."""

    launch_ns: float = 1000  # from a kernel's last store to the next one's first load, from the last store to the end
    load_ns: float = 600  # TMA, from L2
    result_ns: float = 250  # through shared memory
    parts_ns: float = 350  # from L2, the first of the parts that the last program adds
    operand_bytes_per_ns: float = 224  # from shared memory
    neighbour_bytes: float = 96 * 1024  # of shared memory that a program of the launch before has


LATENCIES = Latencies()


def estimate(
    config: ConvConfig, shape: ConvShape, device: DeviceFacts, rates: Rates = RATES, chained: Latencies = LATENCIES
) -> float:
    """Nanoseconds that a launch might take, with what an H200's SM does. Those in Gluon are taken for dependent ones.

    A program's products and loads keep an SM busy, several programs side by side all the more; but however few there
    are, each is a chain: what comes before its loop, turn after turn, its result. DRAM is left out, as what it moves
    hardly depends on the tile: a pointwise convolution of many images may take longer than this.
    """
    if config.kernel == FEW:
        return _estimate_few(config, shape, device, rates, chained)
    m, k = config.block_m, config.block_k
    at_once = taps(config, shape)  # for which pixels are loaded
    turns = cdiv(steps(config, shape), config.split_k) * at_once + cdiv(shape.shortcut_c, config.block_c)
    flops = 2 * m * k * config.block_c * (1 if shape.itemsize == 2 else 2)
    result = rates.element_ns * m * k * (rates.residual_factor if shape.residual else 1)
    programs = cdiv(tiles(config, shape) * config.split_k, device.sm_count)  # of the busiest SM
    if config.is_gluon:  # one program an SM takes them in turn
        columns = m // 2 if config.kernel == CONV64 else k
        share = _COLUMN if at_once > 1 else _MATRIX.get(columns, 1.0)
        turn = flops / (rates.specialised_flops_per_ns * share) + rates.specialised_turn_ns / at_once
        accumulator = m * k // (4 if config.kernel == CONV64 else 2)
        result *= rates.exposed_share * (accumulator / 4096) ** 0.3
        products = turns * turn
        if config.kernel == CONV:
            work = rates.program_ns + programs * (products + result)
        else:  # one group stores what two would, while the other multiplies
            work = rates.program_ns + programs * max(products, products / 2 + result) + 2 * result
    else:
        loads = (m + k) * config.block_c * shape.itemsize
        turn = max(flops / (rates.flops_per_ns * _MATRIX.get(m if config.swap else k, 1.0)), loads / rates.bytes_per_ns)
        least = rates.turn_ns
        if config.box is None:
            turn, least = turn * rates.pointer_factor, rates.pointer_turn_ns
        beside = max(min(_programs_per_sm(config, shape, device), programs), 1)
        chain = rates.program_ns + turns * max(turn, least * config.block_c / 64) + result
        work = max(programs * (turns * turn + result), cdiv(programs, beside) * chain)
    work += chained.launch_ns if config.is_gluon else rates.launch_ns
    if config.split_k == 1:
        return work
    # The last program reads every partial.
    return work + rates.split_ns + 6 * m * k * (config.split_k + 1) / rates.bytes_per_ns


def _estimate_few(config: ConvConfig, shape: ConvShape, device: DeviceFacts, rates: Rates, chained: Latencies) -> float:
    """Nanoseconds of `hopper_few`: an SM with room for it beside the launch before has its filters before its input."""
    m = config.block_m
    blocks = steps(config, shape) // config.split_k + bool(shape.shortcut_c)
    filters, pixels = blocks * 64 * 128 / rates.bytes_per_ns, blocks * m * 128 / rates.bytes_per_ns
    products = blocks * (64 + m) * 128 / chained.operand_bytes_per_ns
    programs = cdiv(tiles(config, shape) * config.split_k, device.sm_count)  # of the busiest SM
    shared = shared_memory(config, shape)
    chain = chained.load_ns + max(pixels, products) + chained.result_ns
    turns = cdiv(programs, device.shared_memory // shared)
    ns = chained.launch_ns + turns * chain + (programs - 1) * max(filters + pixels, products)
    if programs * shared + chained.neighbour_bytes > device.shared_memory:
        ns += filters
    if config.split_k > 1:
        ns += rates.split_ns + chained.parts_ns + config.split_k * m * 64 * 4 / rates.bytes_per_ns
    return ns


def _programs_per_sm(config: ConvConfig, shape: ConvShape, device: DeviceFacts) -> int:
    """By shared memory, and by registers: accumulators and some 56 others a thread."""
    accumulators = config.block_m * config.block_k // (32 * config.num_warps) * (2 if shape.shortcut_c else 1)
    registers = 32 * config.num_warps * max(64, accumulators + 56)
    return max(1, min(device.shared_memory // shared_memory(config, shape), 65536 // registers))
