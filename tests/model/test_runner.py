"""The runner: when it captures, replays and lets go, on a CPU with a fake of CUDA's graphs."""

from __future__ import annotations

import contextlib
import functools
import gc
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from fake_cuda import FakeCuda, FakeEvent, captured, images, small, with_grad
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from resnet_triton import disabled, ops, optimize, refresh, report, revert
from resnet_triton.bench.worker import WARM_CALLS
from resnet_triton.graphs import cuda_graph, fingerprint, replay, runner
from resnet_triton.graphs.function import GraphedFunction
from resnet_triton.ops import precision
from resnet_triton.support import vision, waiting

torchvision = vision.torchvision()


pytestmark = pytest.mark.usefixtures("no_grad")


# --- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "captures", "replays"),
    [("auto", [0, 1, 1, 1], 2), (True, [1, 1, 1, 1], 3), (False, [0, 0, 0, 0], 0)],
    ids=str,
)
def test_capture_and_replay(cuda, mode, captures, replays):
    model = small(cuda_graph=mode)
    counts = []
    for i in range(4):
        x = images() + i
        expected = model._forward_impl(x)
        assert torch.equal(model(x), expected)
        counts.append(len(cuda.graphs))
    assert counts == captures
    assert sum(g.replays for g in cuda.graphs) == replays


def test_only_what_our_models_launch_may_start_before_the_kernel_before_has_ended(cuda):
    """In another function a kernel may copy a parameter just before it is read."""
    captured(small(), images())
    function, values = GraphedFunction(lambda x, weight: (x * weight,), {0}, {1}, True), [images(), torch.ones(1)]
    for _ in range(3):
        function(values)
    assert [graph.writes_no_parameter for graph in cuda.graphs] == [True, False]


@pytest.mark.parametrize("freeze", [False, True])
def test_no_graph_where_a_block_is_disabled(cuda, freeze):
    model, x = small(freeze=freeze), images()
    block = model.layer1[0]
    with disabled(block):
        captured(model, x)
    assert not cuda.graphs
    captured(model, x)
    with disabled(block), mock.patch.object(block.relu, "forward", torch.zeros_like):  # which no graph knows
        assert torch.equal(model(x), model._forward_impl(x))
        assert cuda.graphs[0].replays == 0
    with disabled(small()):
        model(x)
    with disabled(block):
        thread = threading.Thread(target=torch.no_grad()(model), args=(x,))
        thread.start()
        thread.join()
    assert [graph.replays for graph in cuda.graphs] == [2]


def test_results_are_the_callers(cuda):
    model = small()
    captured(model, images())
    first = model(images())
    kept = first.clone()
    model(images() + 1)
    assert torch.equal(first, kept)


def test_inputs_are_left_alone(cuda):
    model = small()
    x = images()
    kept = x.clone()
    captured(model, x)
    model(x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    "change",
    [lambda x: x[:1], lambda x: x[..., :15], lambda x: x.contiguous(memory_format=torch.channels_last)],
    ids=["batch", "size", "layout"],
)
def test_another_input_is_another_graph(cuda, change):
    model = small()
    x = images()
    captured(model, x)
    other = change(x)
    assert torch.equal(model(other), model._forward_impl(other))
    assert [g.replays for g in cuda.graphs] == [0]
    captured(model, other)
    assert len(cuda.graphs) == 2
    assert cuda.graphs[1].beside is cuda.graphs[0]
    assert torch.equal(model(x), model._forward_impl(x))


def test_means_are_numbers_that_a_graph_can_trust(cuda):
    """A list edited in place would leave the graph with the means it was captured with."""
    model = small()
    mean = [0.1, 0.2, 0.3]
    model.normalize = mean, [1.0, 1.0, 1.0]
    x = torch.randint(256, (2, 3, 16, 16)).byte()
    captured(model, x)
    mean[0] = 0.9
    assert model.normalize == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    assert torch.equal(model(x), model._forward_impl(x))
    model.normalize = mean, [1.0, 1.0, 1.0]
    assert torch.equal(model(x), model._forward_impl(x))
    assert len(cuda.graphs) == 2


def test_captured_in_inference_mode_and_replayed_outside(cuda):
    model = small()
    with torch.inference_mode():
        captured(model, images())
        assert model(images()).is_inference()
    assert not model(images()).is_inference()
    assert cuda.graphs[0].replays == 2


