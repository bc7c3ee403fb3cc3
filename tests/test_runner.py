"""The runner: when it captures, replays and captures again, on a CPU with a fake of CUDA's graphs."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_triton
from resnet_triton import fingerprint, models, optimize, precision, refresh, report, revert, runner, vision

torchvision = vision.torchvision()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Graphs in the place of CUDA's, on CPU tensors."""
    fake = FakeCuda()
    monkeypatch.setattr(runner, "cuda", fake)
    return fake


def small(**modes: Any) -> models.ResNet:
    """A ResNet with one block a stage and batch norms that do something."""
    torch.manual_seed(0)
    model = models.ResNet(models.BasicBlock, [1, 1, 1, 1], num_classes=512).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.2, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
            nn.init.uniform_(m.bias, -0.2, 0.2)
    return optimize(model, **modes, inplace=True)


def images(n: int = 2, size: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(n)).to(dtype)


def captured(model: Any, *inputs: Tensor) -> None:
    """Call twice: afterwards each input has its graph."""
    for x in inputs:
        model(x)
        model(x)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


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
        expected = model.body(x)
        assert torch.equal(model(x), expected)
        counts.append(len(cuda.graphs))
    assert counts == captures
    assert sum(g.replays for g in cuda.graphs) == replays


def test_default_is_auto(cuda):
    model = resnet_triton.resnet18(num_classes=3).eval()
    captured(model, images(size=32))
    assert len(cuda.graphs) == 1


def test_kernels_torch_is_left_alone_unless_graphs_are_forced(cuda):
    captured(small(kernels="torch"), images())
    assert not cuda.graphs
    captured(small(kernels="torch", cuda_graph=True), images())
    assert len(cuda.graphs) == 1


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
    assert torch.equal(model(other), model.body(other))
    assert [g.replays for g in cuda.graphs] == [0]
    captured(model, other)
    assert len(cuda.graphs) == 2
    assert cuda.graphs[1].beside is cuda.graphs[0]
    assert torch.equal(model(x), model.body(x))


@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, :, ::2, ::2], lambda x: x[:1].expand(2, 3, 16, 16), lambda x: torch._neg_view(x)],
    ids=["strided", "expanded", "negative"],
)
def test_inputs_of_any_layout(cuda, view):
    model = small()
    x = view(images())
    captured(model, x)
    assert torch.equal(model(x), model.body(x))
    assert cuda.graphs[0].replays == 1


def test_bytes(cuda):
    model = small()
    model.normalize = ((0.5,) * 3, (0.25,) * 3)
    x = (images() * 50).clamp(0, 255).to(torch.uint8)
    captured(model, x)
    assert torch.equal(model(x), model.body(x))
    assert cuda.graphs[0].replays == 1


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


# --- edits -----------------------------------------------------------------------------------------------------------


IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "weight": lambda m: m.layer1[0].conv1.weight.mul_(2),
    "weight-data": lambda m: m.fc.weight.data.mul_(2),
    "statistics": lambda m: m.layer4[0].bn2.running_var.mul_(2),
    "load_state_dict": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
}


@pytest.mark.parametrize("edit", IN_PLACE)
def test_edits_in_place_need_no_new_graph(cuda, edit):
    model, x = small(), images()
    captured(model, x)
    before = model(x)
    IN_PLACE[edit](model)
    assert torch.equal(model(x), model.body(x))
    assert not torch.equal(model(x), before)
    assert len(cuda.graphs) == 1
    assert cuda.graphs[0].replays == 3


