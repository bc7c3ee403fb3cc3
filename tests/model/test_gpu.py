"""What only a GPU can show: CUDA graphs against eager calls, streams, threads, memory, and no waiting."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
from torch import Tensor, nn

import resnet_triton
from resnet_triton import functional, models, optimize, refresh, report
from resnet_triton.config import ConvConfig, ConvShape, lookup
from resnet_triton.config.device import facts
from resnet_triton.graphs import look, replay
from resnet_triton.kernels.launch import Launch
from resnet_triton.ops import conv, first_run
from resnet_triton.ops.trace import trace
from resnet_triton.support import vision
from resnet_triton.tuner.trial import Trial

pytestmark = pytest.mark.gpu

SOFTWARE = torch.cuda.is_available() and torch.cuda.get_device_name() == "Software GPU"
"""A GPU as `software_gpu/` is: right, and slow."""
too_large = pytest.mark.skipif(SOFTWARE, reason="too large for a GPU in software")
inductors_kernels = pytest.mark.skipif(SOFTWARE, reason="the simulator does not know Inductor's kernels")


def small(full: Any, less: Any) -> Any:
    """A size, less on a GPU in software."""
    return less if SOFTWARE else full


EDGE = small(224, 32)
FP32 = pytest.param(torch.float32, marks=too_large, id="torch.float32")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In inference mode, and with no memory left over from the test before."""
    monkeypatch.setattr(replay, "SETTLED", small(replay.SETTLED, 3))
    gc.collect()
    with torch.inference_mode():
        yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


on_hopper = pytest.mark.skipif(not hopper(), reason="needs a GPU of compute capability 9.0")


def build(dtype: torch.dtype = torch.float16, name: str = "", **modes: Any) -> Any:
    """A ResNet-18, or the one of that name."""
    with torch.inference_mode(False):  # parameters that can be edited anywhere
        torch.manual_seed(0)
        resnet18 = models.ResNet(models.BasicBlock, [small(2, 1)] * 4, num_classes=100)
        model = (getattr(resnet_triton, name)(num_classes=100) if name else resnet18).eval()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.running_mean, -0.2, 0.2)
                nn.init.uniform_(m.running_var, 0.5, 2.0)
        return optimize(model.to("cuda", dtype), **modes, inplace=True)


