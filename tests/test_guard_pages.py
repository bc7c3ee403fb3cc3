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
from typing import Any
from unittest import mock

import pytest
import shadow
import test_planted as kernels
from mapped import guarded, run_file
from planted import planted
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_triton import interpreter
from resnet_triton.kernels.launch import Launch

Fault = tuple[str, Callable[[], None], str, str, bool]
FAULTS: dict[str, Fault] = {
    "conv_pointer, a filter too many": (
        "conv_pointer", kernels.pointer, "mask_k = offs_k < K", "mask_k = offs_k <= K", True
    ),
    "conv_pointer, a column before the first": (
        "conv_pointer", kernels.pointer, "(h >= 0) & (h < H) & (w >= 0) & (w < W) & mask_m\n",
        "(h >= -1) & (h < H) & (w >= -1) & (w < W) & mask_m\n", False
    ),
    "conv_box, an image too many": ("conv_box", kernels.box, "[h, w, n, c], [row", "[h, w, n + 1, c], [row", True),
    "stem, a window too many": ("stem", kernels.stem, "[rows, n, q, WINDOW]", "[rows, n, q + 1, WINDOW]", True),
    "max_pool, a column too many": ("max_pool", kernels.max_pool, "(w0 + s < W)", "(w0 + s <= W)", True),
    "max_pool, a row before the first": ("max_pool", kernels.max_pool, "(h0 + r >= 0)", "(h0 + r >= -1)", False),
    "linear, a channel too many": ("linear", kernels.linear, "offs_c < C", "offs_c <= C", True),
    "add_relu, an element too many": ("add_relu", kernels.add_relu, "offs < NUMEL", "offs <= NUMEL", True),
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
    file, call, old, new, end = fault
    child = os.fork()
    if child == 0:
        os.close(2)
        with contextlib.suppress(Exception), planted(file, old, new), guards(end=end):
            call()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "nothing"


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with mock.patch.object(shadow, "watch", return_value=contextlib.nullcontext()):  # it would find them first
        for end in (True, False):
            with guards(end=end):
                for call in kernels.CALLS:
                    call()
        print(json.dumps({name: signal_of(fault) for name, fault in FAULTS.items()}))


@pytest.mark.skipif(not interpreter.active(), reason="kernels are compiled here")
def test_no_kernel_touches_a_guard_page_until_a_fault_is_planted() -> None:
    assert json.loads(run_file(__file__)) == dict.fromkeys(FAULTS, "SIGSEGV")


if __name__ == "__main__":
    main()
