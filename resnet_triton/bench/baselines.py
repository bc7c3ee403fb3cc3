"""One operator call by ours, by eager PyTorch and by cuDNN's fused operators: functions of a name and its arguments.

Each returns what makes the call and can be timed again and again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import config
from ..config import device
from ..ops import OPERATORS, ConvCall, interpreter, registry
from ..ops.stem import POOL, StemCall

Answer = Callable[[], Tensor]
Arguments = tuple[Any, ...]


def output(operator: str, args: Arguments) -> Tensor:
    """A tensor for the answer, uninitialised."""
    return OPERATORS[operator].output(*args)


def ours(operator: str, args: Arguments) -> Answer:
    """What our model does: its launches, planned now, or its PyTorch path."""
    chosen = OPERATORS[operator]
    if chosen.choose(*args).backend == "torch":
        return partial(registry.call, operator, *args)
    out = chosen.output(*args)
    launches, reason = chosen.launches(out, *args)
    if reason is not None:
        return partial(registry.call, operator, *args)

    def answer() -> Tensor:
        with torch.cuda.device(out.device) if out.device.type == "cuda" else interpreter.ready():
            for launch in launches:
                launch.run()
        return out

    return answer


def tiles(operator: str, args: Arguments) -> dict[str, Any] | None:
    """The tiles of a convolution by our kernels."""
    if operator != "conv_bn_relu" or OPERATORS[operator].choose(*args).backend == "torch":
        return None
    chosen = asdict(config.lookup(ConvCall(*args).shape, device.facts(args[0].device)))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}


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


def eager(operator: str, args: Arguments) -> Answer:
    """The functions that torchvision's modules call."""
    return partial(EAGER[operator], *args)


def cudnn_layer(operator: str, args: Arguments) -> Answer:
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
