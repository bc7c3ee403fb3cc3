"""The operators inside PyTorch beyond `contract/`: opcheck, derivatives, compile, export, functorch and threads."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from calls import CALLS, WITH_SHORTCUT, small, through_the_dispatcher, with_tensors
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_triton import functional as F
from resnet_triton import resnet18
from resnet_triton.ops import (
    AddRelu,
    BatchNorm,
    ConvBnRelu,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    Stem,
)

BACKENDS = ("torch", "triton")
EVERY_CALL = pytest.mark.parametrize("name", CALLS)
# torch's own forward-mode derivatives still use torch.jit.script
JIT_SCRIPT = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """fp32 means fp32 here. By the older flag: torch.export refuses to run once the newer one is set (torch 2.13)."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def theirs(call: Any) -> Tensor:
    """The call with torch.nn.functional alone."""
    match call:
        case ConvBnRelu():
            y = _norm(TF.conv2d(call.x, call.weight, None, *call.geometry), call.batch_norm)
            added = call.residual
            if call.shortcut is not None:
                x, weight, norm, stride = call.shortcut
                added = _norm(TF.conv2d(x, weight, None, stride), norm)
            return TF.relu(y + added)
        case Stem():
            x = call.x
            if call.pixel_mean is not None:
                mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (call.pixel_mean, call.pixel_std))
                x = (x / 255 - mean) / std
            return TF.max_pool2d(TF.relu(_norm(TF.conv2d(x, call.weight, None, 2, 3), call.batch_norm)), 3, 2, 1)
        case AddRelu():
            return TF.relu(call.x + call.other)
        case MaxPool2d():
            return TF.max_pool2d(call.x, 3, 2, 1)
        case GlobalAvgPool():
            return TF.adaptive_avg_pool2d(call.x, 1)
        case Linear():
            return TF.linear(call.x, call.weight, call.bias)
        case _:
            return TF.linear(TF.adaptive_avg_pool2d(call.x, 1).flatten(1), call.weight, call.bias)


def _norm(y: Tensor, norm: BatchNorm) -> Tensor:
    return TF.batch_norm(y, *norm[:4], False, 0.0, norm.eps)


def tensors(call: Any) -> list[Tensor]:
    return call.schema.tensors(call)


def run_on(call: Any, *given: Tensor) -> Tensor:
    """The call on other tensors."""
    others = iter(given)
    return with_tensors(call, lambda _: next(others)).run()


def overload(call: Any) -> Any:
    return getattr(torch.ops.resnet_triton, call.name).default


