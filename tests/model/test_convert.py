"""optimize, revert and report on torchvision's models and on models that contain one."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_triton
from resnet_triton import models, optimize, report, revert
from resnet_triton.ops import dispatch
from resnet_triton.support import vision

torchvision = vision.torchvision()
tv = importlib.import_module("torchvision.models.resnet")


def randomised(model: nn.Module) -> nn.Module:
    """In eval mode, with batch norm statistics that are not 0 and 1."""
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.2, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
    return model.eval()


def small(block: str = "BasicBlock", **kwargs: Any) -> nn.Module:
    """A torchvision ResNet with one block a stage."""
    torch.manual_seed(0)
    return randomised(tv.ResNet(getattr(tv, block), [1, 1, 1, 1], num_classes=10, **kwargs))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5 * float(expected.abs().max()))


def image() -> Tensor:
    return torch.randn(2, 3, 40, 36, generator=torch.Generator().manual_seed(0))


# --- optimize --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@torch.no_grad()
def test_shares_every_tensor_and_answers_equally(name):
    original = randomised(getattr(torchvision.models, name)(num_classes=10))
    expected = original(image())
    state = {k: v.clone() for k, v in original.state_dict().items()}
    fast = optimize(original)
    assert type(fast) is models.ResNet
    assert type(original) is tv.ResNet
    assert {type(m).__module__ for m in original.modules()} <= {"torch.nn.modules." + n for n in (
        "activation", "batchnorm", "container", "conv", "linear", "pooling")} | {tv.__name__}  # fmt: skip
    mine, yours = tensors(fast), tensors(original)
    assert list(mine) == list(yours)
    assert all(mine[key] is yours[key] for key in yours)
    assert list(fast.state_dict()) == list(state)
    for key, value in fast.state_dict().items():
        assert torch.equal(value, state[key]), key
    close(fast(image()), expected)
    close(original(image()), expected)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in fast.parameters() if p.dim() == 4)


@torch.no_grad()
def test_edits_of_the_original_reach_the_optimized_model():
    original = small()
    fast = optimize(original)
    original.layer1[0].conv1.weight.mul_(2)
    original.bn1.running_var.mul_(3)
    original.train()(torch.randn(4, 3, 64, 64))
    original.eval()
    close(fast(image()), original(image()))


@torch.no_grad()
def test_inplace():
    model = small()
    expected = model(image())
    assert optimize(model, inplace=True) is model
    assert type(model) is models.ResNet
    assert type(model.layer1[0]) is models.BasicBlock
    assert tv.ResNet is not models.ResNet
    assert type(small()) is tv.ResNet  # the class itself is as it was
    close(model(image()), expected)


@torch.no_grad()
def test_twice():
    original = small()
    once = optimize(original)
    twice = optimize(once, kernels="torch")
    assert twice is not once
    assert (once.kernels, twice.kernels, twice.layer4[0].kernels) == ("auto", "torch", "torch")
    assert all(a is b for a, b in zip(twice.parameters(), original.parameters(), strict=True))
    close(twice(image()), original(image()))
    assert type(revert(twice)) is tv.ResNet


@pytest.mark.parametrize("kernels", ["auto", "torch", "triton"])
def test_modes_reach_every_block(kernels):
    fast = optimize(small(), kernels=kernels)
    assert [m.kernels for m in fast.modules() if isinstance(m, models.ResNet | models.BasicBlock)] == [kernels] * 5


@torch.no_grad()
def test_a_model_of_ours():
    original = randomised(resnet_triton.resnet18(num_classes=10))
    changed = optimize(original, kernels="torch")
    assert (original.kernels, original.layer1[0].kernels, changed.kernels) == ("auto", "auto", "torch")
    assert changed.conv1.weight is original.conv1.weight
    close(changed(image()), original(image()))


def test_unknown_mode():
    model = small()
    with pytest.raises(ValueError, match="kernels='cuda', expected one of 'auto', 'torch', 'triton'"):
        optimize(model, kernels="cuda", inplace=True)
    assert type(model) is tv.ResNet


def test_nothing_to_optimize():
    with pytest.raises(ValueError, match="Sequential contains no torchvision ResNet"):
        optimize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    with pytest.raises(ValueError, match="Linear was not converted"):
        revert(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="ResNet was not converted"):
        revert(small())


@torch.no_grad()
def test_inside_another_model():
    head = nn.Conv2d(10, 4, 1)
    model = nn.Sequential(small(), nn.Unflatten(1, (10, 1, 1)), head).eval()
    expected = model(image())
    fast = optimize(model)
    assert type(fast) is nn.Sequential
    assert [type(m) for m in (fast[0], fast[0].layer1[0], fast[2])] == [models.ResNet, models.BasicBlock, nn.Conv2d]
    assert fast[2].weight is head.weight
    close(fast(image()), expected)


@torch.no_grad()
def test_segmentation_backbone():
    """IntermediateLayerGetter keeps the children of a ResNet, not the ResNet; half of its blocks are dilated."""
    torch.manual_seed(0)
    model = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3)
    randomised(model)
    expected = model(image())["out"]
    fast = optimize(model)
    kinds = Counter(type(m) for m in fast.modules())
    assert kinds[models.Bottleneck] == 16
    assert kinds[tv.Bottleneck] == 0
    before = Counter(dispatch.calls)
    close(fast(image())["out"], expected)
    assert dispatch.calls - before == {
        ("conv_bn_relu", "torch"): 48
    }  # four shortcuts ride along; the stem is the getter's


class Doubled(tv.ResNet):
    """A subclass with code of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@torch.no_grad()