def test_fp32_precision_belongs_to_the_shape(cuda):
    model = small()
    for _ in range(2):
        for switch in ("ieee", "tf32"):
            with precision.fp32_precision(switch):
                captured(model, images())
    assert len(cuda.graphs) == 2


# --- what a replay does ----------------------------------------------------------------------------------------------


class Alone:
    """A stem's launch on the CPU."""

    def __init__(self, call: ops.Stem) -> None:
        self.call, self.out = call, call.output().fill_(torch.nan)

    def repeat(self, changing: str) -> Callable[[Tensor], None]:
        assert changing == "x_ptr"
        return self.again

    def again(self, x: Tensor) -> None:
        self.out[:] = replace(self.call, x=x).reference()


@pytest.fixture
def log(cuda, monkeypatch):
    """What the host asks of CUDA beside the graph, in order, where the stem reads images as they are."""
    found: list[str] = []
    capture = cuda.capture

    def logged(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        return lambda *arguments: found.append(name) or function(*arguments)

    def logging(entry: Any, beside: Any) -> Any:
        alone = isinstance(getattr(entry.fill, "__self__", None), Alone)
        fill = entry.fill and logged(entry.fill, "stem" if alone else "copy")
        return capture(replace(entry, fill=fill), beside)

    monkeypatch.setattr(ops.Stem, "alone", lambda call: ((launch := Alone(call)).out, launch))
    monkeypatch.setattr(cuda, "capture", logging)
    for owner, name in ((FakeEvent, "wait"), (FakeEvent, "record"), (Tensor, "clone")):
        monkeypatch.setattr(owner, name, logged(getattr(owner, name), name))
    return found


@pytest.mark.parametrize("readable", [True, False])
def test_host_calls_of_a_replay(cuda, log, readable):
    """One launch in front of the graph, one behind it, and what makes the next replay wait."""
    model = small()
    model.normalize = ((0.5,) * 3, (0.25,) * 3)
    for of_bytes in (False, True):
        pixels = torch.randint(256, (2 * 3 * 16 * 16 + 4,)) if of_bytes else torch.randn(2 * 3 * 16 * 16 + 4)
        pixels = pixels.byte() if of_bytes else pixels
        x = (pixels[:-4] if readable else pixels[3:-1]).view(2, 3, 16, 16)
        captured(model, x)
        for _ in range(2):
            log.clear()
            y = model(x)
            assert log == ["wait", "stem" if readable else "copy", "clone", "record"]
            assert torch.equal(y, model._forward_impl(x))
            x += 1
    assert [graph.replays for graph in cuda.graphs] == [2, 2]


def test_host_calls_of_a_replay_on_a_gpu(monkeypatch):
    """Of the real module. Buffers are told of a stream once; a device is switched to if it is not the current one."""
    asked = mock.Mock()
    asked.current_stream.side_effect = lambda device: stream
    asked.device.return_value = mock.MagicMock()
    asked.clone.return_value = y = torch.zeros(2)
    for name in ("current_device", "current_stream", "device"):
        monkeypatch.setattr(torch.cuda, name, getattr(asked, name))
    monkeypatch.setattr(cuda_graph, "takes", lambda x: True)
    model, x = small(), images()
    model._triton_runner = kept = runner.Runner(model)
    buffers = mock.Mock(record_stream=asked.record_stream, clone=asked.clone)
    graph = cuda_graph.Captured(asked, buffers, asked.fill, buffers, buffers)
    kept._graphs[replay.key_of(x)] = replay._Replayed(graph)
    kept._done = asked
    every_time = ["current_stream", "wait", "fill", "replay", "clone", "record"]
    for handle, device, more in ((7, None, 2), (7, None, 0), (8, None, 2), (7, None, 0), (8, 1, 0)):
        asked.current_device.return_value = device  # that of `x` is None
        stream = mock.Mock(cuda_stream=handle)
        asked.reset_mock()
        assert model(x) is y
        names = [name for name, *_ in asked.mock_calls if not name.startswith("device()")]
        assert names.count("record_stream") == more
        assert [name for name in names if name != "record_stream"] == [
            "current_device", *["device"] * (device is not None), *every_time
        ]  # fmt: skip
        assert asked.mock_calls.index(mock.call.fill(x)) < asked.mock_calls.index(mock.call.replay())
        asked.wait.assert_called_once_with(stream)
        asked.record.assert_called_once_with(stream)


@pytest.mark.parametrize(
    "other",
    [
        lambda x: torch.cat([x, x])[1:3],
        lambda x: torch.cat([x.flatten(), x.flatten()])[1 : x.numel() + 1].view(x.shape),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch._neg_view(x),
        lambda x: torch._efficientzerotensor(x.shape),
        lambda x: x[:1].expand(x.shape),
    ],
    ids=["elsewhere", "not aligned", "channels_last", "negative", "zeros without memory", "expanded"],
)
def test_images_that_the_stem_cannot_read_are_copied(cuda, log, other):
    model, x = small(), images()
    captured(model, x)
    x = other(x)
    for _ in range(4):
        assert torch.equal(model(x), model._forward_impl(x))


@pytest.mark.parametrize("build", [small, lambda **modes: optimize(torchvision.models.resnet18().eval(), **modes)])
@pytest.mark.parametrize("freeze", [False, True])
def test_edits_show_in_front_of_the_graph_too(cuda, log, freeze, build):
    """Of a model of ours, and of one that was torchvision's."""
    model, x = build(freeze=freeze), images()
    captured(model, x)
    model.conv1.weight.mul_(2)
    log.clear()
    y = model(x)
    assert log.count("stem") == 1
    torch.testing.assert_close(y, model._forward_impl(x))
    if not freeze:
        model.bn1.running_mean.add_(1)
        assert torch.equal(model(x), model._forward_impl(x))
        model.bn1.eps = 0.5
        assert torch.equal(model(x), model._forward_impl(x))
        model.maxpool.kernel_size, model.maxpool.padding = 5, 2  # no stem of ours: captured from the images on
        for _ in range(2):
            assert torch.equal(model(x), model._forward_impl(x))
        log.clear()
        model(x)
        assert "stem" not in log
        assert len(cuda.graphs) == 3


# --- inputs that stay where they are ---------------------------------------------------------------------------------


def settled(model: Any, x: Tensor) -> None:
    """Call until a graph reads this input where it is."""
    captured(model, x)
    for _ in range(replay.SETTLED):
        model(x)


def test_inputs_have_settled_before_a_benchmark_times_a_call(cuda):
    model, x = small(), images()
    for _ in range(WARM_CALLS["cuda"]):
        model(x)
    assert cuda.graphs[1].replays > 0
    for _ in range(WARM_CALLS["cuda"]):
        model(x)
    assert len(cuda.graphs) == 2


def test_inputs_that_stay_are_read_where_they_are(cuda, log):
    model, x, other = small(), images(), images() + 1
    settled(model, x)
    assert cuda.graphs[1].input == ()  # it keeps no memory of the caller's
    for _ in range(2):
        log.clear()
        y = model(x)
        assert log == ["wait", "clone", "record"]
        assert torch.equal(y, model._forward_impl(x))
        x += 1
        log.clear()
        y = model(other)
        assert log == ["wait", "stem", "clone", "record"]
        assert torch.equal(y, model._forward_impl(other))
    assert [graph.replays for graph in cuda.graphs] == [replay.SETTLED + 2, 2]
    assert f"replayed {replay.SETTLED + 4} times" in report(model).graphs[""]
    assert cuda.graphs[1].writes_no_parameter


@pytest.mark.parametrize("of", ["model", "function"])
def test_settled_inputs_are_not_kept(cuda, of):
    x = images()
    if of == "model":
        model = small()
        settled(model, x)
    else:
        function = GraphedFunction(lambda x, weight: (x * weight,), {0}, {1}, True)
        values = [x, torch.tensor(2.0)]
        for _ in range(2 + replay.SETTLED):
            function(values)
        values.clear()
    assert len(cuda.graphs) == 2
    kept = weakref.ref(x)
    del x
    gc.collect()
    assert kept() is None


def test_each_further_place_has_to_be_earned_by_twice_as_many_calls(cuda, monkeypatch):
    monkeypatch.setattr(replay, "SETTLED", 2)
    model, places = small(), [images() + i for i in range(replay._PLACES + 1)]
    captured(model, places[0])
    for n, x in enumerate(places[:-1]):
        for _ in range(replay.SETTLED * 2**n):
            assert len(cuda.graphs) == 1 + n
            model(x)
        assert len(cuda.graphs) == 2 + n
    for _ in range(replay.SETTLED * 2 ** (n + 2)):
        model(places[-1])
    assert len(cuda.graphs) == 1 + replay._PLACES
    for x in places:
        x += 1
        assert torch.equal(model(x), model._forward_impl(x))


def test_places_that_never_come_back_are_forgotten(cuda, monkeypatch):
    monkeypatch.setattr(replay, "_REMEMBERED", 8)
    model, kept = small(), [images() for _ in range(20)]
    captured(model, images())
    for x in kept:
        model(x)
    (graphs,) = model._triton_runner._graphs.values()
    assert 0 < len(graphs.seen) <= 8


def test_inputs_that_no_kernel_reads_where_they_are_never_settle(cuda):
    model = small()
    x = torch.randn(2 * 3 * 16 * 16 + 1)[1:].view(2, 3, 16, 16)
    settled(model, x)
    assert torch.equal(model(x), model._forward_impl(x))
    assert len(cuda.graphs) == 1


@pytest.mark.parametrize("edit", [
    lambda m: setattr(m.bn1, "eps", 0.5), lambda m: setattr(m.conv1.weight, "data", m.conv1.weight.data * 2),
], ids=["eps", "data"])  # fmt: skip
def test_edits_show_where_inputs_have_settled(cuda, monkeypatch, edit):
    """Behind them it takes twice as many calls again."""
    monkeypatch.setattr(replay, "SETTLED", 4)
    model, x = small(), images()
    settled(model, x)
    model(x)
    edit(model)
    for n in range(10):
        assert torch.equal(model(x), model._forward_impl(x))
        assert len(cuda.graphs) == (3 if n < 8 else 4)


def test_a_capture_that_fails_where_inputs_settle(cuda, monkeypatch):
    """Memory may have run out for a moment: all is captured again, and inputs settle later."""
    monkeypatch.setattr(replay, "SETTLED", 4)
    model, x = small(), images()
    captured(model, x)
    for _ in range(replay.SETTLED - 1):
        model(x)
    cuda.failure = RuntimeError("as CUDA says")
    with pytest.warns(RuntimeWarning, match=r"no CUDA graph for 2x3x16x16 float32, its capture failed: as CUDA says"):
        y = model(x)
    assert torch.equal(y, model._forward_impl(x))
    assert not model._triton_runner._graphs
    cuda.failure = None
    for _ in range(10):
        assert torch.equal(model(x), model._forward_impl(x))
    assert [graph.replays for graph in cuda.graphs] == [4, 8, 1]


def for_a_moment(model: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, while another thread changes the model."""

    def within(*args: Any) -> Any:
        model.bn1.eps = 0.5
        try:
            return call(*args)
        finally:
            model.bn1.eps = 1e-5

    return within


@pytest.mark.skipif(fingerprint._version is None, reason="nothing tells of a change that is undone")
@pytest.mark.parametrize("equal", [False, True])
def test_a_change_for_a_moment_while_inputs_settle(cuda, monkeypatch, equal):
    """Before, one that leaves an equal value is harmless."""
    model, x = small(), images()
    captured(model, x)
    if equal:
        model.bn1.eps = float(str(model.bn1.eps))
    else:
        monkeypatch.setattr(cuda, "capture", for_a_moment(model, cuda.capture))
    for _ in range(replay.SETTLED + 2):
        assert torch.equal(model(x), model._forward_impl(x))
    assert [graph.replays for graph in cuda.graphs] == ([replay.SETTLED, 2] if equal else [replay.SETTLED + 2, 0])


def test_a_change_for_a_moment_while_the_launch_before_the_graph_is_made(cuda, log):
    model, x = small(), images()
    model(x)
    model._entry = for_a_moment(model, model._entry)
    model(x)
    del model._entry
    for _ in range(3):
        assert torch.equal(model(x), model._forward_impl(x))


def test_inputs_of_a_function_that_no_kernel_reads_where_they_are_never_settle(cuda):
    x = torch.randn(9)
    for n, y in enumerate((x[1:], torch._neg_view(x[:8])), 1):
        function = GraphedFunction(lambda x, y: (x + y,), {0, 1}, set(), True)
        for _ in range(4 + replay.SETTLED):
            assert torch.equal(function([x[:8], y])[0], x[:8] + y)
        assert len(cuda.graphs) == n


def test_a_conjugate_is_not_what_it_conjugates(cuda):
    function, x = GraphedFunction(lambda x: (x * 2,), {0}, set(), True), torch.randn(8, dtype=torch.complex64)
    for _ in range(3 + replay.SETTLED):
        function([x])
    assert torch.equal(function([x.conj()])[0], x.conj() * 2)


def test_a_parameter_where_another_was_when_a_function_was_captured(cuda):
    function, x = GraphedFunction(lambda x, weight: (x * weight,), {0}, {1}, True), images()
    first = nn.Parameter(torch.tensor(2.0))
    for _ in range(3):
        function([x, first])
    there, first.data = first.data, torch.tensor(5.0)
    for _ in range(2 + replay.SETTLED):
        assert torch.equal(function([x, nn.Parameter(there)])[0], x * 2)
    assert len(cuda.graphs) == 2
    assert cuda.graphs[1].replays


@pytest.mark.parametrize("calls", [1, 1 + replay.SETTLED])
def test_a_parameter_moved_by_another_thread_during_a_capture(cuda, calls):
    weight, x = nn.Parameter(torch.tensor(2.0)), images()
    moves = [False]

    def function(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        y = x * weight
        if moves[0]:
            moves[0], weight.data = False, torch.tensor(5.0)
        return (y,)

    graphed, there = GraphedFunction(function, {0}, {1}, True), weight.data
    for _ in range(calls):
        graphed([x, weight])
    capture = cuda.capture

    def moving(*args: Any) -> Any:
        moves[0] = True
        return capture(*args)

    cuda.capture = moving
    with pytest.warns(RuntimeWarning, match="its capture failed: another thread has moved a parameter meanwhile"):
        graphed([x, weight])
    cuda.capture = capture
    weight.data = there
    for _ in range(4):
        assert torch.equal(graphed([x, weight])[0], x * 2)


def test_inputs_of_a_function_settle(cuda, log):
    function = GraphedFunction(lambda x, weight, y: (x * weight + y,), {0, 2}, {1}, True)
    x, weight, y = values = [images(), torch.tensor(2.0), images()]
    for _ in range(2 + replay.SETTLED):
        function(values)
    for _ in range(2):
        x += 1
        y -= 3
        log.clear()
        assert torch.equal(function(values)[0], x * 2 + y)
        assert log == ["wait", "clone", "record"]
        log.clear()
        assert torch.equal(function([x, weight, x])[0], x * 3)
        assert log == ["wait", "copy", "clone", "record"]
    assert len(cuda.graphs) == 2


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_graph_goes_first(cuda, monkeypatch):
    monkeypatch.setattr(replay, "LIMIT", 2)
    model = small()
    captured(model, images(1), images(2))
    model(images(1))
    captured(model, images(3))
    for n in (1, 3, 2):
        assert torch.equal(model(images(n)), model._forward_impl(images(n)))
    assert [g.replays for g in cuda.graphs[:3]] == [2, 0, 1]
    assert report(model).graphs[""].count("replayed") == 2


def test_shapes_that_take_turns_are_not_captured_every_time(cuda, monkeypatch):
    monkeypatch.setattr(replay, "LIMIT", 2)
    model = small()
    for _ in range(24):
        for n in (1, 2, 3):
            model(images(n, 8))
    assert len(cuda.graphs) <= 3 * 5  # 24 rounds: at most after 2, 1, 2, 4, 8 calls


def test_shapes_are_forgotten(cuda, monkeypatch):
    monkeypatch.setattr(replay, "_REMEMBERED", 3)
    model = small()
    for n in range(1, 8):
        model(images(n, 8))
    assert len(model._triton_runner._shapes) == 3


class Negated(TorchFunctionMode):
    """What the head returns."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        return -y if "avg_pool_linear" in str(func) else y


def test_a_mode_that_sees_functions_is_asked_at_every_call(cuda):
    """And no graph holds anything of it. A default device is such a mode, too, but it changes no function."""
    model, x = small(), images()
    expected = model(x)
    for _ in range(2):
        with Negated():
            for _ in range(3):
                assert torch.equal(model(x), model._forward_impl(x))
        assert torch.equal(model(x), expected)
    assert len(cuda.graphs) == 1
    before = cuda.graphs[0].replays
    with torch.device("cpu"):
        model(x)
    assert cuda.graphs[0].replays == before + 1


def test_a_hook_added_while_a_capture_begins(cuda, monkeypatch):
    """By another thread, behind the question whether there is one."""
    model, x, called = small(), images(), []
    asked = type(model).uncaptured_model_reason

    def meanwhile(self):
        reason = asked(self)
        if reason is None and not called:
            called.append("registered")
            model.layer1[0].conv1.register_forward_hook(lambda *_: called.append("called"))
        return reason

    monkeypatch.setattr(type(model), "uncaptured_model_reason", meanwhile)
    for _ in range(4):
        model(x)
    assert called[2:] == ["called"] * (len(called) - 2)
    before = len(called)
    model(x)
    assert len(called) == before + 1


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_failed_capture_leaves_the_model_usable(cuda):
    model, x = small(), images()
    captured(model, images(1))
    model(x)
    cuda.failure = RuntimeError("not permitted")
    with pytest.warns(RuntimeWarning, match="no CUDA graph for 2x3x16x16 float32, its capture failed: not permitted"):
        y = model(x)
    assert torch.equal(y, model._forward_impl(x))
    cuda.failure = None
    for _ in range(3):
        assert torch.equal(model(x), model._forward_impl(x))
    assert len(cuda.graphs) == 1  # remembered: not tried again
    for n in (3, 1):
        captured(model, images(n))
        assert torch.equal(model(images(n)), model._forward_impl(images(n)))
    assert len(cuda.graphs) == 3, "in other memory"
    assert "the capture failed 1 times, an earlier capture failed 3 times" in report(model).graphs[""]


@pytest.mark.parametrize(
    "failure",
    [torch.OutOfMemoryError("no memory"), RuntimeError("CUDA error: operation not permitted when stream is capturing")],
    ids=["memory", "another capture"],
)
def test_a_capture_that_fails_for_a_passing_reason_is_tried_again(cuda, monkeypatch, failure):
    """After 1, 2, 4, ... calls; once it has not failed, a replay answers."""
    model, x, calls, tried = small(), images(), [0], []
    capture = cuda.capture
    monkeypatch.setattr(cuda, "capture", lambda *args: tried.append(calls[0]) or capture(*args))

    def call(times: int) -> None:
        for _ in range(times):
            calls[0] += 1
            assert torch.equal(model(x), model._forward_impl(x))

    cuda.failure = failure
    with pytest.warns(RuntimeWarning, match="its capture failed"):
        call(10)
    assert tried == [2, 3, 5, 9]
    reasons = "a shape's first calls 1 times, the capture failed 4 times, an earlier capture failed 5 times"
    assert reasons in report(model).graphs[""]
    cuda.failure = None
    call(9)
    assert tried == [2, 3, 5, 9, 17]
    assert [graph.replays for graph in cuda.graphs] == [2]


class Torch:
    """What torch 2.11 does for a capture, and how it takes it that one cannot be ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
        self.fails, self.capturing, self.recording, self.random = fails, False, set[Any](), True
        self.cleared: list[bool] = []  # workspaces of cuBLAS, within a capture or not
        self.sync_debug_mode = 2  # "error"
        stream = mock.Mock(device=torch.device("cuda:1"))
        monkeypatch.setattr(cuda_graph, "_side_stream", lambda device: stream)
        stand_ins = {"CUDAGraph": lambda: self, "graph": self.graph, "stream": contextlib.nullcontext,
                     "graph_pool_handle": lambda: (0, 1), "is_current_stream_capturing": lambda: self.capturing,
                     "get_sync_debug_mode": lambda: self.sync_debug_mode,
                     "set_sync_debug_mode": functools.partial(setattr, self, "sync_debug_mode")}  # fmt: skip
        for name, value in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, getattr(self, name), raising=False)

    def pool(self) -> tuple[int, int]:
        return 0, 1

    @contextlib.contextmanager
    def graph(self, graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.capture_begin(capture_error_mode, pool)
        try:
            yield
        finally:
            self.capture_end()

    def capture_begin(self, capture_error_mode: str, pool: Any = (1, 0)) -> None:
        assert capture_error_mode == "thread_local"
        assert not self.recording
        assert self.sync_debug_mode == 0, "torch 2.13 waits here"
        self.capturing, self.recording, self.random = True, {pool}, False

    def capture_end(self) -> None:
        assert self.capturing
        self.capturing = False
        if self.fails:
            self.fails = False
            raise RuntimeError("operation failed due to a previous error during capture")
        self._cuda_endAllocateToPool(1, *self.recording)
        self.random = True

    def _cuda_clearCublasWorkspaces(self) -> None:
        self.cleared.append(bool(self.recording))

    def _cuda_endAllocateToPool(self, device: int | None, pool: Any) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def _cuda_releasePool(self, device: int | None, pool: Any) -> None:
        assert (device, pool) == (1, (0, 1))
        assert cuda_graph._capturing._is_owned(), "another thread's capture would raise"


@pytest.mark.parametrize("cannot_end", [False, True])
@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_pytorch_knows_when_a_capture_is_over(monkeypatch, raises, cannot_end, beside):
    """Of the real module."""
    fake = Torch(monkeypatch, cannot_end)

    def body(x: Tensor) -> Tensor:
        within.append((list(fake.cleared), gc.isenabled()))
        if raises and fake.recording:
            raise ValueError("by the body")
        return x + 1

    within: list[Any] = []
    entry = cuda_graph.Entry(torch.zeros(1), lambda x: None, body)
    with contextlib.ExitStack() as stack:
        if raises or cannot_end:
            error = RuntimeError if cannot_end else ValueError
            stack.enter_context(pytest.raises(error, match="previous error" if cannot_end else "by the body"))
        cuda_graph.capture(entry, mock.Mock(graph=fake) if beside else None)
    assert not fake.recording
    assert fake.random
    assert fake.sync_debug_mode == 2
    assert within == [([], True), ([True], False)], "at first nothing is captured; then cuBLAS has no memory yet"
    assert fake.cleared == [True, True]
    assert gc.isenabled()


@pytest.mark.parametrize("cannot_end", [False, True])
def test_ctrl_c_when_a_capture_has_just_begun(monkeypatch, cannot_end):
    """Of the real module."""
    fake = Torch(monkeypatch, cannot_end)
    begin = fake.capture_begin

    def interrupted(*args: Any) -> None:
        fake.capture_begin = begin
        begin(*args)
        raise KeyboardInterrupt

    fake.capture_begin = interrupted
    with pytest.raises(KeyboardInterrupt):
        cuda_graph.capture(cuda_graph.Entry(torch.zeros(1), lambda x: None, lambda x: x + 1), None)
    assert not fake.capturing
    assert not fake.recording
    assert fake.random
    assert fake.sync_debug_mode == 2


@pytest.mark.parametrize("error", [None, 0, 201], ids=["no library", "a stream", "an error"])
def test_captures_share_no_stream_with_others_if_the_driver_makes_one(monkeypatch, error):
    library = mock.Mock(side_effect=OSError) if error is None else mock.Mock()
    library.return_value.cuStreamCreate.return_value = error
    monkeypatch.setattr(cuda_graph.ctypes, "CDLL", library)
    for name in ("device", "Stream", "ExternalStream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    stream = cuda_graph._side_stream.__wrapped__(torch.device("cuda:1"))
    made, other = torch.cuda.ExternalStream, torch.cuda.Stream
    assert stream is (made if error == 0 else other).return_value
    torch.cuda.device.assert_called_once_with(torch.device("cuda:1"))


def test_the_last_who_waits_puts_the_mode_back(monkeypatch):
    """In one thread, here; it is one mode for all."""
    fake = Torch(monkeypatch, False)
    first, second = waiting.may_wait(), waiting.may_wait()
    with second:
        with first:
            assert fake.sync_debug_mode == 0
        assert fake.sync_debug_mode == 0
    assert fake.sync_debug_mode == 2


# --- copies, moves, the end ------------------------------------------------------------------------------------------


def test_a_model_given_to_torch_compile_pickles():
    model = small()
    model.compile(backend="eager")
    assert pickle.loads(pickle.dumps(model))._compiled_call_impl is None


def dead(cuda: FakeCuda) -> bool:
    """Whether nobody but the fake keeps its only graph's buffers."""
    buffer = weakref.ref(cuda.graphs[0])
    cuda.graphs.clear()
    gc.collect()
    return buffer() is None


def test_graphs_end_with_the_model(cuda):
    model = small()
    captured(model, images())
    model.itself = [model]  # a cycle through an attribute
    captured(model, images())
    cuda.graphs[:] = cuda.graphs[-1:]
    del model
    assert dead(cuda)


@pytest.mark.parametrize("freeze", [False, True])
def test_graphs_and_weights_end_with_the_model_at_once(cuda, freeze):
    model = small(freeze=freeze)
    captured(model, images())
    replica = model._replicate_for_data_parallel()
    del replica
    kept = [weakref.ref(t) for t in (*model.parameters(), cuda.graphs[0])]
    assert model._triton_runner.holds()
    assert model._triton_runner._fingerprint
    cuda.graphs.clear()
    gc.disable()
    try:
        del model
        assert not any(ref() is not None for ref in kept)
    finally:
        gc.enable()


def test_another_class_of_the_model_itself(cuda):
    model, x = small(), images()
    captured(model, x)
    model.__class__ = type("Other", (type(model),), {"_head": lambda self, x: x})
    assert torch.equal(model(x), model._forward_impl(x))
    assert cuda.graphs[0].replays == 0


def test_another_dict_of_the_model_itself(cuda):
    model, x = small(), images()
    model.normalize = (0.5,) * 3, (0.5,) * 3
    x = images().clamp(0, 1).mul(255).byte()
    captured(model, x)
    model.__dict__ = vars(model).copy()
    captured(model, x)
    model.normalize = (0.25,) * 3, (0.5,) * 3
    assert torch.equal(model(x), model._forward_impl(x))
    assert cuda.graphs[0].replays == 0


def test_revert_frees(cuda):
    model = optimize(torchvision.models.resnet18(num_classes=3).eval(), inplace=True)
    captured(model, images(size=32))
    assert len(cuda.graphs) == 1
    revert(model)
    assert dead(cuda)
    assert not {"_triton_runner", "cuda_graph", "frozen"} & set(vars(model))


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside"])
def test_a_move_frees(cuda, inside):
    model = small()
    captured(model, images())
    whole = nn.Sequential(model) if inside else model
    whole.half()
    assert dead(cuda)


# --- threads ---------------------------------------------------------------------------------------------------------


def test_models_do_not_wait_for_each_other(cuda):
    """While one is in a replay, and while it captures, another is called."""
    x = images()
    models = [small() for _ in range(2)]
    captured(models[0], x)
    captured(models[1], x)
    expected = models[1]._forward_impl(x)
    inside, go_on = threading.Event(), threading.Event()

    def held(*arguments: Any) -> None:
        inside.set()
        go_on.wait(60)
        raise MemoryError

    for owner, name, call in ((cuda.graphs[0], "replay", images()), (cuda, "capture", images(3))):
        inside.clear()
        go_on.clear()
        with mock.patch.object(owner, name, held):
            other = threading.Thread(target=hold_off, args=(models[0], call))
            other.start()
            assert inside.wait(60)
            assert torch.equal(models[1](x), expected)  # or it would wait for ever
            assert models[0]._triton_runner._lock.locked()  # of one model, one call at a time, for its buffers
            go_on.set()
            other.join()
    assert cuda.graphs[1].replays == 2


def hold_off(model: Any, x: Tensor) -> None:
    with torch.no_grad(), contextlib.suppress(MemoryError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captured(model, x)


# --- the public face -------------------------------------------------------------------------------------------------


def test_report_says_what_the_graphs_did(cuda):
    model = small()
    assert report(model).graphs == {"": "cuda_graph='auto'; graphs: none; calls without: none counted"}
    captured(model, images())
    model(images())
    with_grad(model, images())
    line = report(model).graphs[""]
    assert line == (
        "cuda_graph='auto'; graphs: 2x3x16x16 float32 replayed 1 times; "
        "calls without: a shape's first calls 2 times, grad mode is on 1 times"
    )
    assert line in str(report(model))
    frozen = nn.Sequential(small(freeze=True, cuda_graph=False))
    assert str(report(frozen)).splitlines()[-2] == (
        "0: cuda_graph=False, to be frozen at the next call; graphs: none; calls without: none counted"
    )
    frozen(images())
    assert "cuda_graph=False, frozen; " in report(frozen).graphs["0"]


@pytest.mark.parametrize("mode", ["on", 1, None], ids=str)
def test_unknown_mode(mode):
    with pytest.raises(ValueError, match=f"cuda_graph={mode!r}, expected 'auto', True or False"):
        optimize(torchvision.models.resnet18(), cuda_graph=mode)


@pytest.mark.parametrize("modes", [{"cuda_graph": True}, {"freeze": True}], ids=str)
def test_modes_that_need_a_whole_resnet(modes):
    blocks = nn.Sequential(torchvision.models.resnet18().layer1)
    optimize(blocks)
    with pytest.raises(ValueError, match=r"container.Sequential contains no whole ResNet"):
        optimize(blocks, **modes)


def test_optimize_again_changes_the_modes(cuda):
    model, x = small(), images()
    captured(model, x)
    optimize(model, cuda_graph=False, inplace=True)
    model(x)
    assert cuda.graphs[0].replays == 0
    assert optimize(model, freeze=True, inplace=False).frozen
    assert not model.frozen


def test_nothing_to_refresh():
    with pytest.raises(ValueError, match="Linear contains no ResNet of ours"):
        refresh(nn.Linear(2, 2))
