"""Convolution + batch norm [+ residual | + 1x1 shortcut convolution and its batch norm] [+ activation], in one kernel.

Implicit GEMM over channels-last memory: M = N*P*Q output pixels, K output channels, reduction over R*S*C. Batch norm is
applied to the fp32 accumulator from the running statistics as they are at the launch; no folded weights exist. The
kernels differ in how they load and in which warps do what:

* `hopper_conv.py`, and for 64 channels `hopper_conv64.py` (sm_90): warp-specialised, one warp loads, two groups
  multiply; 16 bits, the first also fp32 as TF32, filters 1x1 and 3x3;
* `hopper_few.py` (sm_90): for few images, without a loop, launched while the previous kernel still runs;
* `conv_box.py` (sm_90 and newer): tensor descriptors; the M tile is a box of output rows x columns x images;
* `conv_pointer.py` (everywhere): masked pointers over consecutive output pixels, for any geometry and groups.

Few output pixels leave most of a GPU idle. Then SPLIT_K programs share a tile. Each reduces over an equal part of the
(channel slab, tap) steps and applies the scale; the first also adds the shift, and the last the shortcut. The one that
finishes last sums the partials. The parts are equal because a loop of unknown length makes ptxas serialise wgmma
(C7513, sm_90). If a scale is infinite, because a variance and epsilon are both 0, parts of opposite signs sum to NaN.

No kernel skips a filter tap that falls into the padding: a NaN or Inf weight there must give NaN, as in PyTorch.
"""

from __future__ import annotations

from .conv_box import conv_box
from .conv_pointer import conv_pointer
from .hopper_conv import hopper_conv
from .hopper_conv64 import hopper_conv64
from .hopper_few import hopper_few
from .launch import Launch
from .values import BOX, CONV, CONV64, FEW, PINGPONG, POINTER, Convolution

_LAUNCHERS = {
    POINTER: conv_pointer, BOX: conv_box, CONV: hopper_conv, PINGPONG: hopper_conv, CONV64: hopper_conv64,
    FEW: hopper_few,
}  # fmt: skip


def conv_bn_relu(call: Convolution) -> Launch:
    """The launch that computes a call, of the kernel that its configuration names."""
    return _LAUNCHERS[call.config.kernel](call)
