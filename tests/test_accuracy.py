"""Real-valued data: an error bound per element against fp64, and torchvision's own logits.

The bound grants one rounding of the output and a random walk of fp32 rounding errors over the sum, `lam` times; it has
no room for sums kept in 16 bits, nor for TF32 where IEEE was asked for, and planted faults show that.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from exact import DTYPES, dtype_id, generator, run
from torch import Tensor

from resnet_triton import dispatch, interpreter, ops, optimize, vision
from resnet_triton.device import KNOWN, override
from resnet_triton.ops import ConvCall

BITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}  # of a significand


class Sums(NamedTuple):
    """A call's answer in fp64, the same with every term made positive, and how many products each sum has."""

    name: str
    args: tuple[Any, ...]
    answer: Tensor
    magnitude: Tensor
    length: int
    by_pointers: bool = False

    def run(self) -> Tensor:
        """Our kernel's answer; `by_pointers` pretends to an A100, which has no tensor descriptors."""
        with override(KNOWN[80]) if self.by_pointers else contextlib.nullcontext():
            return run(self.name, *self.args)


def needed(y: Tensor, sums: Sums, *, tf32: bool = False) -> float:
    """The least `lam` for which every element of `y` is within
    `u_out*|y64| + lam*sqrt(length)*2**-24*magnitude + smallest subnormal`, plus `2**-11*magnitude` for TF32.
    """
    error = (y.double() - sums.answer).abs() - sums.answer.abs() * 2.0 ** -BITS[y.dtype]
    error -= torch.finfo(y.dtype).smallest_normal * 2.0 ** (1 - BITS[y.dtype])
    if tf32:
        error -= sums.magnitude * 2.0**-11
    walk = math.sqrt(sums.length) * 2.0**-24 * sums.magnitude
    return (error / walk).max().item()


def lam(device: torch.device) -> float:
    return 1.0 if device.type == "cpu" else 4.0  # NumPy's summation is known; a tensor core's is not


