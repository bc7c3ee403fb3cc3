"""A ResNet's stem for Hopper (compute capability 9.0), warp-specialised and persistent, in Gluon: 7x7/2 convolution +
batch norm + ReLU + 3x3/2 max pool in one launch, from images as they are. Nothing in between reaches global memory.

**The product.** A row of the convolution is W X, where W (64 x 224) is the filters and column n of X the window of one
column of the convolution: 7 image rows x 8 pixels x 4 channels. Windows are 7 pixels wide and begin at an odd pixel;
with the pixel before they are four pairs, 64 bytes an image row. That pixel, which has no weight, and channels that
the image does not have are zeros in X, too: zero times infinity would be NaN. W stays in registers throughout.

**The order of columns.** Pooled column j is the maximum of columns 2j - 1, 2j and 2j + 1 of the convolution. In the
accumulator of a product (wgmma) a thread has two neighbours of every eight columns, so in their natural order the three
would mostly be in different threads. Therefore column n = 8 r + m of X is column 14 m - 1 + r of the convolution:

             m = 0     1     2    ...    7
    r =  0      -1    13    27          97
    r =  1       0    14    28          98
      ...
    r = 14      13    27    41         111
    r = 15       -     -     -           -

A thread has two whole columns of this table, and column m has all that pooled columns 7 m to 7 m + 6 need, so no value
has to move to another thread. Of 128 columns, seven are computed twice and eight are not used.

**The work.** An item is a strip of pooled rows of one image, 56 columns wide. A group of four warps walks down its
strip: for each pooled row it computes two rows of the convolution, and keeps the horizontal maxima of the second for
the row below. A program has two such groups, which take turns: while one uses the tensor cores, the other
normalises, takes maxima and stores.

**The images.** For each of the two groups, four more warps pack: they read two image rows, build windows from them and
write these into a slot of a ring (`hopper_stem_pack.py`). A row of the convolution reads four slots; the next row
begins one slot later.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper import async_store, compute_here, descriptor_of, maximum, relu, scale_and_shift
from .hopper_stem_pack import STAGES, is_paired, normalises_exactly, packer, work_item
from .launch import Launch, cdiv, with_base
from .values import BatchNorm, normalization_arguments

ACCUMULATOR = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))


@gluon.jit
def filter_row(w_ptr, ROW: gl.constexpr, C: gl.constexpr):
    """Row ROW of the filters (64, 7, 7, C) as [64, 32]: element 4 s + c is channel c of pixel s - 1, if any."""
    layout: gl.constexpr = gl.DotOperandLayout(0, ACCUMULATOR, 2)
    k = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, layout)), 1)
    e = gl.expand_dims(gl.arange(0, 32, layout=gl.SliceLayout(0, layout)), 0)
    s = e // 4 - 1
    c = e % 4
    mask = (k >= 0) & (s >= 0) & (c < C)
    return gl.load(w_ptr + (k * (49 * C) + (ROW * 7 + s) * C + c), mask=mask, other=0.0)


@gluon.jit
def split_even_odd(y):
    """[64, R, 8] -> its even and its odd rows r, [64, R / 2, 8] each."""
    return y.reshape((64, y.shape[1] // 2, 2, 8)).permute((0, 1, 3, 2)).split()


@gluon.jit
def interleave(even, odd):
    odd = gl.convert_layout(odd, even.type.layout)
    return gl.join(even, odd).permute((0, 1, 3, 2)).reshape((64, even.shape[1] * 2, 8))


@gluon.jit
def shift_rows(y):
    """[64, 8, 8] with row r + 1 in the place of row r; the last is garbage. This only renames registers."""
    even, odd = split_even_odd(y)  # 0 2 4 6, 1 3 5 7
    first, second = split_even_odd(even)  # 0 4, 2 6
    _, four = split_even_odd(first)
    shifted = interleave(odd, interleave(second, interleave(four, four)))  # 1 3 5 7, (2 6, 4 *): 1 2 3 4 5 6 7 *
    return gl.convert_layout(shifted, y.type.layout)


@gluon.jit
def pooled_columns(y):
    """Horizontal maxima of a row of the convolution, [64, 8 (x), 8 (m)]: element (x, m) is of pooled column 7 m + x."""
    left, middle = split_even_odd(y.reshape((64, 16, 8)))
    return maximum(maximum(left, gl.convert_layout(middle, left.type.layout)), shift_rows(left))


@gluon.jit
def convolution_row(
    group: gl.constexpr, turn: gl.constexpr, filters, scale, shift, ring, full, empty, turns, slot, together
):
    """The next row of the convolution, normalised, as `pooled_columns`, from `slot` on.

    Where the groups are `together`, they take turns at the tensor cores; `turn` is 0 and 1 in turn.
    """
    f0, f1, f2, f3, f4, f5, f6 = filters
    mbarrier.wait(full.index((slot + 3) % STAGES), (slot + 3) // STAGES & 1)
    x0 = ring.index(slot % STAGES)
    x1 = ring.index((slot + 1) % STAGES)
    x2 = ring.index((slot + 2) % STAGES)
    x3 = ring.index((slot + 3) % STAGES)
    mbarrier.wait(turns.index(group), turn ^ (1 - group), pred=together)
    acc = gl.zeros((64, 128), gl.float32, ACCUMULATOR)  # not read
    acc = warpgroup_mma(f0, x0.slice(0, 128, 0).permute((1, 0)), acc, use_acc=False, is_async=True)
    acc = warpgroup_mma(f1, x0.slice(128, 128, 0).permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma(f2, x1.slice(0, 128, 0).permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma(f3, x1.slice(128, 128, 0).permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma(f4, x2.slice(0, 128, 0).permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma(f5, x2.slice(128, 128, 0).permute((1, 0)), acc, is_async=True)
    mbarrier.arrive(turns.index(1 - group), count=1, pred=together)  # its products come behind this row's last
    acc = warpgroup_mma(f6, x3.slice(0, 128, 0).permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(slot % STAGES), count=1)
    return compute_here(pooled_columns(acc * gl.expand_dims(scale, 1) + gl.expand_dims(shift, 1)))


@gluon.jit
def multiplier(
    group: gl.constexpr, y_desc, rest_desc, w_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps,
    ring, out, full, empty, turns, items, TILES, STRIPS, STRIP, P, SEVENS, C: gl.constexpr, ODD_P: gl.constexpr,
):  # fmt: skip
    """One of the two groups that multiply."""
    filters = (
        filter_row(w_ptr, 0, C), filter_row(w_ptr, 1, C), filter_row(w_ptr, 2, C), filter_row(w_ptr, 3, C),
        filter_row(w_ptr, 4, C), filter_row(w_ptr, 5, C), filter_row(w_ptr, 6, C),
    )  # fmt: skip
    k = gl.arange(0, 64, layout=gl.SliceLayout(1, ACCUMULATOR))
    scale, shift = scale_and_shift(mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps, k, k < 64)
    slot = 0
    for item in range(gl.program_id(0) + group * gl.num_programs(0), items, 2 * gl.num_programs(0)):
        together = (group == 1) | (item + gl.num_programs(0) < items)  # else group 0 has the last item alone
        tile, i0, n = work_item(item, TILES, STRIPS, STRIP)
        for ahead in gl.static_range(3):
            mbarrier.wait(full.index((slot + ahead) % STAGES), (slot + ahead) // STAGES & 1)
        above = convolution_row(group, 0, filters, scale, shift, ring, full, empty, turns, slot, together)
        above = gl.where(i0 > 0, above, float("-inf"))
        slot += 1
        for i in range(i0, i0 + STRIP):
            even = convolution_row(group, 1, filters, scale, shift, ring, full, empty, turns, slot, together)
            pooled = maximum(above, even)
            slot += 1
            above = convolution_row(group, 0, filters, scale, shift, ring, full, empty, turns, slot, together)
            if ODD_P:
                pooled = gl.where(2 * i + 1 < P, maximum(pooled, above), pooled)
            else:
                pooled = maximum(pooled, above)
            pooled = relu(pooled).to(y_desc.dtype)
            slot += 1
            tma.store_wait(0)  # the row before has left its buffer
            out.reshape((8, 8, 64)).permute((2, 0, 1)).store(pooled)
            fence_async_shared()
            async_store(y_desc, [n, i, 0, tile * 8, 0], out)
            if rest_desc is not None:
                async_store(rest_desc, [n, i, 0, tile * 8 - SEVENS, 0], out)
        mbarrier.wait(turns.index(group), 1 ^ (1 - group), pred=together)  # one turn more, to begin a strip with turn 0
        mbarrier.arrive(turns.index(1 - group), count=1, pred=together)
        for ahead in gl.static_range(3):
            mbarrier.arrive(empty.index((slot + ahead) % STAGES), count=1)
        slot += 3
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "stride_n", "stride_c", "stride_h", "items", "TILES", "STRIPS", "STRIP", "P", "Q", "SEVENS", "H", "W",
    ]
)  # fmt: skip
def hopper_stem_kernel(
    x_ptr, w_ptr, y_desc, rest_desc, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps,
    stride_n, stride_c, stride_h, items, TILES, STRIPS, STRIP, P, Q, SEVENS, H, W,
    mean_0, mean_1, mean_2, mean_3, std_0, std_1, std_2, std_3,
    C: gl.constexpr, PLANES: gl.constexpr, PAIRED: gl.constexpr, NORMALIZE: gl.constexpr,
    ODD_P: gl.constexpr, ODD_Q: gl.constexpr,
):  # fmt: skip
    # Registers of a thread, most for filters and accumulators: the four groups share the 512 that a multiprocessor has
    # for 4 x 32 threads, and two groups pack.
    PACKING: gl.constexpr = 56 if PAIRED and x_ptr.dtype.element_ty.primitive_bitwidth == 16 else 64
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    rings = [gl.allocate_shared_memory(y_desc.dtype, [STAGES, 256, 32], layout) for _ in (0, 1)]
    out = gl.allocate_shared_memory(y_desc.dtype, [2, 1, 1, 8, 8, 64], y_desc.layout)
    full = [gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()) for _ in (0, 1)]
    empty = [gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()) for _ in (0, 1)]
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full[0].index(i), count=1)
        mbarrier.init(full[1].index(i), count=1)
        mbarrier.init(empty[0].index(i), count=1)
        mbarrier.init(empty[1].index(i), count=1)
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    fence_async_shared()
    normalization = ()
    if NORMALIZE:
        normalization = (mean_0, mean_1, mean_2, mean_3, std_0, std_1, std_2, std_3)
    gl.warp_specialize([
        (multiplier, (
            group, y_desc, rest_desc, w_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps,
            rings[group], out.index(group), full[group], empty[group], turns,
            items, TILES, STRIPS, STRIP, P, SEVENS, C, ODD_P,
        )) if group < 2 else (packer, (
            group - 2, x_ptr, stride_n, stride_c, stride_h, normalization, rings[group - 2], full[group - 2],
            empty[group - 2], items, TILES, STRIPS, STRIP, Q, H, W, C, PLANES, PAIRED, ODD_Q,
        ))
        for group in (0, 1, 2, 3)
    ], worker_num_warps=[4, 4, 4], worker_num_regs=[256 - PACKING, PACKING, PACKING])  # fmt: skip


def supports(x: Tensor, weight: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> bool:
    """Whether `hopper_stem` takes these, once the images lie as it reads them: see there."""
    k, c, _, _ = weight.shape
    return (
        k == 64 and c <= 4
        and weight.dtype in (torch.float16, torch.bfloat16)
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
        and (mean is None or std is None or normalises_exactly(tuple(mean), tuple(std)))
    )  # fmt: skip


def reads(x: Tensor) -> bool:
    """Whether images lie as `hopper_stem` reads them: see there."""
    (c, h, w), (c_stride, h_stride, w_stride) = x.shape[1:], x.stride()[1:]
    together = w_stride == 1 or (c_stride == 1 and w_stride == c)
    # It begins up to five rows above the image.
    return together and max(max(h, 5) * h_stride, c * c_stride, w * w_stride) < 2**30


def hopper_stem(
    *, out: Tensor, x: Tensor, weight: Tensor, batch_norm: BatchNorm, mean: Sequence[float] | None,
    std: Sequence[float] | None, strip: int, programs: int,
) -> Launch:  # fmt: skip
    """The launch of at most `programs` programs that writes `out` (N, 64, P', Q'), dense in channels_last memory.

    `weight` (64, C, 7, 7), C at most 4, fp16 or bf16, dense in channels_last memory, aligned to 16 bytes like `out`.
    `x` (N, C, H, W), fp32, fp16 or bf16, is rounded to the weight's dtype; with `mean` and `std`, one for each channel,
    it holds bytes and becomes `(x / 255 - mean) / std` first, computed in fp32. In its memory neighbours are either the
    pixels of a row or the channels of a pixel and then the pixels; it is read faster where all pairs of pixels lie on
    words of two values. A group of warps computes `strip` pooled rows at a time.
    """
    n, c, h, w = x.shape
    _, _, pool_p, pool_q = out.shape
    p, q, tiles, strips = (h + 1) // 2, (w + 1) // 2, cdiv(pool_q, 56), cdiv(pool_p, strip)
    items = n * strips * tiles
    y_desc, rest_desc = _row_descriptors(out)
    paired = is_paired(x)
    word = 2 if paired else 1
    arguments = {
        "x_ptr": x, "w_ptr": weight, "y_desc": y_desc, "rest_desc": rest_desc, **batch_norm.arguments(),
        "stride_n": x.stride(0) // word, "stride_c": x.stride(1) // word, "stride_h": x.stride(2) // word,
        "items": items, "TILES": tiles, "STRIPS": strips, "STRIP": strip,
        "P": p, "Q": q, "SEVENS": pool_q // 7, "H": h, "W": w,
        **normalization_arguments(mean, std),
        "C": c, "PLANES": x.stride(3) == 1, "PAIRED": paired, "ODD_P": p % 2 == 1, "ODD_Q": q % 2 == 1,
    }  # fmt: skip
    return Launch(hopper_stem_kernel, (min(programs, items),), arguments, num_warps=4)


def _row_descriptors(out: Tensor) -> list[TensorDescriptor | None]:
    """Descriptors that take a row of a tile, [8 (x), 8 (m), 64]: pooled column 7 m + x is column x of their group m.

    The second is of the columns behind the last seven, if there are any, in one group. Whatever lies outside is
    dropped: x = 7, and groups and rows that the result does not have.
    """
    n, k, pool_p, pool_q = out.shape
    groups, rest = divmod(pool_q, 7)
    strides = (pool_p * pool_q * k, pool_q * k, k, 7 * k, 1)
    found: list[TensorDescriptor | None] = []
    for first, columns, count in ((0, 7, groups), (7 * groups, rest, 1)):
        if columns and count:
            like = descriptor_of(out.dtype, (n, pool_p, columns, count, k), strides, (1, 1, 8, 8, k))
            found.append(with_base(like, out[..., first:]))
    return [*found, None][:2]
