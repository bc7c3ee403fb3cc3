"""The GPU in software (`software_gpu/`) keeps CUDA's promises, and no others. Runs on it alone: `make software-gpu`."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from resnet_triton.config.targets import target

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_name() != "Software GPU", reason="needs the GPU in software"
)


def test_it_is_the_gpu_that_was_asked_for():
    known = target(os.environ.get("SOFTWARE_GPU", "sm_90")).known
    found = torch.cuda.get_device_properties()
    assert (10 * found.major + found.minor, found.multi_processor_count) == (known.arch, known.sm_count)
    assert found.shared_memory_per_block_optin == known.shared_memory
    assert found.max_threads_per_multi_processor == 32 * known.sm_warps


def two_streams(waits: bool) -> Tensor:
    """What one stream reads of what another has written, in twenty tries."""
    other, x = torch.cuda.Stream(), torch.zeros(20, device="cuda")
    y = torch.empty_like(x)
    torch.cuda.synchronize()
    for i in range(20):
        x[i] = 1
        if waits:
            other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            y[i] = x[i]
    torch.cuda.synchronize()
    return y


def test_streams_are_in_order_only_where_one_waits():
    assert two_streams(waits=True).all()
    assert not two_streams(waits=False).all()


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            work()
        finally:
            graph.capture_end()
    return graph


def test_a_graph_runs_again_on_what_is_in_its_memory():
    x, y = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    graph = captured(lambda: torch.mul(x, 2, out=y))
    assert not y.any(), "a capture runs nothing"
    for value in (3, 5):
        x.fill_(value)
        graph.replay()
        assert (y == 2 * value).all()


@pytest.mark.parametrize(
    "forbidden", [Tensor.item, Tensor.cpu, lambda x: torch.cuda.synchronize()], ids=["item", "cpu", "synchronize"]
)
def test_what_captures_forbid(forbidden):
    x = torch.ones((), device="cuda")
    with pytest.raises(RuntimeError, match="captur"):
        captured(lambda: forbidden(x.add_(1)))


def test_work_of_a_capture_is_joined():
    x, other = torch.ones(3, device="cuda"), torch.cuda.Stream()

    def work() -> None:
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            x.mul_(2)

    with pytest.raises(RuntimeError, match="unjoined"):
        captured(work)


def test_nothing_is_done_before_it_is_waited_for():
    x, event = torch.zeros(3, device="cuda"), torch.cuda.Event()
    torch.cuda.synchronize()
    x.fill_(1)
    event.record()
    assert not event.query()
    event.synchronize()
    assert event.query()
    assert (x == 1).all()
