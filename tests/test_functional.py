"""resnet_triton.functional against torch.nn.functional: values, dtypes, shapes, memory formats and errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

from resnet_triton import dispatch
from resnet_triton import functional as F

BACKENDS = ("torch", "triton", "auto")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """fp32 means fp32 here. By the older flag: torch.export refuses to run once the newer one is set (torch 2.13)."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def ran() -> Callable[[], dict[tuple[str, str], int]]:
    """Calls counted since the test began."""
    before = Counter(dispatch.calls)
    return lambda: dict(dispatch.calls - before)


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def torch_conv(
    x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, gamma: Any, beta: Any, eps: float, **kw: Any
) -> Tensor:
    residual, relu = kw.pop("residual", None), kw.pop("relu", True)
    y = TF.batch_norm(TF.conv2d(x, weight, None, **kw), mean, var, gamma, beta, False, 0.0, eps)
    y = y if residual is None else y + residual
    return TF.relu(y) if relu else y


def torch_stem(x: Tensor, *rest: Any) -> Tensor:
    return TF.max_pool2d(torch_conv(x, *rest, stride=2, padding=3), 3, 2, 1)


def torch_head(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return TF.linear(x.mean((2, 3)), weight, bias)


def conv_tensors(device: Any, n: int, c: int, h: int, w: int, k: int, r: int, s: int, groups: int = 1) -> list[Tensor]:
    """x, weight, mean, var, gamma, beta in fp32."""
    torch.manual_seed(0)
    x = torch.randn(n, c, h, w, device=device)
    weight = torch.randn(k, c // groups, r, s, device=device) / (c // groups * r * s) ** 0.5
    norm = [torch.randn(k, device=device), torch.rand(k, device=device) + 0.5]
    return [x, weight, *norm, torch.randn(k, device=device), torch.randn(k, device=device)]


# --- values ----------------------------------------------------------------------------------------------------------

GEOMETRIES = {
    "stem": ({"n": 1, "c": 3, "h": 9, "w": 11, "k": 8, "r": 7, "s": 7}, {"stride": 2, "padding": 3}),
    "3x3": ({"n": 2, "c": 16, "h": 8, "w": 6, "k": 16, "r": 3, "s": 3}, {"padding": 1}),
    "3x3-stride2": ({"n": 2, "c": 8, "h": 6, "w": 8, "k": 16, "r": 3, "s": 3}, {"stride": 2, "padding": 1}),
    "3x3-stride2-odd": ({"n": 1, "c": 8, "h": 7, "w": 5, "k": 8, "r": 3, "s": 3}, {"stride": 2, "padding": 1}),
    "1x1": ({"n": 2, "c": 16, "h": 3, "w": 5, "k": 24, "r": 1, "s": 1}, {}),
    "1x1-stride2": ({"n": 2, "c": 16, "h": 6, "w": 4, "k": 8, "r": 1, "s": 1}, {"stride": 2}),
    "dilated": ({"n": 1, "c": 8, "h": 9, "w": 9, "k": 8, "r": 3, "s": 3}, {"padding": 2, "dilation": 2}),
    "pairs": (
        {"n": 1, "c": 5, "h": 8, "w": 9, "k": 7, "r": 1, "s": 3},
        {"stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
    ),
    "one-pixel": ({"n": 3, "c": 4, "h": 1, "w": 1, "k": 6, "r": 1, "s": 1}, {}),
    "smaller-than-filter": ({"n": 1, "c": 4, "h": 2, "w": 1, "k": 4, "r": 3, "s": 3}, {"padding": 1}),
    "one-channel": ({"n": 1, "c": 1, "h": 4, "w": 5, "k": 1, "r": 3, "s": 3}, {}),
    "empty-batch": ({"n": 0, "c": 4, "h": 5, "w": 5, "k": 8, "r": 3, "s": 3}, {"padding": 1}),
}


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_conv_bn_relu(device, geometry, kernels):
    sizes, options = geometry
    tensors = conv_tensors(device, **sizes)
    expected = torch_conv(*(t.double() for t in tensors), 1e-3, **options)
    actual = F.conv_bn_relu(*tensors, 1e-3, **options, kernels=kernels)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("affine", [False, True], ids=["no-affine", "affine"])
def test_conv_bn_relu_options(device, affine, relu, residual, kernels):
    x, weight, mean, var, gamma, beta = conv_tensors(device, 2, 6, 5, 4, 8, 3, 3)
    gamma, beta = (gamma, beta) if affine else (None, None)
    options = {"padding": 1, "relu": relu, "residual": torch.randn(2, 8, 5, 4, device=device) if residual else None}
    kept = [None if t is None else t.clone() for t in (x, weight, mean, var, gamma, beta, options["residual"])]
    actual = F.conv_bn_relu(x, weight, mean, var, gamma, beta, **options, kernels=kernels)
    torch.testing.assert_close(
        actual, torch_conv(x, weight, mean, var, gamma, beta, 1e-5, **options), rtol=1e-5, atol=1e-5
    )
    for t, before in zip((x, weight, mean, var, gamma, beta, options["residual"]), kept, strict=True):
        assert (t is before is None) or torch.equal(t, before)  # no input is written to


@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [("triton", dtype) for dtype in DTYPES] + [("torch", torch.float32), ("auto", torch.float32)],
    ids=lambda v: str(v).removeprefix("torch."),
)
def test_small_integers_are_exact(device, kernels, dtype):
    """Sums of small integers and scales by powers of two leave nothing to round but the result."""
    rng = np.random.default_rng(0)

    def pick(values: Any, *shape: int) -> Tensor:
        return torch.from_numpy(rng.choice(np.asarray(values, dtype=np.float32), shape)).to(device)

    x, weight, residual = (
        pick(range(-3, 4), 2, 8, 6, 6),
        pick(range(-2, 3), 16, 8, 3, 3),
        pick(range(-9, 10), 2, 16, 3, 3),
    )
    norm = pick(range(-5, 6), 16), pick([0.25, 1, 4, 16], 16), pick([0, 0.5, -0.5, 1, 2], 16), pick(range(-5, 6), 16)
    options: dict[str, Any] = {"stride": 2, "padding": 1}
    expected = torch_conv(*(t.double() for t in (x, weight, *norm)), 0.0, residual=residual.double(), **options)
    x, weight, residual = x.to(dtype), weight.to(dtype), residual.to(dtype)
    actual = F.conv_bn_relu(x, weight, *norm, 0.0, residual=residual, **options, kernels=kernels)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernels", BACKENDS)
def test_dtype_of_result(device, kernels, dtype):
    x, weight, *norm = conv_tensors(device, 1, 4, 4, 4, 4, 1, 1)
    x, weight, bias = x.to(dtype), weight.to(dtype), norm[-1].to(dtype)
    results = [
        F.conv_bn_relu(x, weight, *norm, kernels=kernels),  # batch norm in fp32 beside a narrower x
        F.add_relu(x, x, kernels=kernels),
        F.max_pool2d(x, 2, kernels=kernels),
        F.global_avg_pool(x, kernels=kernels),
        F.linear(x, weight[:, :, 0, 0], bias, kernels=kernels),
        F.avg_pool_linear(x, weight[:, :, 0, 0], bias, kernels=kernels),
        F.stem(x, weight.expand(4, 4, 7, 7) / 7, *norm, kernels=kernels),
    ]
    expected = [
        torch_conv(x.double(), weight.double(), *(t.double() for t in norm), 1e-5),
        TF.relu(x.double() * 2),
        TF.max_pool2d(x.double(), 2),
        x.double().mean((2, 3), keepdim=True),
        TF.linear(x.double(), weight[:, :, 0, 0].double(), bias.double()),
        torch_head(x.double(), weight[:, :, 0, 0].double(), bias.double()),
        torch_stem(x.double(), (weight.expand(4, 4, 7, 7) / 7).double(), *(t.double() for t in norm), 1e-5),
    ]
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for actual, value in zip(results, expected, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), value, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("kernels", BACKENDS)
def test_add_relu(device, kernels):
    torch.manual_seed(0)
    x, other = torch.randn(2, 3, 5, 7, device=device), torch.randn(2, 3, 5, 7, device=device)
    x[0, 0, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
    other[0, 0, 0, :4] = torch.tensor([1.0, 1.0, torch.inf, -1.0])
    kept = x.clone(), other.clone()
    torch.testing.assert_close(
        F.add_relu(x, other, kernels=kernels), TF.relu(x + other), rtol=0, atol=0, equal_nan=True
    )
    torch.testing.assert_close((x, other), kept, rtol=0, atol=0, equal_nan=True)


POOLS = {
    "stride-defaults-to-window": (2,),
    "resnet": (3, 2, 1),
    "pairs": ((3, 2), (1, 2), (1, 0)),
    "stride-larger-than-window": (1, 2),
    "keyword-none": (2, None),
}


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("arguments", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("size", [(2, 5, 6, 7), (1, 3, 3, 3), (0, 3, 4, 4)], ids=["odd", "small", "empty-batch"])
def test_max_pool2d(device, size, arguments, kernels):
    torch.manual_seed(0)
    x = torch.randn(size, device=device) - 3  # negative: a padding of zeros would win
    if x.numel():
        x[0, 0, 1, 1], x[0, 1, 1, 1] = torch.nan, -torch.inf
    expected = TF.max_pool2d(x, *arguments)
    actual = F.max_pool2d(x, *arguments, kernels=kernels)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("size", [(2, 70, 3, 5), (1, 3, 1, 1), (1, 2, 9, 8), (0, 3, 4, 4)], ids=str)
def test_global_avg_pool(device, size, kernels):
    torch.manual_seed(0)
    x = torch.randn(size, device=device)
    actual = F.global_avg_pool(x, kernels=kernels)
    torch.testing.assert_close(actual, TF.adaptive_avg_pool2d(x.double(), 1).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("size", [(5, 33), (33,), (2, 3, 33), (1, 33), (0, 33)], ids=str)
def test_linear(device, size, bias, kernels):
    torch.manual_seed(0)
    x, weight = torch.randn(size, device=device), torch.randn(70, 33, device=device)
    b = torch.randn(70, device=device) if bias else None
    expected = TF.linear(x.double(), weight.double(), None if b is None else b.double())
    actual = F.linear(x, weight, b, kernels=kernels)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("affine", [False, True], ids=["no-affine", "affine"])
@pytest.mark.parametrize("size", [(2, 3, 9, 12), (1, 1, 1, 1), (5, 6, 7, 3), (0, 3, 8, 8)], ids=str)
def test_stem(device, size, affine, kernels):
    tensors = conv_tensors(device, *size, 10, 7, 7)
    tensors = tensors if affine else tensors[:4]
    expected = torch_stem(*(t.double() for t in tensors), *[None] * (6 - len(tensors)), 1e-5)
    actual = F.stem(*tensors, kernels=kernels)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)
    assert is_channels_last(actual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("batch", [0, 2])
def test_stem_of_bytes(device, batch, kernels, dtype):
    """Bytes give the answer of the images that were normalised by hand, in the dtype of the weight."""
    _, weight, *norm = conv_tensors(device, 1, 3, 1, 1, 8, 7, 7)
    x = torch.randint(256, (batch, 3, 10, 9), device=device, dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = (x / 255 - torch.tensor(mean, device=device)[:, None, None]) / torch.tensor(std, device=device)[
        :, None, None
    ]
    expected = torch_stem(*(t.double() for t in (images.to(dtype), weight.to(dtype), *norm)), 1e-5)
    actual = F.stem(x, weight.to(dtype), *norm, pixel_mean=mean, pixel_std=std, kernels=kernels)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(actual, expected.to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("size", [(2, 33, 3, 5), (1, 7, 1, 1), (17, 9, 2, 2), (0, 33, 4, 4)], ids=str)
def test_avg_pool_linear(device, size, bias, kernels):
    torch.manual_seed(0)
    x, weight = torch.randn(size, device=device), torch.randn(70, size[1], device=device)
    b = torch.randn(70, device=device) if bias else None
    expected = torch_head(x.double(), weight.double(), None if b is None else b.double())
    actual = F.avg_pool_linear(x, weight, b, kernels=kernels)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)


# --- memory formats --------------------------------------------------------------------------------------------------


def offset(x: Tensor) -> Tensor:
    """The same values one element into a larger storage, so that the pointer is not 16-byte aligned."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def sliced(x: Tensor) -> Tensor:
    big = x.new_full([2 * d + 1 for d in x.shape], torch.nan)
    big[tuple(slice(1, None, 2) for _ in x.shape)] = x
    return big[tuple(slice(1, None, 2) for _ in x.shape)]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x.t().contiguous().t(),
    "sliced": sliced,
    "expanded": lambda x: x[:1].expand(x.shape),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "negative-view": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
    "offset": offset,
}

CALLS: dict[str, tuple[list[tuple[int, ...]], Callable[..., Tensor], Callable[..., Tensor]]] = {
    # shapes of the tensors, our function of them, torch's
    "conv_bn_relu": (
        [(2, 8, 5, 6), (8, 8, 3, 3), (2, 8, 5, 6)],
        lambda x, w, r, **kw: F.conv_bn_relu(x, w, w.new_zeros(8), w.new_ones(8), padding=1, residual=r, **kw),
        lambda x, w, r: torch_conv(x, w, w.new_zeros(8), w.new_ones(8), None, None, 1e-5, padding=1, residual=r),
    ),
    "add_relu": ([(2, 3, 5, 4)] * 2, F.add_relu, lambda x, y: TF.relu(x + y)),
    "max_pool2d": ([(2, 3, 5, 6)], lambda x, **kw: F.max_pool2d(x, 3, 2, 1, **kw), lambda x: TF.max_pool2d(x, 3, 2, 1)),
    "global_avg_pool": ([(2, 3, 5, 4)], F.global_avg_pool, lambda x: TF.adaptive_avg_pool2d(x, 1)),
    "linear": ([(3, 10), (6, 10)], F.linear, TF.linear),
    "stem": (
        [(2, 3, 9, 8), (8, 3, 7, 7)],
        lambda x, w, **kw: F.stem(x, w / 12, w.new_zeros(8), w.new_ones(8), **kw),
        lambda x, w: torch_stem(x, w / 12, w.new_zeros(8), w.new_ones(8), None, None, 1e-5),
    ),
    "avg_pool_linear": ([(2, 10, 5, 4), (6, 10)], F.avg_pool_linear, torch_head),
}


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_any_layout_of_the_inputs(device, call, layout, kernels):
    shapes, ours, theirs = call
    torch.manual_seed(0)
    tensors = [layout(torch.randn(shape, device=device)) for shape in shapes]
    plain = [t.resolve_neg().clone(memory_format=torch.contiguous_format) for t in tensors]
    torch.testing.assert_close(ours(*tensors, kernels=kernels), theirs(*plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "call", [c for n, c in CALLS.items() if "linear" not in n], ids=[n for n in CALLS if "linear" not in n]
)
def test_result_is_channels_last(device, call, layout, kernels):
    shapes, ours, _ = call
    assert is_channels_last(ours(*(layout(torch.randn(shape, device=device)) for shape in shapes), kernels=kernels))


@pytest.mark.parametrize("kernels", BACKENDS)
def test_statistics_may_be_strided(device, kernels):
    x, weight, *norm = conv_tensors(device, 1, 4, 4, 4, 6, 1, 1)
    strided = [torch.stack([t, t + 1], dim=1)[:, 0] for t in norm]
    assert strided[0].stride() == (2,)
    expected = F.conv_bn_relu(x, weight, *norm, kernels=kernels)
    torch.testing.assert_close(F.conv_bn_relu(x, weight, *strided, kernels=kernels), expected)


# --- what the kernels do not do --------------------------------------------------------------------------------------


def test_backend_is_counted(device, ran):
    x = torch.randn(1, 4, 4, 4, device=device)
    on_gpu = torch.device(device).type == "cuda"
    F.add_relu(x, x, kernels="torch")
    F.add_relu(x, x, kernels="triton")
    F.add_relu(x, x, kernels="triton")
    F.max_pool2d(x, 2, kernels="auto")
    assert ran() == {
        ("add_relu", "torch"): 1,
        ("add_relu", "triton"): 2,
        ("max_pool2d", "triton" if on_gpu else "torch"): 1,
    }


HALVES: dict[str, Any] = {"pixel_mean": [0.5] * 4, "pixel_std": [0.5] * 4}


def stem_tensors(tensors: list[Tensor], x: Tensor) -> list[Tensor]:
    """x, and in fp64 a 1x1 convolution's weight, spread over the stem's 7x7 taps, and its batch norm."""
    _, weight, *norm = (t.double() for t in tensors)
    return [x, weight.expand(-1, -1, 7, 7), *norm]


FALLBACKS: dict[str, tuple[str, Callable[..., Any], str]] = {
    "fp64-conv": ("conv_bn_relu", lambda a, kw: F.conv_bn_relu(*(t.double() for t in a), **kw), "torch.float64"),
    "fp64-add": ("add_relu", lambda a, kw: F.add_relu(a[0].double(), a[0].double(), **kw), "torch.float64"),
    "fp64-pool": ("max_pool2d", lambda a, kw: F.max_pool2d(a[0].double(), 2, **kw), "torch.float64"),
    "fp64-average": ("global_avg_pool", lambda a, kw: F.global_avg_pool(a[0].double(), **kw), "torch.float64"),
    "fp64-linear": ("linear", lambda a, kw: F.linear(a[0].double(), a[0][0, 0].double(), **kw), "torch.float64"),
    "fp64-stem": ("stem", lambda a, kw: F.stem(*stem_tensors(a, a[0].double()), **kw), "torch.float64"),
    "fp64-stem-of-bytes": (
        "stem",
        lambda a, kw: F.stem(*stem_tensors(a, a[0].byte()), **HALVES, **kw),
        "torch.float64",
    ),
    "fp64-head": (
        "avg_pool_linear",
        lambda a, kw: F.avg_pool_linear(a[0].double(), a[1][:, :, 0, 0].double(), **kw),
        "torch.float64",
    ),
    "mixed-add": ("add_relu", lambda a, kw: F.add_relu(a[0], a[0].half(), **kw), "mixed dtypes"),
    "grouped": ("conv_bn_relu", lambda a, kw: F.conv_bn_relu(a[0], a[1][:, :2], *a[2:], groups=2, **kw), "grouped"),
}


@pytest.mark.parametrize("fallback", FALLBACKS.values(), ids=FALLBACKS)
def test_fallbacks(device, fallback, ran):
    operator, call, reason = fallback
    tensors = conv_tensors(device, 2, 4, 4, 4, 6, 1, 1)
    expected = call(tensors, {"kernels": "torch"})
    actual = call(tensors, {"kernels": "auto"})
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)
    assert ran() == {(operator, "torch"): 2}
    with pytest.raises(NotImplementedError, match=reason):
        call(tensors, {"kernels": "triton"})
    assert ran() == {(operator, "torch"): 2}


def test_grouped_convolution(device):
    tensors = conv_tensors(device, 2, 8, 5, 5, 12, 3, 3, groups=4)
    torch.testing.assert_close(
        F.conv_bn_relu(*tensors, padding=1, groups=4),
        torch_conv(*tensors, 1e-5, padding=1, groups=4),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("kernels", ["auto", "torch", "triton"])
def test_weights_of_another_dtype_are_named(device, kernels):
    """PyTorch refuses these too, with a RuntimeError that does not say which tensor is meant."""
    x, weight, *norm = conv_tensors(device, 1, 4, 4, 4, 4, 1, 1)
    with pytest.raises(TypeError, match=r"weight has dtype torch.float32, expected torch.float16 like x"):
        F.conv_bn_relu(x.half(), weight, *norm, kernels=kernels)
    with pytest.raises(TypeError, match=r"bias has dtype torch.float32, expected torch.float16 like x"):
        F.linear(x[:, :, 0, 0].half(), weight[:, :, 0, 0].half(), norm[0], kernels=kernels)
    with pytest.raises(TypeError, match=r"bias has dtype torch.float32, expected torch.float16 like x"):
        F.avg_pool_linear(x.half(), weight[:, :, 0, 0].half(), norm[0], kernels=kernels)


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_dtype_with_a_wider_residual(device, grad):
    """The result has one dtype, whether or not a gradient is wanted."""
    x, weight, *norm = conv_tensors(device, 1, 4, 4, 4, 4, 1, 1)
    y = F.conv_bn_relu(x.half(), weight.half().requires_grad_(grad), *norm, residual=torch.randn_like(x))
    assert y.dtype == torch.float16


# --- bad inputs ------------------------------------------------------------------------------------------------------


def conv(**changes: Any) -> Callable[[], Tensor]:
    arguments = {
        "x": torch.zeros(2, 4, 5, 5),
        "weight": torch.zeros(6, 4, 3, 3),
        "running_mean": torch.zeros(6),
        "running_var": torch.ones(6),
    }
    return lambda: F.conv_bn_relu(**(arguments | changes))  # type: ignore[arg-type]


def stem(**changes: Any) -> Callable[[], Tensor]:
    arguments = {
        "x": torch.zeros(2, 4, 5, 5),
        "weight": torch.zeros(6, 4, 7, 7),
        "running_mean": torch.zeros(6),
        "running_var": torch.ones(6),
    }
    return lambda: F.stem(**(arguments | changes))  # type: ignore[arg-type]


X = torch.zeros(2, 4, 5, 5)
PIXELS = {"x": X.byte(), **HALVES}
BAD: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    # the call, its error, and words that the message has to hold: the argument, what it is, what it should be
    "conv-rank": (conv(x=torch.zeros(4, 5, 5)), ValueError, ["x", "(4, 5, 5)", "4 dimensions"]),
    "conv-weight-rank": (conv(weight=torch.zeros(6, 4)), ValueError, ["weight", "(6, 4)", "4 dimensions"]),
    "conv-channels": (conv(x=torch.zeros(2, 3, 5, 5)), ValueError, ["x", "3 channels", "expected 4"]),
    "conv-groups": (conv(groups=4), ValueError, ["x", "groups=4"]),
    "conv-integers": (conv(x=X.int()), TypeError, ["x", "torch.int32", "floating-point"]),
    "conv-weight-complex": (conv(weight=torch.zeros(6, 4, 3, 3).cfloat()), TypeError, ["weight", "torch.complex64"]),
    "conv-weight-device": (conv(weight=torch.zeros(6, 4, 3, 3, device="meta")), ValueError, ["weight", "meta", "cpu"]),
    "conv-mean-device": (conv(running_mean=torch.zeros(6, device="meta")), ValueError, ["running_mean", "meta", "cpu"]),
    "conv-mean-shape": (conv(running_mean=torch.zeros(5)), ValueError, ["running_mean", "(5,)", "(6,)"]),
    "conv-var-shape": (conv(running_var=torch.ones(6, 1)), ValueError, ["running_var", "(6, 1)", "(6,)"]),
    "conv-bn-weight-shape": (conv(bn_weight=torch.ones(1)), ValueError, ["bn_weight", "(1,)", "(6,)"]),
    "conv-bn-bias-dtype": (conv(bn_bias=torch.ones(6).long()), TypeError, ["bn_bias", "torch.int64"]),
    "conv-residual-shape": (
        conv(residual=torch.zeros(2, 6, 1, 1)),
        ValueError,
        ["residual", "(2, 6, 1, 1)", "(2, 6, 3, 3)"],
    ),
    "conv-small-input": (conv(x=torch.zeros(2, 4, 2, 5)), ValueError, ["x has shape (2, 4, 2, 5)", "(3, 3)"]),
    "conv-padding": (conv(padding=-1), ValueError, ["padding", "-1"]),
    "conv-stride": (conv(stride=0), ValueError, ["stride", "0"]),
    "conv-stride-triple": (conv(stride=(1, 2, 3)), ValueError, ["stride", "(1, 2, 3)", "pair"]),
    "conv-stride-float": (conv(stride=1.5), TypeError, ["stride", "1.5", "int"]),
    "conv-kernels": (conv(kernels="cuda"), ValueError, ["kernels", "'cuda'", "'auto', 'torch', 'triton'"]),
    "add-shape": (lambda: F.add_relu(X, X[:1]), ValueError, ["other", "(1, 4, 5, 5)", "(2, 4, 5, 5)"]),
    "add-rank": (lambda: F.add_relu(X[0], X[0]), ValueError, ["x", "(4, 5, 5)", "4 dimensions"]),
    "add-device": (lambda: F.add_relu(X, X.to("meta")), ValueError, ["other", "meta", "cpu"]),
    "add-kernels": (lambda: F.add_relu(X, X, kernels="cuda"), ValueError, ["kernels", "'cuda'"]),
    "pool-rank": (lambda: F.max_pool2d(X[0], 2), ValueError, ["x", "(4, 5, 5)", "4 dimensions"]),
    "pool-padding": (lambda: F.max_pool2d(X, 2, padding=2), ValueError, ["padding", "(2, 2)", "half"]),
    "pool-small-input": (lambda: F.max_pool2d(X, 6), ValueError, ["x has shape (2, 4, 5, 5)", "(6, 6)"]),
    "pool-window": (lambda: F.max_pool2d(X, 0), ValueError, ["kernel_size", "0"]),
    "pool-integers": (lambda: F.max_pool2d(X.byte(), 2), TypeError, ["x", "torch.uint8"]),
    "average-rank": (lambda: F.global_avg_pool(X[0, 0]), ValueError, ["x", "(5, 5)", "4 dimensions"]),
    "average-no-pixels": (lambda: F.global_avg_pool(X[..., :0]), ValueError, ["x", "(2, 4, 5, 0)", "one pixel"]),
    "average-integers": (lambda: F.global_avg_pool(X.long()), TypeError, ["x", "torch.int64"]),
    "linear-features": (lambda: F.linear(X, torch.zeros(3, 4)), ValueError, ["x", "(2, 4, 5, 5)", "(..., 4)"]),
    "linear-weight-rank": (lambda: F.linear(X, torch.zeros(5)), ValueError, ["weight", "(5,)", "2 dimensions"]),
    "linear-bias": (lambda: F.linear(X, torch.zeros(3, 5), torch.zeros(5)), ValueError, ["bias", "(5,)", "(3,)"]),
    "stem-rank": (stem(x=X[0]), ValueError, ["x", "(4, 5, 5)", "4 dimensions"]),
    "stem-weight-rank": (stem(weight=torch.zeros(6, 4)), ValueError, ["weight", "(6, 4)", "4 dimensions"]),
    "stem-weight-size": (stem(weight=torch.zeros(6, 4, 3, 3)), ValueError, ["weight", "(6, 4, 3, 3)", "(K, C, 7, 7)"]),
    "stem-channels": (stem(x=X[:, :3]), ValueError, ["x", "3 channels", "expected 4"]),
    "stem-no-pixels": (stem(x=X[..., :0]), ValueError, ["x has shape (2, 4, 5, 0)"]),
    "stem-integers": (stem(x=X.int()), TypeError, ["x", "torch.int32", "floating"]),
    "stem-weight-integers": (stem(weight=torch.zeros(6, 4, 7, 7).int()), TypeError, ["weight", "torch.int32"]),
    "stem-weight-device": (stem(weight=torch.zeros(6, 4, 7, 7, device="meta")), ValueError, ["weight", "meta", "cpu"]),
    "stem-mean-shape": (stem(running_mean=torch.zeros(5)), ValueError, ["running_mean", "(5,)", "(6,)"]),
    "stem-var-shape": (stem(running_var=torch.ones(6, 1)), ValueError, ["running_var", "(6, 1)", "(6,)"]),
    "stem-bn-weight-shape": (stem(bn_weight=torch.ones(1)), ValueError, ["bn_weight", "(1,)", "(6,)"]),
    "stem-bn-bias-dtype": (stem(bn_bias=torch.ones(6).long()), TypeError, ["bn_bias", "torch.int64"]),
    "stem-kernels": (stem(kernels="cuda"), ValueError, ["kernels", "'cuda'"]),
    "stem-bytes-alone": (stem(x=X.byte()), TypeError, ["x", "torch.uint8", "pixel_mean and pixel_std"]),
    "stem-bytes-half": (stem(x=X.byte(), pixel_mean=[0.5] * 4), TypeError, ["x", "torch.uint8", "pixel_std"]),
    "stem-floats-normalised": (stem(**PIXELS | {"x": X}), TypeError, ["x", "torch.float32", "expected torch.uint8"]),
    "stem-pixel-mean": (stem(**PIXELS | {"pixel_mean": [0.5]}), ValueError, ["pixel_mean", "1 values", "expected 4"]),
    "stem-pixel-std": (stem(**PIXELS | {"pixel_std": [0.5] * 3}), ValueError, ["pixel_std", "3 values", "expected 4"]),
    "stem-bytes-channels": (
        stem(x=X[:, :3].byte(), pixel_mean=[0.5] * 3, pixel_std=[0.5] * 3),
        ValueError,
        ["x", "3 channels", "expected 4"],
    ),
    "head-rank": (lambda: F.avg_pool_linear(X[0], torch.zeros(3, 4)), ValueError, ["x", "(4, 5, 5)", "4 dimensions"]),
    "head-no-pixels": (lambda: F.avg_pool_linear(X[..., :0], torch.zeros(3, 4)), ValueError, ["x", "one pixel"]),
    "head-channels": (lambda: F.avg_pool_linear(X, torch.zeros(3, 5)), ValueError, ["x", "(2, 4, 5, 5)", "expected 5"]),
    "head-weight-rank": (lambda: F.avg_pool_linear(X, torch.zeros(4)), ValueError, ["weight", "(4,)", "2 dimensions"]),
    "head-bias": (
        lambda: F.avg_pool_linear(X, torch.zeros(3, 4), torch.zeros(4)),
        ValueError,
        ["bias", "(4,)", "(3,)"],
    ),
    "head-integers": (lambda: F.avg_pool_linear(X.int(), torch.zeros(3, 4)), TypeError, ["x", "torch.int32"]),
    "head-device": (
        lambda: F.avg_pool_linear(X, torch.zeros(3, 4, device="meta")),
        ValueError,
        ["weight", "meta", "cpu"],
    ),
    "head-kernels": (
        lambda: F.avg_pool_linear(X, torch.zeros(3, 4), kernels="cuda"),
        ValueError,
        ["kernels", "'cuda'"],
    ),
    "linear-device": (lambda: F.linear(X, torch.zeros(3, 5, device="meta")), ValueError, ["weight", "meta", "cpu"]),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_inputs_have_a_clear_error(bad):
    call, error, words = bad
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.conv_bn_relu(x, torch.zeros(4, 4, 1, 1), torch.zeros(4), torch.ones(4), residual=X[:, :, :1, :1]),
        lambda x: F.conv_bn_relu(x, torch.zeros(4, 4, 1, 1), torch.zeros(1), torch.ones(1)),
        lambda x: F.add_relu(x, X[:1]),
        lambda x: F.max_pool2d(x[0], 2),
        lambda x: F.global_avg_pool(x[0]),
        lambda x: F.linear(x, torch.zeros(5)),
        lambda x: F.stem(x, torch.zeros(4, 4, 5, 5), torch.zeros(4), torch.ones(4)),
        lambda x: F.stem(x, torch.zeros(4, 4, 7, 7), torch.zeros(1), torch.ones(1)),
        lambda x: F.avg_pool_linear(x, torch.zeros(3, 5)),
    ],
    ids=["conv-residual", "conv-statistics", "add", "max_pool", "average", "linear", "stem", "stem-statistics", "head"],
)
@pytest.mark.parametrize("mode", ["grad", "autocast"])
def test_bad_shapes_are_refused_in_every_mode(call, mode):
    """Whether a gradient is wanted, or autocast is on, must not decide what is a valid call."""
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"), pytest.raises(ValueError, match="expected"):
        call(X.clone().requires_grad_(mode == "grad"))


def test_a_convolution_has_a_residual_or_a_shortcut(device):
    x, weight, ones = (torch.ones(s, device=device) for s in ((1, 4, 3, 3), (4, 4, 1, 1), (4,)))
    head = (x, weight, ones, ones, None, None, 0.0, [1, 1], [0, 0], [1, 1], 1)
    whole = (x, weight, ones, ones, None, None, 0.0, [1, 1])
    for kernels in ("torch", "triton"):
        with pytest.raises(ValueError, match="residual and shortcut_x are both given"):
            torch.ops.resnet_triton.conv_bn_relu(*head, x, *whole, True, False, kernels)
        with pytest.raises(ValueError, match="belong together"):
            torch.ops.resnet_triton.conv_bn_relu(*head, None, x, *[None] * 5, 0.0, [1, 1], True, False, kernels)