def with_gradients(call: Any) -> Any:
    """Wanted of all tensors but batch norm's statistics and bytes."""
    values = zip(call.schema.arguments, call.schema.flatten(call), strict=True)
    return call.schema.build([
        v.clone().requires_grad_(v.is_floating_point() and "running" not in a.name) if isinstance(v, Tensor) else v
        for a, v in values
    ])  # fmt: skip


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "permuted": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,  # dense, yet neither format
}


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@EVERY_CALL
def test_opcheck(device, name, layout, kernels):
    """Of all layouts, what a compiler is promised of the result; the rest does not depend on them."""
    call = with_tensors(small(name, device, kernels=kernels), LAYOUTS[layout])
    rest = {} if (layout, kernels) == ("contiguous", "triton") else {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(overload(call), call.schema.flatten(call), **rest)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which PyTorch hides itself
@EVERY_CALL
def test_opcheck_with_gradients(device, name):
    call = with_gradients(small(name, device, kernels="auto"))
    torch.library.opcheck(overload(call), call.schema.flatten(call))


@pytest.mark.parametrize("name", ["running_mean", "running_var", "bn_weight", "bn_bias"])
def test_shortcut_statistics_are_checked(device, name):
    """A kernel that is given too short a vector would read past its end."""
    call = small(WITH_SHORTCUT, device)
    norm = call.shortcut.batch_norm._replace(**{name: torch.ones(3, device=device)})
    call = replace(call, shortcut=call.shortcut._replace(batch_norm=norm))
    for called in (call.run, lambda: through_the_dispatcher(call)):
        with pytest.raises(ValueError, match=f"shortcut_{name}"):
            called()


# --- an eager call ---------------------------------------------------------------------------------------------------

_NORM = ("running_mean", "running_var", "bn_weight", "bn_bias", "eps")
_MODES = ("batch_invariant", "kernels")
SIGNATURES = {
    "conv_bn_relu": (
        "x", "weight", *_NORM, "stride", "padding", "dilation", "groups", "residual", "shortcut_x", "shortcut_weight",
        *(f"shortcut_{name}" for name in _NORM), "shortcut_stride", "activation", "negative_slope", *_MODES,
    ),
    "stem": ("x", "weight", *_NORM, "pixel_mean", "pixel_std", *_MODES),
    "add_relu": ("x", "other", *_MODES),
    "max_pool2d": ("x", "kernel_size", "stride", "padding", "ceil_mode", *_MODES),
    "global_avg_pool": ("x", *_MODES),
    "linear": ("x", "weight", "bias", *_MODES),
    "avg_pool_linear": ("x", "weight", "bias", *_MODES),
}  # fmt: skip


@EVERY_CALL
def test_a_call_is_flattened_and_built_again(device, name):
    call = small(name, device)
    values = call.schema.flatten(call)
    assert [a.name for a in overload(call)._schema.arguments] == list(SIGNATURES[call.name])
    assert vars(call.schema.build(values)) == vars(call)
    of_the_dispatcher = [list(v) if isinstance(v, tuple) else v for v in values]
    assert vars(call.schema.build(of_the_dispatcher)) == vars(call)
    assert [id(t) for t in tensors(call)] == [id(v) for v in values if isinstance(v, Tensor)]


class SeenByDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        SEEN.append(str(func))
        return func(*args, **(kwargs or {}))


class SeenByFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        SEEN.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        SEEN.append(str(func))
        return super().__torch_function__(func, types, args, kwargs)


SEEN: list[str] = []


def under(mode: Any, call: Any) -> Tensor:
    with mode:
        return call.run()


SEEING: dict[str, Callable[[Any], Tensor]] = {
    "dispatch mode": lambda call: under(SeenByDispatch(), call),
    "function mode": lambda call: under(SeenByFunctions(), call),
    "subclass": lambda call: replace(call, x=call.x.as_subclass(Subclass)).run().as_subclass(Tensor),
}
CHANGING: dict[str, Callable[[Any], Tensor]] = {
    "negative view": lambda call: replace(call, x=torch._neg_view(-call.x)).run(),
    "vmap": lambda call: torch.func.vmap(lambda x: replace(call, x=x).run())(call.x[None])[0],
}
"""What tensors are under these is not in their memory: a launch that read it would give wrong answers."""


@EVERY_CALL
def test_an_eager_call_goes_straight_to_its_launches(device, name, monkeypatch):
    monkeypatch.setattr(torch.ops.resnet_triton, name.partition(" ")[0], None)
    small(name, device).run()


@pytest.mark.parametrize("how", [*SEEING, *CHANGING])
@EVERY_CALL
def test_an_eager_call_is_seen_by_whatever_watches(device, name, how):
    call = small(name, device)
    SEEN.clear()
    actual = (SEEING | CHANGING)[how](call)
    assert how in CHANGING or any(call.name in func for func in SEEN)
    assert torch.equal(actual, call.run())


@EVERY_CALL
def test_an_eager_call_heeds_gradients_and_autocast(device, name):
    call, wanted = (small(name, device, kernels=kernels) for kernels in ("triton", "auto"))
    unwatched = call.run()
    with pytest.raises(NotImplementedError, match="a gradient is wanted"):
        with_gradients(call).run()
    assert with_gradients(wanted).run().requires_grad
    with torch.autocast(call.x.device.type, torch.bfloat16):
        if call.autocast:
            with pytest.raises(NotImplementedError, match="autocast is on"):
                call.run()
            assert wanted.run().dtype == torch.bfloat16
        else:
            assert torch.equal(call.run(), unwatched)


# --- derivatives -----------------------------------------------------------------------------------------------------


@JIT_SCRIPT
@EVERY_CALL
def test_gradcheck(device, name):
    """Backward, forward-mode and, because ReLU and max are piecewise linear, second derivatives too."""
    call = small(name, device, torch.float64, kernels="auto")
    if isinstance(call, (AddRelu, ConvBnRelu)):  # gradcheck perturbs element by element: keep them few
        call = with_tensors(call, lambda t: t[:2, :2, :3, :3] if t.dim() == 4 else t[:2])
        if getattr(call, "shortcut", None) is not None:
            call = replace(call, shortcut=call.shortcut._replace(stride=(1, 1)))
    if isinstance(call, Stem):
        call = replace(with_tensors(call, lambda t: t[:2]), x=call.x[:1, :, :3, :4])
    call = with_gradients(call)
    assert torch.autograd.gradcheck(lambda *t: run_on(call, *t), tensors(call), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *t: run_on(call, *t), tensors(call))


# --- torch.compile, export, functorch --------------------------------------------------------------------------------


@pytest.fixture
def recompiles():
    """A fresh compiler; the number of graphs compiled so far."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def chain(tensors: list[Tensor], kernels: str) -> Tensor:
    """Every operator after the other. Inductor checks the strides of each result against those it was promised."""
    y = F.conv_bn_relu(*tensors[:6], 1e-3, padding=1, residual=tensors[6], kernels=kernels)
    y = F.max_pool2d(F.add_relu(y, tensors[6], kernels=kernels), 2, kernels=kernels)
    pooled = torch.flatten(F.global_avg_pool(y, kernels=kernels), 1)
    y = F.stem(y, tensors[1].new_ones(8, 8, 7, 7), *tensors[2:6], kernels=kernels)
    y = F.avg_pool_linear(y, tensors[4].diag(), kernels=kernels)
    return F.linear(pooled + y, tensors[4][None, :], kernels=kernels)


@pytest.mark.parametrize(
    ("layout", "kernels"), [("contiguous", "torch"), ("channels_last", "triton"), ("permuted", "triton")]
)
@torch.no_grad()
def test_compiled_functions(device, recompiles, layout, kernels):
    given = tensors(with_tensors(small("conv_bn_relu", device), LAYOUTS[layout]))
    compiled = torch.compile(chain, fullgraph=True)
    torch.testing.assert_close(compiled(given, kernels), chain(given, kernels), rtol=1e-5, atol=1e-5)
    assert recompiles() == 1


@pytest.mark.slow
@torch.no_grad()
def test_compiled_model_with_a_dynamic_batch(device, recompiles):
    torch.manual_seed(0)
    model = resnet18(num_classes=10).eval().to(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in (2, 3, 7):
        x = torch.randn(batch, 3, 32, 32, device=device)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert recompiles() == 1


# torch's own remarks on saving any channels_last weight and, 2.11's, on loading any; the program is compared below
@pytest.mark.filterwarnings("ignore:No complete tensor found in the group:UserWarning")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_export_with_a_dynamic_batch(device, grad):
    torch.manual_seed(0)
    model = resnet18(num_classes=10).eval().to(device)
    batch = torch.export.Dim("batch", min=2, max=64)
    x = torch.randn(5, 3, 32, 32, device=device)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: batch},))
        targets = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
        ours = {name: n for name, n in targets.items() if name.startswith("resnet_triton")}
        fused = {"stem": 1, "conv_bn_relu": 16, "avg_pool_linear": 1}
        assert ours == {f"resnet_triton.{operator}.default": n for operator, n in fused.items()}
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        torch.testing.assert_close(torch.export.load(buffer).module()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", BACKENDS)
@EVERY_CALL
def test_vmap(device, name, kernels):
    """vmap has no rule for these and runs them one by one: slow, yet right."""
    call = small(name, device, kernels=kernels)
    stack = torch.stack([call.x, -call.x, call.x + 1])
    actual = torch.func.vmap(lambda x: replace(call, x=x).run())(stack)
    expected = torch.stack([theirs(replace(call, x=x)) for x in stack])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# --- threads ---------------------------------------------------------------------------------------------------------
