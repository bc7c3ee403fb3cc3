"""The operators inside PyTorch beyond `contract/`: opcheck, derivatives, compile, export, functorch and threads."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from resnet_triton import BasicBlock, resnet18
from resnet_triton import functional as F
from resnet_triton.ops import dispatch

BACKENDS = ("torch", "triton", "auto")
# torch's own forward-mode derivatives still use torch.jit.script
JIT_SCRIPT = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """fp32 means fp32 here. By the older flag: torch.export refuses to run once the newer one is set (torch 2.13)."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def arguments(operator: str, device: Any, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The tensors of one small call."""
    torch.manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    if operator == "conv_bn_relu":
        return [
            randn(2, 4, 5, 6),
            randn(8, 4, 3, 3),
            randn(8),
            randn(8).abs() + 0.5,
            randn(8),
            randn(8),
            randn(2, 8, 5, 6),
        ]
    if operator == "stem":
        return [randn(2, 3, 9, 10), randn(8, 3, 7, 7) / 12, randn(8), randn(8).abs() + 0.5, randn(8), randn(8)]
    if operator == "stem of bytes":
        return [torch.randint(256, (2, 3, 9, 10), device=device).byte(), *arguments("stem", device, dtype)[1:]]
    if operator == "linear":
        return [randn(3, 10), randn(6, 10), randn(6)]
    if operator == "avg_pool_linear":
        return [randn(2, 4, 5, 6), randn(7, 4), randn(7)]
    return [randn(2, 4, 5, 6)] * 2 if operator == "add_relu" else [randn(2, 4, 5, 6)]


PIXELS = ([0.5, 0.4, 0.6], [0.25, 0.2, 0.3])
"""Mean and standard deviation of each channel."""


def ours(operator: str, tensors: list[Tensor], kernels: str = "auto") -> Tensor:
    """Our function of `arguments(operator)`."""
    if operator == "stem":
        return F.stem(*tensors, 1e-3, kernels=kernels)
    if operator == "stem of bytes":
        return F.stem(*tensors, 1e-3, pixel_mean=PIXELS[0], pixel_std=PIXELS[1], kernels=kernels)
    if operator == "conv_bn_relu":
        return F.conv_bn_relu(*tensors[:6], 1e-3, padding=1, residual=tensors[6], kernels=kernels)
    if operator == "max_pool2d":
        return F.max_pool2d(*tensors, 3, 2, 1, kernels=kernels)
    return getattr(F, operator)(*tensors, kernels=kernels)


def theirs(operator: str, tensors: list[Tensor]) -> Tensor:
    """The same with torch.nn.functional alone."""
    if operator == "stem of bytes":
        mean, std = (torch.tensor(values, device=tensors[0].device)[:, None, None] for values in PIXELS)
        return theirs("stem", [(tensors[0] / 255 - mean) / std, *tensors[1:]])
    if operator == "stem":
        x, weight, mean, var, gamma, beta = tensors
        y = TF.batch_norm(TF.conv2d(x, weight, stride=2, padding=3), mean, var, gamma, beta, False, 0.0, 1e-3)
        return TF.max_pool2d(TF.relu(y), 3, 2, 1)
    if operator == "conv_bn_relu":
        x, weight, mean, var, gamma, beta, residual = tensors
        y = TF.batch_norm(TF.conv2d(x, weight, padding=1), mean, var, gamma, beta, False, 0.0, 1e-3)
        return TF.relu(y + residual)
    if operator == "max_pool2d":
        return TF.max_pool2d(*tensors, 3, 2, 1)
    if operator == "global_avg_pool":
        return TF.adaptive_avg_pool2d(*tensors, 1)
    if operator == "avg_pool_linear":
        x, weight, bias = tensors
        return TF.linear(TF.adaptive_avg_pool2d(x, 1).flatten(1), weight, bias)
    return TF.linear(*tensors) if operator == "linear" else TF.relu(tensors[0] + tensors[1])


