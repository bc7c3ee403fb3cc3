"""Our ResNets against torchvision's: state, answers, edits of all kinds, replaced modules, weights."""

from __future__ import annotations

import builtins
import contextlib
import copy
import importlib
import io
import os
import pickle
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_triton
from resnet_triton import functional, models
from resnet_triton.config.targets import KNOWN
from resnet_triton.kernels.launch import Launch
from resnet_triton.ops import dispatch, interpreter
from resnet_triton.ops.trace import trace
from resnet_triton.support import vision

torchvision = vision.torchvision()
feature_extraction = importlib.import_module("torchvision.models.feature_extraction")


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """fp32 means fp32 here. By the older flag: torch.export refuses to run once the newer one is set (torch 2.13)."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def pair(name: str, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """(ours, torchvision's), both from seed 0."""
    torch.manual_seed(0)
    ours = getattr(resnet_triton, name)(**kwargs)
    torch.manual_seed(0)
    return ours, getattr(torchvision.models, name)(**kwargs)


def small_pair(block: str, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """The same with one block a stage, "BasicBlock" or "Bottleneck"."""
    made = []
    for library in (models, torchvision.models.resnet):
        torch.manual_seed(0)
        made.append(library.ResNet(getattr(library, block), [1, 1, 1, 1], **kwargs))
    return made[0], made[1]


def busy(model: nn.Module, seed: int = 0) -> None:
    """Give every batch norm statistics and affine parameters that are not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(t: Tensor, low: float, high: float) -> None:
        t.copy_(torch.rand(t.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                for t, low, high in (
                    (m.running_mean, -0.2, 0.2),
                    (m.running_var, 0.5, 2.0),
                    (m.weight, 0.5, 1.2),
                    (m.bias, -0.3, 0.3),
                ):
                    uniform(t, low, high)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max()))


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_same_seed_gives_the_same_state(name):
    ours, theirs = (m.state_dict() for m in pair(name))
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize(
    "name",
    ["resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d", "resnext101_32x8d",
     "resnext101_64x4d"],
)  # fmt: skip
def test_state_names_and_shapes(name):
    with torch.device("meta"):
        ours, theirs = pair(name)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    layers = [[repr(m) for m in model.modules() if not list(m.children())] for model in (ours, theirs)]
    assert layers[0] == layers[1]  # strides and groups, too


def reachable_tensors(root: nn.Module) -> dict[int, int]:
    """{address: bytes} of every tensor storage that hangs on a module, its attributes and their contents."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    waiting: list[Any] = [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            waiting += item
        elif isinstance(item, nn.Module):
            waiting.append(vars(item))
    return found


@torch.no_grad()
def test_weights_exist_once():
    ours, theirs = pair("resnet18", num_classes=10)
    ours.eval()(torch.zeros(1, 3, 32, 32))
    assert sum(reachable_tensors(ours).values()) == sum(reachable_tensors(theirs).values())
    assert sum(t.nbytes for t in ours.state_dict().values()) == sum(t.nbytes for t in theirs.state_dict().values())


def test_filters_are_channels_last():
    ours = resnet_triton.resnet18()
    filters = [p for p in ours.parameters() if p.dim() == 4]
    assert len(filters) == 20
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in filters)
    assert not ours.layer1[0].conv1.weight.is_contiguous()


# --- answers ---------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "resnet18": lambda: pair("resnet18"),
    "resnet50": lambda: pair("resnet50"),
    "classes": lambda: small_pair("BasicBlock", num_classes=7),
    "zero_init": lambda: small_pair("BasicBlock", zero_init_residual=True),
    "zero_init-bottleneck": lambda: small_pair("Bottleneck", zero_init_residual=True),
    "wide": lambda: small_pair("Bottleneck", width_per_group=128),
    "grouped": lambda: small_pair("Bottleneck", groups=32, width_per_group=4),
    "dilated": lambda: small_pair("Bottleneck", replace_stride_with_dilation=[False, True, True]),
    "group_norm": lambda: small_pair("BasicBlock", norm_layer=lambda c: nn.GroupNorm(4, c)),
    "frozen_norm": lambda: small_pair("Bottleneck", norm_layer=torchvision.ops.FrozenBatchNorm2d),
    "no_statistics": lambda: small_pair(
        "BasicBlock", norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False)
    ),
    "other_eps": lambda: small_pair("BasicBlock", norm_layer=lambda c: nn.BatchNorm2d(c, eps=0.1)),
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_answers_are_those_of_torchvision(variant):
    ours, theirs = (m.eval() for m in VARIANTS[variant]())
    if "init" not in variant and variant != "no_statistics":
        busy(ours)
        busy(theirs)
    x = torch.randn(2, 3, 64, 48)
    close(ours(x), theirs(x))


