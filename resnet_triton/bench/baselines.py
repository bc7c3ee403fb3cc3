"""One operator call by ours, by eager PyTorch and by cuDNN's fused operators.

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

from ..ops import BatchNorm, ConvBnRelu, Operation, Stem, gluon, operation, reference
from ..ops.stem import STEM_POOL

Answer = Callable[[], Tensor]


def ours(call: Operation) -> Answer:
    """What our model does: its launches, planned now, or on a CPU its PyTorch path. RuntimeError for that on a GPU."""
    (result, choice), facts = call.choose(), gluon.facts(call.x.device)
    out, launches, reason = call.prepare(result, facts) if choice.backend == "triton" else (None, (), choice.reason)
    if out is None:
        if call.x.is_cuda:
            raise RuntimeError(f"no kernel of ours runs this: {reason}")
        return call.run

    def answer() -> Tensor:
        with operation.on(out.device):
            for launch in launches:
                launch.run()
        return out

    return answer


def tiles(call: Operation) -> dict[str, Any] | None:
    """The tiles of a convolution by our kernels."""
    if not isinstance(call, ConvBnRelu) or not call.tiled or call.choose()[1].backend == "torch":
        return None
    chosen = asdict(call.choose_tile(gluon.facts(call.x.device)).config)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}


def _eager_conv(c: ConvBnRelu) -> Tensor:
    y = _normed(F.conv2d(c.x, c.weight, None, *c.geometry), c.batch_norm)
    if c.residual is not None:
        y += c.residual
    if c.shortcut is not None:
        x, weight, batch_norm, stride = c.shortcut
        y += _normed(F.conv2d(x, weight, None, stride), batch_norm)
    return reference.activate(y, *c.activation)


def _normed(y: Tensor, batch_norm: BatchNorm) -> Tensor:
    mean, var, weight, bias, eps = batch_norm
    return F.batch_norm(y, mean, var, weight, bias, eps=eps)


EAGER: dict[str, Callable[[Any], Tensor]] = {
    "conv_bn_relu": _eager_conv,
    "stem": lambda c: F.max_pool2d(_eager_conv(c.convolution(c.x)), *STEM_POOL),
    "max_pool2d": lambda c: F.max_pool2d(c.x, c.kernel_size, c.stride, c.padding, ceil_mode=c.ceil_mode),
    "add_relu": lambda c: F.relu(c.x + c.other, inplace=True),
    "global_avg_pool": lambda c: F.adaptive_avg_pool2d(c.x, 1),
    "linear": lambda c: F.linear(c.x, c.weight, c.bias),
    "avg_pool_linear": lambda c: F.linear(F.adaptive_avg_pool2d(c.x, 1).flatten(1), c.weight, c.bias),
}
"""Each operator as torchvision's modules compute it."""


def eager(call: Operation) -> Answer:
    """The functions that torchvision's modules call."""
    return partial(EAGER[call.name], call)


def cudnn_layer(call: Operation) -> Answer:
    """A convolution or a stem as cuDNN's fused operators (CUDA only), batch norm folded into filters and bias now."""
    c: Any = call.convolution(call.x) if isinstance(call, Stem) else call
    weight, bias = _folded(c.weight, c.batch_norm)
    if c.shortcut is not None:
        short_weight, short_bias = _folded(c.shortcut.weight, c.shortcut.batch_norm)

    def answer() -> Tensor:
        added = c.residual
        if c.shortcut is not None:
            added = F.conv2d(c.shortcut.x, short_weight, short_bias, c.shortcut.stride)
        if added is not None:
            return torch.cudnn_convolution_add_relu(c.x, weight, added, 1.0, bias, *c.geometry)
        y = torch.cudnn_convolution_relu(c.x, weight, bias, *c.geometry)
        return F.max_pool2d(y, *STEM_POOL) if c is not call else y

    return answer


def _folded(weight: Tensor, batch_norm: Any) -> tuple[Tensor, Tensor]:
    mean, var, bn_weight, bn_bias, eps = batch_norm
    scale = bn_weight.double() / (var.double() + eps).sqrt()
    filters = (weight.double() * scale[:, None, None, None]).to(weight.dtype, memory_format=torch.channels_last)
    return filters, (bn_bias.double() - mean.double() * scale).to(weight.dtype)
