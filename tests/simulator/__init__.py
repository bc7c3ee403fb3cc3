"""Executes the PTX that a launch compiles to for sm_90, on a CPU, and judges how its parts wait for each other.

It knows of no kernel: names, parameters and tensor maps come from the launch and the PTX, and what it has no meaning
for is an error, never skipped. Values are exact on integers. The order of events is judged for all orders at once
(`judge.py`), from one execution; a schedule executes another order, with everything asynchronous as late as its waits
allow, and has to give the same values.

Not seen: time; lanes of one warp against each other; the registers that ptxas gives a product. That a load overwrites
what a running product reads is no fault of PTX if ptxas is to copy it: `machine_code/products.py` reads SASS for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .decode import MAPS, Decoder
from .judge import CHECKS, GRID, KINDS, Judge, Shadow
from .machine import Machine, Program
from .memory import Global, TensorMap
from .ptx import Kernel, Unknown, parse

__all__ = ["CHECKS", "Result", "Unknown", "simulate"]


@dataclass
class Result:
    faults: list[str]
    """One line each, the name of the check first."""


def simulate(
    launch: Any,
    ptx: str,
    *,
    programs: Iterable[tuple[int, int, int]] | None = None,
    schedule: int | None = None,
    checks: Iterable[str] | None = None,
    early: Iterable[str] = (),
    shared: int = 232448,
) -> Result:
    """Run the programs of a `Launch`, by default all in the order of the grid, one after the other, on its CPU tensors.

    `programs` names them in the order in which they arrive. `schedule` is the seed of another order of warps. `checks`
    are those of `CHECKS` to make, all by default. `early` are the arguments that a dependent launch may use before it
    waits for the launch before: it did not write them. `shared` is a program's shared memory in bytes.

    Raises Unknown for PTX that it has no meaning for.
    """
    kernel = parse(ptx)
    grid = (*launch.grid, 1, 1)[:3]
    order = list(itertools.product(*map(range, reversed(grid)))) if programs is None else None
    places = [place[::-1] for place in order] if order is not None else list(programs or ())
    barriers = sum("mbarrier.init" in i.op for i in kernel.code)
    judge = Judge(checks, len(places) * (kernel.threads // 32 * len(KINDS) + barriers))
    memory = Global()
    machine = Machine(judge, memory, shared, schedule, kernel.threads, barriers)
    values = _values(launch, kernel, machine)
    waits = any(i.op == "griddepcontrol.wait" for i in kernel.code)
    early = set(early)
    for region in memory.regions:
        shadow = Shadow(judge, region.name, len(region.bytes) // region.unit, region.unit, GRID)
        shadow.written[:] = waits and not early.issuperset(region.names)
        machine.shadows.append(shadow)
    Decoder(kernel, machine, values, grid)
    with np.errstate(all="ignore"):
        for place in places:
            Program(machine, place).run()
    return Result(judge.faults)


def _values(launch: Any, kernel: Kernel, machine: Machine) -> list[int]:
    """The bits of the kernel's parameters, in the order of the launch's arguments; tensors and maps get addresses."""
    values: list[int] = []
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            continue
        if isinstance(value, torch.Tensor):
            values.append(machine.memory.address(parameter.name, value))
        elif isinstance(value, float):
            values.append(int(np.float32(value).view(np.uint32)))
        elif isinstance(value, int):
            values.append(value)
        else:
            start = machine.memory.address(parameter.name, value.base)
            found = machine.memory.region(np.array([start], np.uint64))
            assert found is not None
            machine.maps[MAPS + len(values)] = TensorMap(found[0], int(found[1][0]), value)
            values += [MAPS + len(values), *value.shape, *value.strides]
    sizes = [size for _, size in kernel.parameters]
    scratch = len(sizes) - len(values)  # of Triton's own, which no kernel here uses
    if not 0 <= scratch <= 2 or set(sizes[len(values) :]) - {8}:
        raise Unknown(f"{kernel.name} takes {len(sizes)} parameters, and the launch has {len(values)}")
    return values + [0] * scratch
