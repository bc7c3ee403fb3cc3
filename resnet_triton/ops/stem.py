"""A ResNet's stem: 7x7/2 convolution + batch norm + ReLU + 3x3/2 max pool, from images of floats or of bytes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self

from .. import config
from ..config.device import DeviceFacts
from ..kernels import cost
from ..kernels.cost import Cost
from ..kernels.launch import Launch
from ..kernels.values import BatchNorm, Geometry
from . import gluon, reference
from .checks import aligned, channels_last, check_pixels, check_rank, in_channels_last, too_large
from .conv import ConvBnRelu
from .dispatch import AUTO, HAS_TRITON, Modes
from .operation import Operation, Result, Shape, register
from .pool import MaxPool2d
from .precision import conv_precision

if HAS_TRITON:
    from ..kernels.hopper_stem import hopper_stem, reads, supports
    from ..kernels.stem import pack, packed_shape, stem

STEM_CONV = Geometry(stride=(2, 2), padding=(3, 3))
STEM_POOL = ((3, 3), (2, 2), (1, 1))
"""Window, stride and padding of the stem's pool."""


@dataclass(eq=False)
class Stem(Operation):
    """`max_pool2d(relu(batch_norm(conv2d(x, weight, stride=2, padding=3))), 3, 2, 1)`.

    x (N, C, H, W), weight (K, C, 7, 7), result (N, K, H', W') in the weight's dtype, to which x is rounded.
    Bytes become `(x / 255 - pixel_mean) / pixel_std` first.
    """

    rounds_between = True
    autocast = True

    x: Tensor
    weight: Tensor
    batch_norm: BatchNorm
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    modes: Modes = AUTO

    def convolution(self, x: Tensor) -> ConvBnRelu:
        """The convolution alone, of images in the filters' dtype."""
        return ConvBnRelu(x, self.weight, self.batch_norm, STEM_CONV, modes=self.modes)

    def result(self) -> Result:
        x, weight = self.x, self.weight
        check_rank("x", x.shape, 4, "(N, C, H, W)")
        given = (self.pixel_mean is not None, self.pixel_std is not None)
        if given != (x.dtype == torch.uint8,) * 2:
            raise TypeError(
                f"x has dtype {x.dtype}, expected torch.uint8 with pixel_mean and pixel_std, else floating point"
            )
        if weight.dim() == 4 and tuple(weight.shape[2:]) != (7, 7):
            raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (K, C, 7, 7)")
        if x.dtype == torch.uint8:
            x = x.new_empty((), dtype=weight.dtype).expand(x.shape)  # for its shape only
        n, k, p, q = self.convolution(x).result().shape
        if self.pixel_mean is not None and self.pixel_std is not None:
            check_pixels(self.pixel_mean, self.pixel_std, x.shape[1])
        return Result((n, k, (p - 1) // 2 + 1, (q - 1) // 2 + 1), weight.dtype)

    def fallback_reason(self, shape: Shape) -> str | None:
        p, q = ((edge - 1) // 2 + 1 for edge in self.x.shape[2:])
        return too_large((*shape[:2], p, q), self.x, STEM_CONV.padding[1], self.weight.numel())

    def launches(self, out: Tensor, facts: DeviceFacts) -> tuple[Launch, ...]:
        x, weight = self.x, channels_last(self.weight)
        n, c, h, w = x.shape
        shape, images = out.shape, self._for_one_launch(facts)
        if images is not None and aligned(out):
            return (
                hopper_stem(
                    out=out, x=images, weight=weight, batch_norm=self.batch_norm.contiguous(), mean=self.pixel_mean,
                    std=self.pixel_std, strip=config.hopper_strip(n, *shape[2:], facts), programs=facts.sm_count,
                ),
            )  # fmt: skip
        if self.modes.batch_invariant:
            tile = config.invariant_stem(*shape[1:], facts)
        else:
            tile = config.stem_heuristic(*shape, facts)
        if tile is None or c > 4 or weight.dtype not in (torch.float16, torch.bfloat16) or not _windows_work(x.device):
            return self._two_layers(out, facts)
        packed, marks = _scratch(n, h, w, weight.dtype, x.device)
        return (
            pack(out=packed, marks=marks, x=x, mean=self.pixel_mean, std=self.pixel_std, block=128, num_warps=4),
            stem(
                out=out, packed=packed, marks=marks, weight=weight, batch_norm=self.batch_norm.contiguous(),
                block_q=tile.block_q, block_k=tile.block_k, strip=tile.strip,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            ),
        )  # fmt: skip

    def alone(self) -> tuple[Tensor, Launch] | None:
        """The result, uninitialised, and the launch that writes it; None if it takes more than one launch.

        It reads weights and images where they are, so it can be repeated: `x_ptr` is all that changes with other images
        of the same sizes, strides and dtype whose address is, like that of `x`, a multiple of 16. It stays on the same
        memory, whatever `t.data = ...` does to a weight.
        """
        result, choice = self.choose()
        if choice.backend == "torch" or not aligned(self.x):
            return None
        out, launches, _ = self.prepare(result, gluon.facts(self.x.device))
        if out is None or len(launches) != 1 or not launches[0].is_gluon:
            return None
        (launch,) = launches
        own = {t.data_ptr() for t in self.schema.tensors(self)}
        read = {name: value.detach() for name, value in launch.arguments.items() if isinstance(value, Tensor)}
        described = [value.base for value in launch.arguments.values() if hasattr(value, "base")]
        elsewhere = [t for t in described if t.untyped_storage().data_ptr() != out.data_ptr()]
        if elsewhere or not own.issuperset(map(Tensor.data_ptr, read.values())):
            return None
        return out, replace(launch, arguments={**launch.arguments, **read})

    def _for_one_launch(self, facts: DeviceFacts) -> Tensor | None:
        """The images for the warp-specialised kernel, copied if it cannot read them as they lie; None if it takes none.

        Batch-invariant calls take it, too: each row of the convolution is one chain of products, in which a pixel has
        the same place whatever the batch, the strip or the strides. A strip only says which rows are computed twice.
        """
        if not facts.has_gluon or not supports(self.x, self.weight, self.pixel_mean, self.pixel_std):
            return None
        images = self.x if reads(self.x) else self.x.contiguous()
        return images if reads(images) else None

    def _two_layers(self, out: Tensor, facts: DeviceFacts) -> tuple[Launch, ...]:
        """Convolution, then pool: fp32, five channels and more, GPUs or drivers that the fused kernel does not suit."""
        convolution = self.convolution(self._images())
        between = convolution.result().empty(out.device)
        if self._pays_to_widen(between, facts):
            convolution = replace(convolution, x=_of_four(convolution.x), weight=_of_four(self.weight))
        pool = MaxPool2d(between, *STEM_POOL, modes=self.modes)
        return *convolution.launches(between, facts), *pool.launches(out, facts)

    def _pays_to_widen(self, between: Tensor, facts: DeviceFacts) -> bool:
        """Whether three channels had better be four: a load brings four, but three have to come one by one.

        In fp32 the products take more than the loads, and there would be a third more of them. Two copies, each after
        zeros, pay from about four tiles of 128 pixels an SM on. A batch-invariant call must not look at that.
        """
        if self.x.shape[1] != 3 or (self.weight.dtype == torch.float32 and conv_precision(torch.float32) == "ieee"):
            return False
        pixels = between.numel() // between.shape[1]
        return self.modes.batch_invariant or pixels >= 4 * 128 * facts.sm_count

    def _images(self) -> Tensor:
        if self.pixel_mean is None or self.pixel_std is None:
            return self.x.to(self.weight.dtype)
        return reference.normalize(self.x, self.pixel_mean, self.pixel_std).to(self.weight.dtype)

    def other_launches(self, out: Tensor, facts: DeviceFacts) -> tuple[Launch, ...]:
        return self.launches(out, gluon.without(facts)) if facts.has_gluon else ()

    def image(self, i: int) -> Self:
        alone = super().image(i)
        return replace(alone, x=alone._images(), pixel_mean=None, pixel_std=None)

    def reference(self) -> Tensor:
        return in_channels_last(reference.stem(self._images(), self.weight, *self.batch_norm))

    def cost(self) -> Cost:
        (n, c, h, w), (_, k, p, q) = self.x.shape, self.result().shape
        return cost.stem(n=n, c=c, h=h, w=w, k=k, p=p, q=q, itemsize=self.weight.element_size())


def _of_four(t: Tensor) -> Tensor:
    """`t` in channels_last memory, with zeros behind its three channels, which meet zeros: NaN stays where it is.

    A copy for this call: the next one reads the parameters again.
    """
    n, c, h, w = t.shape
    wide = t.new_zeros(n, h, w, 4).permute(0, 3, 1, 2)
    wide[:, :c] = t
    return wide


def _scratch(n: int, h: int, w: int, dtype: torch.dtype, where: torch.device) -> tuple[Tensor, Tensor]:
    """What `pack` fills: blocks of pixels, and a mark for each row of them."""
    packed = torch.empty(packed_shape(n, h, w), dtype=dtype, device=where)
    return packed, torch.empty(packed.shape[:2], dtype=torch.int32, device=where)


_windows: dict[torch.device, bool] = {}


def _windows_work(where: torch.device) -> bool:
    """Whether the driver takes a tensor map whose windows overlap. Its documentation does not promise that it does."""
    if where.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return _windows.get(where, True)
    if where not in _windows:
        try:
            _try_windows(where)
            _windows[where] = True
        except RuntimeError as error:
            if gluon.is_passing(error):
                raise
            _windows[where] = False
            warnings.warn(f"the stem takes two launches, the fused one failed: {error}", RuntimeWarning, stacklevel=2)
    return _windows[where]


def _try_windows(where: torch.device) -> None:
    """Launch the fused stem on eight pixels of zeros; RuntimeError from the driver if it refuses."""
    x = torch.zeros(1, 3, 8, 8, dtype=torch.float16, device=where)
    weight = channels_last(torch.zeros(64, 3, 7, 7, dtype=torch.float16, device=where))
    out = channels_last(torch.empty(1, 64, 2, 2, dtype=torch.float16, device=where))
    ones = torch.ones(64, dtype=torch.float32, device=where)
    packed, marks = _scratch(1, 8, 8, x.dtype, where)
    with torch.cuda.device(where):
        pack(out=packed, marks=marks, x=x, mean=None, std=None, block=128, num_warps=4).run()
        stem(
            out=out, packed=packed, marks=marks, weight=weight, batch_norm=BatchNorm(ones, ones, None, None, 0.0),
            block_q=64, block_k=64, strip=2, num_warps=4, num_stages=2,
        ).run()  # fmt: skip


register("stem", Stem)
