"""Each operation in plain PyTorch: the oracle of the tests and the implementation wherever the kernels do not run.

Everything here is differentiable, works on any device and any dtype that PyTorch takes, and gives PyTorch's own answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

Pair = tuple[int, int]

# Elements from which batch norm on the CPU pays in place, one pass of addcmul: batch_norm writes to new memory, which
# costs page faults that a smaller result, still in the cache, does not (1.1x on the whole model at batch 16, 2 cores).
_LARGE = 1 << 18
# Elements between the stem's convolution and pool that still find room in a CPU's cache, those of four images of 224 x
# 224 pixels: 1.1x on the whole model at batch 16 (2 cores, 32 MB of L3).
_CACHED = 4 * 64 * 112 * 112


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """Convolution, batch norm with running statistics, residual add, activation."""
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    vectors, wide = (running_mean, running_var, bn_weight, bn_bias), torch.promote_types(y.dtype, torch.float32)
    if {t.dtype for t in vectors if t is not None} not in ({y.dtype}, {wide}):  # others PyTorch's batch norm refuses
        running_mean, running_var, bn_weight, bn_bias = (None if t is None else t.to(wide) for t in vectors)  # type: ignore[assignment]
    fp32 = y.dtype == torch.float32 == running_var.dtype and y.device.type == "cpu"
    plain = fp32 and not _written_down() and not _differentiated(y, bn_weight, bn_bias)
    if plain and y.numel() >= _LARGE:
        scale = (running_var + eps).rsqrt()
        scale = scale if bn_weight is None else scale * bn_weight
        shift = (0.0 if bn_bias is None else bn_bias) - running_mean * scale
        torch.addcmul(shift[:, None, None], y, scale[:, None, None], out=y)
    else:
        # Not F.batch_norm: torch 2.11's refuses an eps of 0, which frozen norms have, and convolutions without one.
        cudnn = torch.backends.cudnn.enabled
        y = torch.batch_norm(y, bn_weight, bn_bias, running_mean, running_var, False, 0.0, eps, cudnn)
    inplace = residual is not None and not _written_down() and not _differentiated(y, residual)
    z = y if residual is None else y.add_(residual) if inplace else y + residual
    return activate(z, activation, negative_slope).to(y.dtype)  # a wider residual does not widen the result


def activate(x: Tensor, activation: str, negative_slope: float) -> Tensor:
    """An activation by its name in `torch.nn.functional`, or "none"; it may overwrite x."""
    if activation == "none":
        return x
    if activation == "gelu":
        return F.gelu(x)
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope, inplace=True)
    named: Tensor = getattr(F, activation)(x, inplace=True)
    return named


def add_relu(x: Tensor, other: Tensor) -> Tensor:
    """`relu(x + other)`."""
    return F.relu(x + other)


def stem(
    x: Tensor, weight: Tensor, running_mean: Tensor, running_var: Tensor, bn_weight: Tensor | None,
    bn_bias: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """7x7/2 convolution, batch norm, ReLU and 3x3/2 max pool."""
    statistics = (running_mean, running_var, bn_weight, bn_bias, eps)

    def few(images: Tensor) -> Tensor:
        y = conv_bn_relu(images, weight, *statistics, stride=(2, 2), padding=(3, 3))
        return max_pool2d(y, (3, 3), (2, 2), (1, 1))

    if _written_down() or x.device.type != "cpu" or x.dim() != 4:
        return few(x)
    n, _, h, w = x.shape
    each = max(4 * _CACHED // max(weight.shape[0] * h * w, 1), 1)
    return few(x) if n <= each else torch.cat([few(images) for images in x.split(each)])


def normalize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bytes (N, C, H, W) to fp32 `(x / 255 - mean) / std`, with a mean and a standard deviation for each channel."""

    def per_channel(values: Sequence[float]) -> Tensor:
        # Filled where they are needed: a copy from the host could not be captured in a CUDA graph.
        return torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=x.device) for value in values])

    return (x.float() / 255 - per_channel(mean)) / per_channel(std)


def max_pool2d(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, ceil_mode: bool = False) -> Tensor:
    """Max pooling."""
    return F.max_pool2d(x, kernel_size, stride, padding, ceil_mode=ceil_mode)


def global_avg_pool(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 1, 1)."""
    return F.adaptive_avg_pool2d(x, 1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`."""
    return F.linear(x, weight, bias)


def _written_down() -> bool:
    """Whether a compiler or a tracer takes the operators down, which then must not depend on sizes or the grad mode."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def _differentiated(*tensors: Tensor | None) -> bool:
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return wanted or forward_ad._current_level >= 0