def test_bad_arguments_are_those_of_torchvision():
    with pytest.raises(ValueError, match="replace_stride_with_dilation"):
        resnet_triton.resnet50(replace_stride_with_dilation=[True])
    with pytest.raises(ValueError, match="BasicBlock"):
        resnet_triton.resnet18(width_per_group=128)


# --- bytes -----------------------------------------------------------------------------------------------------------

NORMALIZE = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def normalised_by_hand(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in NORMALIZE)
    return (pixels / 255 - mean) / std


@pytest.fixture
def pixels(device: torch.device) -> Tensor:
    return torch.randint(256, (2, 3, 40, 36), generator=torch.Generator().manual_seed(0)).byte().to(device)


@torch.no_grad()
def test_bytes_give_the_answer_of_normalised_images(pixels):
    ours, theirs = (m.eval() for m in pair("resnet18", num_classes=10))
    ours.normalize = NORMALIZE
    pixels = pixels.cpu()
    before = Counter(dispatch.calls)
    answer = ours(pixels)
    assert dispatch.calls - before == {
        ("stem", "torch"): 1,
        ("conv_bn_relu", "torch"): 16,
        ("avg_pool_linear", "torch"): 1,
    }
    close(answer, theirs(normalised_by_hand(pixels)))
    images = normalised_by_hand(pixels)
    assert torch.equal(ours(images), answer)  # floats are taken as they are
    assert not torch.allclose(ours(pixels.float()), answer, rtol=1e-3)


@pytest.mark.slow
@torch.no_grad()
def test_bytes_on_the_kernels(device, pixels):
    ours, theirs = (m.eval().to(device) for m in small_pair("BasicBlock", num_classes=10))
    busy(ours)
    busy(theirs)
    ours.half().normalize = NORMALIZE
    for module in ours.modules():
        if isinstance(module, models.ResNet | models.BasicBlock):
            module.kernels = "triton"
    before = Counter(dispatch.calls)
    answer = ours(pixels)
    assert dispatch.calls - before == {
        ("stem", "triton"): 1, ("conv_bn_relu", "triton"): 8, ("avg_pool_linear", "triton"): 1
    }  # fmt: skip
    assert torch.equal(answer, ours(normalised_by_hand(pixels).half()))  # rounded once, after normalising
    close(answer.float(), theirs(normalised_by_hand(pixels)), 5e-3)


@torch.no_grad()
def test_six_functions_lie_between_a_model_and_its_launches(device, monkeypatch):
    """What an eager call costs on the host is what they do."""
    package = Path(resnet_triton.__file__).resolve().parent
    kernels = (package / "kernels").resolve()
    depths: Counter[int] = Counter()

    def counted(launch: Launch) -> None:
        frames, ours = sys._getframe(1), 0
        while frames is not None:
            folders = Path(frames.f_code.co_filename).resolve().parents
            ours += package in folders or kernels in folders
            frames = frames.f_back
        depths[ours] += 1

    monkeypatch.setattr(Launch, "run", counted)
    monkeypatch.setattr(interpreter, "ready", contextlib.nullcontext)  # nothing is launched for shadow memory to watch
    model = resnet_triton.resnet18().eval().to(device)
    resnet_triton.optimize(model, kernels="triton", cuda_graph=False)(torch.zeros(1, 3, 64, 64, device=device))
    assert depths.total() >= 18
    assert max(depths) <= 6, depths


