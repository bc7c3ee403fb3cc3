"""Shadow memory for Triton's interpreter: every access of every program, checked element by element.

While a `watch()` lasts, each `Launch.run` gives its kernel pointers whose upper bits name the argument they come from.
Pointer arithmetic carries them along, so an access through `x_ptr` that lands in some other tensor is a fault, too.
Memory that a kernel may write has one number for each element: nobody has stored it yet, or an earlier launch has, or
the epoch of this launch in which it was stored. An epoch is a stretch of one program between barriers and atomics;
`Order` knows which epochs a program may see. The interpreter runs one program after another, so a race shows no wrong
value in it, but it shows here. Launches of one watch follow each other: a later one may read what an earlier one wrote.

Faults are AssertionErrors that name kernel, program, argument and element:

* an access outside its tensor, or into a gap between its elements;
* a load under a mask that does not say what it gets where the mask is false;
* a store into an input, or an output that shares memory with another argument;
* two lanes of one store at the same element;
* a load (or atomic update) of an element that nobody has stored, and in the end an output with such elements;
* a race: two programs store one element, or one loads what the other stores, without an arrival in between.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import triton.language as tl
from order import EARLIER, NOBODY, Array, Order
from torch import Tensor
from triton.runtime import interpreter as upstream
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_triton.kernels.launch import Launch
from resnet_triton.ops import interpreter

OUTPUTS = {"y_ptr", "y_desc", "partials_ptr", "semaphores_ptr"}
"""What a kernel may store into, by the name of its argument; a packer also into its marks."""
COUNTERS = {"semaphores_ptr"}
"""Outputs that hold zeros before the launch."""

TAG_SHIFT = 48


def may_store(kernel: str, argument: str) -> bool:
    return argument in OUTPUTS or (kernel, argument) == ("pack_kernel", "marks_ptr")


class Memory:
    """Of each element, the epoch that stored it, and the last that loaded it in this launch."""

    def __init__(self, argument: Argument, kernel: str) -> None:
        self.owner, self.kernel = argument, kernel  # of the last launch that might store
        self.stored = np.full(argument.span, EARLIER if argument.name in COUNTERS else NOBODY, np.int32)
        self.loaded = np.full(argument.span, EARLIER, np.int32)

    def missing(self) -> Array:
        """Elements that nobody has stored."""
        nobody = self.stored == NOBODY
        return np.flatnonzero(nobody if self.owner.covered is None else nobody & self.owner.covered)

    def settle(self) -> None:
        """The launch is over, and what it stored may be loaded by the next."""
        np.minimum(self.stored, EARLIER, out=self.stored)
        self.loaded.fill(EARLIER)


class Argument:
    """A tensor as one launch sees it. `covered` tells its elements from the gaps between them."""

    def __init__(self, name: str, tensor: Tensor, tag: int, writable: bool) -> None:
        self.name, self.tensor, self.writable = name, tensor, writable
        self.address = tensor.data_ptr()
        self.span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        self.span *= tensor.numel() > 0
        self.itemsize = tensor.element_size()
        self.bytes = self.span * self.itemsize
        self.start = np.uint64((2 * tag + 1) << TAG_SHIFT - 1)  # in the middle, so that pointers below it have its tag
        self.covered: Array | None = None
        if tensor.numel() != self.span or 0 in tensor.stride():
            covered = tensor.new_zeros(self.span, dtype=bool)
            covered.as_strided(tensor.shape, tensor.stride()).fill_(True)
            self.covered = covered.numpy()
        self.memory: Memory | None = None

    def overlaps(self, other: Argument) -> bool:
        return self.address < other.address + other.bytes and other.address < self.address + self.bytes

    def place(self, elements: Array) -> str:
        """The first of some elements, counted in memory, by its coordinates."""
        rest, index = int(elements[0]), [0] * self.tensor.dim()
        for axis in sorted(range(len(index)), key=self.tensor.stride, reverse=True):
            if self.tensor.shape[axis] > 1 and self.tensor.stride(axis):
                index[axis], rest = divmod(rest, self.tensor.stride(axis))
        return f"{self.name}[{', '.join(map(str, index))}]"

    def handle(self, offsets: Array, like: Any) -> Any:
        """Real pointers at these distances from the start."""
        return upstream.TensorHandle(np.add(offsets, np.uint64(self.address), out=offsets), like.dtype)


class Watch:
    """What is known of the launches of one operator call."""

    def __init__(self) -> None:
        self.memories: dict[tuple[int, int], Memory] = {}
        self.kept: list[Launch] = []  # or a freed tensor's address could come back as another's
        self.arguments: dict[int, Argument] = {}
        self.order = Order()
        self.fault: AssertionError | None = None

    def launch(self, run: Any, launch: Launch) -> Any:
        self.kept.append(launch)
        self.kernel, self.order, self.arguments = launch.kernel.__name__, Order(), {}
        tensors = {n: v.base if isinstance(v, TensorDescriptor) else v for n, v in launch.arguments.items()}
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor):
                self.register(name, tensor)
        try:
            compiled = run(launch)
        except Exception:
            if self.fault is not None:  # the interpreter wraps it once for each function of the call
                raise self.fault from None
            raise
        for argument in self.arguments.values():
            if argument.memory is not None:
                argument.memory.settle()
        return compiled

    def register(self, name: str, tensor: Tensor) -> None:
        tag = len(self.arguments) + 1
        new = Argument(name, tensor, tag, may_store(self.kernel, name))
        for other in self.arguments.values():
            if (new.writable or other.writable) and new.overlaps(other):
                raise AssertionError(f"{self.kernel}: {name} shares memory with {other.name}, and is stored into")
        key = (new.address, new.bytes)
        memory = self.memories.get(key)
        if new.writable:
            memory = self.memories[key] = memory or Memory(new, self.kernel)
            memory.owner, memory.kernel = new, self.kernel
            new.memory = memory
        elif memory is not None and memory.missing().size:
            new.memory = memory
        self.arguments[tag] = new

    def pointer(self, tensor: Tensor) -> np.uint64:
        """The first of a tensor's pointers, tagged with its argument; those that look the same are the same."""
        for a in self.arguments.values():
            same = a.tensor.shape == tensor.shape and a.tensor.stride() == tensor.stride()
            if same and a.address == tensor.data_ptr() and a.itemsize == tensor.element_size():
                return a.start
        raise AssertionError(f"{self.kernel} takes a tensor that is none of its launch's arguments")

    def finish(self) -> None:
        """Every output is whole."""
        for memory in self.memories.values():
            missing = memory.missing()
            if missing.size:
                first = f"{memory.owner.place(missing)} and {missing.size - 1} more elements"
                raise AssertionError(f"{memory.kernel} never stores {first}")

    # What follows is called by the interpreter's operations.

    def fail(self, text: str) -> NoReturn:
        self.fault = AssertionError(f"{self.kernel}, program {self.order.program}, {text}")
        raise self.fault

    def locate(self, pointers: Array, mask: Array, verb: str) -> tuple[Argument, Array]:
        """The argument that pointers come from, and their distances from its start in bytes. Only `mask` is checked."""
        argument = self.arguments.get(pointers.item(0) >> TAG_SHIFT)
        if argument is None:
            self.fail(f"{verb} through a pointer that comes from no argument")
        offsets = pointers - argument.start  # below the start they wrap around
        if offsets.max() >= argument.bytes:
            outside = offsets[mask & (offsets >= argument.bytes)]
            if outside.size:
                element = int(outside[0].astype(np.int64)) // argument.itemsize
                self.fail(f"{verb} outside {argument.name}: element {element} of {argument.span}")
        if argument.covered is not None:
            elements = offsets[mask] // argument.itemsize
            gaps = elements[~argument.covered[elements]]
            if gaps.size:
                self.fail(f"{verb} in a gap of {argument.name}: element {gaps[0]} of {argument.span}")
        return argument, offsets

    def load(self, handle: Any, mask: Any, other: Any) -> Any:
        mask = np.asarray(mask.data, bool)
        argument, offsets = self.locate(handle.data, mask, "loads")
        if other is None and mask.size > 1 and not mask.all():  # of one element, the interpreter forgets a zero
            self.fail(f"loads {argument.name} under a mask without other=: what it gets there is anything")
        memory = argument.memory
        if memory is not None:
            elements = offsets[mask] // argument.itemsize
            self.check(argument, elements, memory.stored[elements], "loads", "stored")
            memory.loaded[elements] = self.order.load(memory.loaded[elements])
        return argument.handle(offsets, handle)

    def store(self, handle: Any, mask: Any) -> Any:
        mask = np.asarray(mask.data, bool)
        argument, offsets = self.locate(handle.data, mask, "stores")
        elements = offsets[mask] // argument.itemsize
        if elements.size:
            stored = self.own(argument, elements, "stores").stored
            lanes = np.arange(elements.size, dtype=np.int32)
            stored[elements] = lanes
            twice = elements[stored[elements] != lanes]
            if twice.size:
                self.fail(f"stores {argument.place(twice)} from two lanes of one store")
            stored[elements] = self.order.epoch
        return argument.handle(offsets, handle)

    def atomic(self, handle: Any, mask: Array, semantics: Any, scope: Any) -> Any:
        argument, offsets = self.locate(handle.data, mask, "updates")
        elements = offsets[mask] // argument.itemsize
        if elements.size:
            memory = self.own(argument, elements, "updates")
            wide = scope != upstream._ir.MEM_SYNC_SCOPE.CTA
            acquire, release = (wide and name in semantics.name for name in ("ACQUIRE", "RELEASE"))
            addresses = (offsets[mask] + argument.start).tolist()
            memory.stored[elements] = self.order.arrive(addresses, acquire=acquire, release=release)
        return argument.handle(offsets, handle)

    def own(self, argument: Argument, elements: Array, verb: str) -> Memory:
        """The memory of elements that this program is about to change."""
        memory = argument.memory
        if memory is None or not argument.writable:
            self.fail(f"{verb} {argument.place(elements)}, an input")
        self.check(argument, elements, memory.stored[elements], verb, "stored")
        self.check(argument, elements, memory.loaded[elements], verb, "loaded")
        return memory

    def check(self, argument: Argument, elements: Array, epochs: Array, verb: str, done: str) -> None:
        """Whatever was done to these elements happened before what this program does."""
        if verb != "stores" and not epochs.all():
            self.fail(f"{verb} {argument.place(elements[epochs == NOBODY])}, which nobody has stored")
        epoch = self.order.stranger(epochs, verb)
        if epoch is not None:
            place, other = argument.place(elements[epochs == epoch]), self.order.programs[epoch]
            self.fail(f"{verb} {place}, which {other} {done}: no barrier and arrival in between")


