"""Code that somebody replaced, on an instance or on a class, runs at the next call, graph or not: as in torchvision."""

from __future__ import annotations

import copy
import functools
import importlib
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda import captured, images
from torch import Tensor, nn
from torchvision_models import close

from resnet_triton import converted, models, optimize, report
from resnet_triton.ops import dispatch, original
from resnet_triton.support import vision

torchvision = vision.torchvision()
tv = importlib.import_module("torchvision.models.resnet")


pytestmark = pytest.mark.usefixtures("no_grad")


def pair(origin: str) -> tuple[Any, Any]:
    """A model to optimize, and torchvision's with the same weights."""
    return copy.deepcopy(_pair(origin))


@functools.cache
def _pair(origin: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    plain = tv.ResNet(tv.BasicBlock, [1, 1, 1, 1], num_classes=10).eval()
    for m in plain.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.2, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
    if origin == "torchvision":
        return copy.deepcopy(plain), plain
    ours = models.ResNet(models.BasicBlock, [1, 1, 1, 1], num_classes=10).eval()
    ours.load_state_dict(plain.state_dict())
    return ours, plain


def louder(code: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return code(*arguments) * 1.5 + 0.25


def closure(module: nn.Module, name: str) -> Any:
    code = getattr(module, name)
    return lambda *arguments: louder(code, *arguments)


def partial(module: nn.Module, name: str) -> Any:
    return functools.partial(louder, getattr(module, name))


def method(module: nn.Module, name: str) -> Any:
    """As accelerate wraps: the function below the bound method, bound again."""
    code = getattr(module, name).__func__

    @functools.wraps(code)
    def wrapper(self: Any, *arguments: Any) -> Tensor:
        return louder(code, self, *arguments)

    return types.MethodType(wrapper, module)


PLACES = {
    "model": ("", "forward"), "model-impl": ("", "_forward_impl"), "stage": ("layer2", "forward"),
    "block": ("layer2.0", "forward"), "stem": ("conv1", "forward"), "stem-norm": ("bn1", "forward"),
    "conv": ("layer1.0.conv2", "forward"), "conv-inner": ("layer1.0.conv2", "_conv_forward"),
    "norm": ("layer3.0.bn1", "forward"), "relu": ("layer3.0.relu", "forward"), "pool": ("maxpool", "forward"),
    "average": ("avgpool", "forward"), "classifier": ("fc", "forward"), "shortcut": ("layer2.0.downsample", "forward"),
    "shortcut-conv": ("layer2.0.downsample.0", "forward"), "conv-call": ("layer1.0.conv1", "_call_impl"),
    "relu-call": ("layer3.0.relu", "_call_impl"), "classifier-call": ("fc", "_call_impl"),
}  # fmt: skip
INSTANCES = [(closure, place) for place in PLACES] + [
    (way, place) for way in (partial, method) for place in ("model", "model-impl", "block", "conv")
]


@pytest.mark.parametrize(
    ("way", "place", "origin"),
    [*((*instance, "torchvision") for instance in INSTANCES), *((closure, place, "ours") for place in PLACES)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_patched_instance(cuda: Any, way: Callable[..., Any], place: str, origin: str) -> None:
    (model, plain), x = pair(origin), images()
    before = plain(x)
    captured(optimize(model), x)
    close(model(x), before)
    assert cuda.graphs[0].replays == 1
    path, name = PLACES[place]
    for m in (model, plain):
        target = m.get_submodule(path)
        setattr(target, name, way(target, name))
    expected = plain(x)
    assert not torch.allclose(expected, before, rtol=1e-3)
    calls = Counter(dispatch.calls)
    for _ in range(3):
        close(model(x), expected)
    assert (Counter(dispatch.calls) - calls)["conv_bn_relu", "torch"] > 0, "the rest still runs on our operators"
    assert [graph.replays for graph in cuda.graphs] == [1]
    found = report(model, tuple(x.shape))
    assert found.replaced == {path: f"its {name} was replaced"}
    assert f"its {name} was replaced" in str(found)
    delattr(model.get_submodule(path), name)
    for _ in range(3):
        close(model(x), before)
    assert cuda.graphs[-1].replays > 0


CLASSES: dict[str, tuple[Any, str]] = {
    "torchvision-forward": (tv.ResNet, "forward"), "torchvision-impl": (tv.ResNet, "_forward_impl"),
    "torchvision-block": (tv.BasicBlock, "forward"),
    "ours-forward": (models.ResNet, "forward"), "ours-impl": (models.ResNet, "_forward_impl"),
    "ours-block": (models.BasicBlock, "forward"),
    "converted-forward": (converted.ResNet, "forward"), "converted-impl": (converted.ResNet, "_forward_impl"),
    "converted-block": (converted.BasicBlock, "forward"),
    "conv": (nn.Conv2d, "forward"), "conv-inner": (nn.Conv2d, "_conv_forward"), "norm": (nn.BatchNorm2d, "forward"),
    "norms": (nn.modules.batchnorm._BatchNorm, "forward"), "relu": (nn.ReLU, "forward"),
    "pool": (nn.MaxPool2d, "forward"), "average": (nn.AdaptiveAvgPool2d, "forward"),
    "classifier": (nn.Linear, "forward"), "stage": (nn.Sequential, "forward"),
}  # fmt: skip


def patch(monkeypatch: pytest.MonkeyPatch, cls: Any, name: str) -> None:
    code = getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda *arguments: louder(code, *arguments))


def patched(kind: str, plain: nn.Module, x: Tensor) -> Tensor:
    """What torchvision's model answers under a patch, where ours and converted classes stand for torchvision's."""
    cls, name = CLASSES[kind]
    with pytest.MonkeyPatch.context() as beside:
        patch(beside, getattr(tv, cls.__name__, cls), name)
        return plain(x)


@pytest.mark.parametrize("origin", ["torchvision", "ours"])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_patched_class(cuda: Any, monkeypatch: pytest.MonkeyPatch, kind: str, origin: str) -> None:
    (model, plain), x = pair(origin), images()
    before, expected = plain(x), patched(kind, plain, x)
    assert not torch.allclose(expected, before, rtol=1e-3)
    captured(optimize(model), x)
    model(x)
    cls, name = CLASSES[kind]
    patch(monkeypatch, cls, name)
    if kind.startswith(("torchvision", "converted")) and origin == "ours":  # nobody's that concerns it
        close(model(x), before)
        assert cuda.graphs[0].replays == 2
        return
    for _ in range(3):
        close(model(x), expected)
    assert [graph.replays for graph in cuda.graphs] == [1]
    found = report(model, tuple(x.shape))
    assert found.replaced
    named = "BatchNorm2d" if kind == "norms" else cls.__name__
    assert all(f"'s {named}.{name} was replaced" in why for why in found.replaced.values())
    assert f"{named}.{name} was replaced, so what is there now runs: " in str(found)
    monkeypatch.undo()
    for _ in range(3):
        close(model(x), before)
    assert cuda.graphs[-1].replays > 0
    assert report(model, tuple(x.shape)).replaced == {}


def test_the_rows_of_a_report_say_what_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair("torchvision")
    optimize(model)
    patch(monkeypatch, tv.BasicBlock, "forward")
    model.fc.forward = closure(model.fc, "forward")
    reasons = {c.name: c.reason for c in report(model, (1, 3, 32, 32)).calls}
    assert reasons["conv1"] == "CPU tensors"
    assert reasons["layer1.0.conv1"] == "layer1.0: torchvision's BasicBlock.forward was replaced"
    assert reasons["fc"] == "fc: its forward was replaced"
    monkeypatch.undo()
    patch(monkeypatch, nn.Conv2d, "_conv_forward")
    reasons = {c.name: c.reason for c in report(model, (1, 3, 32, 32)).calls}
    assert reasons["layer1.0.conv1"] == "torch's Conv2d._conv_forward was replaced"
    assert "conv1, layer1.0.conv1, layer1.0.conv2 and 9 more" in str(report(model, (1, 3, 32, 32)))


@pytest.mark.parametrize("kind", ["torchvision-impl", "torchvision-block", "conv", "conv-inner", "norm"])
def test_what_must_run_on_our_operators_is_refused(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    for mode in ({"kernels": "triton"}, {"batch_invariant": True}):
        model, _ = pair("torchvision")
        optimize(model, **mode)
        with monkeypatch.context() as patches:
            patch(patches, *CLASSES[kind])
            with pytest.raises(NotImplementedError, match=f"{next(iter(mode))}=.*replaced"):
                model(images())


def test_every_layer_is_as_written_here() -> None:
    """Else nothing would run on a kernel."""
    assert all(code is not None and cls.forward is code for cls, code in original.LAYERS.items())
    assert original.CONV_FORWARD is nn.Conv2d._conv_forward
    classes = {*original.LAYERS, converted.ResNet, converted.BasicBlock, converted.Bottleneck}
    assert classes | {models.ResNet, models.BasicBlock, models.Bottleneck} <= models.STATELESS
    assert all(original.written(cls) is cls.forward for cls in models.STATELESS), "whose code a graph's check looks at"


def test_code_that_was_replaced_before_anybody_looked() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    original.remember(Layer)
    assert original.replaced(Layer()) is None
    forward = Layer.forward
    for replacement in (nn.ReLU.forward, functools.partialmethod(louder, 1), torch.relu):
        Layer.forward = replacement  # type: ignore[assignment, method-assign]
        original.remember(Layer)
        assert original.written(Layer) is None
        assert "Layer.forward was replaced" in (original.replaced(Layer()) or "")
    Layer.forward = forward  # type: ignore[method-assign]
    original.remember(Layer)
    assert original.replaced(Layer()) is None