def test_a_subclass_keeps_its_code():
    torch.manual_seed(0)
    model = randomised(Doubled(tv.BasicBlock, [1, 1, 1, 1], num_classes=10))
    expected = model(image())
    fast = optimize(model)
    assert type(fast) is Doubled
    assert {type(fast.get_submodule(f"layer{i}.0")) for i in range(1, 5)} == {models.BasicBlock}
    close(fast(image()), expected)
    assert type(revert(fast).layer1[0]) is tv.BasicBlock


@torch.no_grad()
def test_frozen_batch_norm_runs_on_torch():
    model = small("Bottleneck", norm_layer=torchvision.ops.FrozenBatchNorm2d)
    expected = model(image())
    fast = optimize(model)
    close(fast(image()), expected)
    with pytest.raises(NotImplementedError, match="FrozenBatchNorm2d"):
        optimize(model, kernels="triton")(image())


@torch.no_grad()
def test_hooks_are_kept():
    model = small()
    model.layer1[0].conv1.register_forward_hook(lambda module, arguments, output: output * 2)
    model.layer4.register_forward_pre_hook(lambda module, arguments: (arguments[0] + 1,))
    expected = model(image())
    fast = optimize(model)
    close(fast(image()), expected)
    plain = small()
    assert not torch.allclose(plain(image()), expected, rtol=1e-3)  # the hooks matter


