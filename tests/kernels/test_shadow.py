"""Shadow memory finds every kind of fault, in kernels made for the purpose, and passes what is right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import shadow
import torch
import triton
import triton.language as tl
from exact import generator, integers, run
from reliability.planting import planted
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_triton.kernels.launch import Launch
from resnet_triton.kernels.tiles import sum_partials
from resnet_triton.ops import AddRelu, MaxPool2d, interpreter
from resnet_triton.ops.dispatch import Modes

pytestmark = pytest.mark.skipif(not interpreter.active(), reason="kernels are compiled here")


@triton.jit
def copy_kernel(x_ptr, y_ptr, N, SHIFT, STEP, BLOCK: tl.constexpr):
    """y = x, BLOCK elements a program; SHIFT moves what is loaded, STEP is how far apart programs store."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs + SHIFT, mask=offs < N, other=0.0)
    tl.store(y_ptr + tl.program_id(0) * STEP + tl.arange(0, BLOCK), x, mask=offs < N)


@triton.jit
def careless_kernel(x_ptr, y_ptr, N):
    """Asks for 16 elements of N, and does not say what the others are."""
    offs = tl.arange(0, 16)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < N), mask=offs < N)


@triton.jit
def every_second_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs // 2, tl.load(x_ptr + offs))


@triton.jit
def clear_kernel(x_ptr, x_desc):
    if x_ptr is not None:
        tl.store(x_ptr, 0.0)
    else:
        x_desc.store([0, 0], tl.zeros((4, 4), tl.float32))


@triton.jit
def count_kernel(partials_ptr):
    tl.atomic_add(partials_ptr + tl.arange(0, 4) // 2, 1.0)


@triton.jit
def last_kernel(y_ptr):
    """The last one stores, all others load."""
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(y_ptr, 1.0)
    else:
        tl.load(y_ptr)


@triton.jit
def descriptor_kernel(x_desc, y_desc, ROW, COLUMN):
    y_desc.store([0, 0], x_desc.load([ROW, COLUMN]))


@triton.jit
def neighbour_kernel(y_ptr, FIRST: tl.constexpr, DISTANCE: tl.constexpr):
    """Each program stores its element, and loads the one DISTANCE away before or after."""
    i = tl.program_id(0)
    inside = (i + DISTANCE >= 0) & (i + DISTANCE < tl.num_programs(0))
    if FIRST:
        tl.store(y_ptr + i, 1.0)
    tl.debug_barrier()
    tl.load(y_ptr + i + DISTANCE, mask=inside, other=0.0)
    if not FIRST:
        tl.store(y_ptr + i, 1.0)


@triton.jit
def splits_kernel(partials_ptr, semaphores_ptr, y_ptr, SPLIT_K: tl.constexpr):
    acc = tl.full((4, 4), 1.0, tl.float32)
    acc, last = sum_partials(acc, partials_ptr, semaphores_ptr, tl.program_id(0), tl.program_id(1), SPLIT_K, 4, 4)
    tl.store(y_ptr + tl.program_id(0), tl.sum(acc), mask=last)


def launch(kernel: Any, programs: int = 1, **arguments: Any) -> Launch:
    return Launch(kernel, (programs,), arguments)


def copy(x: Tensor, y: Tensor, n: int = 10, shift: int = 0, step: int = 4) -> Launch:
    return launch(copy_kernel, 3, x_ptr=x, y_ptr=y, N=n, SHIFT=shift, STEP=step, BLOCK=4)


def watched(*launches: Launch) -> None:
    with interpreter.ready():
        for each in launches:
            each.run()


@contextmanager
def fault(text: str) -> Iterator[None]:
    with pytest.raises(AssertionError, match=re.escape(text)):
        yield


def tens() -> tuple[Tensor, Tensor]:
    return torch.ones(10), torch.empty(10)


def test_what_is_right_passes():
    x, y = tens()
    watched(copy(x, y), copy(y, torch.empty(10)))
    assert torch.equal(x, y)
    y.zero_()
    watched(copy(x, y), copy(x, y))
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("n", "shift", "text"),
    [
        (11, 0, "copy_kernel, program (2, 0, 0), loads outside x_ptr: element 10 of 10"),
        (10, 1, "copy_kernel, program (2, 0, 0), loads outside x_ptr: element 10 of 10"),
        (10, -1, "copy_kernel, program (0, 0, 0), loads outside x_ptr: element -1 of 10"),
        (10, 2**40, f"copy_kernel, program (0, 0, 0), loads outside x_ptr: element {2**40} of 10"),
    ],
)
def test_loads_stay_inside(n, shift, text):
    with fault(text):
        watched(copy(*tens(), n=n, shift=shift))


