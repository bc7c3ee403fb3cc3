"""The repairs of Triton's interpreter are right, and upstream still needs each of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from exact import dtype_id
from torch import Tensor

from resnet_triton.ops import interpreter

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = pytest.mark.skipif(not interpreter.active(), reason="kernels are compiled here")
SPECIAL_VALUES = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of overflow and NaN


@triton.jit
def cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a = tl.load(a_ptr + m * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n)
    acc = tl.load(c_ptr + m * N + n)
    tl.store(c_ptr + m * N + n, tl.dot(a, b, acc, input_precision="ieee"))


@triton.jit
def maximum_kernel(x_ptr, y_ptr, z_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    tl.store(z_ptr + offs, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def count_kernel(y_ptr, N):
    for _ in range(N):
        tl.store(y_ptr, tl.load(y_ptr) + 1)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    interpreter.repair()
    y = torch.empty_like(x, dtype=dtype)
    cast_kernel[(1,)](x, y, x.numel())
    return y


def dot(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`a @ b + c` in fp32."""
    interpreter.repair()
    out = c.clone()
    dot_kernel[(1,)](a, b, out, *c.shape, a.shape[1])
    return out


def every(dtype: torch.dtype) -> Tensor:
    """All 65,536 bit patterns of a 16-bit type."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Equal bits; all NaN are alike."""
    nan, view = y.isnan(), {2: torch.int16, 4: torch.int32}[y.element_size()]
    return torch.equal(x.isnan(), nan) and torch.equal(x.view(view)[~nan], y.view(view)[~nan])


# --- the repairs -----------------------------------------------------------------------------------------------------


@INTERPRETED
@SPECIAL_VALUES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_widening_is_exact(dtype: torch.dtype) -> None:
    assert same_bits(cast(every(dtype), torch.float32), every(dtype).float())


@INTERPRETED
@SPECIAL_VALUES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("low", [0x0000, 0x0001, 0x1000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], ids=hex)
def test_narrowing_rounds_to_nearest_even(dtype: torch.dtype, low: int) -> None:
    """All fp32 with these low halves: exact, just below, at and above a tie; denormals, infinities, NaN, overflow."""
    x = ((every(torch.bfloat16).view(torch.int16).int() << 16) | low).view(torch.float32)
    assert same_bits(cast(x, dtype), x.to(dtype))


@INTERPRETED
@SPECIAL_VALUES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_dot_takes_every_value(dtype: torch.dtype) -> None:
    x, factor = every(dtype)[:, None], torch.tensor([[1.0, 0.0, -3.0]], dtype=dtype)[:, [0, 1, 2, 0]]
    y = dot(x, factor, torch.zeros(2**16, 4))
    assert same_bits(y.abs(), (x.float() * factor.float() + 0.0).abs())
    assert same_bits(dot(factor.T.contiguous(), x.T.contiguous(), torch.zeros(4, 2**16)), y.T.contiguous())


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("other", [1.5, -0.25, float("inf"), float("-inf"), float("nan")])
def test_maximum_takes_every_value(dtype: torch.dtype, other: float) -> None:
    """Triton 3.9.0's interpreter compares bfloat16 as integers; those before compare it in fp32."""
    interpreter.repair()
    x = every(dtype)
    y, z = torch.full_like(x, other), torch.empty_like(x)
    maximum_kernel[(1,)](x, y, z, x.numel())
    assert same_bits(z, torch.maximum(x, y))


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_id)
def test_dot_sums_in_fp32(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 129, shape, generator=g).to(dtype) for shape in ((16, 32), (32, 16)))
    c = torch.randint(-(2**20), 2**20, (16, 16), generator=g).float()
    assert torch.equal(dot(a, b, c), (a.double() @ b.double() + c.double()).float())


@INTERPRETED
def test_a_loop_up_to_an_argument() -> None:
    """Triton 3.6.0 needs a repair with NumPy 2.4 or newer. It may go when 3.7 is the oldest that is supported."""
    interpreter.repair()
    y = torch.zeros(1)
    count_kernel[(1,)](y, 3)
    assert y.item() == 3


@INTERPRETED
def test_repairing_again_changes_nothing() -> None:
    from triton.runtime import interpreter as upstream

    interpreter.repair()
    before = upstream._convert_float, upstream.InterpreterBuilder.create_dot, upstream.interpreter_builder.options
    interpreter.repair()
    assert before == (
        upstream._convert_float, upstream.InterpreterBuilder.create_dot, upstream.interpreter_builder.options
    )  # fmt: skip


# --- tripwires: upstream is still wrong ------------------------------------------------------------------------------

UNREPAIRED = """
    import json, torch, triton, triton.language as tl
    from triton.language.semantic import TritonSemantic
    from test_interpreter import cast_kernel, dot_kernel

    def cast(value, source, target):
        y = torch.empty(1, dtype=target)
        cast_kernel[(1,)](torch.tensor([value], dtype=source), y, 1)
        return y.item()

    def dot(value):
        a, c = torch.full((1, 1), value, dtype=torch.bfloat16), torch.zeros(1, 1)
        dot_kernel[(1,)](a, a, c, 1, 1, 1)
        return c.item()

    checks = []
    check = TritonSemantic.binary_op_sanitize_overflow_impl
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda *args: checks.append(1) or check(*args)
    print(json.dumps({
        "dot": dot(3.0) == 9.0,
        "narrowing": cast(1.0 + 3 * 2.0**-9, torch.float32, torch.bfloat16) == 1.0 + 2.0**-7,
        "widening": cast(2.0**-133, torch.bfloat16, torch.float32) == 2.0**-133,
        "overflow check": not checks,
    }))
"""


@pytest.fixture(scope="module")
def upstream_is_right() -> dict[str, bool]:
    """Of each repaired fault, whether the interpreter of a fresh process is free of it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(UNREPAIRED)],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/kernels"))),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("fault", ["dot", "narrowing", "widening", "overflow check"])
def test_upstream_still_needs_the_repair(upstream_is_right: dict[str, bool], fault: str) -> None:
    if not upstream_is_right[fault]:
        return
    pinned = re.search(r"^triton==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned
    if triton.__version__ != pinned[1]:
        pytest.skip(f"Triton {triton.__version__} is right, the tested {pinned[1]} is not: keep the repair for now")
    pytest.fail(f"upstream is fixed from version {triton.__version__}: delete the repair of {fault!r}")
