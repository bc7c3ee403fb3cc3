"""Executes the PTX that a launch compiles to, for sm_80 and later, and judges how its parts wait for each other.

It knows of no kernel: names, parameters and tensor maps come from the launch and the PTX, and what it has no meaning
for is an error, never skipped. Values are exact on integers. The order of events is judged for all orders at once
(`judge.py`), from one execution; a schedule executes another order, with everything asynchronous as late as its waits
allow, and has to give the same values.

Not seen: time; lanes of one warp against each other; what ptxas makes of registers; fence.proxy.async between reads and
the load that overwrites what was read, which compilers leave out. The race of triton-lang/triton#9433 is in the PTX of
Triton 3.6.0 and 3.7.1, so it is found here; 3.8.0's is made by ptxas, and `machine_code/products.py` finds it in
machine code.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .instructions import MAPS, Decoder
from .judge import CHECKS, GRID, KINDS, Judge, Memory
from .machine import Machine, Program
from .memory import REGION_BITS, TensorMap
from .ptx import Unknown, parse

__all__ = ["CHECKS", "Result", "Unknown", "components", "simulate"]


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
) -> Result:
    """Run the programs of a `Launch`, by default all in the order of the grid, one after the other, on its CPU tensors.

    `programs` names them in the order in which they arrive. `schedule` is the seed of another order of warps. `checks`
    are those of `CHECKS` to make, all by default. `early` are the arguments that a dependent launch may use before it
    waits for the launch before: that did not write them.

    Raises Unknown for PTX that it has no meaning for.
    """
    kernel = parse(ptx)
    grid = (*launch.grid, 1, 1)[:3]
    places = [place[::-1] for place in np.ndindex(grid[::-1])] if programs is None else list(programs)
    judge = Judge(checks, len(places) * components(kernel))
    machine = Machine(judge, grid, kernel.threads // 32, kernel.maxnreg, schedule)
    _place(launch, machine)
    scratch = len(kernel.parameters) - len(machine.values)  # of Triton's own, which no kernel here uses
    if not 0 <= scratch <= 2:
        raise Unknown(f"{kernel.name} takes {len(kernel.parameters)} parameters, the launch has {len(machine.values)}")
    machine.values += [0] * scratch
    if any(i.op == "griddepcontrol.wait" for i in kernel.code):
        for memory in machine.regions:
            memory.written[:] = not set(early).issuperset(memory.name.split(" = "))
    Decoder(kernel, machine)
    with np.errstate(all="ignore"):
        for place in places:
            Program(machine, place).run()
    return Result(list(judge.found.values()))


def components(kernel: Any) -> int:
    """How many components a program of a parsed kernel has at most: see `judge.py`."""
    barriers = 16 + sum("mbarrier.init" in i.op for i in kernel.code)
    return kernel.threads // 32 * len(KINDS) + barriers


def _place(launch: Any, machine: Machine) -> None:
    """Give the tensors of a launch addresses, and the machine its parameters, in the order of the arguments."""
    regions: dict[int, Memory] = {}

    def address(name: str, tensor: torch.Tensor) -> int:
        storage, size = tensor.untyped_storage(), tensor.element_size()
        if storage.data_ptr() not in regions:
            data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            base, nothing = len(regions) + 1 << REGION_BITS, np.zeros(len(data), bool)
            regions[storage.data_ptr()] = Memory(machine.judge, name, data, base, size, nothing, GRID)
        memory = regions[storage.data_ptr()]
        if memory.unit != size:
            raise Unknown(f"{name} and {memory.name} share memory with elements of other sizes")
        memory.name = name if memory.name == name else f"{memory.name} = {name}"
        elements = torch.zeros(len(memory.bytes) // size, dtype=torch.bool)
        elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        memory.covered[: len(elements) * size] |= elements.numpy().repeat(size)
        return memory.base + tensor.storage_offset() * size

    values = machine.values
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            continue
        if isinstance(value, torch.Tensor):
            values.append(address(parameter.name, value))
        elif isinstance(value, float):
            values.append(int(np.float32(value).view(np.uint32)))
        elif isinstance(value, int):
            values.append(value)
        else:
            start = address(parameter.name, value.base)
            memory = regions[value.base.untyped_storage().data_ptr()]
            machine.maps[MAPS + len(values)] = TensorMap(memory, start - memory.base, value)
            values += [MAPS + len(values), *value.shape, *value.strides]
    machine.regions += regions.values()
