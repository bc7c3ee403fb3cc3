"""How many programs of a launch a GPU holds at a time, and the least work that a call can do with."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from ..kernels import cost
from ..kernels.cost import Cost
from ..kernels.launch import Launch
from ..machine_code import Code
from ..ops import OPERATORS, ConvCall
from ..ops.trace import Call
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


def waves(launch: Launch, code: Code, target: Target) -> float:
    """How often the GPU has to be filled to run every program of a launch."""
    resident = programs_per_sm(code, launch.num_warps, target.sm)
    return prod(launch.grid) / (max(resident, 1) * target.facts.sm_count)


def least(call: Call) -> Cost | None:
    """FLOPs and bytes no implementation of a call can do without; None for an operator that has no cost here."""
    count = COSTS.get(call.operator)
    return None if count is None else count(OPERATORS[call.operator].result(*call.args).shape, *call.args)


def _conv(shape: tuple[int, ...], *args: Any) -> Cost:
    key = ConvCall(*args).shape
    return cost.conv_bn_relu(
        n=key.n, c=key.c, h=key.h, w=key.w, k=key.k, p=key.p, q=key.q, r=key.r, s=key.s, itemsize=key.itemsize,
        stride=key.stride, residual=key.residual, shortcut_c=key.shortcut_c,
    )  # fmt: skip


def _add_relu(shape: tuple[int, ...], x: Any, *_: Any) -> Cost:
    return cost.add_relu(numel=x.numel(), itemsize=x.element_size())


def _max_pool(shape: tuple[int, ...], x: Any, *_: Any) -> Cost:
    n, c, h, w = x.shape
    return cost.max_pool(n=n, c=c, h=h, w=w, p=shape[2], q=shape[3], itemsize=x.element_size())


def _avg_pool(shape: tuple[int, ...], x: Any, *_: Any) -> Cost:
    n, c, h, w = x.shape
    return cost.global_avg_pool(n=n, c=c, h=h, w=w, itemsize=x.element_size())


def _linear(shape: tuple[int, ...], x: Any, weight: Any, *_: Any) -> Cost:
    k, c = weight.shape
    return cost.linear(m=prod(shape[:-1]), c=c, k=k, itemsize=x.element_size())


def _stem(shape: tuple[int, ...], x: Any, weight: Any, *_: Any) -> Cost:
    n, c, h, w = x.shape
    return cost.stem(n=n, c=c, h=h, w=w, k=shape[1], p=shape[2], q=shape[3], itemsize=weight.element_size())


def _head(shape: tuple[int, ...], x: Any, *_: Any) -> Cost:
    n, c, h, w = x.shape
    return cost.avg_pool_linear(n=n, c=c, h=h, w=w, k=shape[1], itemsize=x.element_size())


COSTS: dict[str, Callable[..., Cost]] = {
    "conv_bn_relu": _conv, "add_relu": _add_relu, "max_pool2d": _max_pool, "global_avg_pool": _avg_pool,
    "linear": _linear, "stem": _stem, "avg_pool_linear": _head,
}  # fmt: skip
"""For each operator, its cost from its result's shape and its arguments."""


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
