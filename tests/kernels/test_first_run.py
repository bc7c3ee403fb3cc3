"""What a GPU's first results are compared with: what passes, what does not, and what runs then."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from calls import CALLS, small, with_tensors
from exact import DTYPES, KERNELS, in_turn
from torch import Tensor

from resnet_triton.kernels.launch import Launch
from resnet_triton.ops import (
    NONE,
    Activation,
    AvgPoolLinear,
    BatchNorm,
    ConvBnRelu,
    Geometry,
    GlobalAvgPool,
    Linear,
    Shortcut,
    dispatch,
    first_run,
    gluon,
    in_graph,
    operation,
)
from resnet_triton.ops.dispatch import Modes

Change = Callable[[Tensor], object]


def conv(dtype: torch.dtype, *, images: int = 2, c: int = 512, k: int = 64, edge: int = 7) -> ConvBnRelu:
    """A 3x3 convolution as in a trained network: activations behind a ReLU, long sums."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(images, c, edge, edge, generator=g).relu().to(dtype)
    weight = (torch.randn(k, c, 3, 3, generator=g) / (9 * c) ** 0.5).to(dtype)
    norm = BatchNorm(*torch.randn(4, k, generator=g).unbind(), 1e-5)
    norm = norm._replace(running_var=norm.running_var.abs() + 0.5)
    residual = torch.randn(images, k, edge, edge, generator=g).to(dtype)
    return ConvBnRelu(x, weight, norm, Geometry(padding=(1, 1)), residual, activation=NONE, modes=KERNELS)


def right(call: Any) -> Tensor:
    """The result, rounded once."""
    return with_tensors(call, Tensor.double).reference().to(call.weight.dtype)


def differs(call: Any, out: Tensor) -> bool:
    return bool(first_run.compare(call, out)[0])


def tells(call: Any, out: Tensor) -> bool:
    return bool(first_run.compare(call, out)[1])


# --- what passes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), in_turn(CALLS))
def test_right_results_pass(name: str, dtype: torch.dtype) -> None:
    call = small(name, "cpu", dtype)
    out = call.run()
    assert not differs(call, out)
    assert tells(call, out)


ROUNDED = {
    "sums that cancel out": lambda call: replace(call, x=call.x + 30),
    "a mean that cancels the sum out": lambda call: replace(
        call, batch_norm=call.batch_norm._replace(running_mean=call.reference().float().mean((0, 2, 3)) * 100)
    ),
    "variances next to zero": lambda call: replace(
        call, batch_norm=call.batch_norm._replace(running_var=torch.full_like(call.batch_norm.running_var, 1e-9))
    ),
    "a residual that cancels the rest out": lambda call: replace(
        call, residual=-replace(call, residual=None).reference()
    ),
    "results at the end of fp16's range": lambda call: replace(
        call, batch_norm=call.batch_norm._replace(bn_weight=call.batch_norm.bn_weight * 6e4)
    ),
    "numbers next to zero": lambda call: with_tensors(call, lambda t: t * 1e-4),
    "results next to zero": lambda call: replace(
        call, residual=call.residual * 1e-7, batch_norm=call.batch_norm._replace(
            bn_weight=call.batch_norm.bn_weight * 1e-7, bn_bias=call.batch_norm.bn_bias * 1e-7
        )
    ),
    "fp32's smallest": lambda call: with_tensors(call, lambda t: t * 1e-38),
    "a steep activation": lambda call: replace(call, activation=Activation("leaky_relu", -50.0), x=call.x - 1),
    "a clipped activation": lambda call: replace(call, activation=Activation("relu6"), x=call.x * 9),
    "a variance below zero": lambda call: replace(
        call, batch_norm=call.batch_norm._replace(running_var=-call.batch_norm.running_var)
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", ROUNDED)
def test_rounding_passes(change: str, dtype: torch.dtype) -> None:
    """Where sums lose most: a kernel's own roundings, and those of TF32, are no fault."""
    call = ROUNDED[change](conv(dtype, c=16, k=16))
    x, weight = (_cut(t) if dtype == torch.float32 else t for t in (call.x, call.weight))
    with np.errstate(all="ignore"):
        out = replace(call, x=x, weight=weight).run()
    assert not differs(call, out)


def _cut(t: Tensor) -> Tensor:
    """fp32 as tensor cores read it."""
    return (t.view(torch.int32) & -0x2000).view(torch.float32)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "weight", "residual"])