MEAN, STD = NORMALIZE
NO_STATISTICS: dict[str, tuple[Any, str]] = {
    "one-mean": (([0.5], [0.2]), "pixel_mean has 1 values, expected 3, one for each channel"),
    "two-means": ((MEAN[:2], STD), "pixel_mean has 2 values, expected 3"),
    "four-stds": ((MEAN, [*STD, 1]), "pixel_std has 4 values, expected 3"),
    "zero": ((MEAN, [0.2, 0, 0.2]), "expected finite numbers and standard deviations above 0"),
    "negative": ((MEAN, [-0.2, 0.2, 0.2]), "above 0"),
    "nan": (([float("nan"), 0, 0], STD), "expected finite"),
    "infinite": ((MEAN, [0.2, 0.2, float("inf")]), "expected finite"),
    "no-pair": (MEAN, "normalize=.* expected None or a mean and a standard deviation for each channel"),
    "number": (0.5, "normalize=0.5, expected None or"),
    "text": ((["a", "b", "c"], STD), "normalize=.* expected None or"),
}


@pytest.mark.parametrize("kind", NO_STATISTICS)
@torch.no_grad()
def test_what_cannot_normalise(pixels, kind):
    """On the fused path, on PyTorch's, where modules are called, and for the operator itself."""
    statistics, message = NO_STATISTICS[kind]
    pixels, model = pixels.cpu(), resnet_triton.resnet18(num_classes=10).eval()
    model.normalize = NORMALIZE
    with pytest.raises(ValueError, match=message):
        model.normalize = statistics
    assert model.normalize == tuple(map(tuple, NORMALIZE)), "it stays as it was"
    if not message.startswith("normalize"):
        model._triton_normalize = statistics  # as if it had been right for another conv1
        for change in (lambda m: None, lambda m: m.train(), lambda m: setattr(m, "maxpool", nn.MaxPool2d(2))):
            change(model)
            with pytest.raises(ValueError, match=message):
                model(pixels)
        for kernels in ("torch", "triton"):
            ones = torch.ones(64)
            with pytest.raises(ValueError, match=message):
                functional.stem(
                    pixels, model.conv1.weight, ones, ones, pixel_mean=statistics[0], pixel_std=statistics[1],
                    kernels=kernels,
                )  # fmt: skip


def test_normalize_follows_the_channels_of_conv1():
    model = resnet_triton.resnet18(num_classes=10).eval()
    model.conv1 = nn.Conv2d(4, 64, 7, 2, 3, bias=False)
    with pytest.raises(ValueError, match="pixel_mean has 3 values, expected 4"):
        model.normalize = NORMALIZE
    model.normalize = [0.5] * 4, [0.2] * 4
    assert model(torch.zeros(1, 4, 32, 32, dtype=torch.uint8)).shape == (1, 10)


@pytest.mark.parametrize("freeze", [False, True])
@torch.no_grad()
def test_a_negative_eps_is_an_error_as_in_pytorch(freeze):
    model = vision.torchvision().models.resnet18(num_classes=10).eval()
    resnet_triton.optimize(model, freeze=freeze)
    x = torch.zeros(1, 3, 32, 32)
    for norm in model.bn1, model.layer2[0].downsample[1]:
        norm.eps = -0.5
        with pytest.raises(ValueError, match=r"batch_norm eps must be .*, but got -0.5"):
            resnet_triton.refresh(model)(x)
        norm.eps = 1e-5


