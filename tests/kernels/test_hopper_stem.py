"""The stem in Gluon, executed from its PTX: bit for bit like fp64, nothing left unordered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from exact import batch_norm, channels_last, generator, integers
from gluon import ptx
from simulator import simulate

from resnet_triton.kernels.hopper_stem import hopper_stem, reads, supports
from resnet_triton.kernels.hopper_stem_pack import is_paired, normalises_exactly
from resnet_triton.kernels.values import BatchNorm
from resnet_triton.ops import reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAN, INF = float("nan"), float("inf")


def beside_another(x: Tensor) -> Tensor:
    """Rows that lie apart."""
    return torch.cat([x, x.flip(3)], 3)[..., : x.shape[3]]


class Case(NamedTuple):
    """Images, and how they lie in memory; `strip` pooled rows an item, `programs` of two groups."""

    size: tuple[int, int, int, int]  # n, c, h, w
    dtype: torch.dtype = torch.float16
    layout: Callable[[Tensor], Tensor] = Tensor.contiguous
    weight: torch.dtype = torch.float16
    special: bool = False
    affine: bool = True
    strip: int = 2
    programs: int = 2


CASES = {
    "columns of several tiles": Case((1, 3, 16, 284), programs=3),
    "a column more than a tile": Case((1, 1, 5, 226), programs=1),
    "pixels": Case((3, 3, 14, 28), layout=channels_last, strip=1),
    "floats": Case((2, 3, 13, 62), torch.float32, special=True),
    "odd": Case((2, 1, 9, 19), strip=3, affine=False, programs=1),
    "bytes": Case((2, 3, 12, 30), torch.uint8, layout=channels_last),
}
SLOW = {
    "bfloat16": Case((2, 4, 12, 29), torch.bfloat16, channels_last, weight=torch.bfloat16, special=True),
    "float pixels": Case((1, 3, 17, 222), torch.float32, channels_last, special=True),
    "rows apart": Case((2, 2, 18, 62), layout=beside_another, special=True, programs=1),
    "planes of bytes": Case((2, 3, 13, 33), torch.uint8),
    "fp16, filters in bfloat16": Case((1, 3, 9, 30), weight=torch.bfloat16),
}


def images(case: Case, g: torch.Generator) -> tuple[Tensor, Tensor, BatchNorm]:
    """Images, filters and batch norm for which fp64 leaves nothing to round before the output."""
    n, c, h, w = case.size
    if case.dtype == torch.uint8:  # filters of one weight, for what a byte becomes is no integer
        filters = torch.zeros(64, c, 7, 7)
        k = torch.arange(64)
        filters[k, k % c, k // c % 7, k // 2 % 7] = 1.0 - 2.0 * (k % 2)
        ones = torch.ones(64)
        x = torch.randint(0, 256, case.size, generator=g, dtype=torch.uint8)
        return x, filters.to(case.weight), BatchNorm(0 * ones, ones, None, None, 0.0)
    x, filters = integers(g, 3, *case.size, dtype=case.dtype), integers(g, 2, 64, c, 7, 7)
    if case.special:
        filters[filters == 0] = 1.0  # PyTorch's products may skip a zero, and with it NaN
        x[0, 0, 0, 0], x[n - 1, c - 1, h - 1, w - 1], x[0, 0, h // 2, w // 2] = INF, -INF, NAN
    return x, filters.to(case.weight), batch_norm(g, 64, affine=case.affine)


def expected(x: Tensor, filters: Tensor, norm: BatchNorm, dtype: torch.dtype) -> Tensor:
    y = F.conv2d(x.double(), filters.double(), stride=2, padding=3)
    mean, var, bn_weight, bn_bias = (None if t is None else t.double()[:, None, None] for t in norm[:4])
    y = (y - mean) / (var + norm.eps).sqrt()
    y = y if bn_weight is None else y * bn_weight
    y = y if bn_bias is None else y + bn_bias
    return F.max_pool2d(torch.where(y < 0, 0.0, y), 3, 2, 1).to(dtype)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name) for name, case in CASES.items()]
    + [pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()],
)
def test_exact(case: Case) -> None:
    x, filters, norm = images(case, generator(torch.device("cpu"), 0))
    mean, std = (MEAN, STD) if case.dtype == torch.uint8 else (None, None)
    real = reference.normalize(x, MEAN, STD) if case.dtype == torch.uint8 else x
    right = expected(real.to(case.weight), filters, norm, case.weight)
    out = channels_last(torch.full_like(right, NAN if not case.special else 777.0))
    x, filters = case.layout(x), channels_last(filters)
    assert supports(x, filters, mean, std)
    assert reads(x)
    launch = hopper_stem(
        out=out, x=x, weight=filters, batch_norm=norm, mean=mean, std=std, strip=case.strip, programs=case.programs
    )
    n, _, pool_p, pool_q = out.shape
    assert launch.arguments["items"] == n * -(-pool_p // case.strip) * -(-pool_q // 56), "no more rows"
    assert launch.grid[0] <= case.programs
    assert not simulate(launch, ptx(launch)).faults
    torch.testing.assert_close(out, right, rtol=0, atol=0, equal_nan=True)
    assert right.isnan().any() == case.special


def test_for_other_images_only_the_address_changes() -> None:
    """The same machine code and arguments, as the launch in front of a CUDA graph is repeated."""
    case = CASES["pixels"]
    x, filters, norm = images(case, generator(torch.device("cpu"), 0))
    out = channels_last(torch.empty_like(expected(x, filters, norm, case.weight)))
    other = case.layout(images(case, generator(torch.device("cpu"), 1))[0])
    launch = hopper_stem(
        out=out, x=case.layout(x), weight=channels_last(filters), batch_norm=norm, mean=None, std=None,
        strip=case.strip, programs=case.programs,
    )  # fmt: skip
    repeated = replace(launch, arguments={**launch.arguments, "x_ptr": other})
    for again, given in ((launch, x), (repeated, other)):
        out.fill_(NAN)
        assert not simulate(again, ptx(launch)).faults
        torch.testing.assert_close(out, expected(given, filters, norm, case.weight), rtol=0, atol=0)


def test_what_comes_out_for_an_image_depends_on_nothing_else() -> None:
    """Not by one bit, whatever its batch, the strips and the programs: so batch-invariant calls may take it."""
    g = generator(torch.device("cpu"), 0)
    x, filters = (torch.randn(*size, generator=g).half() for size in ((3, 3, 22, 30), (64, 3, 7, 7)))
    filters, norm = channels_last(filters), batch_norm(g, 64, affine=True)

    def run(x: Tensor, strip: int, programs: int) -> Tensor:
        out = channels_last(torch.full((len(x), 64, 6, 8), NAN, dtype=torch.float16))
        launch = hopper_stem(
            out=out, x=x, weight=filters, batch_norm=norm, mean=None, std=None, strip=strip, programs=programs
        )
        assert not simulate(launch, ptx(launch)).faults
        return out

    whole = run(x, 6, 1)
    for i, strip in enumerate((1, 4, 6)):
        assert torch.equal(run(x[i : i + 1].clone(), strip, 2), whole[i : i + 1]), strip


def test_layouts_that_it_reads():
    """Whole planes, or pixels with their channels side by side; words of two values only where they lie in words."""
    filters = torch.zeros(64, 3, 7, 7, dtype=torch.float16)
    pixels = torch.zeros(2, 8, 8, 4, dtype=torch.float16).permute(0, 3, 1, 2)
    assert reads(pixels[:, :3].contiguous())
    assert reads(pixels[:, :3].contiguous(memory_format=torch.channels_last))
    assert not reads(pixels[:, :3]), "a fourth channel lies between"
    assert not reads(torch.empty_strided((1, 3, 8, 8), (600, 200, 24, 3))), "two pixels of the same channel do"
    for c in (4, 5):
        assert supports(torch.zeros(2, c, 8, 8), filters.new_zeros(64, c, 7, 7), None, None) == (c == 4), "four fit"
    for dtype in (torch.uint8, torch.float16, torch.float32):
        memory = torch.zeros(80, dtype=dtype)
        for first in range(8):
            assert is_paired(memory[first : first + 64].view(1, 1, 8, 8)) == (first % 2 == 0), (dtype, first)
        assert not is_paired(memory[:63].view(1, 1, 9, 7))
        for channels in (1, 2):
            assert is_paired(memory.as_strided((1, channels, 4, 8), (80, 35, 8, 1))) == (channels == 1)
    for c, stride, h, row, w, near in (
        (3, 2**30 // 3, 2, 8, 8, True), (3, 2**30 // 3 + 1, 2, 8, 8, False),
        (1, 8, 6, 2**30 // 6, 8, True), (1, 8, 6, 2**30 // 6 + 1, 8, False),
        (1, 8, 1, 2**30 // 5, 8, True), (1, 8, 1, 2**30 // 5 + 1, 8, False),
        (1, 8, 1, 8, 2**30 - 1, True), (1, 8, 1, 8, 2**30, False),
    ):  # fmt: skip
        far = torch.empty_strided((1, c, h, w), (8, stride, row, 1), dtype=torch.float16, device="meta")
        assert reads(far) == near, "offsets within an image are int32"
    assert not supports(far[..., :8], filters[:, :c].float(), None, None)
    assert not supports(far[..., :8].double(), filters[:, :c], None, None)
    assert not supports(far[..., :8], filters[:32, :c], None, None)


def test_what_reciprocals_normalise_exactly():
    assert normalises_exactly(MEAN, STD), "as torchvision normalises"
    assert normalises_exactly((3.0,), (2.0**-126,)), "none becomes infinite"
    assert normalises_exactly((0.5,), (1.7 * 2.0**125,)), "no quotient lies halfway between two numbers"
    assert not normalises_exactly((0.5,), (2.0**126,)), "some do"
    assert not normalises_exactly((-2.15046,), (1.9056e38,)), "one is halfway in fp64, and no tie in fp32"
    assert not normalises_exactly((0.5, 0.5), (0.5, 1e-45)), "its reciprocal is infinite"
    with torch.device("meta"):
        assert normalises_exactly((0.25,), (0.5,)), "whatever the default device"