def test_what_is_not_finite_proves_nothing(number: float, where: str) -> None:
    """PyTorch's algorithms spread it to different elements."""
    call = conv(torch.float16, images=1)
    getattr(call, where)[0, 3, 1, 1] = number
    out = torch.zeros_like(call.residual)
    assert not differs(call, out)
    assert not tells(call, out)


SAYING_NOTHING = {
    "grey images": lambda call: replace(call, x=torch.ones_like(call.x)),
    "images of one colour": lambda call: replace(call, x=call.x[:, :, :1, :1].expand(call.x.shape)),
    "results of zero": lambda call: replace(
        call, residual=None, batch_norm=call.batch_norm._replace(bn_weight=torch.zeros(64), bn_bias=torch.zeros(64))
    ),
}


@pytest.mark.parametrize("change", SAYING_NOTHING)
def test_data_that_say_nothing_prove_nothing(change: str) -> None:
    call = SAYING_NOTHING[change](conv(torch.float16))
    assert not differs(call, right(call))
    assert not tells(call, right(call))


def test_black_bytes_prove_nothing() -> None:
    """Normalised, their channels differ."""
    call = small("stem of bytes", "cpu")
    assert tells(call, call.reference())
    call.x.zero_()
    assert not tells(call, call.reference())


# --- what does not ---------------------------------------------------------------------------------------------------


def _a_step_is_missing(call: ConvBnRelu) -> Tensor:
    weight = call.weight.clone()
    weight[:, 64:128, 1, 1] = 0  # of 72 steps of 64 channels
    return right(replace(call, weight=weight))


def _a_tap_is_another(call: ConvBnRelu) -> Tensor:
    weight = call.weight.clone()
    weight[:, :, 0, 1] = weight[:, :, 0, 2]
    return right(replace(call, weight=weight))


def _changed(change: Change, batch: int = -1) -> Callable[[ConvBnRelu], Tensor]:
    def wrong(call: ConvBnRelu) -> Tensor:
        out = right(call)
        change(out[batch])
        return out

    return wrong


