"""Models of a few layers for torch.compile, on which every order of summation gives the same bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import exact
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_triton.ops import dispatch
from resnet_triton.ops.trace import Call

CBR, ADD, POOL = "conv_bn_relu", "add_relu", "max_pool2d"
LEFT = "aten.convolution"


def integral(model: nn.Module) -> nn.Module:
    """In eval mode, with parameters on which every order of summation gives the same bits."""
    g = exact.generator(torch.device("cpu"), 0)
    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            m.weight.data = exact.integers(g, 1, *m.weight.shape, dtype=m.weight.dtype)
            if m.bias is not None:
                m.bias.data = exact.integers(g, 3, *m.bias.shape, dtype=m.bias.dtype)
        elif isinstance(m, nn.BatchNorm2d | Frozen):
            norm = exact.batch_norm(g, 8, torch.float32 if m.weight is None else m.weight.dtype)
            m.running_mean.copy_(norm.running_mean)
            m.running_var.copy_(norm.running_var)
            m.eps = norm.eps
            if m.weight is not None:
                m.weight.data, m.bias.data = norm.bn_weight, norm.bn_bias
    return model.eval()


class Frozen(nn.Module):
    """Batch norm as detectors freeze it, written as torchvision and detectron2 write it."""

    def __init__(self, k: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(k))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (t.reshape(1, -1, 1, 1) for t in self.buffers())
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class Affine(nn.Module):
    """A number for each channel times and plus another one."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, -1.0, 0.5, 1.0]).repeat(k // 4).reshape(k, 1, 1))
        self.shift = nn.Parameter(torch.arange(float(k)).reshape(1, k, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.shift + self.scale * x


class Residual(nn.Module):
    def __init__(self, shortcut: nn.Module | None, *, order: int = 0, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        stride = 1 if shortcut is None else 2
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, stride, 1, bias=False), norm(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), norm(8)
        self.shortcut, self.order = shortcut, order

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu_(self.norm1(self.conv1(x)))))
        identity = x if self.shortcut is None else self.shortcut(x)
        if self.order:
            return F.relu(identity + y)
        y += identity
        return F.relu(y, inplace=True)


def lambdas(function: Callable[..., Tensor], **modules: nn.Module) -> nn.Module:
    class Lambdas(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(self, x)

    made = Lambdas()
    made.register_buffer("v", torch.zeros(8))
    for name, module in modules.items():
        made.add_module(name, module)
    return made


def conv(bias: bool = False, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1, bias=bias, **kwargs)


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(8)


def sequence(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


def downsample() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 1, 2, bias=False), norm())


def stem() -> nn.Module:
    return sequence(nn.Conv2d(8, 8, 7, 2, 3, bias=False), norm(), nn.ReLU(), nn.MaxPool2d(3, 2, 1))


def head() -> nn.Module:
    return sequence(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def images(n: int = 2, c: int = 8, size: int = 8) -> Tensor:
    return exact.integers(exact.generator(torch.device("cpu"), 1), 2, n, c, size, size)


def ours(calls: list[Call]) -> list[str]:
    return [c.operator for c in calls if c.operation is not None or c.operator == LEFT]


def strides(t: Tensor) -> list[int]:
    """Where they say anything."""
    return [s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1]


def used(call: Callable[..., Any], *args: Any) -> Counter[Any]:
    before = Counter(dispatch.calls)
    call(*args)
    return dispatch.calls - before


class Denoiser(nn.Module):
    """Several inputs, one of them integers and one that need not be there; tensors, a number and nothing come out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.steps = conv(), nn.Embedding(10, 8)

    def forward(self, x: Tensor, step: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        y = self.conv(x) + self.steps(step)[:, :, None, None]
        parts = y[:, 1:5:2, 1:] * 1, y.amax(1)[:, ::2], y[:, :1].neg().expand(-1, 4, -1, -1)
        return {"y": (y if mask is None else y * mask, y.sum((2, 3)), *parts), "pixels": x[0, 0].numel(), "mask": None}