_active: Watch | None = None


@contextlib.contextmanager
def watch(*, whole: bool = True) -> Iterator[None]:
    """Check the launches of one operator call; `whole`: in the end, all their outputs have to be stored completely."""
    watched = Watch()
    builder, run, convert = upstream.InterpreterBuilder, Launch.run, upstream._implicit_cvt
    begin, barrier = builder.set_grid_idx, builder.create_barrier
    load, store = builder.create_masked_load, builder.create_masked_store
    update, exchange = builder.create_atomic_rmw, builder.create_atomic_cas

    def implicit_cvt(value: Any) -> Any:
        converted = convert(value)
        if isinstance(value, Tensor):
            converted.handle.data = np.array([watched.pointer(value)])
        return converted

    def set_grid_idx(self: Any, *index: int) -> None:
        begin(self, *index)
        watched.order.begin(tuple(int(self.create_get_program_id(axis).data[0]) for axis in range(3)))

    def create_barrier(self: Any) -> Any:
        watched.order.barrier()
        return barrier(self)

    def create_masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        return load(self, watched.load(ptrs, mask, other), mask, other, *rest, **options)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, watched.store(ptrs, mask), value, mask, *rest)

    def create_atomic_rmw(self: Any, operation: Any, ptr: Any, value: Any, mask: Any, *order: Any) -> Any:
        return update(self, operation, watched.atomic(ptr, np.asarray(mask.data, bool), *order), value, mask, *order)

    def create_atomic_cas(self: Any, ptr: Any, expected: Any, value: Any, *order: Any) -> Any:
        everywhere = np.ones(ptr.data.shape, bool)
        return exchange(self, watched.atomic(ptr, everywhere, *order), expected, value, *order)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Launch, "run", lambda launch: watched.launch(run, launch)))
        stack.enter_context(mock.patch.object(upstream, "_implicit_cvt", implicit_cvt))
        for operation in (
            set_grid_idx, create_barrier, create_masked_load, create_masked_store, create_atomic_rmw, create_atomic_cas
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(builder, operation.__name__, operation))
        stack.enter_context(mock.patch(f"{__name__}._active", watched))
        yield
    if whole:
        watched.finish()


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """The interpreter without what takes half of its time.

    At each call of a function in a kernel it searches `tl` for what it replaces, which it has done at the launch.
    """
    patch = upstream._patch_lang

    @functools.cache
    def languages(function: Any) -> list[Any]:
        return [tl, *(value for value in function.__globals__.values() if value is tl.core)]

    def patch_lang(function: Any) -> Any:
        if any(tl.core.is_builtin(language.load) for language in languages(function)):
            return patch(function)
        return upstream._LangPatchScope()

    with mock.patch.object(upstream, "_patch_lang", patch_lang):
        yield


@contextlib.contextmanager
def everywhere() -> Iterator[None]:
    """Watch whatever is interpreted: every sequence of launches runs inside `interpreter.ready`."""
    ready = interpreter.ready

    @contextlib.contextmanager
    def watched_and_ready() -> Iterator[None]:
        with ready(), contextlib.nullcontext() if _active else watch():
            yield

    with quick(), mock.patch.object(interpreter, "ready", watched_and_ready):
        yield