FAULTS: dict[str, Callable[[ConvBnRelu], Tensor]] = {
    "a step of the reduction is missing": _a_step_is_missing,
    "a tap is another": _a_tap_is_another,
    "NaN, as memory that nobody wrote": _changed(lambda y: y[5, 3, 3].fill_(float("nan"))),
    "infinity": _changed(lambda y: y[5, 3, 3].fill_(float("inf"))),
    "one element of the last image": _changed(lambda y: y[5, 3, 3].add_(1)),
    "one element of the first image": _changed(lambda y: y[5, 3, 3].add_(1), 0),
    "filters in another order": _changed(lambda y: y.copy_(y.flip(0))),
    "a row too low": _changed(lambda y: y.copy_(y.roll(1, 1))),
    "no residual": lambda call: right(replace(call, residual=None)),
    "batch norm of the next filter": lambda call: right(
        replace(call, batch_norm=BatchNorm(*(t.roll(1) for t in call.batch_norm[:4]), 1e-5))
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_results_do_not_pass(fault: str, dtype: torch.dtype) -> None:
    call = conv(dtype)
    assert not differs(call, right(call))
    assert differs(call, FAULTS[fault](call))


def test_a_wrong_shortcut_does_not_pass() -> None:
    call = conv(torch.float16)
    norm = call.batch_norm
    short = Shortcut(torch.randn(2, 32, 14, 14).half(), torch.randn(64, 32, 1, 1).half(), norm, (2, 2))
    call = replace(call, residual=None, shortcut=short)
    assert not differs(call, right(call))
    wrong = short._replace(batch_norm=norm._replace(running_mean=norm.bn_bias))
    assert differs(call, right(replace(call, shortcut=wrong)))


def test_a_head_without_its_bias_does_not_pass() -> None:
    """In bf16, though it rounds the mean."""
    x, weight = torch.randn(2, 64, 3, 3).bfloat16(), torch.randn(8, 64).bfloat16() / 8
    call = AvgPoolLinear(x, weight, torch.full((8,), 0.1).bfloat16())
    assert not differs(call, call.reference())
    assert differs(call, replace(call, bias=None).reference())


@pytest.mark.parametrize("images", [1, 2, 3, 4, 5, 9])
def test_first_and_last_image_are_compared_and_some_between(images: int) -> None:
    call = GlobalAvgPool(torch.randn(images, 2, 3, 3))
    seen = []
    for i in range(images):
        out = call.reference().clone()
        out[i] += 1
        seen.append(differs(call, out))
    assert seen[0]
    assert seen[-1]
    assert sum(seen) == min(images, first_run.IMAGES)


# --- what runs then --------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Interpreted kernels are taken for compiled ones. Those whose name is put into the set write something wrong."""
    wrong: set[str] = set()
    interpreted = Launch.run

    def run(launch: Launch) -> str:
        interpreted(launch)
        if launch.name in wrong:
            written = launch.arguments.get("y_ptr", launch.arguments.get("y_desc"))
            getattr(written, "base", written).add_(1)
        return launch.name

    monkeypatch.setattr(Launch, "run", run)
    monkeypatch.setattr(Launch, "compile", lambda launch: launch.name)
    monkeypatch.setattr(first_run, "_can_be_compared", lambda out: True)
    monkeypatch.setattr(first_run, "_right", {None})
    monkeypatch.setattr(first_run, "_wrong", {})
    monkeypatch.setattr(first_run, "_tried", Counter())
    monkeypatch.setattr(first_run, "may_wait", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    return wrong


def test_a_kernel_is_compared_once(gpu: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare = first_run.compare
    monkeypatch.setattr(first_run, "compare", lambda *args: compared.append(1) or compare(*args))
    for _ in range(3):
        small("linear", "cpu").run()
    assert len(compared) == 1
    small("add_relu", "cpu").run()
    assert len(compared) == 2
    assert first_run.describe() == "kernels whose first result was compared with PyTorch's: 2, all right"


def test_a_kernel_is_compared_again_where_nothing_was_proven(gpu: set[str]) -> None:
    """A few times."""
    call = small("linear", "cpu")
    nothing = replace(call, x=torch.zeros_like(call.x))
    nothing.run()
    assert first_run._right == {None}
    call.run()
    assert first_run._right == {None, "linear"}
    first_run._right.remove("linear")
    first_run._tried.clear()
    for tries in range(first_run._TRIES):
        assert ("linear" in first_run._right, first_run._tried["linear"]) == (False, tries)
        nothing.run()
    assert "linear" in first_run._right


def test_an_edit_between_launch_and_comparison_is_no_fault(gpu: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread."""
    call, compare = small("linear", "cpu"), first_run.compare

    def edited(*args: Any) -> Any:
        monkeypatch.setattr(first_run, "compare", compare)
        call.weight.mul_(2)
        return compare(*args)

    monkeypatch.setattr(first_run, "compare", edited)
    assert not differs(call, call.run())
    assert first_run._wrong == {}


def test_semaphores_that_a_wrong_kernel_may_have_left_dirty_are_forgotten(
    gpu: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_graph, "_kept", {(torch.device("cuda"), 0): torch.ones(1024, dtype=torch.int32)})
    small("add_relu", "cpu").run()
    assert in_graph._kept
    gpu.add("linear")
    with pytest.warns(RuntimeWarning, match="gave a wrong result"), pytest.raises(NotImplementedError):
        small("linear", "cpu").run()
    assert not in_graph._kept


def test_only_kernels_that_were_not_proven_are_condemned(gpu: set[str]) -> None:
    many = replace(small("avg_pool_linear", "cpu"), x=torch.randn(32, 4, 5, 6))
    GlobalAvgPool(many.x, KERNELS).run()
    gpu.add("linear")
    with pytest.warns(RuntimeWarning, match="^linear gave a wrong result"), pytest.raises(NotImplementedError):
        many.run()
    assert set(first_run._wrong) == {"linear"}


def test_a_warning_made_an_error_keeps_no_kernel_in_gluon_from_running(
    gpu: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Launch, "is_gluon", True)
    monkeypatch.setattr(gluon, "_refused", False)
    gpu.add("linear")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="gave a wrong result"):
            small("linear", "cpu").run()
    assert not gluon._refused


def run_as_on_a_gpu(call: Any) -> tuple[Tensor, dict[str, int]]:
    """With `kernels="auto"`; and how many times it ran on what."""
    before = Counter(dispatch.calls)
    out = replace(call, modes=Modes()).run()
    return out, {backend: n for (_, backend), n in (Counter(dispatch.calls) - before).items()}


def test_a_wrong_kernel_is_not_launched_again(gpu: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And with no other kernel for it, PyTorch computes the call."""
    monkeypatch.setattr(dispatch, "choose", lambda *args: dispatch.Choice("triton", ""))
    monkeypatch.setattr(operation, "choose", lambda *args: dispatch.Choice("triton", ""))
    gpu.add("linear")
    call = small("linear", "cpu")
    with pytest.warns(RuntimeWarning, match=r"linear gave a wrong result on this GPU \(A GPU\), by PyTorch's") as said:
        out, ran = run_as_on_a_gpu(call)
    assert len(said) == 1
    assert (ran, torch.equal(out, call.reference())) == ({"torch": 1}, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpu.clear()  # it would be right now
        out, ran = run_as_on_a_gpu(call)
    assert (ran, torch.equal(out, call.reference())) == ({"torch": 1}, True)
    assert first_run.describe() == (
        "kernels whose first result was compared with PyTorch's: 1, linear gave a wrong result on this GPU (A GPU)"
    )


def boxes() -> ConvBnRelu:
    """A convolution that `conv_box` computes, by its tile, and `conv_pointer` could."""
    return replace(conv(torch.float16, images=32, c=16, k=16, edge=8), residual=None)


def test_another_kernel_runs_in_place_of_a_wrong_one(gpu: set[str]) -> None:
    gpu.add("conv_box")
    call = boxes()
    with pytest.warns(RuntimeWarning, match="conv_box gave a wrong result"):
        out = call.run()
    assert not differs(call, out)
    assert first_run._right == {None, "conv_pointer"}


def test_the_other_kernel_is_compared_too(gpu: set[str]) -> None:
    gpu.update({"conv_box", "conv_pointer"})
    call = boxes()
    with (
        pytest.warns(RuntimeWarning) as said,
        pytest.raises(NotImplementedError, match='"triton" cannot run this call: conv_pointer gave a wrong result'),
    ):
        call.run()
    assert [str(w.message).partition(" gave")[0] for w in said] == ["conv_box", "conv_pointer"]


def test_a_batch_invariant_call_takes_no_other_kernel(gpu: set[str]) -> None:
    gpu.update({"conv_box", "conv_pointer"})
    call = replace(boxes(), modes=Modes(batch_invariant=True, kernels="triton"))
    with (
        pytest.warns(RuntimeWarning, match="conv_box gave a wrong result"),
        pytest.raises(NotImplementedError, match="batch_invariant=True cannot run here: conv_box gave a wrong"),
    ):
        call.run()


def test_what_pytorch_cannot_compute_is_not_compared(gpu: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    gpu.add("linear")
    call = small("linear", "cpu")
    with monkeypatch.context() as patched:
        patched.setattr(Linear, "reference", fail)
        call.run()
    assert first_run._right == {None}


@pytest.mark.parametrize("is_gluon", [True, False])
def test_a_kernel_that_cuda_fails_in_is_named(is_gluon: bool, gpu: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    waits = torch.cuda.current_stream.return_value.synchronize
    waits.side_effect = RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
    monkeypatch.setattr(Launch, "is_gluon", is_gluon)
    said = "CUDA failed when linear ran for the first time, or what was launched before: CUDA error: an illegal memory"
    remedy = "; RESNET_TRITON_GLUON=0 has other kernels run" if is_gluon else ""
    with pytest.raises(RuntimeError, match=f"{said} access was encountered{remedy}$"):
        small("linear", "cpu").run()
    waits.side_effect = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        small("add_relu", "cpu").run()


@pytest.mark.parametrize(("value", "chosen"), [("0", False), ("1", True), (None, True)])
def test_a_variable_keeps_gluon_from_being_chosen(value: str | None, chosen: bool) -> None:
    code = (
        "import torch; from resnet_triton.config import device; from resnet_triton.config.targets import KNOWN\n"
        "from resnet_triton.ops import gluon; device.facts = lambda where: KNOWN[90]\n"
        "print(gluon.facts(torch.device('cuda')).has_gluon)"
    )
    environment = {name: v for name, v in os.environ.items() if name not in (gluon.VARIABLE, "TRITON_INTERPRET")}
    environment |= {} if value is None else {gluon.VARIABLE: value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(chosen)
