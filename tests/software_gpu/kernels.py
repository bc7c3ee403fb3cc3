"""Triton's kernels on the GPU in software, executed from their PTX by the simulator, which judges nothing here."""

from __future__ import annotations

import ctypes
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from driver import MAPS as MARK
from driver import Library, TensorMap, parameter_sizes
from simulator import components
from simulator.instructions import MAPS, Decoder
from simulator.judge import WRITES, Agent, Judge
from simulator.machine import Machine, Program
from simulator.memory import REGION_BITS
from simulator.memory import TensorMap as Map
from simulator.ptx import parse
from triton.compiler.compiler import CompiledKernel

from . import RUNTIME, launch

Array = Any
_ptx: dict[int, str] = {}  # by the driver's handle
_parsed: dict[int, tuple[Any, list[int]]] = {}
_known: dict[Any, list[Any]] = defaultdict(list)  # what launches have read and written


class Memory:
    """An allocation before a launch, and which of its bytes the launch has read as they were, and written."""

    def __init__(self, base: int) -> None:
        self.base, self.name = base, f"the memory at {base:#x}"
        self.bytes = _bytes(base, RUNTIME.software_block(base))
        self.before = self.bytes.copy()
        self.read, self.written = np.zeros((2, len(self.bytes)), bool)

    def access(self, agent: Agent, at: Array, size: int, verb: str, same: Array | None = None) -> Array:
        if not ((at >= 0) & (at + size <= len(self.bytes)) & (at % size == 0)).all():
            raise RuntimeError(f"{verb} {size} bytes outside {self.name}")
        places = at[:, None] + np.arange(size)
        if verb not in WRITES or verb == "updates":
            self.read[places] |= ~self.written[places]
        if verb in WRITES:
            self.written[places] = True
        return np.ones(len(at), bool)


class Allocations(dict[int, Memory]):
    """All of them, by what the simulator takes for a number of a tensor."""

    def __len__(self) -> int:
        return 1 << 48 - REGION_BITS

    def __missing__(self, number: int) -> Memory:
        self[number] = Memory(number + 1 << REGION_BITS)
        return self[number]


class Strict(Judge):
    """Orders are not judged: only what no program could survive."""

    def report(self, check: str, place: str, text: str) -> None:
        if check in ("bounds", "bytes", "deadlock"):
            raise RuntimeError(f"{check}: {place}: {text}")


def install(folder: Path) -> Library:
    """Have Triton launch on the GPU in software, by a driver that has to be kept."""
    initialise = CompiledKernel._init_handles

    def initialised(kernel: Any) -> None:
        initialise(kernel)
        if kernel.function is not None:
            _ptx[kernel.function] = kernel.asm["ptx"]

    CompiledKernel._init_handles = initialised

    def launched(handle: int, name: bytes, sides: Any, stream: int, dependent: int, others: int, places: Any) -> None:
        if handle not in _parsed:
            _parsed[handle] = parse(_ptx[handle]), parameter_sizes(_ptx[handle])
        (kernel, sizes), grid = _parsed[handle], tuple(sides[:3])
        values = [ctypes.string_at(place, size) for place, size in zip(places[: len(sizes)], sizes, strict=True)]
        numbers = [int.from_bytes(value[:8], "little") for value in values]
        given = [library.maps[n - MARK] if len(v) == 128 else n for n, v in zip(numbers, values, strict=True)]
        launch(stream, lambda: _execute(kernel, grid, given))

    library = Library(folder, launched)
    return library


def _execute(kernel: Any, grid: tuple[int, ...], given: list[TensorMap | int]) -> None:
    """Write what a launch alike in all but addresses wrote, if what it read is the same here; else simulate."""
    places = [value.address if isinstance(value, TensorMap) else value for value in given]
    tensors = list(dict.fromkeys(place for place in places if place >> REGION_BITS))
    form = [
        (tensors.index(place), value._replace(address=0) if isinstance(value, TensorMap) else None)
        if place in tensors
        else value
        for value, place in zip(given, places, strict=True)
    ]
    known = _known[id(kernel), grid, str(form)]
    for reads, digest, writes in known:
        if _digest(_bytes(tensors[i] + at, size) for i, at, size in reads) == digest:
            for i, at, data in writes:
                _bytes(tensors[i] + at, len(data))[:] = data
            return
    memory = Allocations()
    _simulate(kernel, grid, given, memory)
    touched = list(memory.values())
    reads = [part for m in touched for part in _parts(m, m.read, tensors)]
    writes = [
        (i, at, _bytes(tensors[i] + at, size).copy()) for m in touched for i, at, size in _parts(m, m.written, tensors)
    ]
    known.append((reads, _digest(m.before[m.read] for m in touched), writes))
    del known[:-8]


def _parts(memory: Memory, mask: Array, tensors: list[int]) -> Iterator[tuple[int, int, int]]:
    """Where a mask is set: the number of a tensor, an offset in bytes from it, and a size."""
    edges = np.flatnonzero(np.diff(mask.view(np.int8), prepend=0, append=0)) + memory.base
    for start, end in edges.reshape(-1, 2).tolist():
        for a, b in pairwise([start, *sorted(t for t in tensors if start < t < end), end]):
            first = max(t for t in tensors if t <= a)
            yield tensors.index(first), a - first, b - a


def _digest(parts: Iterable[Array]) -> bytes:
    found = hashlib.blake2b()
    for part in parts:
        found.update(part)
    return found.digest()


def _simulate(kernel: Any, grid: tuple[int, ...], given: list[TensorMap | int], memory: Allocations) -> None:
    """One program after the other. Each has a judge of its own: together their clocks would take most of the time."""
    size = components(kernel)
    machine = Machine(Strict((), size), grid, kernel.threads // 32, kernel.maxnreg, None)
    machine.regions = memory
    for value in given:
        if isinstance(value, TensorMap):
            place = MAPS + len(machine.values)
            machine.maps[place] = _map(value, memory)
            machine.values.append(place)
        else:
            machine.values.append(value)
    Decoder(kernel, machine)
    with np.errstate(all="ignore"):
        for program in np.ndindex(grid[::-1]):
            machine.judge, machine.updates = Strict((), size), {}
            Program(machine, program[::-1]).run()


def _map(told: TensorMap, memory: Allocations) -> Map:
    size = 4 if told.dtype == "tf32" else getattr(torch, told.dtype).itemsize
    descriptor = SimpleNamespace(
        base=torch.empty(0, dtype=torch.float32 if size == 4 else getattr(torch, told.dtype)),
        shape=told.sizes, strides=[stride // size for stride in told.strides] + [1], block_shape=told.box,
        layout=SimpleNamespace(swizzle_byte_width=told.swizzle), round_f32_to_tf32=told.dtype == "tf32",
    )  # fmt: skip
    within = memory[(told.address >> REGION_BITS) - 1]
    return Map(within, told.address - within.base, descriptor)


def _bytes(address: int, size: int) -> Array:
    """Bytes of the device's memory; none if they have been freed."""
    base = address >> REGION_BITS << REGION_BITS
    size = size if address + size <= base + RUNTIME.software_block(base) else 0
    return np.frombuffer((ctypes.c_char * size).from_address(address), np.uint8) if size else np.zeros(0, np.uint8)
