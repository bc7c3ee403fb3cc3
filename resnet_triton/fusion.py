"""When a convolution, its batch norm, ReLU and residual or shortcut may be one fused call, and that call.

A module that is not what it should be (training mode, a replaced norm layer, a forward hook, a `forward` of somebody
else's) is simply called, as torchvision would call it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .ops import NONE, RELU, BatchNorm, ConvBnRelu, Geometry, Shortcut, dispatch, original
from .ops.checks import pair
from .ops.dispatch import Modes
from .ops.original import CONV_FORWARD, LAYERS, replaced

Conv2d, BatchNorm2d, ReLU = nn.Conv2d, nn.BatchNorm2d, nn.ReLU
_CONV, _NORM, _RELU = (LAYERS[cls] for cls in (Conv2d, BatchNorm2d, ReLU))


class Fused(NamedTuple):
    """What one fused call needs of a convolution and the batch norm behind it, as they are now."""

    weight: Tensor
    batch_norm: BatchNorm
    geometry: Geometry


def fuse(conv: Any, norm: Any) -> Fused | str:
    """What `norm(conv(x))` needs to be one fused call, or why it cannot be one. Asked before each call."""
    frozen = type(norm) is not BatchNorm2d and is_frozen_norm(type(norm))
    if (type(conv), type(norm)) != (Conv2d, type(norm) if frozen else BatchNorm2d):
        return f"{_named(conv)} and {_named(norm)} instead of torch's Conv2d and BatchNorm2d"
    if norm.training and not frozen:
        return dispatch.TRAINING
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return "convolution without zero padding in numbers"
    if _hooked(conv) or watched(norm):
        return "a hook or a forward of its own"
    if Conv2d.forward is not _CONV or (replaced(norm) if frozen else BatchNorm2d.forward is not _NORM):
        return f"{replaced(conv) or replaced(norm)}"
    if Conv2d._conv_forward is not CONV_FORWARD or "_conv_forward" in conv.__dict__:
        return f"{replaced(conv)}"
    try:  # past Module.__getattr__, which costs more than all else here
        filters, statistics, affine = conv._parameters, norm._buffers, norm._parameters
        weight, conv_bias = filters["weight"], filters["bias"]
        mean, var = statistics["running_mean"], statistics["running_var"]
        bn_weight, bn_bias = affine["weight"], affine["bias"]
    except KeyError:  # frozen norms have buffers, replicas, shards and pruned layers plain attributes
        weight, conv_bias, mean, var = conv.weight, conv.bias, norm.running_mean, norm.running_var
        bn_weight, bn_bias = norm.weight, norm.bias
    if mean is None or var is None:
        return "batch norm without running statistics"
    if norm.eps < 0:
        return "batch norm with a negative eps"  # which PyTorch refuses, but for frozen norms
    if conv_bias is not None:
        return "convolution with a bias"
    geometry = Geometry(pair(conv.stride), pair(conv.padding), pair(conv.dilation), conv.groups)
    return Fused(weight, BatchNorm(mean, var, bn_weight, bn_bias, float(norm.eps)), geometry)


def is_frozen_norm(cls: type) -> bool:
    """Whether it is torchvision's batch norm of four buffers, which training mode does not touch.

    By its name, for torchvision need not be there. Its code is remembered, so that `replaced` can tell.
    """
    if (cls.__module__, cls.__name__) != ("torchvision.ops.misc", "FrozenBatchNorm2d"):
        return False
    original.remember_once(cls)
    return True


def _named(module: nn.Module) -> str:
    cls = type(module)
    return f"{cls.__module__.partition('.')[0]}'s {cls.__name__}"


def watched(module: nn.Module) -> bool:
    """Whether calling this instance does more than its class's forward."""
    return _hooked(module) or _has_any_global_hook()


def _hooked(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__ or "_call_impl" in module.__dict__


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is exactly of this kind, as written, and unwatched, so that a fused call may stand in for it."""
    return type(module) is kind and kind.forward is LAYERS[kind] and not watched(module)


def plain_pool(pool: nn.Module) -> bool:
    """Whether `pool` is a max pool such as our operators compute."""
    return (
        isinstance(pool, nn.MaxPool2d)
        and plain(pool, nn.MaxPool2d)
        and pool.dilation == 1
        and not (pool.ceil_mode or pool.return_indices)
    )


def conv_norm_act(
    x: Tensor,
    conv: Any,
    norm: Any,
    act: Any,
    modes: Modes,
    *,
    identity: Tensor | None = None,
    downsample: nn.Module | None = None,
) -> Tensor:
    """`act(norm(conv(x)) + downsample(identity))` in one fused call if the modules allow it, else module by module."""
    relu = type(act) is ReLU and ReLU.forward is _RELU and not _hooked(act)
    fused = fuse(conv, norm)
    if isinstance(fused, str):
        y = _conv_norm(x, conv, norm, modes, fused)
        if identity is not None:
            y += identity if downsample is None else downsample(identity)  # in place, for a hook may have kept y
        return act(y)

    shortcut = None if downsample is None or identity is None else _shortcut(identity, downsample)
    if shortcut is not None:
        identity = None
    elif downsample is not None:
        identity = call_module(downsample, identity, modes)
    y = ConvBnRelu(x, *fused, identity, shortcut, RELU if relu else NONE, modes).run()
    return y if relu else call_module(act, y, modes)


def call_module(module: Any, x: Any, modes: Modes) -> Any:
    """`module(x)`, as torchvision would call it. NotImplementedError if the answer must not depend on the batch."""
    if not plain(module, nn.Identity):
        _refuse_batch_invariance(modes, f"{type(module).__name__} replaced, watched or traced")
    return module(x)


def refuse_modules(modes: Modes, reason: str) -> None:
    """NotImplementedError, naming the reason, if modules must not run as PyTorch runs them."""
    _refuse_batch_invariance(modes, reason)
    dispatch.raise_if_required(modes.kernels, reason)


def _conv_norm(x: Tensor, conv: nn.Module, norm: nn.Module, modes: Modes, reason: str) -> Tensor:
    _refuse_batch_invariance(modes, reason)
    dispatch.choose(modes.kernels, x.device, x.dtype, reason)
    dispatch.count("conv_bn_relu", "torch", reason)
    y: Tensor = norm(conv(x))
    return y


def _refuse_batch_invariance(modes: Modes, reason: str) -> None:
    if modes.batch_invariant:
        raise NotImplementedError(f"batch_invariant=True cannot call modules, only operators of ours: {reason}")


def _shortcut(x: Tensor, downsample: nn.Module) -> Shortcut | None:
    """The shortcut of `x`, if its convolution and batch norm can ride in the block's last convolution."""
    if not plain(downsample, nn.Sequential) or len(downsample) != 2:  # type: ignore[arg-type]
        return None
    conv: Any
    conv, norm = downsample.children()
    fused = fuse(conv, norm)
    if isinstance(fused, str) or conv.kernel_size != (1, 1):
        return None
    weight, batch_norm, geometry = fused
    if geometry.padding != (0, 0) or geometry.groups != 1:
        return None
    return Shortcut(x, weight, batch_norm, geometry.stride)