OPERATORS = ("conv_bn_relu", "stem", "add_relu", "max_pool2d", "global_avg_pool", "linear", "avg_pool_linear")
CALLS = (*OPERATORS, "stem of bytes")
DIFFERENTIABLE = {
    "conv_bn_relu": (0, 1, 4, 5, 6),
    "stem": (0, 1, 4, 5),
    "stem of bytes": (1, 4, 5),
    "add_relu": (0, 1),
    "linear": (0, 1, 2),
    "avg_pool_linear": (0, 1, 2),
}  # batch norm's statistics not, nor bytes


def overload(operator: str) -> Any:
    return getattr(torch.ops.resnet_triton, operator.partition(" ")[0]).default


def with_gradients(operator: str, tensors: list[Tensor]) -> list[Tensor]:
    wanted = DIFFERENTIABLE.get(operator, (0,))
    return [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]


def schema_arguments(operator: str, tensors: list[Tensor], kernels: str) -> tuple[Any, ...]:
    if operator == "conv_bn_relu":
        return (
            *tensors[:6],
            1e-3,
            [1, 1],
            [1, 1],
            [1, 1],
            1,
            tensors[6],
            *[None] * 6,
            0.0,
            [1, 1],
            True,
            False,
            kernels,
        )
    if operator.startswith("stem"):
        return (*tensors, 1e-3, *(PIXELS if operator == "stem of bytes" else (None, None)), False, kernels)
    if operator == "max_pool2d":
        return (*tensors, [3, 3], [2, 2], [1, 1], kernels)
    return (*tensors, kernels) if operator == "add_relu" else (*tensors, False, kernels)


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "permuted": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,  # dense, yet neither format
}


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("operator", CALLS)
def test_opcheck(device, operator, layout, kernels):
    tensors = [layout(t) for t in arguments(operator, device)]
    torch.library.opcheck(overload(operator), schema_arguments(operator, tensors, kernels))


@pytest.mark.parametrize("operator", CALLS)
def test_opcheck_with_gradients(device, operator):
    tensors = with_gradients(operator, arguments(operator, device))
    torch.library.opcheck(overload(operator), schema_arguments(operator, tensors, "auto"))


