"""`freeze=True`: batch norm's scale and shift as they were at one moment, in place of its statistics."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def snapshot(model: Any) -> Any:
    """A model that answers as `model` does now, whatever becomes of its batch norms. Call it where grad mode is off.

    It reads the filters and the classifier in the memory of `model`, so editing those in place shows; replacing one
    does not. Its batch norms have mean 0, variance 1 and eps 0, the scale as weight and the shift as bias: a kernel
    computes from them exactly that scale and that shift.
    """
    frozen = _twin(model)
    for norm in frozen.modules():
        if type(norm) is nn.BatchNorm2d and norm.running_mean is not None and norm.running_var is not None:
            _freeze(norm)
    return frozen


def _twin(module: Any) -> Any:
    """Another module with the same attributes and weights. Not a deep copy: an attribute may be one that has none."""
    twin = module.__new__(type(module))
    own = vars(module).copy()  # in one step: another thread may call the model meanwhile, or be told to forget graphs
    vars(twin).update({k: v.copy() if isinstance(v, dict) else v for k, v in own.items() if k != "_triton_runner"})
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else _twin(child)
    for name, p in module._parameters.items():
        twin._parameters[name] = None if p is None else nn.Parameter(p.detach(), requires_grad=False)
    for name, buffer in module._buffers.items():
        twin._buffers[name] = None if buffer is None else buffer.clone()
    return twin


def _freeze(norm: Any) -> None:
    if norm.eps < 0:  # a call raises PyTorch's error
        return
    scale, shift = _scale_and_shift(norm)
    norm.running_mean, norm.running_var, norm.eps = torch.zeros_like(scale), torch.ones_like(scale), 0.0
    norm.weight, norm.bias = (nn.Parameter(t, requires_grad=False) for t in (scale, shift))


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """In fp32, or in fp64 if a tensor is; the shift rounded once, as a fused multiply-add rounds it."""
    tensors = [t for t in chain(norm.parameters(), norm.buffers()) if t.is_floating_point()]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    scale = (norm.running_var.to(dtype) + norm.eps).sqrt().reciprocal()
    if norm.weight is not None:
        scale = scale * norm.weight
    bias = 0.0 if norm.bias is None else norm.bias.double()
    shift = bias - norm.running_mean.double() * scale.double()
    return scale.to(dtype), shift.to(dtype)