def images(n: int, dtype: torch.dtype = torch.float16, size: int = EDGE, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(n, 3, size, size, device="cuda", generator=generator).to(dtype)


def replays(model: Any) -> int:
    return sum(graph.replays for graph in model._triton_runner._graphs.values())


def captured(model: Any, *inputs: Tensor) -> None:
    for x in inputs:
        model(x)
        model(x)


# --- the same answer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FP32], ids=str)
@pytest.mark.parametrize("n", small([1, 2, 8, 33], [1, 3]))
def test_a_replay_is_bitwise_an_eager_call(n, dtype):
    model = build(dtype)
    captured(model, images(n, dtype))
    for seed in (1, 2):
        x = images(n, dtype, seed=seed)
        assert torch.equal(model(x), model._forward_impl(x))
    assert replays(model) == 2
    assert model._triton_runner._fingerprint._look is look._compiled().look


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel has run yet."""
    monkeypatch.setattr(first_run, "_right", {None})
    monkeypatch.setattr(first_run, "_wrong", {})
    monkeypatch.setattr(first_run, "_tried", Counter())


def test_first_results_are_compared(unproven: None) -> None:
    model, x = build(), images(2)
    for given in (torch.zeros_like(x), x, x):  # of which the first prove nothing of the stem
        model(given)
    assert replays(model) == 1
    launched = {launch.name for call in trace(model, tuple(x.shape)) for launch in call.launches(facts(x.device))}
    assert ", all right\n" in str(report(model, x))
    assert len(first_run._right) > len(launched)  # of a kernel there are several, by constants


@pytest.mark.parametrize("dependent", [
    pytest.param(False, id="in the first call"), pytest.param(True, id="in the graph alone", marks=on_hopper),
])  # fmt: skip
def test_a_wrong_kernel_is_not_launched_again(dependent: bool, unproven: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found at its first run, whether that is the model's first call or the one before its capture."""
    model, x = build(), images(2)
    right = model(x).clone()
    name = next(launch.name for call in trace(model, tuple(x.shape)) if call.operator == "conv_bn_relu"
                for launch in call.launches(facts(x.device)))  # fmt: skip
    run = Launch.run
    resnet_triton.refresh(model)
    first_run._right.intersection_update({None})

    def wrong(launch: Launch) -> Any:
        compiled = run(launch)
        if launch.name == name and launch.dependent >= dependent:
            written = launch.arguments.get("y_ptr", launch.arguments.get("y_desc"))
            getattr(written, "base", written).add_(1)
        return compiled

    monkeypatch.setattr(Launch, "run", wrong)
    with pytest.warns(RuntimeWarning, match=rf"{name}.* gave a wrong result on this GPU"):
        captured(model, x)
    torch.testing.assert_close(model(x), right, rtol=1e-2, atol=1e-2)
    assert replays(model) == 1


@pytest.mark.parametrize("n", small([1, 33], [1, 3]))
def test_images_that_stay_are_read_where_they_are(n):
    model, x = build(), images(n)
    captured(model, x)
    for seed in range(replay.SETTLED + 4):
        x.copy_(images(n, seed=seed))
        other = images(n, seed=seed + 100)
        for given in (x, other):
            assert torch.equal(model(given), model._forward_impl(given))
    (graphs,) = model._triton_runner._graphs.values()
    assert x.data_ptr() in graphs.there
    size, kept = x.untyped_storage().nbytes(), torch.cuda.memory_allocated()
    del x, given
    assert torch.cuda.memory_allocated() <= kept - size  # no graph keeps it
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    again = images(n, seed=5)  # perhaps where the first ones were
    for _ in range(2):
        assert torch.equal(model(again), model._forward_impl(again))


def test_inputs_of_a_compiled_model_that_stay_are_read_where_they_are():
    layers = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    with torch.inference_mode(False):
        torch.manual_seed(0)
        model = nn.Sequential(*layers).eval().to("cuda", torch.float16)
        plain = copy.deepcopy(model)
        optimize(model, cuda_graph=True)
    x = torch.randn(4, 8, 6, 6, device="cuda", dtype=torch.float16)
    for seed in range(replay.SETTLED + 6):
        x.normal_(generator=torch.Generator("cuda").manual_seed(seed))
        torch.testing.assert_close(model(x), plain(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("layout", ["channels_last", "strided", "expanded"])
def test_inputs_of_any_layout(layout):
    model = build()
    x = images(4, size=EDGE + 2)
    x = {"channels_last": x.contiguous(memory_format=torch.channels_last), "strided": x[:, :, ::2, ::2],
         "expanded": x[:1].expand(4, -1, -1, -1)}[layout]  # fmt: skip
    captured(model, x)
    assert torch.equal(model(x), model._forward_impl(x))
    assert replays(model) == 1


def test_bytes():
    model = build()
    model.normalize = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x = (images(2).abs() * 80).clamp(0, 255).to(torch.uint8)
    captured(model, x)
    assert torch.equal(model(x), model._forward_impl(x))
    assert replays(model) == 1


@pytest.mark.parametrize("name", ["resnet50", "grouped"])
def test_other_architectures(name):
    """Grouped convolutions run on cuDNN, inside the graph."""
    if name == "resnet50":
        model = build(name=name)
    else:
        with torch.inference_mode(False):
            model = models.ResNet(models.Bottleneck, [1, 1, 1, 1], groups=32, width_per_group=4).eval().cuda().half()
    captured(model, images(2))
    x = images(2, seed=1)
    torch.testing.assert_close(model(x), model._forward_impl(x), rtol=2e-3, atol=2e-3)
    assert replays(model) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -0.0], ids=str)
def test_special_values_come_out_as_from_cudnn(value, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight, residual = (
        torch.randint(-1, 2, shape, device="cuda", generator=generator).to(dtype)
        for shape in ((8, 64, 14, 14), (64, 64, 3, 3), (8, 64, 14, 14))
    )
    x[0, 3, 5, 7] = x[7, 63, 13, 13] = residual[1, 2, 3, 4] = value
    mean, var, ones = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda"), torch.ones(64, device="cuda")
    answers = [
        functional.conv_bn_relu(x, weight, mean, var, ones, mean, 0.0, padding=1, residual=residual, kernels=kernels)
        for kernels in ("triton", "torch")
    ]
    torch.testing.assert_close(*answers, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(*(y.signbit() & (y == 0) for y in answers))


@too_large
def test_more_elements_than_int32_counts():
    """2,700 images: 2.2 billion elements in front of the pool."""
    model = build(cuda_graph=False)
    y = model(images(1).expand(2700, -1, -1, -1))
    torch.testing.assert_close(y, y[:1].expand_as(y), rtol=0, atol=0)
    torch.testing.assert_close(y[:1], model(images(1)), rtol=5e-3, atol=5e-3)
    x = torch.randn(1, 64, 112, 112, device="cuda").half().expand(2700, -1, -1, -1)
    pooled = functional.max_pool2d(x.contiguous(memory_format=torch.channels_last), 3, 2, 1, kernels="triton")
    assert torch.equal(pooled[-1], pooled[0])


def test_250_calls_of_60_images_are_bitwise_equal():
    model = build()
    x = images(small(60, 2))
    expected = model._forward_impl(x)
    for i in range(250):
        assert torch.equal(model(x), expected), i
    assert replays(model) == 248


@pytest.mark.parametrize("dtype", [FP32, torch.float16, torch.bfloat16], ids=str)
def test_an_image_is_computed_alike_in_any_batch(dtype):
    """At batch sizes to which the heuristic gives other tiles, splits and boxes; graphs and eager calls alike."""
    model = build(dtype, batch_invariant=True)
    x = images(small(256, 4), dtype)
    expected = model._forward_impl(x)
    parts = (1, 0), (1, 17), (1, 255), (2, 8), (7, 100), (32, 224), (33, 5), (129, 60)
    for n, start in small(parts, ((1, 0), (1, 3), (3, 1))):
        part = x[start : start + n].clone()
        for _ in range(3):
            assert torch.equal(model(part), expected[start : start + n]), (n, start)


def test_deterministic_algorithms():
    """Then PyTorch fills every new tensor with NaN, also inside a graph."""
    torch.use_deterministic_algorithms(True)
    try:
        model = build()
        captured(model, images(2))
        x = images(2, seed=1)
        assert torch.equal(model(x), model._forward_impl(x))
        assert replays(model) == 1
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("graphs", ["auto", False], ids=["graph", "eager"])
def test_frozen(graphs):
    model, x = build(freeze=True, cuda_graph=graphs), images(4)
    live = model._forward_impl(x)
    for _ in range(3):
        torch.testing.assert_close(model(x), live, rtol=2e-3, atol=2e-3)
    before = model(x)
    model.bn1.running_var.mul_(4)
    assert torch.equal(model(x), before)
    refresh(model)
    torch.testing.assert_close(model(x), model._forward_impl(x), rtol=2e-3, atol=2e-3)
    assert not torch.equal(model(x), before)


# --- edits -----------------------------------------------------------------------------------------------------------


def twice(model: Any) -> dict[str, Tensor]:
    return {k: v * 2 if v.is_floating_point() else v for k, v in model.state_dict().items()}


EDITS: dict[str, Callable[[Any], Any]] = {
    "weight": lambda m: m.layer1[0].conv1.weight.mul_(2),
    "statistics": lambda m: m.bn1.running_var.mul_(2),
    "load_state_dict": lambda m: m.load_state_dict(twice(m)),
    "load_state_dict-assign": lambda m: m.load_state_dict(twice(m), assign=True),
    "data": lambda m: setattr(m.conv1.weight, "data", m.conv1.weight.data * 2),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "contiguous": lambda m: m.to(memory_format=torch.contiguous_format),
    "module": lambda m: setattr(m, "fc", nn.Linear(512, 10, device="cuda", dtype=torch.float16)),
    "eps": lambda m: setattr(m.bn1, "eps", 0.5),
    "hook": lambda m: m.layer2[0].register_forward_hook(lambda module, arguments, output: output * 2),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_show_at_the_next_call(edit):
    model, x = build(), images(2)
    captured(model, x)
    before = model(x)
    with torch.inference_mode(False), torch.no_grad():
        EDITS[edit](model)
    x = x.to(model.conv1.weight.dtype)
    expected = model._forward_impl(x)
    for _ in range(4):
        y = model(x)
        assert torch.equal(y, expected)
    if edit != "contiguous":
        assert y.shape != before.shape or not torch.equal(y.half(), before)


def test_captured_in_inference_mode_and_replayed_outside():
    model, x = build(), images(2)
    captured(model, x)
    with torch.inference_mode(False), torch.no_grad():
        x = x.clone()
        assert torch.equal(model(x), model._forward_impl(x))
    assert replays(model) == 1


class Denoiser(nn.Module):
    """Not torchvision's, of two inputs, one of them integers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.steps = nn.Conv2d(3, 64, 3, padding=1), nn.Embedding(10, 64)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        return (self.conv(x) * self.steps(step)[:, :, None, None].sigmoid()).mean((2, 3))


@pytest.mark.parametrize("rest", ["eager", pytest.param("inductor", marks=inductors_kernels)])
def test_a_compiled_model_of_two_inputs(rest):
    with torch.inference_mode(False):
        model = optimize(Denoiser().eval().half().cuda(), cuda_graph=True)
    options = {"cuda_graph": True, "rest": rest}
    functions = [model, torch.compile(model, backend="resnet_triton", dynamic=False, options=options)]
    for i in range(5):
        x, step = images(2, seed=i), torch.tensor([i, 9 - i], device="cuda")
        with resnet_triton.disabled(model):
            expected = model(x, step)
        for function in functions:
            torch.testing.assert_close(function(x, step), expected, rtol=1e-2, atol=1e-2)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert "replayed 0 times" not in str(report(model, (x, step)).graphs)


# --- streams and threads ---------------------------------------------------------------------------------------------


@on_hopper
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_images_are_read_where_they_are(layout):
    model = build()
    model.normalize = (0.5,) * 3, (0.25,) * 3
    for x in (images(2), images(2).mul(50).clamp(0, 255).byte()):
        x = x.contiguous(memory_format=layout)
        captured(model, x)
        (*_, graphs) = model._triton_runner._graphs.values()
        assert graphs.anywhere.input.shape == (2, 64, EDGE // 4, EDGE // 4), "behind the stem"
        for n in range(4):  # at other addresses, one of them not a multiple of 16
            memory = torch.cat([x.flatten()[:n], (x + n).permute(0, 2, 3, 1).flatten()])[n:]
            y = memory.view(2, EDGE, EDGE, 3).permute(0, 3, 1, 2) if layout is torch.channels_last else x + n
            assert torch.equal(model(y), model._forward_impl(y))
    assert replays(model) >= 4


def test_several_streams():
    model = build()
    inputs = [images(n, seed=n) for n in small((1, 2, 8, 16), (1, 2, 3, 4))]
    expected = [model._forward_impl(x) for x in inputs]
    captured(model, *inputs)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for i in range(60):
        with torch.cuda.stream(streams[i % 3]):
            results.append((i % 4, model(inputs[i % 4])))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected[which]) for which, y in results)
    assert replays(model) == 60


def test_several_threads():
    model = build()
    inputs = [images(n, seed=n) for n in (1, 2, small(8, 3))]
    expected = [model._forward_impl(x) for x in inputs]
    torch.cuda.synchronize()
    failures: list[str] = []

    def work(first: int) -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
                for i in range(first, first + 50):
                    if not torch.equal(model(inputs[i % 3]), expected[i % 3]):
                        failures.append(f"call {i} is wrong")
        except BaseException as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(model._triton_runner._graphs) == 3


def test_a_thread_that_has_not_used_the_gpu_before():
    """Nor has it a CUDA context. No kernel is replaced by another, of which there would be a warning."""
    model, x = build(cuda_graph=False), images(2)
    expected = model(x)
    answers: list[Any] = []

    def work() -> None:
        try:
            with torch.inference_mode():
                answers.append(model(x))
        except BaseException as error:
            answers.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(answers[0], expected)


def test_inside_the_users_own_graph():
    model, x = build(), images(2)
    captured(model, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    x.copy_(images(2, seed=1))
    graph.replay()
    assert torch.equal(y, model._forward_impl(x))
    assert replays(model) == 0


def test_a_compiled_model_that_somebody_captures_at_once():
    """Nothing is made in the capture that later calls read: its filters move at the call behind it."""
    known, model, x, graph = chain(), chain(), images(2, size=6), torch.cuda.CUDAGraph()
    expected = model(x)
    optimize(known)(x)  # whose kernels are loaded: without, the capture would fail
    optimize(model)
    with pytest.warns(RuntimeWarning, match="Sequential is captured as it was written"), torch.cuda.graph(graph):
        y = model(x)
    graph.replay()
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
    for _ in range(2):
        torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)


def test_somebody_captures_other_sizes_than_those_that_were_called():
    model, x, other, graph = chain(), images(2, size=6), images(3, size=6), torch.cuda.CUDAGraph()
    expected, wanted = model(x), model(other)
    optimize(model, cuda_graph=False)(x)
    with torch.cuda.graph(graph):
        y = model(other)
    torch.testing.assert_close(model(other), wanted, rtol=1e-2, atol=1e-2)  # before anything was replayed
    torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)
    graph.replay()
    torch.testing.assert_close(y, wanted, rtol=1e-2, atol=1e-2)


@inductors_kernels
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # Inductor's first one
def test_inside_the_graphs_of_inductor():
    """They lend a call memory, and refuse one that keeps some of it."""
    model, x = build(cuda_graph=False), images(1)
    expected = model(x)
    fast = torch.compile(model, mode="reduce-overhead", dynamic=False)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(fast(x).clone(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_somebody_captures_another_device_than_the_current_one():
    with torch.cuda.device(1):
        model, x, graph, stream = chain(), images(2, size=6), torch.cuda.CUDAGraph(), torch.cuda.Stream()
        optimize(model, cuda_graph=True)
        captured(model, x)
        expected = model(x)
        with torch.cuda.graph(graph, stream=stream), torch.cuda.device(0):
            y = model(x)
        graph.replay()
        torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    with torch.cuda.device(1):
        model, x = build(), images(2)
    captured(model, x)
    assert torch.equal(model(x), model._forward_impl(x))
    assert replays(model) == 1


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_replay_does_not_wait():
    model, x, y = build(), images(2), images(small(8, 3))
    captured(model, x, y)
    with no_waiting():
        for _ in range(3):
            model(x)
            model(y)
    assert replays(model) == 6


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_capture_waits_even_where_that_is_made_an_error():
    model, x = build(), images(2)
    with no_waiting():
        captured(model, x)
        assert torch.cuda.get_sync_debug_mode() == 2
    model(x)
    assert replays(model) == 1
    torch.cuda.synchronize()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_freezing_waits_even_where_that_is_made_an_error():
    """For a snapshot is taken on one stream, and read on others."""
    model, x, streams = build(freeze=True), images(2), [torch.cuda.Stream() for _ in range(2)]
    expected = model._forward_impl(x)
    torch.cuda.synchronize()
    with no_waiting():
        answers = [on_stream(stream, model, x) for stream in streams]
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in answers)


def on_stream(stream: torch.cuda.Stream, model: Any, x: Tensor) -> Tensor:
    with torch.cuda.stream(stream):
        return model(x)


def chain() -> nn.Module:
    with torch.inference_mode(False):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval().half().cuda()


def test_what_a_first_call_makes_is_there_for_other_streams():
    """Filters in another order, and a missing norm's statistics."""
    for model in (chain(), chain().to(memory_format=torch.channels_last)):
        x = images(2, size=6)
        expected = model(x)
        optimize(model, cuda_graph=False)
        torch.cuda.synchronize()
        answers = [on_stream(torch.cuda.Stream(), model, x) for _ in range(3)]
        torch.cuda.synchronize()
        for y in answers:
            torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


def test_filters_are_moved_between_the_calls_of_all_streams():
    model, x, stream = chain(), images(2, size=6), torch.cuda.Stream()
    expected = model(x)
    optimize(model, cuda_graph=False)(x)
    torch.cuda.synchronize()
    for _ in range(small(20, 6)):
        y = on_stream(stream, model, x)
        model.train()
        others = [torch.full((16, 3, 3, 3), 7.0, dtype=torch.float16, device="cuda") for _ in range(20)]
        torch.cuda.current_stream().synchronize()
        model.eval()
        z = on_stream(stream, model, x)
        torch.cuda.synchronize()
        del others
        for answer in (y, z):
            torch.testing.assert_close(answer, expected, rtol=1e-2, atol=1e-2)


def test_a_capture_takes_nothing_of_other_threads():
    """Whichever of PyTorch's streams they have: there are 32, which it hands out in turns."""
    model, x, counts = build(), images(2), torch.zeros(32, device="cuda")
    counts += 0  # the kernel is loaded
    streams = [torch.cuda.Stream() for _ in counts]
    torch.cuda.synchronize()

    def elsewhere() -> None:
        with torch.inference_mode():
            for stream, count in zip(streams, counts, strict=True):
                with torch.cuda.stream(stream):
                    count += 1

    def head(y: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            other = threading.Thread(target=elsewhere)
            other.start()
            other.join()
        return type(model)._head(model, y)

    model._head = head
    captured(model, x)
    for _ in range(2):
        assert torch.equal(model(x), model._forward_impl(x))
    assert replays(model) == 2
    torch.cuda.synchronize()
    assert counts.eq(1).all()


def test_a_replay_returns_before_the_gpu_is_done():
    model, x = build(), images(small(8, 2))
    captured(model, x)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # cycles: half a second
    done = torch.cuda.Event()
    model(x)
    done.record()
    assert not done.query()


def test_kernels_of_a_compiled_model_are_compiled_beside_each_other(monkeypatch):
    """All of them, those of its graph too, before any is launched."""
    threads = []
    listener = triton.knobs.compilation, "listener", lambda **event: threads.append(threading.get_ident())
    monkeypatch.setattr(*listener)
    layers = nn.Conv2d(8, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(24, 40, 3)
    model = optimize(nn.Sequential(*layers).eval().cuda().half())
    x = torch.randn(2, 8, 20, 20, device="cuda").half()
    for _ in range(3):
        model(x)
    assert threads
    assert threading.get_ident() not in threads


# --- memory and failures ---------------------------------------------------------------------------------------------


def test_the_least_recently_used_graph_goes_first():
    model = build()
    sizes = range(1, replay.LIMIT + 3)
    for n in sizes:
        captured(model, images(n, size=small(64, 32)))
        model(images(n, size=small(64, 32)))
    assert len(model._triton_runner._graphs) == replay.LIMIT
    for n in sizes:
        x = images(n, size=small(64, 32), seed=1)
        assert torch.equal(model(x), model._forward_impl(x))


def too_much() -> None:
    torch.empty(1 << 48, dtype=torch.uint8, device="cuda")


def forbidden() -> None:
    torch.ones(1, device="cuda").item()


@pytest.mark.parametrize("action", [too_much, forbidden])
def test_a_failed_capture_leaves_the_model_usable(action):
    model, x = build(), images(2)
    captured(model, images(1))
    expected = model._forward_impl(x)

    def head(y: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            action()
        return type(model)._head(model, y)

    model._head = head
    model(x)
    stream = torch.cuda.current_stream()
    with pytest.warns(RuntimeWarning, match=f"no CUDA graph for 2x3x{EDGE}x{EDGE} float16, its capture failed"):
        y = model(x)
    assert torch.cuda.current_stream() == stream
    assert torch.equal(y, expected)
    del model._head
    torch.cuda.empty_cache()  # raises while the allocator believes that a capture is under way
    torch.rand(1, device="cuda")  # and so does the generator
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert replays(model) == 1
    for n in (3, 1):
        captured(model, images(n))
        assert torch.equal(model(images(n)), model._forward_impl(images(n)))
    assert replays(model) >= 3
    assert "the capture failed 1 times" in report(model).graphs[""]


@pytest.mark.parametrize("method", ["capture_begin", "capture_end"])
def test_ctrl_c_at_the_ends_of_a_capture(method, monkeypatch):
    model, x = build(), images(2)
    expected = model(x)
    real = getattr(torch.cuda.CUDAGraph, method)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        monkeypatch.undo()
        real(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda.CUDAGraph, method, interrupted)
    stream = torch.cuda.current_stream()
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert torch.cuda.current_stream() == stream
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.rand(1, device="cuda")
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert replays(model) == 1


def test_garbage_spoils_no_capture():
    """Python would collect it any time. What destroys a graph is forbidden while another is captured."""
    model, x, graph = build(), images(2), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.clone()
    graphs = [graph]
    del graph

    def head(y: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            garbage: list[Any] = [graphs.pop()]
            for _ in range(10_000):
                garbage.append(garbage)
                garbage = []
        return type(model)._head(model, y)

    model._head = head
    captured(model, x)
    assert torch.equal(model(x), model._forward_impl(x))
    assert not graphs
    assert replays(model) == 1


class Gram(nn.Module):
    """A product behind a convolution that cuBLAS splits, in a workspace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).transpose(0, 1).flatten(1) / 16
        return y @ y.t()


def test_a_graph_has_the_workspace_that_it_computes_in_for_itself():
    """Beside a graph that computes at the same time, and when that is gone."""
    x, expected, streams = images(8), [], [torch.cuda.Stream(), torch.cuda.Stream()]
    with torch.inference_mode(False):
        grams = [optimize(Gram().eval().half().cuda(), cuda_graph=True) for _ in streams]
    for model in grams:
        expected.append([model(x) for _ in range(3)][-1])
    torch.cuda.synchronize()
    answers: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for model, stream, found in zip(grams, streams, answers, strict=True):
            with torch.cuda.stream(stream):
                found.append(model(x))
    torch.cuda.synchronize()
    for found, y in zip(answers, expected, strict=True):
        assert all(torch.equal(answer, y) for answer in found)
    refresh(grams[0])
    gc.collect()
    torch.cuda.empty_cache()
    memory = torch.full((64 << 20,), 7, dtype=torch.uint8, device="cuda")
    assert torch.equal(grams[1](x), expected[1])
    assert memory.eq(7).all()
    assert "replayed 52 times" in str(report(grams[1], x.shape).graphs)


def peak(model: Any, x: Tensor) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(4):
        model(x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@too_large
def test_a_batch_of_256_needs_half_of_torchvisions_memory():
    x = images(256).contiguous(memory_format=torch.channels_last)
    model = vision.torchvision().models.resnet18(num_classes=100).eval().cuda().half()
    theirs = peak(model.to(memory_format=torch.channels_last), x)
    del model
    ours = peak(build(), x)
    assert ours <= theirs / 2, (ours, theirs)


def test_graphs_give_their_memory_back():
    model, x = build(), images(small(64, 3))
    model._forward_impl(x)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    captured(model, x)
    assert torch.cuda.memory_reserved() > before
    refresh(model)
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


def test_graphs_of_a_compiled_model_give_their_memory_back():
    x = images(8)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with torch.inference_mode(False):
        model = optimize(Gram().eval().half().cuda(), cuda_graph=True)
    for _ in range(3):
        model(x)
    assert torch.cuda.memory_reserved() > before
    del model
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


# --- kernels that only a GPU runs, or that are off by default ---------------------------------------------------------


@pytest.mark.parametrize("split", [2, 4, 9])
def test_shared_tiles_are_exact_and_repeatable(split):
    shape = ConvShape(3, 256, 14, 14, 256, 3, 3, padding=(1, 1), residual=True)
    chosen = ConvConfig(64, 64, 64, 4, 3, None, split)
    trial = Trial(shape, torch.device("cuda"), 0)
    assert all(trial.is_exact(chosen) for _ in range(small(50, 2)))


@too_large
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("n", [1, 8, 32, 128, 256])
def test_every_run_of_what_is_shipped_is_exact(n, dtype):
    """A hundred alone, a hundred beside another stream, a hundred in a graph."""
    with torch.inference_mode(False):
        calls = trace(resnet_triton.resnet18().eval(), (n, 3, 224, 224), getattr(torch, dtype))
    where = torch.device("cuda")
    pairs = {(call.shape, lookup(call.shape, facts(where))) for call in calls if call.operator == "conv_bn_relu"}
    wrong_runs = pytest.importorskip("benchmarks.wrong_runs").wrong_runs
    wrong = {pair: wrong_runs(Trial(pair[0], where, 0), pair[1]) for pair in pairs}
    assert len(wrong) == 14
    assert {pair: counts for pair, counts in wrong.items() if any(counts.values())} == {}


@too_large
@on_hopper
def test_every_run_of_what_was_wrong_once_is_exact():
    """Two configurations and their siblings."""
    wrong_runs = pytest.importorskip("benchmarks.wrong_runs").wrong_runs
    siblings = pytest.importorskip("benchmarks.gpu_phases").SIBLINGS
    trials = {shape: Trial(shape, torch.device("cuda"), 0) for shape, _ in siblings.values()}
    wrong = {key: wrong_runs(trials[shape], chosen) for key, (shape, chosen) in siblings.items()}
    assert {key: counts for key, counts in wrong.items() if any(counts.values())} == {}


@pytest.mark.skipif(SOFTWARE, reason="cuda.bindings asks a runtime of its own")
@on_hopper
def test_dependent_launches_are_dependent_in_a_graph(monkeypatch):
    """Each starts when the kernel before lets it, not when that has ended. The first has none before."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", functools.partial(torch.cuda.CUDAGraph, keep_graph=True))
    run, dependent = Launch.run, []

    def recorded(launch: Launch) -> None:
        if torch.cuda.is_current_stream_capturing():
            dependent.append(launch.dependent)
        run(launch)

    monkeypatch.setattr(Launch, "run", recorded)
    model, x = build(), images(1)
    captured(model, x)
    (graphs,) = model._triton_runner._graphs.values()
    graph = graphs.anywhere
    error, *_, count = runtime.cudaGraphGetEdges(graph.graph.raw_cuda_graph(), numEdges=0)
    assert int(error) == 0
    error, _, _, edges, _ = runtime.cudaGraphGetEdges(graph.graph.raw_cuda_graph(), numEdges=count)
    assert int(error) == 0
    programmatic = runtime.cudaGraphDependencyType.cudaGraphDependencyTypeProgrammatic
    assert sum(int(edge.type) == int(programmatic) for edge in edges) == sum(dependent[1:]) > 0
    assert torch.equal(model(x), model._forward_impl(x))


def test_a_graph_lends_its_launches_semaphores_that_stay_at_zero(monkeypatch):
    model = build()
    lent = []
    take = conv.semaphores_for

    def recorded(where: torch.device, tiles: int) -> Tensor:
        semaphores = take(where, tiles)
        lent.append((torch.cuda.is_current_stream_capturing(), semaphores.data_ptr()))
        return semaphores

    monkeypatch.setattr(conv, "semaphores_for", recorded)
    captured(model, images(1))
    (graphs,) = model._triton_runner._graphs.values()
    graph = graphs.anywhere
    assert (True, graph.semaphores.data_ptr()) in lent, "a layer of one image is shared"
    assert all(pointer == graph.semaphores.data_ptr() for capturing, pointer in lent if capturing)
    for seed in range(3):
        model(images(1, seed=seed))
    assert not graph.semaphores.any()
