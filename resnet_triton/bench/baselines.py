"""Each operator by PyTorch alone: what the kernel suite compares ours with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import ConvCall
from ..ops.stem import POOL, StemCall


def _eager_conv(*args: Any) -> Tensor:
    c = ConvCall(*args)
    y = F.conv2d(c.x, c.weight, None, c.stride, c.padding, c.dilation, c.groups)
    y = F.batch_norm(y, c.mean, c.var, c.gamma, c.beta, eps=c.eps)
    if c.residual is not None:
        y += c.residual
    if c.short_x is not None:
        short = F.conv2d(c.short_x, c.short_weight, None, c.short_stride)
        y += F.batch_norm(short, c.short_mean, c.short_var, c.short_gamma, c.short_beta, eps=c.short_eps)
    return F.relu(y, inplace=True) if c.relu else y


EAGER: dict[str, Callable[..., Tensor]] = {
    "conv_bn_relu": _eager_conv,
    "stem": lambda *args: F.max_pool2d(_eager_conv(*StemCall(*args).convolution(args[0])), *POOL),
    "max_pool2d": lambda x, size, stride, padding, kernels: F.max_pool2d(x, size, stride, padding),
    "add_relu": lambda x, other, kernels: F.relu(x + other, inplace=True),
    "global_avg_pool": lambda x, *modes: F.adaptive_avg_pool2d(x, 1),
    "linear": lambda x, weight, bias, *modes: F.linear(x, weight, bias),
    "avg_pool_linear": lambda x, weight, bias, *modes: F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), weight, bias),
}
"""Each operator as torchvision's modules compute it."""


def cudnn_fused(operator: str, args: tuple[Any, ...]) -> Callable[[], Tensor]:
    """A convolution or a stem as cuDNN's fused operators (CUDA only), batch norm folded into filters and bias now."""
    c = StemCall(*args).convolution(args[0]) if operator == "stem" else ConvCall(*args)
    weight, bias = _folded(c.weight, c.mean, c.var, c.gamma, c.beta, c.eps)
    geometry = (c.stride, c.padding, c.dilation, c.groups)

    def answer() -> Tensor:
        added = c.residual
        if c.short_x is not None:
            added = F.conv2d(c.short_x, short_weight, short_bias, c.short_stride)
        if added is not None:
            return torch.cudnn_convolution_add_relu(c.x, weight, added, 1.0, bias, *geometry)
        y = torch.cudnn_convolution_relu(c.x, weight, bias, *geometry)
        return F.max_pool2d(y, *POOL) if operator == "stem" else y

    if c.short_x is not None:
        short = (c.short_weight, c.short_mean, c.short_var, c.short_gamma, c.short_beta, c.short_eps)
        short_weight, short_bias = _folded(*short)
    return answer


def _folded(weight: Tensor, mean: Tensor, var: Tensor, gamma: Any, beta: Any, eps: float) -> tuple[Tensor, Tensor]:
    scale = gamma.double() / (var.double() + eps).sqrt()
    filters = (weight.double() * scale[:, None, None, None]).to(weight.dtype, memory_format=torch.channels_last)
    return filters, (beta.double() - mean.double() * scale).to(weight.dtype)