def doubled(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output * 2


def set_data(parameter: Any, change: Callable[[Tensor], Tensor]) -> None:
    parameter.data = change(parameter.data)


def narrow(model: Any) -> None:
    """Fewer classes, in the memory that was there."""
    set_data(model.fc.weight, lambda t: t[:7])
    set_data(model.fc.bias, lambda t: t[:7])


def trained(model: Any) -> None:
    with torch.no_grad():
        model.train()(images(4))
    model.eval()
    model.bn1.train()


REPLACED: dict[str, Callable[[Any], Any]] = {
    "data": lambda m: set_data(m.conv1.weight, lambda t: t * 2),
    "data-transposed": lambda m: set_data(m.fc.weight, lambda t: t.t()),
    "data-narrower": narrow,
    "parameter": lambda m: setattr(m.fc, "bias", nn.Parameter(m.fc.bias * 2)),
    "parameter-removed": lambda m: setattr(m.fc, "bias", None),
    "buffer": lambda m: setattr(m.bn1, "running_mean", m.bn1.running_mean + 1),
    "load_state_dict-assign": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True),
    "eps": lambda m: setattr(m.bn1, "eps", 0.5),
    "stride": lambda m: setattr(m.layer1[0].conv2, "dilation", (2, 2)) or setattr(m.layer1[0].conv2, "padding", (2, 2)),
    "module": lambda m: setattr(m, "fc", nn.Linear(512, 4)),
    "module-deeper": lambda m: setattr(m.layer3[0], "bn1", nn.BatchNorm2d(256).eval()),
    "block-appended": lambda m: m.layer1.append(models.BasicBlock(64, 64).eval()),
    "block-removed": lambda m: m.layer1.__delitem__(0),
    "pool": lambda m: setattr(m.maxpool, "kernel_size", 5) or setattr(m.maxpool, "padding", 2),
    "activation": lambda m: setattr(m.layer2[0], "relu", nn.SiLU()),
    "hook": lambda m: m.layer4[0].register_forward_hook(doubled),
    "pre-hook": lambda m: m.fc.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 2,)),
    "forward": lambda m: setattr(m.layer2[0].bn1, "forward", lambda x: x * 3),
    "parametrization": lambda m: nn.utils.parametrizations.spectral_norm(m.fc) and m.fc.eval(),
    "training": lambda m: m.layer3[0].bn1.train(),
    "trained": trained,
}


@pytest.mark.parametrize("edit", REPLACED)
def test_other_edits_show_at_the_next_call(cuda, edit):
    model, x = small(), images()
    captured(model, x)
    before = model(x)
    assert cuda.graphs[0].replays == 1
    REPLACED[edit](model)
    expected = copy.deepcopy(model).body(x)
    for _ in range(3):
        y = model(x)
        if edit not in ("training", "trained"):  # those move the statistics
            assert torch.equal(y, expected)
        assert not torch.equal(y, before)
    assert cuda.graphs[0].replays == 1  # not one call took the old graph's answer


@pytest.mark.parametrize("edit", ["data", "parameter", "eps", "module"])
def test_captured_again(cuda, edit):
    model, x = small(), images()
    captured(model, x)
    model(x)
    REPLACED[edit](model)
    model(x)
    assert len(cuda.graphs) == 2
    assert torch.equal(model(x), model.body(x))
    assert [g.replays for g in cuda.graphs] == [1, 1]


def test_an_edit_between_captures(cuda):
    model = small()
    captured(model, images(1))
    model.bn1.eps = 0.5
    captured(model, images(2))
    model.bn1.eps = 1e-5  # as when the first was captured, not the second
    for n in (2, 1, 2, 1):
        assert torch.equal(model(images(n)), model.body(images(n)))
    assert [g.replays for g in cuda.graphs[:2]] == [0, 0]


def test_the_memory_of_a_graph_outlives_the_parameter(cuda):
    """A replay that turns out to be outdated must not have read memory that was given away."""
    model, x = small(), images()
    captured(model, x)
    cuda.graphs.clear()  # the fake's records keep memory too
    addresses = {t.data_ptr() for t in model._runner._fingerprint._memory}
    assert addresses == {t.data_ptr() for t in model.state_dict().values() if t.is_floating_point()}
    set_data(model.conv1.weight, torch.clone)
    assert model.conv1.weight.data_ptr() not in addresses  # taken, as long as the fingerprint lives


def test_a_dtype_in_the_same_memory():
    layer = nn.Linear(8, 8).half()
    before = fingerprint.Fingerprint(layer)
    assert before.holds()
    set_data(layer.weight, lambda t: t.view(torch.bfloat16))
    assert not before.holds()


def test_a_value_that_cannot_be_compared(cuda):
    model, x = small(), images()
    model.note = torch.zeros(2)
    captured(model, x)
    model.note = torch.zeros(2)
    assert torch.equal(model(x), model.body(x))
    assert len(cuda.graphs) == 2


