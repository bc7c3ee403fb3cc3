"""What the contract is about: our functions, PyTorch's own form of each, and arguments on which both are exact.

Integers, and batch norms that scale by powers of two, leave PyTorch nothing to round between its operations either.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from resnet_triton import functional as F
from resnet_triton import models, optimize
from resnet_triton.support import vision

from .term import Args

PIXELS = {"pixel_mean": (0.0, 0.5, 1.0), "pixel_std": (0.25, 0.5, 1.0)}
"""Of bytes that are 0 or 255: every step of normalising is exact."""


class Data:
    """Integers of one dtype on one device, the same for every seed."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.dtype, self.device = dtype, device

    def integers(self, limit: int, *shape: int, low: int | None = None) -> Tensor:
        low = -limit if low is None else low
        return torch.randint(low, limit + 1, shape, generator=self.generator).to(self.device, self.dtype)

    def statistics(self, k: int, prefix: str = "") -> Args:
        """Mean, variance 1 or 4, and affine parameters, for each of k channels."""
        var = 4 ** self.integers(1, k, low=0)
        weight = 2 ** self.integers(1, k, low=0)
        mean, bias = self.integers(1, k), self.integers(2, k)
        return {f"{prefix}running_mean": mean, f"{prefix}running_var": var, f"{prefix}bn_weight": weight,
                f"{prefix}bn_bias": bias, f"{prefix}eps": 0.0}  # fmt: skip


def _conv(data: Data, n: int = 2, c: int = 16, h: int = 4, w: int = 8, k: int = 16) -> Args:
    return {"x": data.integers(2, n, c, h, w), "weight": data.integers(1, k, c, 3, 3), **data.statistics(k),
            "padding": 1}  # fmt: skip


def _residual(data: Data, **sizes: int) -> Args:
    args = _conv(data, **sizes)
    n, _, h, w = args["x"].shape
    return {**args, "residual": data.integers(3, n, args["weight"].shape[0], h, w)}


def _shortcut(data: Data, **sizes: int) -> Args:
    args = _conv(data, **sizes)
    k = args["weight"].shape[0]
    n, c, h, w = args["x"].shape
    short = {"short_x": data.integers(2, n, c, 2 * h, 2 * w), "short_weight": data.integers(1, k, c, 1, 1)}
    return {**args, **short, **data.statistics(k, "short_")}


def _stem(data: Data, n: int = 2, c: int = 3, h: int = 8, w: int = 12, k: int = 8) -> Args:
    return {"x": data.integers(2, n, c, h, w), "weight": data.integers(1, k, c, 7, 7), **data.statistics(k)}


def _add(data: Data, n: int = 2, c: int = 8, h: int = 4, w: int = 8) -> Args:
    return {"x": data.integers(3, n, c, h, w), "other": data.integers(3, n, c, h, w)}


def _pool(data: Data, n: int = 2, c: int = 8, h: int = 5, w: int = 8) -> Args:
    return {"x": data.integers(0, n, c, h, w, low=-9), "kernel_size": 3, "stride": 2, "padding": 1}


def _average(data: Data, n: int = 2, c: int = 8, h: int = 4, w: int = 8) -> Args:
    return {"x": data.integers(3, n, c, h, w)}


def _linear(data: Data, n: int = 2, c: int = 8, k: int = 16) -> Args:
    return {"x": data.integers(3, n, c), "weight": data.integers(2, k, c), "bias": data.integers(2, k)}


def _head(data: Data, n: int = 2, c: int = 8, h: int = 4, w: int = 8, k: int = 16) -> Args:
    x = data.integers(3, n, c, 1, 1).repeat(1, 1, h, w)  # an average that leaves the sums behind it exact
    return {"x": x, "weight": data.integers(2, k, c), "bias": data.integers(2, k)}


def _model(data: Data, n: int = 2, h: int = 8, w: int = 8) -> Args:
    x = torch.randn(n, 3, h, w, generator=data.generator).to(data.device, data.dtype)
    return {"model": tiny().to(data.device, data.dtype), "x": x}


def tiny(library: Any = None) -> Any:
    """A ResNet, torchvision's or ours, of four narrow convolutions: a plain and a strided block, then empty layers."""
    return copy.deepcopy(_tiny(library))


@functools.cache
def _tiny(library: Any) -> Any:
    resnet = library or vision.torchvision().models.resnet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.device("meta"):  # whose layers are all replaced
            model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
        model.conv1, model.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        downsample = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        model.layer1 = nn.Sequential(resnet.BasicBlock(8, 8))
        model.layer2 = nn.Sequential(resnet.BasicBlock(8, 16, 2, downsample))
        model.layer3, model.layer4, model.fc = nn.Sequential(), nn.Sequential(), nn.Linear(16, 5)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.running_mean, -0.2, 0.2)
                nn.init.uniform_(m.running_var, 0.5, 2.0)
    return model.eval()


def _our_shortcut(
    x: Tensor, weight: Tensor, running_mean: Tensor, running_var: Tensor, bn_weight: Any, bn_bias: Any, eps: float,
    padding: int, kernels: str, short_x: Tensor, short_weight: Tensor, short_running_mean: Tensor,
    short_running_var: Tensor, short_bn_weight: Any, short_bn_bias: Any, short_eps: float,
) -> Tensor:  # fmt: skip
    short_norm = F.BatchNorm(short_running_mean, short_running_var, short_bn_weight, short_bn_bias, short_eps)
    return F.conv_bn_relu(
        x, weight, running_mean, running_var, bn_weight, bn_bias, eps, padding=padding, kernels=kernels,
        shortcut=F.Shortcut(short_x, short_weight, short_norm, (2, 2)),
    )  # fmt: skip