def conv(device: torch.device, dtype: torch.dtype) -> Sums:
    """A layer3 convolution with residual, without ReLU (which could only hide errors)."""
    g = generator(device, 0)
    n, c, k, size = 32, 256, 64, 2  # as many images as make the lookup choose descriptors
    x = torch.randn(n, c, size, size, generator=g, device=device).to(dtype)
    w = (torch.randn(k, c, 3, 3, generator=g, device=device) / 48).to(dtype)
    residual = torch.randn(n, k, size, size, generator=g, device=device).to(dtype)
    mean, gamma, beta = (torch.randn(k, generator=g, device=device) for _ in range(3))
    var = torch.rand(k, generator=g, device=device) + 0.5
    short = (None, None, None, None, None, None, 0.0, [1, 1])
    args = ConvCall(
        x, w, mean, var, gamma, beta, 1e-5, [1, 1], [1, 1], [1, 1], 1, residual, *short, False, False, "triton"
    )
    scale = gamma.double() / (var.double() + 1e-5).sqrt()
    shift = beta.double() - mean.double() * scale

    def answer(x: Tensor, w: Tensor, residual: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y = F.conv2d(x.double(), w.double(), padding=1) * scale[:, None, None] + shift[:, None, None]
        return y + residual.double()

    absolute = (beta.abs() + mean.abs() * scale.abs()).double()
    magnitude = answer(x.abs(), w.abs(), residual.abs(), scale.abs(), absolute)
    return Sums("conv_bn_relu", args, answer(x, w, residual, scale, shift), magnitude, c * 9)


def conv_by_pointers(device: torch.device, dtype: torch.dtype) -> Sums:
    """The same on the other load path."""
    return conv(device, dtype)._replace(by_pointers=True)


def linear(device: torch.device, dtype: torch.dtype) -> Sums:
    """ResNet-18's last layer, of 100 classes."""
    g = generator(device, 1)
    x = torch.randn(20, 512, generator=g, device=device).to(dtype)
    w = torch.randn(100, 512, generator=g, device=device).to(dtype)
    b = torch.randn(100, generator=g, device=device).to(dtype)
    magnitude = x.double().abs() @ w.double().abs().T + b.double().abs()
    return Sums("linear", (x, w, b, False, "triton"), x.double() @ w.double().T + b.double(), magnitude, 512)


def pool(device: torch.device, dtype: torch.dtype) -> Sums:
    """A global average over an image of ResNet-18's stem."""
    x = torch.randn(2, 64, 56, 56, generator=generator(device, 2), device=device).to(dtype)
    mean = x.double().mean((2, 3), keepdim=True)
    return Sums("global_avg_pool", (x, False, "triton"), mean, x.double().abs().mean((2, 3), keepdim=True), 56 * 56)


@pytest.mark.parametrize(
    ("operation", "dtype", "precision"),
    [
        *((operation, dtype, "ieee") for operation in (conv, linear, pool) for dtype in DTYPES),
        *((conv_by_pointers, dtype, "ieee") for dtype in (torch.float16, torch.bfloat16)),  # fp32 went this way above
        (conv, torch.float32, "tf32"),
        (conv_by_pointers, torch.float32, "tf32"),
        (linear, torch.float32, "tf32"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value).removeprefix("torch.")),
)
def test_error_bound(
    device: torch.device,
    operation: Callable[..., Sums],
    dtype: torch.dtype,
    precision: str,
    record_property: Callable[[str, object], None],
) -> None:
    sums = operation(device, dtype)
    with in_precision(precision):
        least = needed(sums.run(), sums, tf32=precision == "tf32")
    record_property("needed_lam", least)
    print(f"needs lam {least:.3f} of {lam(device)}")
    assert least <= lam(device)


@contextlib.contextmanager
def in_precision(precision: str) -> Iterator[None]:
    """What torch's flags for fp32 products would say."""
    with (
        mock.patch.object(ops.conv, "conv_precision", return_value=precision),
        mock.patch.object(ops.linear, "matmul_precision", return_value=precision),
    ):
        yield


# --- planted faults: the bound must notice them ----------------------------------------------------------------------


@contextlib.contextmanager
def planted(method: str, operands: Callable[[Any], Any], result: Callable[[Any], Any]) -> Iterator[None]:
    """Make an instruction of the interpreter round its operands or its result."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    interpreter.repair()
    right = getattr(InterpreterBuilder, method)

    def wrong(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        a, b = (TensorHandle(operands(h.data), h.dtype) for h in (a, b))
        handle = right(builder, a, b, *others)
        return TensorHandle(result(handle.data), handle.dtype)

    with mock.patch.object(InterpreterBuilder, method, wrong):
        yield


def as_tf32(data: Any) -> Any:
    """fp32 with the 13 low bits cut off."""
    import numpy as np

    return (np.ascontiguousarray(data).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def through(dtype: torch.dtype) -> Callable[[Any], Any]:
    """fp32 values rounded to `dtype` and back."""
    return lambda data: torch.tensor(data).to(dtype).float().numpy() if data.dtype == "float32" else data


def unchanged(data: Any) -> Any:
    return data


@pytest.mark.skipif(not interpreter.active(), reason="faults are planted in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(
    ("operation", "instruction"),
    [(conv, "create_dot"), (conv_by_pointers, "create_dot"), (linear, "create_dot"), (pool, "create_fadd")],
    ids=["conv", "conv_by_pointers", "linear", "pool"],
)
def test_bound_notices_sums_in_16_bits(
    device: torch.device, operation: Callable[..., Sums], instruction: str, dtype: torch.dtype
) -> None:
    sums = operation(device, dtype)
    with planted(instruction, unchanged, through(dtype)):
        y = sums.run()
    assert needed(y, sums) > 4.0


@pytest.mark.skipif(not interpreter.active(), reason="faults are planted in the interpreter")
@pytest.mark.parametrize("operation", [conv, linear], ids=lambda f: f.__name__)
def test_bound_notices_tf32(device: torch.device, operation: Callable[..., Sums]) -> None:
    sums = operation(device, torch.float32)
    with in_precision("ieee"), planted("create_dot", as_tf32, unchanged):
        y = sums.run()
    assert needed(y, sums) > 4.0
    assert needed(y, sums, tf32=True) <= 1.0


# --- an outside oracle -----------------------------------------------------------------------------------------------


def test_torchvision_resnet18(device: torch.device) -> None:
    """The logits that torchvision expects of its own ResNet-18, computed by our kernels from end to end."""
    torch.manual_seed(0)
    model = vision.torchvision().models.resnet18(num_classes=50).eval()
    x = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        logits = model(x)
    # test/expect/ModelTester.test_resnet18_expect.pkl in torchvision's repository
    assert logits.sum().item() == pytest.approx(8.437855, abs=1e-4)
    assert logits.argmax() == 38

    ours = optimize(model, kernels="triton").to(device)
    state = {name: t.clone() for name, t in ours.state_dict().items()}
    image, before = x.to(device), dispatch.calls.copy()
    precision = "ieee" if device.type == "cuda" else "tf32"  # which the interpreter takes for IEEE, in larger tiles
    with torch.inference_mode(), in_precision(precision):
        y = ours(image)
    expected = {"stem": 1, "conv_bn_relu": 16, "avg_pool_linear": 1}
    assert dispatch.calls - before == {(name, "triton"): count for name, count in expected.items()}
    torch.testing.assert_close(y.cpu(), logits, rtol=0.0, atol=1e-5)
    assert torch.equal(image.cpu(), x)
    for name, t in ours.state_dict().items():
        assert torch.equal(t, state[name]), name


@pytest.mark.slow
def test_half_precision_resnet18(device: torch.device) -> None:
    """fp16, where the stem is fused: at most twice the error of PyTorch's own fp16, both against fp64."""
    torch.manual_seed(0)
    model = vision.torchvision().models.resnet18(num_classes=50).eval()
    x = torch.rand(1, 3, 224, 224).half()
    with torch.inference_mode():
        rounded = copy.deepcopy(model).half()
        exact = copy.deepcopy(rounded).double()(x.double())
        theirs = rounded.to(device)(x.to(device)).cpu()
        before = dispatch.calls.copy()
        ours = optimize(rounded, kernels="triton").to(device)(x.to(device)).cpu()
    expected = {"stem": 1, "conv_bn_relu": 16, "avg_pool_linear": 1}
    assert dispatch.calls - before == {(name, "triton"): count for name, count in expected.items()}
    errors = [(y.double() - exact).abs().max().item() for y in (ours, theirs)]
    assert errors[0] <= 2 * errors[1], errors
    top = exact.topk(2).values
    clear = top[:, 0] - top[:, 1] > 4 * errors[1]
    assert torch.equal(ours.argmax(1)[clear], exact.argmax(1)[clear])
    assert clear.any()
