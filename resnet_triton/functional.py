"""Fused operations of ResNet inference, with torch.nn.functional's conventions.

4-D tensors are NCHW-shaped, in any memory format; results are in channels_last. `kernels` is "auto" (our Triton
kernels where they apply, PyTorch otherwise), "torch", or "triton", which raises NotImplementedError instead of falling
back and, in a process started with TRITON_INTERPRET=1, runs the kernels on CPU tensors too. With gradients wanted or
autocast on, the call runs on PyTorch.

With `batch_invariant=True` what comes out for an image does not depend, bit for bit, on the batch it is in, its place
there or its neighbours, as long as all else is the same: device, dtype, weights, versions, PyTorch's modes (gradients,
autocast) and settings (TF32, threads). Kernels then take one tile and one order of summation for all batch sizes;
PyTorch computes one image after another. `add_relu` and `max_pool2d` are so by nature.

Wrong shapes and devices raise ValueError, wrong dtypes TypeError, both naming the argument.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import ops
from .ops import BatchNorm, Shortcut
from .ops.checks import IntOrPair, pair
from .ops.dispatch import Kernels, Modes

__all__ = [
    "BatchNorm",
    "Shortcut",
    "add_relu",
    "avg_pool_linear",
    "conv_bn_relu",
    "global_avg_pool",
    "linear",
    "max_pool2d",
    "stem",
]


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    shortcut: Shortcut | None = None,
    activation: str = "relu",
    negative_slope: float = 0.01,
    batch_invariant: bool = False,
    kernels: Kernels = "auto",
) -> Tensor:
    """`activation(batch_norm(conv2d(x, weight)) + residual)`, with batch norm's running statistics.

    x (N, C, H, W), weight (K, C / groups, R, S), statistics and affine parameters (K,), residual and result
    (N, K, P, Q). x, weight and residual share a dtype, the result's: fp32 (TF32 if
    `torch.backends.cudnn.conv.fp32_precision` says so; without cuDNN, `torch.backends.cuda.matmul.fp32_precision`),
    fp16 and bf16 run on the kernels, accumulate in fp32 and round once. Batch norm's tensors may be of another floating
    dtype.

    In place of a residual, `shortcut` adds a 1x1 convolution and its batch norm: x (N, C', H', W') and weight
    (K, C', 1, 1) of the same dtype, a `BatchNorm`, and a pair of strides that lead to (P, Q). Beside a convolution in
    groups it runs on PyTorch.

    `activation` is one of torch.nn.functional: "relu", "relu6", "leaky_relu" with `negative_slope`, "hardswish",
    "silu", "gelu" (by erf), or "none".
    """
    statistics = BatchNorm(running_mean, running_var, bn_weight, bn_bias, _number("eps", eps))
    geometry = ops.Geometry(pair(stride, "stride"), pair(padding, "padding"), pair(dilation, "dilation"), groups)
    act = ops.Activation(activation, float(negative_slope))
    modes = Modes(batch_invariant, kernels)
    if shortcut is not None:  # plain tuples, too
        if residual is not None:
            raise ValueError("residual and shortcut are both given, expected at most one of them")
        images, filters, norm, strides = Shortcut(*shortcut)
        norm = BatchNorm(*norm)
        norm = norm._replace(eps=_number("shortcut_eps", norm.eps))
        shortcut = Shortcut(images, filters, norm, pair(strides, "shortcut_stride"))
    return ops.ConvBnRelu(x, weight, statistics, geometry, residual, shortcut, act, modes).run()


def stem(
    x: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    batch_invariant: bool = False,
    kernels: Kernels = "auto",
) -> Tensor:
    """A ResNet's stem: `max_pool2d(relu(batch_norm(conv2d(x, weight, stride=2, padding=3))), 3, 2, 1)`.

    x (N, C, H, W), weight (K, C, 7, 7), statistics and affine parameters (K,), result (N, K, H', W') in the weight's
    dtype, to which x is rounded. Bytes (torch.uint8) become `(x / 255 - pixel_mean) / pixel_std` first, with one value
    for each channel, computed in fp32. Of up to four channels in fp16 or bf16, the tensor between convolution and pool
    never exists on GPUs of compute capability 9.0 (one launch if K = 64, else two) and 10 (two launches). On others
    convolution and pool are a kernel each.
    """
    statistics = BatchNorm(running_mean, running_var, bn_weight, bn_bias, _number("eps", eps))
    mean, std = _numbers("pixel_mean", pixel_mean), _numbers("pixel_std", pixel_std)
    return ops.Stem(x, weight, statistics, mean, std, Modes(batch_invariant, kernels)).run()


def _number(name: str, value: float) -> float:
    """The argument `name` as it is passed on. TypeError if it is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}={value!r}, expected a number") from None


def _numbers(name: str, values: Sequence[float] | None) -> tuple[float, ...] | None:
    """The argument `name` as it is passed on. TypeError if it is no sequence of numbers."""
    try:
        return None if values is None else tuple(map(float, values))
    except (TypeError, ValueError):
        raise TypeError(f"{name}={values!r}, expected a number for each channel") from None


def add_relu(x: Tensor, other: Tensor, *, kernels: Kernels = "auto") -> Tensor:
    """`relu(x + other)`: both and the result (N, C, H, W), of any floating dtypes; the kernel takes equal ones."""
    return ops.AddRelu(x, other, Modes(kernels=kernels)).run()


def max_pool2d(
    x: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    *,
    ceil_mode: bool = False,
    kernels: Kernels = "auto",
) -> Tensor:
    """Max pooling of x (N, C, H, W), of any floating dtype, to (N, C, P, Q).

    NaN wins; padding counts as -inf; the stride defaults to the window. With `ceil_mode` a last window may reach over
    the end of the image. ValueError if padding is over half the window.
    """
    size = pair(kernel_size, "kernel_size")
    step = size if stride is None else pair(stride, "stride")
    return ops.MaxPool2d(x, size, step, pair(padding, "padding"), ceil_mode, Modes(kernels=kernels)).run()


def global_avg_pool(x: Tensor, *, batch_invariant: bool = False, kernels: Kernels = "auto") -> Tensor:
    """Mean over all pixels, summed in fp32: (N, C, H, W), of any floating dtype, to (N, C, 1, 1).

    ValueError if there are no pixels.
    """
    return ops.GlobalAvgPool(x, Modes(batch_invariant, kernels)).run()


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = False, kernels: Kernels = "auto"
) -> Tensor:
    """`x @ weight.T + bias`: x (..., C), weight (K, C), bias (K,), result (..., K), all of one floating dtype.

    Sums are kept in fp32; TF32 only if `torch.backends.cuda.matmul.fp32_precision` says so.
    """
    return ops.Linear(x, weight, bias, Modes(batch_invariant, kernels)).run()


def avg_pool_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = False, kernels: Kernels = "auto"
) -> Tensor:
    """A classifier's head, `linear(global_avg_pool(x).flatten(1), weight, bias)`: one launch for few images.

    x (N, C, H, W), weight (K, C), bias (K,), result (N, K), all of one floating dtype; the mean is rounded to it.
    """
    return ops.AvgPoolLinear(x, weight, bias, Modes(batch_invariant, kernels)).run()