def test_opcheck_of_the_fused_shortcut(device):
    tensors = arguments("conv_bn_relu", device)
    short_weight = torch.randn(8, 4, 1, 1, device=device)
    call = [*schema_arguments("conv_bn_relu", tensors, "triton")]
    call[11:20] = [None, tensors[0], short_weight, *tensors[2:6], 1e-3, [1, 1]]
    operator = torch.ops.resnet_triton.conv_bn_relu.default
    torch.library.opcheck(operator, tuple(call))
    x, weight, mean, var, gamma, beta, _ = tensors
    shortcut = TF.batch_norm(TF.conv2d(x, short_weight), mean, var, gamma, beta, False, 0.0, 1e-3)
    expected = theirs("conv_bn_relu", [x, weight, mean, var, gamma, beta, shortcut])
    torch.testing.assert_close(operator(*call), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mean", "var", "bn_weight", "bn_bias"])
def test_shortcut_statistics_are_checked(device, name):
    """A kernel that is given too short a vector would read past its end."""
    tensors = arguments("conv_bn_relu", device)
    call = [*schema_arguments("conv_bn_relu", tensors, "triton")]
    call[11:20] = [None, tensors[0], torch.randn(8, 4, 1, 1, device=device), *tensors[2:6], 1e-3, [1, 1]]
    call[14 + ["mean", "var", "bn_weight", "bn_bias"].index(name)] = torch.ones(3, device=device)
    with pytest.raises(ValueError, match=f"shortcut_{name}"):
        torch.ops.resnet_triton.conv_bn_relu(*call)


# --- derivatives -----------------------------------------------------------------------------------------------------


@JIT_SCRIPT
@pytest.mark.parametrize("operator", CALLS)
def test_gradcheck(device, operator):
    """Backward, forward-mode and, because ReLU and max are piecewise linear, second derivatives too."""
    tensors = arguments(operator, device, torch.float64)
    if operator == "conv_bn_relu":  # gradcheck perturbs element by element: keep them few
        tensors = [
            tensors[0][:1, :2, :3, :3],
            tensors[1][:2, :2],
            *(t[:2] for t in tensors[2:6]),
            tensors[6][:1, :2, :3, :3],
        ]
    if operator.startswith("stem"):
        tensors = [tensors[0][:1, :, :3, :4], *(t[:2] for t in tensors[1:])]
    tensors = with_gradients(operator, tensors)
    assert torch.autograd.gradcheck(lambda *t: ours(operator, list(t)), tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *t: ours(operator, list(t)), tensors)


@JIT_SCRIPT
@pytest.mark.parametrize("operator", OPERATORS)
def test_forward_mode_in_fp32(device, operator):
    x, *rest = arguments(operator, device)
    tangent = torch.ones_like(x)
    _, actual = torch.func.jvp(lambda x: ours(operator, [x, *rest]), (x,), (tangent,))
    _, expected = torch.func.jvp(lambda x: theirs(operator, [x, *rest]), (x,), (tangent,))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
def test_torch_func_grad(device, operator):
    x, *rest = arguments(operator, device)
    actual = torch.func.grad(lambda x: ours(operator, [x, *rest]).square().sum())(x)
    expected = torch.func.grad(lambda x: theirs(operator, [x, *rest]).square().sum())(x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@torch.no_grad()
def test_compiled_functions(device, recompiles, layout, kernels):
    tensors = [layout(t) for t in arguments("conv_bn_relu", device)]
    compiled = torch.compile(chain, fullgraph=True)
    torch.testing.assert_close(compiled(tensors, kernels), chain(tensors, kernels), rtol=1e-5, atol=1e-5)
    assert recompiles() == 1


def test_compiled_gradients(device, recompiles):
    results = []
    for function in (torch.compile(chain, fullgraph=True, backend="aot_eager"), chain):
        leaves = with_gradients("conv_bn_relu", arguments("conv_bn_relu", device))
        function(leaves, "auto").square().sum().backward()
        results.append([t.grad for t in leaves])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_compiled_model_with_a_dynamic_batch(device, recompiles):
    torch.manual_seed(0)
    model = resnet18(num_classes=10).eval().to(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in (2, 3, 7):
        x = torch.randn(batch, 3, 32, 32, device=device)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert recompiles() == 1


def test_compiled_training(device, recompiles):
    """Modules that are called as they are, here in training mode, must not break the graph."""
    torch.manual_seed(0)
    block = BasicBlock(4, 4).train().to(device)
    x = torch.randn(2, 4, 5, 5, device=device)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)


# torch's own remark on saving any channels_last weight; the loaded program is compared below
@pytest.mark.filterwarnings("ignore:No complete tensor found in the group:UserWarning")
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


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("operator", CALLS)
@torch.no_grad()
def test_make_fx(device, operator, tracing_mode):
    tensors = arguments(operator, device)
    graph = make_fx(lambda *t: ours(operator, list(t)), tracing_mode=tracing_mode)(*tensors)
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [overload(operator)]
    torch.testing.assert_close(graph(*tensors), theirs(operator, tensors), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("operator", CALLS)
def test_vmap(device, operator, kernels):
    """vmap has no rule for these and runs them one by one: slow, yet right."""
    x, *rest = arguments(operator, device)
    stack = torch.stack([x, -x, x + 1])
    actual = torch.func.vmap(lambda x: ours(operator, [x, *rest], kernels))(stack)
    expected = torch.stack([theirs(operator, [x, *rest]) for x in stack])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# --- threads ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_threads(device):
    """Two threads at once: the same answers as one after the other, and no call goes uncounted.

    On the PyTorch path without a GPU: Triton's interpreter keeps the running program in one global place.
    """
    batches = [[t + seed for t in arguments("conv_bn_relu", device)] for seed in range(8)]
    expected = [ours("conv_bn_relu", tensors) for tensors in batches]

    def work(tensors: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return ours("conv_bn_relu", tensors)

    before = Counter(dispatch.calls)
    with ThreadPoolExecutor(2) as pool:
        actual = list(pool.map(work, batches))
    assert sum((dispatch.calls - before).values()) == len(batches)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
