"""Each operation in plain PyTorch: the oracle of the tests and the implementation wherever the kernels do not run.

Everything here is differentiable, works on any device and any dtype that PyTorch takes, and gives PyTorch's own answer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

Pair = tuple[int, int]

# Elements from which batch norm on the CPU pays in place, one pass of addcmul: F.batch_norm writes to new memory, which
# costs page faults that a smaller result, still in the cache, does not (1.1x on the whole model at batch 16, 2 cores).
_LARGE = 1 << 18


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
    relu: bool = True,
) -> Tensor:
    """Convolution, batch norm with running statistics, residual add, ReLU."""
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    fp32 = y.dtype == torch.float32 == running_var.dtype and y.device.type == "cpu"
    plain = fp32 and not torch.compiler.is_compiling() and not _differentiated(y, bn_weight, bn_bias)
    if plain and y.numel() >= _LARGE:
        scale = (running_var + eps).rsqrt()
        scale = scale if bn_weight is None else scale * bn_weight
        shift = -running_mean * scale if bn_bias is None else bn_bias - running_mean * scale
        torch.addcmul(shift[:, None, None], y, scale[:, None, None], out=y)
    else:
        y = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, False, 0.0, eps)
    return add_relu(y, residual, relu=relu, inplace=True).to(y.dtype)  # a wider residual does not widen the result


def add_relu(x: Tensor, other: Tensor | None = None, *, relu: bool = True, inplace: bool = False) -> Tensor:
    """`relu(x + other)`; `inplace` may overwrite x, `other=None` and `relu=False` leave their step out."""
    if other is not None:
        x = x + other if _differentiated(x, other) or not inplace else x.add_(other)
    return F.relu(x, inplace=inplace) if relu else x


def max_pool2d(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair) -> Tensor:
    """Max pooling."""
    return F.max_pool2d(x, kernel_size, stride, padding)


def global_avg_pool(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 1, 1)."""
    return F.adaptive_avg_pool2d(x, 1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`."""
    return F.linear(x, weight, bias)


def _differentiated(*tensors: Tensor | None) -> bool:
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return wanted or forward_ad._current_level >= 0
