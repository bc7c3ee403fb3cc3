"""Every argument of every launch between unreadable pages: one element too far ends the process.

Independent of shadow memory, and sharper in one way: it is the hardware that looks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import shadow
import torch
from exact import conv_call, generator, integers, run, run_conv, stem_call
from mapped import guarded, run_file
from reliability.planting import planted
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_triton import config, ops
from resnet_triton.config import ConvConfig, ConvShape, StemConfig
from resnet_triton.kernels.launch import Launch
from resnet_triton.ops import interpreter

CPU = torch.device("cpu")
LAYER = ConvShape(3, 24, 5, 6, 40, 3, 3, padding=(1, 1), residual=True)
SMALL = ConvShape(1, 16, 4, 5, 40, 3, 3, padding=(1, 1))


def conv(shape: ConvShape, chosen: ConvConfig) -> None:
    run_conv(conv_call(generator(CPU, 0), shape), chosen)


def pointer() -> None:
    conv(LAYER, ConvConfig(32, 32, 16, 4, 2))


def flat() -> None:
    conv(ConvShape(2, 3, 5, 6, 40, 3, 3, (2, 2), (1, 1)), ConvConfig(32, 32, 16, 4, 2))


def box() -> None:
    conv(LAYER, ConvConfig(32, 32, 16, 4, 2, (2, 4, 4), swap=True))


def one_image() -> None:
    conv(ConvShape(1, 16, 6, 10, 32, 3, 3, (2, 2), (1, 1)), ConvConfig(32, 32, 16, 4, 2, (4, 8, 1), swap=True))


def split() -> None:
    conv(SMALL, ConvConfig(16, 32, 16, 4, 2, split_k=3))


def split_boxes() -> None:
    conv(SMALL, ConvConfig(16, 32, 16, 4, 2, (4, 4, 1), split_k=3, swap=True))


def stem() -> None:
    with mock.patch.object(config, "stem_heuristic", return_value=StemConfig(16, 32, 2, 4, 2)):
        run(stem_call(generator(CPU, 0), 2, 3, 9, 42, 40, torch.float16), kernel="stem_kernel")


def images(*shape: int) -> Tensor:
    return integers(generator(CPU, 0), 3, *shape)


def max_pool() -> None:
    run(ops.MaxPool2d(images(2, 65, 7, 9), (3, 3), (2, 2), (1, 1)))


def avg_pool() -> None:
    run(ops.GlobalAvgPool(images(2, 65, 5, 7)))


def head() -> None:
    run(ops.AvgPoolLinear(images(2, 65, 5, 7), images(10, 65), images(10)))


def linear() -> None:
    run(ops.Linear(images(17, 65), images(10, 65), images(10)))


def add_relu() -> None:
    run(ops.AddRelu(images(2, 65, 5, 7), images(2, 65, 5, 7)))


CALLS = (
    pointer, flat, box, one_image, split, split_boxes, stem, max_pool, avg_pool, head, linear,
    add_relu,
)  # fmt: skip


class Fault(NamedTuple):
    """What to run, and a fault as `planted` takes it that ends it at the page behind a tensor (`end`) or before."""

    call: Callable[[], None]
    end: bool
    place: tuple[str, str, str, str]


POINTER, MAX_POOL = ("conv_pointer.py", "conv_pointer_kernel"), ("max_pool.py", "max_pool_kernel")
FAULTS = {
    "conv_pointer, a filter too many": Fault(pointer, True, (*POINTER, "mask_k = offs_k < K", "mask_k = offs_k <= K")),
    "conv_pointer, a column before the first": Fault(pointer, False, (
        *POINTER, "(h >= 0) & ... & (w >= 0) & ... & mask_m", "(h >= -1) & ... & (w >= -1) & ... & mask_m")),
    "conv_box, an image too many": Fault(box, True, (
        "conv_box.py", "pixel_descriptor", "[h, w, n, c]", "[h, w, n + 1, c]")),
    "stem, a window too many": Fault(stem, True, (
        "stem.py", "stem", "[rows, n, q, WINDOW]", "[rows, n, q + 1, WINDOW]")),
    "max_pool, a column too many": Fault(max_pool, True, (*MAX_POOL, "w0 + s < W", "w0 + s <= W")),
    "max_pool, a row before the first": Fault(max_pool, False, (*MAX_POOL, "h0 + r >= 0", "h0 + r >= -1")),
    "linear, a channel too many": Fault(linear, True, ("linear.py", "linear_kernel", "offs_c < C", "offs_c <= C")),
    "add_relu, an element too many": Fault(add_relu, True, (
        "add_relu.py", "add_relu_kernel", "offs < NUMEL", "offs <= NUMEL")),
}  # fmt: skip


@contextlib.contextmanager
def guards(*, end: bool) -> Iterator[None]:
    """Launches work on guarded copies of their tensors."""
    run = Launch.run

    def guarded_run(launch: Launch) -> None:
        arguments: dict[str, Any] = {}
        copies: list[tuple[Tensor, Tensor]] = []
        for name, value in launch.arguments.items():
            tensor = value.base if isinstance(value, TensorDescriptor) else value
            if isinstance(tensor, Tensor):
                copies.append((tensor, guarded(tensor, end=end)))
                descriptor = isinstance(value, TensorDescriptor)
                value = dataclasses.replace(value, base=copies[-1][1]) if descriptor else copies[-1][1]
            arguments[name] = value
        run(dataclasses.replace(launch, arguments=arguments))
        for tensor, copy in copies:
            tensor.copy_(copy)

    with mock.patch.object(Launch, "run", guarded_run):
        yield


def signal_of(fault: Fault) -> str:
    """What ends a process of its own that runs a kernel with this fault."""
    child = os.fork()
    if child == 0:
        os.close(2)
        with contextlib.suppress(Exception), planted(*fault.place), guards(end=fault.end):
            fault.call()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "nothing"


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with mock.patch.object(shadow, "watch", return_value=contextlib.nullcontext()):  # it would find them first
        for end in (True, False):
            with guards(end=end):
                for call in CALLS:
                    call()
        print(json.dumps({name: signal_of(fault) for name, fault in FAULTS.items()}))


@pytest.mark.slow
@pytest.mark.skipif(not interpreter.active(), reason="kernels are compiled here")
def test_no_kernel_touches_a_guard_page_until_a_fault_is_planted() -> None:
    assert json.loads(run_file(__file__)) == dict.fromkeys(FAULTS, "SIGSEGV")


if __name__ == "__main__":
    main()