def test_a_report_leaves_the_graphs_alone(cuda):
    model, x = small(), images()
    captured(model, x)
    report(model, tuple(x.shape))
    model(x)
    assert len(cuda.graphs) == 1
    assert cuda.graphs[0].replays == 1


# --- calls that need every operator ----------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def with_grad(model: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return model(x)


def with_autocast(model: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def with_a_mode(model: Any, x: Tensor) -> Tensor:
    with Watch():
        return model(x)


def with_a_global_hook(model: Any, x: Tensor) -> Tensor:
    handle = nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    try:
        return model(x)
    finally:
        handle.remove()


def with_a_tangent(model: Any, x: Tensor) -> Tensor:
    with warnings.catch_warnings(), torch.autograd.forward_ad.dual_level():
        warnings.simplefilter("ignore")
        return model(x)


def with_jit_trace(model: Any, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, x, check_trace=False)(x + 1)


CALLS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "grad": (with_grad, "grad mode is on"),
    "autocast": (with_autocast, "autocast is on"),
    "mode": (with_a_mode, "sees every operator"),
    "global-hook": (with_a_global_hook, "a hook on all modules"),
    "tangent": (with_a_tangent, "sees every operator"),
    "jit-trace": (with_jit_trace, "sees every operator"),
    "double": (lambda m, x: m.double()(x.double()), "not a batch of images in"),
    "empty": (lambda m, x: m(x[:0]), "not a batch of images in"),
}


@pytest.mark.parametrize("kind", CALLS)
def test_calls_without_a_graph(cuda, kind):
    call, reason = CALLS[kind]
    model, x = small(), images()
    reference = copy.deepcopy(model)
    reference.cuda_graph = False
    captured(model, x)
    for _ in range(3):
        assert torch.equal(call(model, x), call(reference, x))
    assert len(cuda.graphs) == 1
    assert cuda.graphs[0].replays == 0
    assert any(reason in noted for noted in model._runner.eager)


def test_vmap_sees_every_operator():
    reasons = []
    torch.vmap(lambda x: reasons.append(runner.call_obstacle(x)) or x)(torch.zeros(5, 2, 3, 4, 4))
    assert reasons == ["a transform, a tracer or a mode sees every operator"]


def test_a_stream_that_is_being_captured(cuda):
    model, x = small(), images()
    captured(model, x)
    cuda.available = False
    assert torch.equal(model(x), model.body(x))
    assert cuda.graphs[0].replays == 0


def test_compiled(cuda):
    torch._dynamo.reset()
    model, x = small(), images()
    captured(model, x)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected, rtol=1e-4, atol=1e-4)
    assert cuda.graphs[0].replays == 1
    torch._dynamo.reset()


def test_symbolically_traced(cuda):
    model, x = small(), images()
    captured(model, x)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model.body(x))


def test_wrong_inputs_raise_as_ever(cuda):
    model = small()
    captured(model, images())
    for _ in range(3):
        with pytest.raises(ValueError, match="x has 1 channels, expected 3"):
            model(images()[:, :1])
        with pytest.raises(ValueError, match="expected 4 dimensions"):
            model(images()[0])
    assert len(cuda.graphs) == 1
    assert torch.equal(model(images()), model.body(images()))