def test_a_masked_load_says_what_it_gets():
    """Triton promises nothing, the interpreter gives zeros."""
    watched(launch(careless_kernel, x_ptr=torch.ones(16), y_ptr=torch.empty(16), N=16))
    with fault("careless_kernel, program (0, 0, 0), loads x_ptr under a mask without other="):
        watched(launch(careless_kernel, x_ptr=torch.ones(10), y_ptr=torch.empty(10), N=10))


def test_stores_stay_inside():
    with fault("copy_kernel, program (2, 0, 0), stores outside y_ptr: element 9 of 9"):
        watched(copy(torch.ones(10), torch.empty(16)[:9]))


def test_a_load_of_another_argument_is_outside():
    x, _, y = torch.ones(30).chunk(3)
    with fault("loads outside x_ptr: element 20 of 10"):
        watched(copy(x, y, shift=20))


def test_gaps_belong_to_no_tensor():
    x, y = torch.ones(20), torch.empty(20)
    with fault("loads in a gap of x_ptr: element 1 of 19"):
        watched(copy(x[::2], y[:10]))
    with fault("stores in a gap of y_ptr: element 1 of 19"):
        watched(copy(x[:10], y[::2]))
    with fault("loads in a gap of x_ptr: element 1 of 4"):  # as many elements as places, but two coincide
        watched(copy(x.as_strided((2, 2), (0, 3)), y, n=4))


def test_inputs_are_not_stored_into():
    x, y = tens()
    with fault("clear_kernel, program (0, 0, 0), stores x_ptr[0], an input"):
        watched(launch(clear_kernel, x_ptr=x, x_desc=None))
    with fault("clear_kernel, program (0, 0, 0), stores x_desc[0, 0], an input"):
        x_desc = TensorDescriptor(torch.ones(4, 4), [4, 4], [4, 1], [4, 4])
        watched(launch(clear_kernel, x_ptr=None, x_desc=x_desc))
    with fault("copy_kernel: y_ptr shares memory with x_ptr, and is stored into"):
        watched(copy(x, x))
    with fault("copy_kernel: y_ptr shares memory with x_ptr, and is stored into"):
        watched(copy(y[:6], y[4:]))


def test_two_programs_store_one_element():
    with fault("copy_kernel, program (1, 0, 0), stores y_ptr[3], which program (0, 0, 0) stored"):
        watched(copy(*tens(), step=3))


def test_two_lanes_store_one_element():
    with fault("every_second_kernel, program (0, 0, 0), stores y_ptr[0] from two lanes of one store"):
        watched(launch(every_second_kernel, x_ptr=torch.ones(8), y_ptr=torch.empty(4), N=8))


@pytest.mark.parametrize(
    ("first", "distance", "text"),
    [
        (True, -1, "program (1, 0, 0), loads y_ptr[0], which program (0, 0, 0) stored"),
        (True, 1, "program (0, 0, 0), loads y_ptr[1], which nobody has stored"),
        (False, -1, "program (1, 0, 0), loads y_ptr[0], which program (0, 0, 0) stored"),
    ],
)
def test_a_program_loads_what_another_stores(first, distance, text):
    with fault(text):
        watched(launch(neighbour_kernel, 2, y_ptr=torch.empty(2), FIRST=first, DISTANCE=distance))


@pytest.mark.parametrize(("programs", "others"), [(2, "program (0, 0, 0)"), (3, "several programs")])
def test_a_program_stores_what_another_has_loaded(programs, others):
    """In the interpreter the others come first and find the value of the launch before; on a GPU they may not."""
    y = torch.empty(1)
    with fault(f"program ({programs - 1}, 0, 0), stores y_ptr[0], which {others} loaded"):
        watched(copy(torch.ones(1), y, n=1), launch(last_kernel, programs, y_ptr=y))
    watched(copy(torch.ones(1), y, n=1), launch(last_kernel, 1, y_ptr=y))


def test_every_output_is_whole_in_the_end():
    with fault("copy_kernel never stores y_ptr[5, 0] and 1 more elements"):
        watched(copy(torch.ones(10), torch.empty(6, 2)))
    with fault("copy_kernel never stores y_ptr[0, 5] and 1 more elements"):
        watched(copy(torch.ones(10), torch.empty(6, 2).T))
    with shadow.watch(whole=False):
        watched(copy(torch.ones(10), torch.empty(12)))


