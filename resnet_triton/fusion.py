"""When a convolution, its batch norm, ReLU and residual or shortcut may be one fused call, and that call.

A module that is not what it should be (training mode, a replaced norm layer, a forward hook) is simply called, as
torchvision would call it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import ops
from .ops import dispatch


def conv_obstacle(conv: nn.Module, norm: nn.Module) -> str | None:
    """Why `norm(conv(x))` cannot be one fused call; None if it can."""
    if type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d:
        return f"{type(conv).__name__} and {type(norm).__name__} instead of Conv2d and BatchNorm2d"
    if norm.training:
        return "training mode"
    if norm.running_mean is None or norm.running_var is None:
        return "batch norm without running statistics"
    if conv.bias is not None or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return "convolution with a bias or without zero padding in numbers"
    return "a hook or a forward of its own" if watched(conv) or watched(norm) else None


def watched(module: nn.Module) -> bool:
    """Whether calling this instance does more than its class's forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module) or _has_any_global_hook()


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is exactly of this kind and nothing watches it, so that a fused call may stand in for it."""
    return type(module) is kind and not watched(module)


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
    act: nn.Module | None,
    modes: dispatch.Modes,
    *,
    identity: Tensor | None = None,
    downsample: nn.Module | None = None,
) -> Tensor:
    """`act(norm(conv(x)) + downsample(identity))` in one fused call if the modules allow it, else module by module."""
    relu = act is not None and plain(act, nn.ReLU)
    obstacle = conv_obstacle(conv, norm)
    if obstacle is not None:
        y = _by_modules(x, conv, norm, modes, obstacle)
        if identity is not None:
            y = y + (identity if downsample is None else downsample(identity))
        return y if act is None else act(y)

    shortcut = _shortcut(downsample)
    if shortcut is None and downsample is not None:
        identity = by_module(downsample, identity, modes)
    added: tuple[Any, ...] = (identity, *ops.NO_SHORTCUT)
    if shortcut is not None:
        s_conv, s_norm = shortcut
        added = (None, identity, s_conv.weight, *batch_norm(s_norm), s_conv.stride)
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    y = ops.call("conv_bn_relu", x, conv.weight, *batch_norm(norm), *geometry, *added, relu, *modes)
    return y if relu or act is None else by_module(act, y, modes)


def batch_norm(norm: Any) -> tuple[Any, ...]:
    return norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps


def by_module(module: Any, x: Any, modes: dispatch.Modes) -> Any:
    """`module(x)`, as torchvision would call it. NotImplementedError if the answer must not depend on the batch."""
    if not plain(module, nn.Identity):
        _refuse_batch_invariance(modes, f"{type(module).__name__} replaced, watched or traced")
    return module(x)


def _by_modules(x: Tensor, conv: nn.Module, norm: nn.Module, modes: dispatch.Modes, obstacle: str) -> Tensor:
    _refuse_batch_invariance(modes, obstacle)
    dispatch.choose(modes.kernels, x.device, x.dtype, obstacle)
    dispatch.count("conv_bn_relu", "torch", obstacle)
    y: Tensor = norm(conv(x))
    return y


def _refuse_batch_invariance(modes: dispatch.Modes, obstacle: str) -> None:
    if modes.batch_invariant:
        raise NotImplementedError(f"batch_invariant=True cannot call modules, only operators of ours: {obstacle}")


def _shortcut(downsample: nn.Module | None) -> tuple[Any, Any] | None:
    """The shortcut's convolution and batch norm, if they can ride in the block's last convolution."""
    if downsample is None or not plain(downsample, nn.Sequential) or len(downsample) != 2:  # type: ignore[arg-type]
        return None
    conv, norm = downsample.children()
    if conv_obstacle(conv, norm) is not None:
        return None
    pointwise = conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    return (conv, norm) if pointwise else None