class Counting(nn.ReLU):
    """Does more than compute."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


OBSTACLES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook": (lambda m: m.layer2[0].bn1.register_forward_hook(doubled), "layer2.0.bn1 has a hook"),
    "layer-hook": (lambda m: m.layer2.register_forward_hook(doubled), "layer2 has a hook"),
    "training": (lambda m: m.layer3[0].bn2.train(), "layer3.0.bn2 is in training mode"),
    "module": (lambda m: setattr(m.layer1[0], "relu", Counting()), "layer1.0.relu is a Counting"),
}


@pytest.mark.parametrize("kind", OBSTACLES)
def test_models_without_a_graph(cuda, kind):
    edit, reason = OBSTACLES[kind]
    model = small()
    edit(model)
    captured(model, images(), images(3))
    assert not cuda.graphs
    assert any(reason in noted for noted in model._runner.eager)


def test_hooks_on_a_stage_fire(cuda):
    model, x = small(), images()
    plain = model(x)
    model.layer2.register_forward_hook(doubled)
    assert not torch.equal(model(x), plain)


def test_a_demand_that_cannot_be_met_warns_once(cuda):
    model = small(cuda_graph=True)
    with pytest.warns(RuntimeWarning, match="cuda_graph=True, but calls run without a graph: grad mode is on"):
        with_grad(model, images())
    with_grad(model, images())  # a second warning would be an error
    model(images())
    assert len(cuda.graphs) == 1


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_graph_goes_first(cuda, monkeypatch):
    monkeypatch.setattr(runner, "LIMIT", 2)
    model = small()
    captured(model, images(1), images(2))
    model(images(1))
    captured(model, images(3))
    for n in (1, 3, 2):
        assert torch.equal(model(images(n)), model.body(images(n)))
    assert [g.replays for g in cuda.graphs[:3]] == [2, 0, 1]
    assert report(model).graphs[""].count("replayed") == 2


def test_shapes_that_take_turns_are_not_captured_every_time(cuda, monkeypatch):
    monkeypatch.setattr(runner, "LIMIT", 2)
    model = small()
    for _ in range(24):
        for n in (1, 2, 3):
            model(images(n, 8))
    assert len(cuda.graphs) <= 3 * 5  # 24 rounds: at most after 2, 1, 2, 4, 8 calls


def test_shapes_are_forgotten(cuda, monkeypatch):
    monkeypatch.setattr(runner, "_REMEMBERED", 3)
    model = small()
    for n in range(1, 8):
        model(images(n, 8))
    assert len(model._runner._shapes) == 3


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError("no memory"), RuntimeError("not permitted")], ids=["memory", "cuda"]
)
def test_a_failed_capture_leaves_the_model_usable(cuda, failure):
    model, x = small(), images()
    model(x)
    cuda.failure = failure
    with pytest.warns(RuntimeWarning, match=f"no CUDA graph for 2x3x16x16 float32, its capture failed: {failure}"):
        y = model(x)
    assert torch.equal(y, model.body(x))
    cuda.failure = None
    for _ in range(3):
        assert torch.equal(model(x), model.body(x))
    assert not cuda.graphs  # remembered: not tried again
    captured(model, images(3))
    assert len(cuda.graphs) == 1
    assert torch.equal(model(images(3)), model.body(images(3)))
    assert "the capture failed 4 times" in report(model).graphs[""]


# --- copies, moves, the end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy, lambda m: m._replicate_for_data_parallel()],
    ids=["deepcopy", "pickle", "copy", "replica"],
)
def test_copies_start_afresh(cuda, copied):
    model, x = small(), images()
    state = list(model.state_dict())
    captured(model, x)
    assert list(model.state_dict()) == state
    other = copied(model)
    if other._modules is not model._modules and other.conv1 is not model.conv1:
        other.conv1.weight.mul_(2)
    assert torch.equal(other(x), other.body(x))
    assert len(cuda.graphs) == 1
    assert cuda.graphs[0].replays == 0


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


def test_revert_frees(cuda):
    model = optimize(torchvision.models.resnet18(num_classes=3).eval(), inplace=True)
    captured(model, images(size=32))
    assert len(cuda.graphs) == 1
    revert(model)
    assert dead(cuda)
    assert not {"_runner", "cuda_graph", "frozen"} & set(vars(model))


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside"])
def test_a_move_frees(cuda, inside):
    model = small()
    captured(model, images())
    whole = nn.Sequential(model) if inside else model
    whole.half()
    assert dead(cuda)


def test_a_move_to_where_it_is_changes_nothing(cuda):
    model, x = small(), images()
    captured(model, x)
    model.to("cpu").float().eval()
    model(x)
    assert cuda.graphs[0].replays == 1


# --- threads ---------------------------------------------------------------------------------------------------------


def test_threads_share_graphs(cuda):
    """The fake refuses replays that overlap, and spoils the buffers between them."""
    model = small()
    inputs = [images(n, 8) for n in (1, 2, 3)]
    expected = [model.body(x) for x in inputs]
    failures: list[str] = []

    def work(first: int) -> None:
        try:
            with torch.inference_mode():
                for i in range(first, first + 15):
                    if not torch.equal(model(inputs[i % 3]), expected[i % 3]):
                        failures.append(f"call {i} is wrong")
        except BaseException as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(before)
    assert not failures
    assert len(cuda.graphs) == 3
    assert sum(g.replays for g in cuda.graphs) >= 60 - 3 * (4 + 2)


# --- frozen models ---------------------------------------------------------------------------------------------------


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graph"])
def test_a_frozen_model_is_a_snapshot_of_its_batch_norms(request, graphs):
    cuda = request.getfixturevalue("cuda") if graphs else None
    model, x = small(freeze=True), images()
    live = model.body(x)
    for _ in range(3):
        assert close(model(x), live)
    before = model(x)
    model.bn1.running_var.mul_(4)
    model.layer1[0].bn1.weight = nn.Parameter(model.layer1[0].bn1.weight * 2)
    model.layer2[0].bn1.eps = 0.5
    for _ in range(3):
        assert torch.equal(model(x), before)
    assert not close(before, model.body(x))
    assert refresh(model) is model
    for _ in range(3):
        assert close(model(x), model.body(x))
    if cuda is not None:
        assert [g.replays for g in cuda.graphs] == [5, 1]


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graph"])
def test_a_frozen_model_reads_filters_in_place(request, graphs):
    if graphs:
        request.getfixturevalue("cuda")
    model, x = small(freeze=True), images()
    captured(model, x)
    model.layer1[0].conv1.weight.mul_(2)
    model.fc.bias.add_(1)
    assert close(model(x), model.body(x))


def test_a_frozen_model_looks_for_no_changes(cuda, monkeypatch):
    model, x = small(freeze=True), images()
    captured(model, x)
    monkeypatch.setattr(fingerprint.Fingerprint, "holds", None)
    model(x)
    assert cuda.graphs[0].replays == 1


def test_a_move_renews_the_snapshot():
    model, x = small(freeze=True), images()
    model(x)
    model.bn1.running_var.mul_(4)
    model.double()
    assert close(model(x.double()), model.body(x.double()))
    model.float()
    assert close(model(x), model.body(x))


def test_a_frozen_model_in_training_mode_trains():
    model = small(freeze=True)
    model(images())
    before = model.bn1.running_mean.clone()
    model.train()(images(4))
    assert not torch.equal(model.bn1.running_mean, before)


def test_a_frozen_model_has_gradients():
    model = small(freeze=True)
    model(images())
    with torch.enable_grad():
        model(images()).sum().backward()
    assert model.bn1.weight.grad.any()


def test_a_model_with_a_hook_is_not_frozen():
    model, x = small(freeze=True), images()
    model.fc.register_forward_hook(doubled)
    model(x)
    model.bn1.running_var.mul_(4)
    assert torch.equal(model(x), model.body(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_scale_and_shift(dtype, affine):
    """Rounded to fp32 and no further, or to fp64."""
    from resnet_triton.snapshot import _scale_and_shift

    torch.manual_seed(0)
    norm = nn.BatchNorm2d(64, affine=affine).eval().to(dtype)
    for t in (*norm.parameters(), norm.running_mean):
        nn.init.uniform_(t, -1, 1)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    wide = copy.deepcopy(norm).double()
    x = torch.randn(3, 64, 2, 2, dtype=torch.float64)
    scale, shift = _scale_and_shift(norm)
    assert scale.dtype == shift.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    y = x * scale.double()[:, None, None] + shift.double()[:, None, None]
    torch.testing.assert_close(y, wide(x), rtol=1e-6, atol=1e-6)


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
    with pytest.raises(ValueError, match="Sequential contains no whole ResNet"):
        optimize(blocks, **modes)


def test_optimize_again_changes_the_modes(cuda):
    model, x = small(), images()
    captured(model, x)
    optimize(model, cuda_graph=False, inplace=True)
    model(x)
    assert cuda.graphs[0].replays == 0
    assert optimize(model, freeze=True).frozen
    assert not model.frozen


def test_nothing_to_refresh():
    with pytest.raises(ValueError, match="Linear contains no ResNet of ours"):
        refresh(nn.Linear(2, 2))