def test_the_next_launch_loads_nothing_that_nobody_has_stored():
    y = torch.empty(12)
    with fault("copy_kernel, program (2, 0, 0), loads x_ptr[10], which nobody has stored"):
        watched(copy(torch.ones(10), y), copy(y, torch.empty(12), n=12))


def test_atomics_meet_at_an_element_but_it_needs_a_value():
    y = torch.empty(2)
    filled = copy(torch.zeros(2), y, n=2)
    watched(filled, launch(count_kernel, 3, partials_ptr=y))
    assert y.tolist() == [6.0, 6.0]
    with fault("count_kernel, program (0, 0, 0), updates partials_ptr[0], which nobody has stored"):
        watched(launch(count_kernel, 3, partials_ptr=y))


def test_descriptors_clip_but_describe_only_their_tensor():
    x, y = torch.ones(4, 4), torch.empty(4, 4)

    def through(x: Tensor, y: Tensor, rows: int, row: int, column: int = 0) -> Launch:
        given, wanted = (TensorDescriptor(t, [n, 4], [4, 1], [4, 4]) for t, n in ((x, rows), (y, len(y))))
        return launch(descriptor_kernel, x_desc=given, y_desc=wanted, ROW=row, COLUMN=column)

    watched(through(x, y, 4, 2), through(x, y, 4, -3), through(x, torch.empty(3, 4), 4, 0))
    with fault("descriptor_kernel, program (0, 0, 0), loads outside x_desc: element 16 of 16"):
        watched(through(x, y, 5, 1))


def splits() -> Launch:
    arguments = {
        "partials_ptr": torch.empty(2 * 3 * 16), "semaphores_ptr": torch.zeros(8, dtype=torch.int32),
        "y_ptr": torch.empty(2), "SPLIT_K": 3,
    }  # fmt: skip
    return Launch(splits_kernel, (2, 3), arguments)


def test_the_last_to_arrive_may_load_what_the_others_stored():
    shared = splits()
    watched(shared)
    assert shared.arguments["y_ptr"].tolist() == [48.0, 48.0]


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("tl.atomic_add(..., 1, sem=..., scope=...) == SPLIT_K - 1", "split == SPLIT_K - 1",
         "program (0, 2, 0), loads partials_ptr[0], which program (0, 0, 0) stored"),
        ("tl.debug_barrier()", "pass", "loads partials_ptr[0], which program (0, 0, 0) stored"),
        ("'acq_rel'", "'relaxed'", "loads partials_ptr[0], which program (0, 0, 0) stored"),
        ("'acq_rel'", "'acquire'", "loads partials_ptr[0], which program (0, 0, 0) stored"),
        ("'acq_rel'", "'release'", "loads partials_ptr[0], which program (0, 0, 0) stored"),
        ("'gpu'", "'cta'", "loads partials_ptr[0], which program (0, 0, 0) stored"),
        ("tl.atomic_add(semaphores_ptr + tile, 1, sem=..., scope=...)",
         "tl.atomic_add(semaphores_ptr + split, 1, sem=..., scope=...)", "never stores y_ptr[0]"),
        ("... == SPLIT_K - 1", "... == SPLIT_K - 2", "loads partials_ptr[32], which nobody has stored"),
        ("last = ...", "if True: last = ...; tl.store(semaphores_ptr + tile, 0)",
         "updates semaphores_ptr[0], which program (0, 0, 0) stored"),
        ("split * (BLOCK_M * BLOCK_K)", "0", "stores partials_ptr[0], which program (0, 0, 0) stored"),
        ("tile.to(tl.int64)", "0", "stores partials_ptr[0], which program (0, 0, 0) stored"),
    ],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_an_arrival_that_orders_nothing(old, new, text):
    with planted("tiles.py", "sum_partials", old, new), fault(text):
        watched(splits())


def test_operators_are_watched_wherever_they_are_called():
    x = torch.ones(1, 5, 4, 5)
    with (
        planted("add_relu.py", "add_relu_kernel", "offs < numel", "offs <= numel"),
        fault("add_relu_kernel, program (0, 0, 0), loads outside"),
    ):
        AddRelu(x, x, Modes(kernels="triton")).run()


def test_some_programs_of_a_launch_are_watched_by_their_own_numbers():
    x = integers(generator(torch.device("cpu"), 0), 3, 1, 64, 60, 60)
    too_many = planted("max_pool.py", "max_pool_kernel", "w0 + s < W", "w0 + s <= W")
    with too_many, fault("program (112, 0, 0)"):
        run(MaxPool2d(x, (3, 3), (1, 1), (1, 1)), programs=[3, 112])