def _bn(y: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
    # Not TF.batch_norm, which is this and, in torch 2.11, refuses an eps of 0.
    return torch.batch_norm(y, weight, bias, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled)


def _torch_conv(
    x: Tensor, weight: Tensor, running_mean: Tensor, running_var: Tensor, bn_weight: Any, bn_bias: Any, eps: float,
    padding: int = 0, stride: int = 1, residual: Tensor | None = None, short_x: Any = None, short_weight: Any = None,
    short_running_mean: Any = None, short_running_var: Any = None, short_bn_weight: Any = None,
    short_bn_bias: Any = None, short_eps: float = 0.0,
) -> Tensor:  # fmt: skip
    y = _bn(TF.conv2d(x, weight, None, stride, padding), running_mean, running_var, bn_weight, bn_bias, eps)
    if short_x is not None:
        short = (short_running_mean, short_running_var, short_bn_weight, short_bn_bias, short_eps)
        residual = _bn(TF.conv2d(short_x, short_weight, None, 2), *short)
    return TF.relu(y if residual is None else y + residual)


def _normalized(pixels: Tensor, mean: Any, std: Any) -> Tensor:
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (mean, std))
    return (pixels / 255 - mean) / std


def _torch_stem(x: Tensor, weight: Tensor, pixel_mean: Any = None, pixel_std: Any = None, **statistics: Any) -> Tensor:
    if pixel_mean is not None:
        x = _normalized(x, pixel_mean, pixel_std).to(weight.dtype)
    return TF.max_pool2d(_torch_conv(x, weight, **statistics, stride=2, padding=3), 3, 2, 1)


def _torch_pool(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    return TF.max_pool2d(x, kernel_size, stride, padding)


def _torch_add(x: Tensor, other: Tensor) -> Tensor:
    return TF.relu(x + other)


def _torch_average(x: Tensor) -> Tensor:
    return TF.adaptive_avg_pool2d(x, 1)


def _torch_head(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return TF.linear(TF.adaptive_avg_pool2d(x, 1).flatten(1), weight, bias)


def _same(model: Any) -> Any:
    return model


def _our_model(
    model: Any, x: Tensor, kernels: str, then: Callable[[Any], Any] = _same, normalize: Any = None, own: bool = False
) -> Tensor:
    """`then` is what happens to the model between its conversion and the call; `own`: it was ours from the start."""
    if own:
        state, model = model.state_dict(), tiny(models).to(x.device, x.dtype)
        model.load_state_dict(state)
    fast = then(optimize(model, kernels=kernels))
    fast.normalize = normalize
    return fast(x)


def _torch_model(
    model: Any, x: Tensor, then: Callable[[Any], Any] = _same, normalize: Any = None, own: bool = False
) -> Tensor:
    assert not isinstance(model, models.ResNet), "ours would be compared with ours"
    model = then(model)
    return model(x if normalize is None else _normalized(x, *normalize).to(model.fc.weight.dtype))


class Subject(NamedTuple):
    """`ways` of the kernels, and which of them each way launches."""

    make: Callable[..., Args]
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    ways: dict[str, set[str]]

    def arguments(self, dtype: torch.dtype, device: torch.device, sizes: dict[str, int]) -> Args:
        return self.make(Data(dtype, device), **sizes)


CONV = {"pointer": {"conv_pointer_kernel"}, "descriptor": {"conv_box_kernel"}}
SUBJECTS = {
    "conv_bn_relu": Subject(_conv, F.conv_bn_relu, _torch_conv, CONV),
    "residual": Subject(_residual, F.conv_bn_relu, _torch_conv, CONV),
    "shortcut": Subject(_shortcut, _our_shortcut, _torch_conv, CONV),
    "stem": Subject(_stem, F.stem, _torch_stem, {
        "pointer": {"conv_pointer_kernel", "max_pool_kernel"}, "descriptor": {"pack_kernel", "stem_kernel"},
    }),
    "add_relu": Subject(_add, F.add_relu, _torch_add, {"pointer": {"add_relu_kernel"}}),
    "max_pool2d": Subject(_pool, F.max_pool2d, _torch_pool, {"pointer": {"max_pool_kernel"}}),
    "global_avg_pool": Subject(_average, F.global_avg_pool, _torch_average, {"pointer": {"global_avg_pool_kernel"}}),
    "linear": Subject(_linear, F.linear, TF.linear, {"pointer": {"linear_kernel"}}),
    "avg_pool_linear": Subject(_head, F.avg_pool_linear, _torch_head, {
        "pointer": {"avg_pool_linear_kernel"}, "two launches": {"global_avg_pool_kernel", "linear_kernel"},
    }),
    "model": Subject(_model, _our_model, _torch_model, {
        "pointer": {"conv_pointer_kernel", "max_pool_kernel", "avg_pool_linear_kernel"},
        "descriptor": {"pack_kernel", "stem_kernel", "conv_box_kernel", "avg_pool_linear_kernel"},
    }),
}  # fmt: skip
"""`residual` and `shortcut` are conv_bn_relu with a residual, and with the fused shortcut of the models; `model` is an
`optimize`d torchvision ResNet."""
CONVS = ("conv_bn_relu", "residual", "shortcut")
FILTERED = (*CONVS, "stem")


def wide(subject: str, args: Args) -> Any:
    """PyTorch's answer in fp64, rounded once."""
    doubled = {name: a.double() if isinstance(a, Tensor) else a for name, a in args.items()}
    return SUBJECTS[subject].theirs(**doubled).to(args["weight"].dtype)


in_fp64 = {name: functools.partial(wide, name) for name in SUBJECTS}