@pytest.mark.parametrize(
    ("eps", "error", "words"), [(-0.5, ValueError, "-0.5, expected at least 0"), ("x", TypeError, "'x', expected a n")]
)
def test_an_eps_that_cannot_be(eps, error, words):
    weight, ones = torch.zeros(8, 8, 1, 1), torch.ones(8)
    x = torch.zeros(1, 8, 8, 8)
    shortcut = functional.Shortcut(x, weight, functional.BatchNorm(ones, ones, None, None, eps), (1, 1))
    with pytest.raises(error, match=f"^eps={words}"):
        functional.conv_bn_relu(x, weight, ones, ones, eps=eps)
    with pytest.raises(error, match=f"^shortcut_eps={words}"):
        functional.conv_bn_relu(x, weight, ones, ones, shortcut=shortcut)
    with pytest.raises(error, match=f"^eps={words}"):
        functional.stem(x, torch.zeros(8, 8, 7, 7), ones, ones, eps=eps)


def test_a_shortcut_that_does_not_fit():
    x, ones = torch.zeros(2, 8, 8, 8), torch.ones(16)

    def call(weight: Tensor, stride: int, residual: Tensor | None = None) -> Tensor:
        norm = functional.BatchNorm(ones, ones, None, None, 1e-5)
        shortcut = functional.Shortcut(x, weight, norm, (stride, stride))
        main = torch.zeros(16, 8, 1, 1)
        return functional.conv_bn_relu(x, main, ones, ones, stride=2, residual=residual, shortcut=shortcut)

    right = call(torch.zeros(16, 8, 1, 1), 2)
    for shape in ((16, 8, 3, 3), (16, 4, 1, 1), (5, 8, 1, 1), (16, 8)):
        with pytest.raises(ValueError, match=re.escape(f"shortcut_weight has shape {shape}, expected (16, 8, 1, 1)")):
            call(torch.zeros(shape), 2)
    with pytest.raises(ValueError, match=re.escape("stride (1, 1) gives (2, 16, 8, 8), expected (2, 16, 4, 4)")):
        call(torch.zeros(16, 8, 1, 1), 1)
    with pytest.raises(ValueError, match=r"^residual and shortcut are both given, expected at most one of them$"):
        call(torch.zeros(16, 8, 1, 1), 2, right)


# --- launches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "dtype", "stem", "convolutions"),
    [
        (90, torch.float16, ["hopper_stem"], {"hopper_few"}),
        (100, torch.float16, ["pack", "stem"], {"conv_box", "conv_pointer"}),
        (90, torch.float32, ["conv_pointer", "max_pool"], {"conv_box", "conv_pointer"}),
        (80, torch.float16, ["conv_pointer", "max_pool"], {"conv_pointer"}),
    ],
    ids=["H200-float16", "B200-float16", "H200-float32", "A100-float16"],
)
def test_launches_of_one_image(arch, dtype, stem, convolutions):
    """At batch 1 the gaps between launches are what a GPU spends its time on."""
    with torch.device("meta"):
        model = resnet_triton.resnet18().eval()
    calls = trace(model, (1, 3, 224, 224), dtype)
    kernels = [launch.name for call in calls for launch in call.launches(KNOWN[arch])]
    assert kernels[: len(stem)] == stem
    assert set(kernels[len(stem) : -1]) <= convolutions
    assert kernels[-1] == "avg_pool_linear"
    assert len(kernels) == len(stem) + 17


# --- edits: the very next forward sees them --------------------------------------------------------------------------


class Blocks(nn.Sequential):
    """A plain and a strided block of one library: small enough for the interpreter."""

    def __init__(self, library: Any) -> None:
        downsample = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        super().__init__(library.BasicBlock(8, 8), library.BasicBlock(8, 16, 2, downsample))


def blocks(kernels: str, device: Any) -> tuple[Blocks, Blocks]:
    torch.manual_seed(0)
    ours = Blocks(models)
    for block in ours:
        block.kernels = kernels
    torch.manual_seed(0)
    theirs = Blocks(torchvision.models.resnet)
    for m in (ours, theirs):
        busy(m)
    return ours.to(device).eval(), theirs.to(device).eval()


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # written a line ago


