"""When a convolution, its batch norm, ReLU and residual or shortcut may be one fused call, and that call.

A module that is not what it should be (training mode, a replaced norm layer, a forward hook) is simply called, as
torchvision would call it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .ops import BatchNorm, ConvBnRelu, Geometry, Shortcut, dispatch
from .ops.checks import pair
from .ops.dispatch import Modes


def unfused_reason(conv: nn.Module, norm: nn.Module) -> str | None:
    """Why `norm(conv(x))` cannot be one fused call; None if it can."""
    if type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d:
        return f"{type(conv).__name__} and {type(norm).__name__} instead of Conv2d and BatchNorm2d"
    if norm.training:
        return "training mode"
    if norm.running_mean is None or norm.running_var is None:
        return "batch norm without running statistics"
    if conv.bias is not None or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return "convolution with a bias or without zero padding in numbers"
    return "a hook or a forward of its own" if _hooked(conv) or watched(norm) else None


def watched(module: nn.Module) -> bool:
    """Whether calling this instance does more than its class's forward."""
    return _hooked(module) or _has_any_global_hook()


def _hooked(module: nn.Module) -> bool:
    its = vars(module)
    hooks = its["_forward_hooks"] or its["_forward_pre_hooks"] or its["_backward_hooks"] or its["_backward_pre_hooks"]
    return bool(hooks) or "forward" in its


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
    modes: Modes,
    *,
    identity: Tensor | None = None,
    downsample: nn.Module | None = None,
) -> Tensor:
    """`act(norm(conv(x)) + downsample(identity))` in one fused call if the modules allow it, else module by module."""
    relu = type(act) is nn.ReLU and not _hooked(act)
    reason = unfused_reason(conv, norm)
    if reason is not None:
        y = _by_modules(x, conv, norm, modes, reason)
        if identity is not None:
            y = y + (identity if downsample is None else downsample(identity))
        return y if act is None else act(y)

    shortcut = None if downsample is None or identity is None else _shortcut(identity, downsample)
    if shortcut is not None:
        identity = None
    elif downsample is not None:
        identity = by_module(downsample, identity, modes)
    y = ConvBnRelu(x, conv.weight, batch_norm(norm), _geometry(conv), identity, shortcut, relu, modes).run()
    return y if relu or act is None else by_module(act, y, modes)


def batch_norm(norm: Any) -> BatchNorm:
    """The tensors of a `BatchNorm2d` as they are now."""
    return BatchNorm(norm.running_mean, norm.running_var, norm.weight, norm.bias, float(norm.eps))


def _geometry(conv: Any) -> Geometry:
    """In whole numbers of Python's, whatever was set on the module."""
    return Geometry(pair(conv.stride), pair(conv.padding), pair(conv.dilation), conv.groups)


def by_module(module: Any, x: Any, modes: Modes) -> Any:
    """`module(x)`, as torchvision would call it. NotImplementedError if the answer must not depend on the batch."""
    if not plain(module, nn.Identity):
        _refuse_batch_invariance(modes, f"{type(module).__name__} replaced, watched or traced")
    return module(x)


def _by_modules(x: Tensor, conv: nn.Module, norm: nn.Module, modes: Modes, reason: str) -> Tensor:
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
    if unfused_reason(conv, norm) is not None:
        return None
    if conv.kernel_size != (1, 1) or conv.padding != (0, 0) or conv.groups != 1:
        return None
    return Shortcut(x, conv.weight, batch_norm(norm), pair(conv.stride))