def doubled_output(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output * 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@torch.no_grad()
def test_copies_of_an_optimized_model(copied):
    original = small()
    original.bn1.register_forward_hook(doubled_output)
    fast = optimize(original, kernels="torch")
    other = copied(fast)
    assert type(other) is models.ResNet
    assert other.layer1[0].kernels == "torch"
    close(other(image()), fast(image()))
    other.conv1.weight.zero_()
    assert original.conv1.weight.any()  # a copy shares nothing
    assert type(revert(other)) is tv.ResNet
    assert type(fast) is models.ResNet


@torch.no_grad()
def test_compiled():
    torch._dynamo.reset()
    fast = optimize(small())
    compiled = torch.compile(fast, fullgraph=True)
    close(compiled(image()), fast(image()))
    torch._dynamo.reset()


# --- revert ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True], ids=["shared", "inplace"])
@torch.no_grad()
def test_revert(inplace):
    original = small("Bottleneck")
    before = copy.deepcopy(original)
    fast = optimize(original, inplace=inplace)
    assert revert(fast) is fast
    assert [type(m) for m in fast.modules()] == [type(m) for m in before.modules()]
    for a, b in zip(fast.modules(), before.modules(), strict=True):
        assert vars(a).keys() == vars(b).keys()
    for key, value in tensors(before).items():
        now = tensors(fast)[key]
        assert now is tensors(original)[key]
        assert now.stride() == value.stride(), key
        assert torch.equal(now, value), key
    assert torch.equal(fast(image()), before(image()))


@torch.no_grad()
def test_revert_keeps_a_channels_last_model_channels_last():
    model = small().to(memory_format=torch.channels_last)
    reverted = revert(optimize(model))
    assert reverted.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


# --- what runs where -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_every_call_of_a_resnet18_runs_on_a_kernel(device):
    """18 calls: the stem, 16 convolutions (3 shortcuts inside their blocks' last one), the head."""
    original = randomised(torchvision.models.resnet18(num_classes=10)).to(device)
    fast = optimize(original, kernels="triton")
    x = image()[:1, :, :32, :32].to(device)
    planned = Counter((c.operator, c.backend) for c in report(fast, tuple(x.shape)).calls)
    before = Counter(dispatch.calls)
    y = fast(x)
    assert dispatch.calls - before == planned
    assert planned == {
        ("stem", "triton"): 1,
        ("conv_bn_relu", "triton"): 16,
        ("avg_pool_linear", "triton"): 1,
    }
    torch.testing.assert_close(y, original(x), rtol=1e-3, atol=1e-3)  # TF32 on a GPU


ROWS = ["conv1", *(f"layer{i}.0.conv{j}" for i in range(1, 5) for j in (1, 2)), "fc"]


def reasons(model: nn.Module, shape: tuple[int, ...] = (2, 3, 64, 64)) -> dict[str, str]:
    return {c.name: c.reason for c in report(model, shape).calls}


@pytest.mark.parametrize(
    ("kernels", "backend", "reason"),
    [("auto", "torch", "CPU tensors"), ("torch", "torch", 'kernels="torch" was asked for')],
    ids=["auto", "torch"],
)
def test_report(kernels, backend, reason):
    result = report(optimize(small(), kernels=kernels))
    assert [c.name for c in result.calls] == ROWS
    assert {(c.backend, c.reason) for c in result.calls} == {(backend, reason)}
    lines = str(result).splitlines()
    assert lines[0].split() == ["layer", "operator", "runs", "on", "why,", "or", "how"]
    assert len(lines) == 1 + len(ROWS) + 2
    for name, line in zip(ROWS, lines[1:], strict=False):
        assert line.split()[0] == name
        assert "PyTorch" in line
        assert line.endswith(reason)
    assert lines[-1].startswith("calls so far in this process: ")


def test_report_of_the_kernels(device):
    """On the kernels a row says how: which path, which tile."""
    result = report(optimize(small().to(device), kernels="triton"))
    assert {c.backend for c in result.calls} == {"triton"}
    rows = dict(zip(ROWS, str(result).splitlines()[1:], strict=False))
    assert {name for name, row in rows.items() if "path, tile" in row} == set(ROWS) - {"conv1", "fc"}
    assert all("Triton kernel" in row for row in rows.values())


def test_report_says_training_mode():
    model = optimize(small())
    model.layer2.train()
    found = reasons(model)
    assert "training mode" in found["layer2.0.conv1"]
    assert "training mode" not in found["layer1.0.conv1"]


def test_report_says_forward_hook():
    model = optimize(small())
    model.layer3[0].bn1.register_forward_hook(lambda *a: None)
    found = reasons(model)
    assert "hook" in found["layer3.0.conv1"]
    assert found["layer3.0.conv2"] == "CPU tensors"


def test_report_of_a_watched_stem_and_head():
    """Where something watches a module, the separate operators run, so that what it watches happens."""
    model = optimize(small())
    model.maxpool.register_forward_hook(lambda *a: None)
    model.avgpool.register_forward_hook(lambda *a: None)
    operators = [c.operator for c in report(model, (2, 3, 64, 64)).calls]
    assert operators[:2] == ["conv_bn_relu", "aten.max_pool2d_with_indices"]
    assert operators[-2:] == ["aten.mean", "linear"]
    model = optimize(small())
    model.bn1.register_forward_hook(lambda *a: None)
    model.fc.register_forward_hook(lambda *a: None)
    operators = [c.operator for c in report(model, (2, 3, 64, 64)).calls]
    assert operators[:3] == ["aten.convolution", "aten.native_batch_norm", "max_pool2d"]  # ReLU is in place
    assert operators[-2:] == ["global_avg_pool", "aten.addmm"]


def test_report_names_a_replaced_layer():
    model = optimize(small())
    model.layer3[0].bn1 = nn.GroupNorm(4, 256)
    assert "GroupNorm" in reasons(model)["layer3.0.conv1"]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_report_changes_nothing(training):
    model = optimize(small()).train(training)
    state = copy.deepcopy(model.state_dict())
    calls = dict(dispatch.calls)
    result = report(model, (2, 3, 64, 64))
    assert dict(dispatch.calls) == calls
    assert result.counted == calls
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_report_of_a_huge_batch_takes_no_memory():
    result = report(optimize(small()), (100_000, 3, 224, 224))
    assert result.calls[0].ours.x.shape == (100_000, 3, 224, 224)


def test_report_before_optimize():
    """A torchvision model as it is: everything on PyTorch, nothing refused."""
    calls = report(small()).calls
    assert {c.backend for c in calls} == {"torch"}
    assert "layer1.0.conv1" in {c.name for c in calls}
