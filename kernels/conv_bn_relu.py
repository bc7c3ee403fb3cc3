"""Convolution + batch norm [+ residual | + 1x1 shortcut convolution and its batch norm] [+ activation], in one kernel.

Implicit GEMM over channels-last memory: M = N*P*Q output pixels, K output channels, reduction over R*S*C. Batch norm is
applied to the fp32 accumulator from the running statistics as they are at the launch; no folded weights exist. The
kernels differ in how they load and in who does what:

* `hopper_conv.py`, and for 64 channels `hopper_conv64.py` (sm_90): warp-specialised, one warp loads, two groups
  multiply; 16 bits, the first also fp32 as TF32, filters 1x1 and 3x3;
* `hopper_few.py` (sm_90): for few images, without a loop, launched before the kernel ahead is done;
* `conv_box.py` (sm_90 and newer): tensor descriptors; the M tile is a box of output rows x columns x images;
* `conv_pointer.py` (everywhere): masked pointers over consecutive output pixels, for any geometry.

Few output pixels leave most of a GPU idle. Then SPLIT_K programs share a tile: each reduces over an equal part of the
(channel slab, tap) steps and applies the scale, the first adds the shift and the last the shortcut, and whoever
finishes last sums the partials. Equal parts, because a loop of unknown length makes ptxas serialise wgmma (C7513,
sm_90).

None skips a filter tap that falls into the padding: a NaN or Inf weight there must give NaN, as in PyTorch.
"""

from __future__ import annotations

from torch import Tensor

from .conv_box import conv_box
from .conv_pointer import conv_pointer
from .hopper_conv import hopper_conv
from .hopper_conv64 import hopper_conv64
from .hopper_few import hopper_few
from .launch import Launch
from .values import Activation, BatchNorm, ConvConfig, Geometry, Shortcut


def conv_bn_relu(
    *,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    batch_norm: BatchNorm,
    geometry: Geometry,
    residual: Tensor | None,
    shortcut: Shortcut | None,
    activation: Activation,
    precision: str,
    config: ConvConfig,
    programs: int,
    partials: Tensor | None,
    semaphores: Tensor | None,
) -> Launch:
    """The launch that writes `out` (N, K, P, Q); allocates nothing and chooses nothing.

    All 4-D tensors are NCHW-shaped, dense in channels_last memory and of one dtype (fp32, fp16 or bf16). `precision`
    is "ieee" or "tf32" and matters for fp32 alone. `config` is legal for this call: `resnet_triton.config.is_legal`
    says what each kernel asks for. If it splits the reduction, `partials` is fp32 with `split_k * block_m * block_k`
    elements a tile, and `semaphores` int32 with two zeros a tile, which the launch leaves at zero. `programs` run at a
    time, one a multiprocessor: a warp-specialised launch has no more.
    """
    if config.kernel == "hopper_few":
        return hopper_few(
            out=out, x=x, weight=weight, batch_norm=batch_norm, geometry=geometry, residual=residual, shortcut=shortcut,
            activation=activation, config=config, partials=partials, semaphores=semaphores,
        )  # fmt: skip
    if config.kernel:
        specialised = hopper_conv64 if config.kernel == "hopper_conv64" else hopper_conv
        return specialised(
            out=out, x=x, weight=weight, batch_norm=batch_norm, geometry=geometry, residual=residual, shortcut=shortcut,
            activation=activation, config=config, programs=programs, partials=partials, semaphores=semaphores,
        )  # fmt: skip
    conv = conv_pointer if config.box is None else conv_box
    return conv(
        out=out, x=x, weight=weight, batch_norm=batch_norm, geometry=geometry, residual=residual, shortcut=shortcut,
        activation=activation, precision=precision, config=config, partials=partials, semaphores=semaphores,
    )  # fmt: skip