def scaled(model: nn.Module) -> dict[str, Tensor]:
    return {k: v * 1.5 if v.is_floating_point() else v for k, v in model.state_dict().items()}


def trained_a_little(model: nn.Module) -> None:
    p = next(model.parameters())
    x = torch.linspace(-1, 1, 4 * 8 * 6 * 6, device=p.device).view(4, 8, 6, 6)
    with torch.no_grad():
        model.train()(x)
    model.eval()


def with_a_hook(model: Any) -> None:
    model[0].conv2.register_forward_hook(lambda module, arguments, output: output * 2)
    model[1].bn1.register_forward_pre_hook(lambda module, arguments: (arguments[0] + 1,))
    model[1].downsample[1].register_forward_hook(lambda module, arguments, output: output - 1)


def with_a_parametrization(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model[0].conv1)
    nn.utils.parametrizations.spectral_norm(model[1].downsample[0]).eval()


def with_a_patched_forward(model: Any) -> None:
    """What wrappers do that replace a method on the instance."""
    for module in (model[0].conv1, model[0].bn2, model[1].relu):
        module.forward = lambda x, original=module.forward: original(x) + 0.5


EDITS: dict[str, Callable[[Any], Any]] = {
    # each changes the model in place, or returns another one
    "none": lambda m: None,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "save-and-load": saved_and_loaded,
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "contiguous": lambda m: m.to(memory_format=torch.contiguous_format),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "load_state_dict": lambda m: m.load_state_dict(scaled(m)) and None,
    "load_state_dict-assign": lambda m: m.load_state_dict(scaled(m), assign=True) and None,
    "weight-in-place": lambda m: m[0].conv1.weight.mul_(2) is None or None,
    "weight-data": lambda m: setattr(m[1].conv2.weight, "data", m[1].conv2.weight.data * 2),
    "weight-replaced": lambda m: setattr(m[1].conv2, "weight", nn.Parameter(m[1].conv2.weight.detach() * 2)),
    "statistics-in-place": lambda m: m[0].bn1.running_var.mul_(3).sum() and None,
    "statistics-replaced": lambda m: setattr(m[1].downsample[1], "running_mean", m[1].bn2.bias + 1),
    "eps": lambda m: setattr(m[0].bn2, "eps", 0.5),
    "affine-removed": lambda m: setattr(m[0].bn2, "weight", None) or setattr(m[0].bn2, "bias", None),
    "training-forward": trained_a_little,
    "hooks": with_a_hook,
    "parametrizations": with_a_parametrization,
    "patched-forward": with_a_patched_forward,
    "conv-bias": lambda m: setattr(m[0], "conv2", nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)),
    "conv-reflect": lambda m: setattr(m[0], "conv1", nn.Conv2d(8, 8, 3, padding=1, bias=False, padding_mode="reflect")),
    "conv-same": lambda m: setattr(m[0], "conv1", nn.Conv2d(8, 8, 3, padding="same", bias=False)),
    "conv-grouped": lambda m: setattr(m[0], "conv1", nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)),
    "norm-identity": lambda m: setattr(m[0], "bn1", nn.Identity()),
    "norm-group": lambda m: setattr(m[1], "bn2", nn.GroupNorm(4, 16)),
    "norm-instance": lambda m: setattr(m[1], "bn1", nn.InstanceNorm2d(16, affine=True).eval()),
    "norm-training": lambda m: m[0].bn1.train() and None,
    "norm-without-statistics": lambda m: setattr(m[0], "bn1", nn.BatchNorm2d(8, track_running_stats=False).eval()),
    "activation-silu": lambda m: setattr(m[0], "relu", nn.SiLU()),
    "activation-leaky": lambda m: setattr(m[1], "relu", nn.LeakyReLU(0.1)),
    "shortcut-pooled": lambda m: m[1].downsample.insert(0, nn.AvgPool2d(1)) and None,
    "shortcut-3x3": lambda m: m[1].downsample.__setitem__(0, nn.Conv2d(8, 16, 3, 2, padding=1, bias=False)),
    "shortcut-identity": lambda m: setattr(m[0], "downsample", nn.Identity()),
}  # fmt: skip
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
SOMEWHERE_ON_TORCH = {  # edits that kernels="triton" has to refuse
    "hooks", "parametrizations", "patched-forward", "conv-bias", "conv-reflect", "conv-same",
    "norm-identity", "norm-group", "norm-instance", "norm-training", "norm-without-statistics",
    "training-forward",
}  # fmt: skip
WITHOUT_EFFECT = {
    "none", "deepcopy", "pickle", "save-and-load", "half", "bfloat16", "contiguous", "channels_last",
    "shortcut-pooled", "shortcut-identity",
}  # fmt: skip


@pytest.mark.parametrize("kernels", ["torch", "auto", "triton"])
@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_edits(device, edit, kernels):
    ours, theirs = blocks(kernels, device)
    x = torch.randn(2, 8, 6, 6, device=device)
    before = ours(x)
    refused = kernels == "triton" and edit in SOMEWHERE_ON_TORCH
    if refused and edit == "training-forward":
        with pytest.raises(NotImplementedError, match=r"training mode; call model.eval\(\)$"):
            EDITS[edit](ours)
        return
    edited = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        edited.append((EDITS[edit](model) or model).to(device))
    ours, theirs = edited
    x = x.to(next(theirs.parameters()).dtype)
    if refused:
        with pytest.raises(NotImplementedError):
            ours(x)
        return
    expected = theirs(x)
    close(ours(x), expected, TOLERANCE[x.dtype])
    if edit not in WITHOUT_EFFECT:
        assert not torch.allclose(before, expected, rtol=1e-3)


# --- hooks, feature extraction ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The nodes obtained by tracing the model in train mode:UserWarning")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@torch.no_grad()
def test_create_feature_extractor(training):
    extract = feature_extraction.create_feature_extractor
    nodes = {"layer1": "low", "layer2.0": "block", "layer4": "out"}
    x = torch.randn(2, 3, 64, 64)
    ours, theirs = (extract(m, nodes).train(training) for m in pair("resnet18"))
    a, b = ours(x), theirs(x)
    assert list(a) == list(b)
    for key, value in b.items():
        close(a[key], value, 5e-5)
    ours.get_parameter("layer4.1.conv2.weight").mul_(2)  # the extractor holds the parameters, not copies
    theirs.get_parameter("layer4.1.conv2.weight").mul_(2)
    close(ours(x)["out"], theirs(x)["out"], 5e-5)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval", "frozen-norms", "frozen-stem"])
@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_gradients_and_statistics_are_those_of_torchvision(block, mode):
    x = torch.randn(3, 3, 33, 33)
    results = []
    for model in small_pair(block, num_classes=5):
        busy(model)
        model.double().train(mode != "eval")  # fp64: what differs is an error, not a rounding
        for m in model.modules():
            if mode == "frozen-norms" and isinstance(m, nn.BatchNorm2d):
                m.eval()
        if mode == "frozen-stem":
            for m in (model.conv1, model.bn1, model.layer1):
                m.eval().requires_grad_(False)
        model(x.double()).square().sum().backward()
        results.append(({n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
    (grads, buffers), (their_grads, their_buffers) = results
    assert grads.keys() == their_grads.keys()
    for key, value in their_grads.items():
        assert (grads[key] is None) == (value is None), key
        if value is not None:
            torch.testing.assert_close(grads[key], value, rtol=1e-9, atol=1e-9 * float(value.abs().max()))
    torch.testing.assert_close(buffers, their_buffers, rtol=1e-12, atol=1e-12)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Path]:
    """An empty cache of checkpoints in place of the user's."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    yield folder
    torch.hub.set_dir(before)


def checkpoint_name(weights: Any) -> str:
    return os.path.basename(weights.url)


ENUM = torchvision.models.ResNet18_Weights


@pytest.mark.parametrize(
    "weights",
    ["IMAGENET1K_V1", "DEFAULT", "ResNet18_Weights.IMAGENET1K_V1", ENUM.IMAGENET1K_V1, ENUM.DEFAULT],
    ids=["name", "default-name", "qualified-name", "member", "default"],
)
def test_weights_come_from_the_local_cache(hub, weights):
    torch.manual_seed(3)
    stored = torchvision.models.resnet18()
    busy(stored)
    torch.save(stored.state_dict(), hub / checkpoint_name(ENUM.IMAGENET1K_V1))
    model = resnet_triton.resnet18(weights=weights, progress=False)
    for (name, a), b in zip(model.state_dict().items(), stored.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("weights", ["IMAGENET1K_V9", "imagenet", True], ids=str)
def test_unknown_weights(weights):
    with pytest.raises(ValueError, match=r"IMAGENET1K_V1.*; a file is for resnet_triton.load_checkpoint") as raised:
        resnet_triton.resnet18(weights=weights)
    assert repr(weights) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "weights",
    [torchvision.models.ResNet50_Weights.IMAGENET1K_V1, "ResNet50_Weights.IMAGENET1K_V1"],
    ids=["member", "qualified-name"],
)
def test_weights_of_another_architecture(weights):
    with pytest.raises((ValueError, TypeError), match="ResNet50_Weights"):
        vision.find_weights("resnet18", weights)


def test_number_of_classes_must_be_that_of_the_weights(hub):
    with pytest.raises(ValueError, match="num_classes=10, expected 1000"):
        resnet_triton.resnet18(weights="DEFAULT", num_classes=10)


class Payload:
    """Unpickling this would call `print`."""

    def __reduce__(self) -> Any:
        return print, ("code from a checkpoint ran",)


def test_a_checkpoint_cannot_run_code(hub, capsys):
    torch.save({"conv1.weight": Payload()}, hub / checkpoint_name(ENUM.IMAGENET1K_V1))
    with pytest.raises(pickle.UnpicklingError):
        resnet_triton.resnet18(weights="DEFAULT", progress=False)
    assert capsys.readouterr().out == ""


def test_torchvision_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    resnet_triton.resnet18(num_classes=3)
    with pytest.raises(ModuleNotFoundError, match="torchvision is not installed; pip install torchvision"):
        resnet_triton.resnet18(weights="DEFAULT")


def test_a_broken_torchvision_is_not_hidden(monkeypatch):
    """A module that torchvision needs is missing: saying that torchvision is would send the user the wrong way."""

    def broken(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torchvision":
            raise ModuleNotFoundError("No module named 'PIL'", name="PIL")
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(ModuleNotFoundError, match="PIL"):
        vision.torchvision()


def test_weights_that_are_no_parameters():
    """As in the replicas of nn.DataParallel, and with strides as lists and an eps of another type."""
    model = models.resnet18(num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and not isinstance(module, torch.nn.Linear):
                    delattr(module, name)
                    setattr(module, name, parameter.detach())
        model.layer1[0].conv1.stride, model.layer1[0].bn1.eps = [1, 1], torch.tensor(1e-5)
        torch.testing.assert_close(model(x), expected)


def test_meta_tensors_and_profilers_see_operators():
    model = models.resnet18(num_classes=5).eval()
    with torch.no_grad(), torch.profiler.profile(acc_events=True) as seen:
        model(torch.randn(1, 3, 32, 32))
    assert any(event.key.startswith("resnet_triton::") for event in seen.key_averages())
    with torch.no_grad():
        assert model.to("meta")(torch.zeros(3, 3, 32, 32, device="meta")).shape == (3, 5)
