"""The backend of torch.compile: what it finds in a model's graph, and `optimize` of models of other people's."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import exact
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from resnet_triton import backend, compiled, disabled, optimize, refresh, report, revert
from resnet_triton.backend import resnet_triton
from resnet_triton.ops import NONE, Activation, dispatch
from resnet_triton.ops.trace import Call


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def integral(model: nn.Module) -> nn.Module:
    """In eval mode, with parameters on which every order of summation gives the same bits."""
    g = exact.generator(torch.device("cpu"), 0)
    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            m.weight.data = exact.integers(g, 1, *m.weight.shape, dtype=m.weight.dtype)
            if m.bias is not None:
                m.bias.data = exact.integers(g, 3, *m.bias.shape, dtype=m.bias.dtype)
        elif isinstance(m, nn.BatchNorm2d | Frozen):
            norm = exact.batch_norm(g, 8, torch.float32 if m.weight is None else m.weight.dtype)
            m.running_mean.copy_(norm.running_mean)
            m.running_var.copy_(norm.running_var)
            m.eps = norm.eps
            if m.weight is not None:
                m.weight.data, m.bias.data = norm.bn_weight, norm.bn_bias
    return model.eval()


class Frozen(nn.Module):
    """Batch norm as detectors freeze it, written as torchvision and detectron2 write it."""

    def __init__(self, k: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(k))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (t.reshape(1, -1, 1, 1) for t in self.buffers())
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class Affine(nn.Module):
    """A number for each channel times and plus another one."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, -1.0, 0.5, 1.0]).repeat(k // 4).reshape(k, 1, 1))
        self.shift = nn.Parameter(torch.arange(float(k)).reshape(1, k, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.shift + self.scale * x


class Residual(nn.Module):
    def __init__(self, shortcut: nn.Module | None, *, order: int = 0, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        stride = 1 if shortcut is None else 2
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, stride, 1, bias=False), norm(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), norm(8)
        self.shortcut, self.order = shortcut, order

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu_(self.norm1(self.conv1(x)))))
        identity = x if self.shortcut is None else self.shortcut(x)
        if self.order:
            return F.relu(identity + y)
        y += identity
        return F.relu(y, inplace=True)


def lambdas(function: Callable[..., Tensor], **modules: nn.Module) -> nn.Module:
    class Lambdas(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(self, x)

    made = Lambdas()
    made.register_buffer("v", torch.zeros(8))
    for name, module in modules.items():
        made.add_module(name, module)
    return made


def conv(bias: bool = False, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1, bias=bias, **kwargs)


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(8)


def sequence(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


def _downsample() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 1, 2, bias=False), norm())


def _stem() -> nn.Module:
    return sequence(nn.Conv2d(8, 8, 7, 2, 3, bias=False), norm(), nn.ReLU(), nn.MaxPool2d(3, 2, 1))


def _head() -> nn.Module:
    return sequence(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


CBR, ADD, POOL = "conv_bn_relu", "add_relu", "max_pool2d"
LEFT = "aten.convolution"
PATTERNS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "conv": (conv, [CBR]),
    "conv with bias": (lambda: conv(bias=True), [CBR]),
    "conv, relu": (lambda: sequence(conv(), nn.ReLU(inplace=True)), [CBR]),
    "conv, norm": (lambda: sequence(conv(), norm()), [CBR]),
    "conv, norm, relu": (lambda: sequence(conv(), norm(), nn.ReLU()), [CBR]),
    "conv with bias, norm, relu": (lambda: sequence(conv(bias=True), norm(), nn.ReLU()), [CBR]),
    "conv, norm without affine": (lambda: sequence(conv(), nn.BatchNorm2d(8, affine=False), nn.ReLU()), [CBR]),
    "conv, frozen norm, relu": (lambda: sequence(conv(), Frozen(8), nn.ReLU()), [CBR]),
    "conv with bias, frozen norm": (lambda: sequence(conv(bias=True), Frozen(8)), [CBR]),
    "conv, scale and shift": (lambda: sequence(conv(), Affine(8), nn.ReLU()), [CBR]),
    "conv with bias, layer scale": (
        lambda: lambdas(lambda m, x: (x + m.b.scale * m.a(x)).relu(), a=conv(bias=True), b=Affine(8)), [CBR],
    ),
    "conv, norm, layer scale": (
        lambda: lambdas(lambda m, x: (m.c(x) * m.s.scale + m.s.scale * m.b(m.a(x))).relu(),
                        a=conv(bias=True), b=norm(), c=sequence(conv(), nn.BatchNorm2d(8, affine=False)), s=Affine(8)),
        [CBR, CBR],
    ),
    "conv, norm, relu6": (lambda: sequence(conv(), norm(), nn.ReLU6()), [CBR]),
    "residual": (lambda: Residual(None), [CBR, CBR]),
    "residual first": (lambda: Residual(None, order=1), [CBR, CBR]),
    "shortcut": (lambda: Residual(_downsample()), [CBR, CBR]),
    "shortcut first": (lambda: Residual(_downsample(), order=1), [CBR, CBR]),
    "frozen shortcut": (lambda: Residual(sequence(_downsample()[0], Frozen(8)), norm=Frozen), [CBR, CBR]),
    "pooled shortcut": (lambda: Residual(sequence(nn.AvgPool2d(2), nn.Conv2d(8, 8, 1, bias=False), norm())), [CBR] * 2),
    "a 3x3 shortcut": (lambda: Residual(sequence(nn.Conv2d(8, 8, 3, 2, 1, bias=False), norm())), [CBR] * 3),
    "a sum without relu": (lambda: lambdas(lambda m, x: m.b(m.a(x)) + x, a=conv(), b=norm()), [CBR]),
    "a sum of three": (lambda: lambdas(lambda m, x: (m.a(x) + m.b(x) + x).relu(), a=conv(), b=conv()), [CBR, CBR, ADD]),
    "twice the same": (lambda: lambdas(lambda m, x: (lambda y: (y + y).relu())(m.a(x)), a=conv()), [CBR, ADD]),
    "one weight twice": (lambda: lambdas(lambda m, x: m.b(m.a(m.b(m.a(x)))).relu(), a=conv(), b=norm()), [CBR, CBR]),
    "a scaled sum": (lambda: lambdas(lambda m, x: torch.add(m.a(x), x, alpha=2).relu(), a=conv()), [CBR]),
    "a weighed branch": (
        lambda: lambdas(lambda m, x: (0.5 * m.b(m.a(x)) + x + m.c(x) * 2).relu(),
                        a=conv(), b=norm(), c=conv(bias=True)),
        [CBR, CBR],
    ),
    "a sum times one": (lambda: lambdas(lambda m, x: ((F.avg_pool2d(x, 1) + x) / 1).relu()), [ADD]),
    "one tensor times one": (
        lambda: lambdas(lambda m, x: (lambda y: torch.cat([y, (y * 1).view(y.shape)]))(m.a(x)), a=conv()), [CBR],
    ),
    "a branch weighed by a tensor": (lambda: lambdas(lambda m, x: m.a(x) * m.v.sum() + x, a=conv()), [CBR]),
    "a sum that broadcasts": (lambda: lambdas(lambda m, x: (m.a(x) + x[:1]).relu(), a=conv()), [CBR]),
    "used twice": (lambda: lambdas(lambda m, x: (lambda y: m.b(y).relu() + y)(m.a(x)), a=conv(), b=norm()), [CBR]),
    "written in place": (lambda: lambdas(lambda m, x: m.b(m.a(x)).mul_(2).relu_().add_(1), a=conv(), b=norm()), [CBR]),
    "a written view": (lambda: lambdas(lambda m, x: (lambda y: (y[:, :4].zero_(), y)[1])(m.a(x)), a=conv()), [CBR]),
    "dropout": (lambda: lambdas(lambda m, x: F.relu(m.drop(m.a(x)) + x), a=conv(), drop=nn.Dropout()), [CBR]),
    "dropout in a head": (lambda: sequence(*_head()[:2], nn.Dropout(), _head()[2]), ["avg_pool_linear"]),
    "add, relu": (lambda: lambdas(lambda m, x: F.relu(F.avg_pool2d(x, 1) + x)), [ADD]),
    "stem": (_stem, ["stem"]),
    "stem without relu": (lambda: sequence(_stem()[0], _stem()[1], _stem()[3]), [CBR, POOL]),
    "another pool": (lambda: sequence(*list(_stem())[:3], nn.MaxPool2d(2)), [CBR, POOL]),
    "pool with ceil_mode": (lambda: nn.MaxPool2d(3, 2, ceil_mode=True), [POOL]),
    "dilated pool": (lambda: nn.MaxPool2d(3, 2, 1, dilation=2), []),
    "dilated pool with ceil_mode": (lambda: nn.MaxPool2d(3, 2, 1, dilation=2, ceil_mode=True), []),
    "pool with indices": (lambda: lambdas(lambda m, x: F.max_pool2d_with_indices(x, 2)[1].float()), []),
    "head": (_head, ["avg_pool_linear"]),
    "head without bias": (lambda: sequence(_head()[0], nn.Flatten(), nn.Linear(8, 4, bias=False)), ["avg_pool_linear"]),
    "head by mean": (lambda: lambdas(lambda m, x: m.fc(x.mean((2, 3))), fc=nn.Linear(8, 4)), ["avg_pool_linear"]),
    "mean": (lambda: nn.AdaptiveAvgPool2d(1), ["global_avg_pool"]),
    "linear": (lambda: lambdas(lambda m, x: m.fc(x[:, :, 0, 0].relu()), fc=nn.Linear(8, 4)), ["linear"]),
    "strides looked at": (lambda: lambdas(lambda m, x: m.a(x).relu().as_strided((4, 3), (1, 7), 5), a=conv()), [CBR]),
    "an input's strides": (lambda: lambdas(lambda m, x: m.a(x) + x[1:].as_strided((1,), (1,), 9), a=conv()), [CBR]),
    "attention": (
        lambda: lambdas(lambda m, x: (lambda y: F.scaled_dot_product_attention(y[:, :4], y[:, 4:], y[:, 4:]))(m.a(x)),
                        a=nn.Conv2d(8, 8, 1)),
        [CBR],
    ),
    "pairs of numbers": (
        lambda: lambdas(lambda m, x: torch.view_as_complex(m.a(x.contiguous())).real,
                        a=nn.Conv2d(8, 8, (3, 2), (1, 4), (1, 0))),
        [CBR],
    ),
    "a slice looked at": (lambda: lambdas(lambda m, x: m.a(x)[1:].as_strided((1, 4), (4, 1), 0) + 0, a=conv()), [LEFT]),
    "a copy looked at": (
        lambda: lambdas(lambda m, x: (m.a(x)[1:] * 1).as_strided((1, 4), (4, 1), 0) + 0, a=conv()), [CBR],
    ),
    "a conjugate": (lambda: lambdas(lambda m, x: torch.view_as_real(torch.complex(x, x).conj() * 1)[..., 1]), []),
    "a gate that is a convolution": (
        lambda: lambdas(lambda m, x: (lambda p: m.a(x) * m.b(p) + m.c(p))(x[:1].mean((2, 3), True)),
                        a=conv(), b=nn.Conv2d(8, 8, 1), c=nn.Conv2d(8, 8, 1)),
        ["global_avg_pool", CBR, CBR, CBR],
    ),
    "a branch": (
        lambda: lambdas(
            lambda m, x: torch.cond(x.sum() > 0, lambda y: y.reshape(-1)[:99] * 2, lambda y: y.reshape(-1)[-99:] * 3,
                                    (m.a(x),)),
            a=conv(),
        ),
        [CBR],
    ),
    "a mean that is computed": (
        lambda: lambdas(lambda m, x: F.batch_norm(m.a(x), m.v * 2, m.v + 1, eps=0.0), a=conv(bias=True)),
        [CBR],
    ),
    "integers": (lambda: lambdas(lambda m, x: F.max_pool2d(x.long(), 2).float()), []),
    "complex numbers": (lambda: lambdas(lambda m, x: torch.complex(x, x).mean((2, 3), True).real), []),
    "grouped": (lambda: sequence(conv(groups=2), norm(), nn.ReLU()), [CBR]),
    "a mask of channels": (lambda: lambdas(lambda m, x: m.a(x) * (m.v[:, None, None] > 0), a=conv()), [CBR]),
    "a large weight": (lambda: lambdas(lambda m, x: (m.a(x) * 1e300).nan_to_num(), a=conv()), [CBR]),
    "depthwise, of many rows": (lambda: nn.Conv2d(8, 8, (32, 1), padding=(16, 0), groups=8), [CBR]),
    "depthwise": (lambda: sequence(conv(groups=8), norm(), nn.ReLU6()), [CBR]),
    "two filters a channel": (lambda: nn.Conv2d(8, 16, 3, groups=8), [CBR]),
    "depthwise, no shortcut": (
        lambda: lambdas(lambda m, x: m.b(m.a(x)) + m.d(m.c(x)),
                        a=conv(groups=8), b=norm(), c=nn.Conv2d(8, 8, 1), d=norm()),
        [CBR, CBR],
    ),
    "transposed": (lambda: nn.ConvTranspose2d(8, 8, 3), [LEFT]),
    "fp64": (lambda: sequence(conv(), norm()).double(), [LEFT]),
}  # fmt: skip


def images(n: int = 2, c: int = 8, size: int = 8) -> Tensor:
    return exact.integers(exact.generator(torch.device("cpu"), 1), 2, n, c, size, size)


def ours(calls: list[Call]) -> list[str]:
    return [c.operator for c in calls if c.operation is not None or c.operator == LEFT]


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("name", PATTERNS)
@torch.no_grad()
def test_patterns(name, kernels):
    """What becomes of each pattern, with the bits and the strides that are the model's: in NCHW on PyTorch, in
    channels_last on the kernels."""
    make, expected = PATTERNS[name]
    model, found = integral(make()), list[Call]()
    x = images().to(next(model.parameters(), torch.ones(())).dtype)
    if kernels == "triton":
        x = exact.channels_last(x)
    answer = model(x.clone())
    backend = functools.partial(resnet_triton, options={"kernels": kernels}, record=found)
    y = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(x.clone())
    assert ours(found) == expected
    assert {call.backend for call in found if call.operation is not None} <= {kernels}
    assert torch.equal(y, answer)
    assert strides(y) == strides(answer)


@torch.no_grad()
def test_vectors_of_16_bits_are_made_in_one_step_each(monkeypatch):
    """In fp32, without a cast first."""
    graphs, rewrite = [], backend.rewrite.rewrite
    monkeypatch.setattr(backend.compile, "rewrite", lambda gm, modes: (rewrite(gm, modes), graphs.append(gm.graph)))
    model = integral(lambdas(lambda m, x: m.b(m.a(x)) * 0.5, a=conv(bias=True), b=norm())).half()
    x = exact.channels_last(images().half())
    expected = model(x)
    assert torch.equal(torch.compile(model, backend="resnet_triton")(x), expected)
    targets = Counter(node.target for node in graphs[0].nodes if node.op == "call_function")
    assert targets == {torch.ops.aten.addcmul.default: 3, torch.ops.resnet_triton.conv_bn_relu.default: 1}


def _swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


INSIDE: dict[Activation, list[Callable[[Tensor], Tensor]]] = {
    Activation("relu6"): [nn.ReLU6(inplace=True), nn.Hardtanh(0, 6), lambda x: x.clamp(0, 6)],
    Activation("leaky_relu", 0.25): [nn.LeakyReLU(0.25)],
    Activation("leaky_relu"): [F.leaky_relu],
    Activation("hardswish"): [nn.Hardswish(inplace=True)],
    Activation("silu"): [nn.SiLU(inplace=True), _swish, lambda x: x.sigmoid() * x],
    Activation("gelu"): [nn.GELU()],
    NONE: [
        nn.Hardtanh(), nn.Hardtanh(0, 5), lambda x: x.clamp(0, 7), lambda x: x.clamp(min=0), nn.GELU("tanh"), nn.Mish(),
        lambda x: x * (2 * x).sigmoid(), lambda x: (lambda s: x * s + s)(x.sigmoid()), lambda x: _swish(x) + x,
        lambda x: x.relu() + x, lambda x: x.sigmoid(),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@torch.no_grad()
def test_activations(kernels):
    """Which activation is computed behind a sum inside the convolution; the last ones are left to PyTorch."""
    cases = [(expected, act) for expected, acts in INSIDE.items() for act in acts]
    model = integral(lambdas(
        lambda m, x: torch.cat([act(m.b(m.a(x)) + x) for _, act in cases]),
        a=conv(), b=norm(),
    ))  # fmt: skip
    found, x = list[Call](), exact.channels_last(images(1))
    backend = functools.partial(resnet_triton, options={"kernels": kernels}, record=found)
    y = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(x)
    convolutions = [call.operation for call in found if call.operator == CBR]
    assert [c.activation for c in convolutions] == [expected for expected, _ in cases]
    assert all(c.residual is not None for c in convolutions)
    torch.testing.assert_close(y, model(x), rtol=1e-6, atol=1e-6)


def strides(t: Tensor) -> list[int]:
    """Where they say anything."""
    return [s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1]


class Features(nn.Module):
    """Several results, one of them of the tensor that goes on, behind a `view`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = conv(bias=True), conv(), norm()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.a(x)
        second = self.norm(self.b(first.relu()))
        flat, (part, _) = first.view(len(x), -1), second.chunk(2, 1)
        row, third = second.sigmoid().squeeze(0), first.sigmoid()
        copies = {"copy": first * 1, "another": third * 1, "third": third / 1, "of x": x * 1}
        return {"first": first, "flat": flat, "second": second, "part": part, "row": row, "x": x, **copies}


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2])
def test_results_have_the_strides_and_the_aliases_that_the_model_gives_them(n):
    model, x = integral(Features()), images(n)
    expected, actual = model(x), torch.compile(model, backend="resnet_triton")(x)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
        assert strides(actual[name]) == strides(value), name
    assert actual["x"] is x
    actual["another"].fill_(77)
    for part, whole in (("flat", "first"), ("part", "second")):
        actual[part].fill_(77)
        assert (actual[whole] == 77).sum() == actual[part].numel(), f"{part} is no part of {whole} any more"
    for copied, value in (("copy", "first"), ("third", "third"), ("of x", "x")):
        assert torch.equal(actual[copied], expected[value]), copied


class Drops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop = conv(), nn.Dropout()

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.drop(self.conv(x))
        z = torch.dropout(F.dropout(self.drop(y), training=False), 0.5, False)
        w = F.dropout(torch.dropout(input=x, p=0.5, train=False), p=0.0)
        z.add_(1)
        w.add_(1)
        return [y, z, x, w, F.dropout(z), torch.dropout(z, 0.5, True)]


@torch.no_grad()
def test_dropout_that_drops_nothing_returns_its_input():
    """So a write into one of them is a write into the other. And the rest drops."""
    model, (x, given) = integral(Drops()), (images(), images())
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    actual = torch.compile(model, backend="resnet_triton")(given)
    assert all(map(torch.equal, actual, expected))
    assert actual[0].data_ptr() == actual[1].data_ptr()
    assert actual[2] is actual[3] is given


@torch.no_grad()
def test_batches_one_and_many_compile_once_each():
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return resnet_triton(graph, inputs)

    model = integral(nn.Sequential(_stem(), Residual(_downsample()), _head()))
    fast = torch.compile(model, backend=count)
    for n in (1, 2, 3, 8):
        x = images(n, size=32)
        assert torch.equal(fast(x), model(x))
    assert len(graphs) == 2


@pytest.mark.parametrize("make", [optimize, functools.partial(torch.compile, backend="resnet_triton")])
@torch.no_grad()
def test_torchs_limit_of_compilations_is_said(make):
    """Models of one class are compiled once for all of them, or have a function each: they do not come near it."""
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(3):
            model, x = make(integral(sequence(conv()))), images()
            assert used(model, x)
        with pytest.warns(RuntimeWarning, match=r"a function 2 times, its limit: .*; raise torch._dynamo.config"):
            assert used(model.half(), x.half())
        assert "the model 2 times, its limit" in str(report(model, x.shape))
        assert not used(model.bfloat16(), x.bfloat16())


@torch.no_grad()
def test_edits_of_weights_show():
    model, x = integral(Residual(_downsample())), images()
    fast = torch.compile(model, backend="resnet_triton")
    fast(x)
    model.conv1.weight.mul_(2)
    model.norm1.running_mean.add_(1)
    assert torch.equal(fast(x), model(x))
    model.conv2.weight = nn.Parameter(model.conv2.weight.flip(0))
    model.conv1.weight.data = model.conv1.weight.data.contiguous(memory_format=torch.channels_last).neg()
    assert torch.equal(fast(x), model(x))


def test_gradients_are_pytorchs():
    model = integral(Residual(_downsample()))
    fast = torch.compile(model, backend="resnet_triton")
    with torch.no_grad():
        fast(images())  # compiled for inference first
    gradients = []
    for call in (model, fast):
        model.zero_grad()
        x = images().requires_grad_()
        call(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad.clone() for p in model.parameters())])
    assert all(map(torch.equal, *gradients))
    with pytest.raises(Exception, match="grad mode is on"):
        torch.compile(model, backend="resnet_triton", options={"kernels": "triton"})(images())


@torch.no_grad()
def test_training_mode_trains_the_statistics():
    torch.manual_seed(0)
    model = Residual(None).train()
    other = copy.deepcopy(model)
    torch.testing.assert_close(torch.compile(model, backend="resnet_triton")(images()), other(images()))
    for (name, mine), theirs in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    assert model.norm1.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "fastest"}, "mode='fastest', expected one of 'default', 'reduce-overhead'"),
        ({"options": {"graph": True}}, "options has 'graph', expected kernels, batch_invariant, cuda_graph, rest"),
        ({"options": {"kernels": "cuda"}}, "kernels='cuda', expected one of"),
        ({"options": {"cuda_graph": 1}}, "cuda_graph=1, expected"),
        ({"options": {"batch_invariant": 1}}, "batch_invariant=1, expected True or False"),
        ({"options": {"rest": "aot"}}, "rest='aot', expected 'eager' or 'inductor'"),
    ],
)
def test_unknown_settings(arguments, message):
    with torch.no_grad(), pytest.raises(Exception, match=message):
        torch.compile(conv(), backend="resnet_triton", **arguments)(images())


class Mixed(nn.Module):
    """Between our convolutions: gates, a grouped convolution, a transposed one, an attention; a view at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.grouped, self.norm = conv(bias=True), conv(), conv(groups=2), norm()
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.norm(self.b(self.a(x).clamp(-3, 3))).relu()
        y = self.grouped(y.flip(1)[:, :, 1:]) * y.amax((2, 3), keepdim=True)
        return y.view(len(x), -1), self.up(y), y


@pytest.mark.slow
@torch.no_grad()
def test_inductor_compiles_the_rest():
    model = integral(Mixed())
    fast = torch.compile(model, backend="resnet_triton", dynamic=True, options={"rest": "inductor"})
    for n in (3, 2):
        for actual, expected in zip(fast(images(n)), model(images(n)), strict=True):
            assert torch.equal(actual, expected)
            assert strides(actual) == strides(expected)
        model.a.weight.mul_(-1)
    assert used(fast, images()) == {("conv_bn_relu", "torch"): 3}


@pytest.mark.slow
@torch.no_grad()
def test_inductor_draws_the_numbers_that_pytorch_draws():
    model, x = sequence(conv(), nn.ReLU()).eval(), images()

    def drop(x):
        return F.dropout(model(x), 0.5, training=True) + torch.rand(1)

    fast = torch.compile(drop, backend="resnet_triton", options={"rest": "inductor"})
    torch.manual_seed(0)
    expected = drop(x)
    torch.manual_seed(0)
    torch.testing.assert_close(fast(x), expected)


@torch.no_grad()
def test_batch_invariant():
    torch.manual_seed(0)
    model, x = sequence(conv(), norm(), nn.ReLU()).eval(), torch.randn(5, 8, 9, 9)
    fast = torch.compile(model, backend="resnet_triton", options={"batch_invariant": True})
    assert torch.equal(fast(x)[3:4], fast(x[3:4]))


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def graphed(model: nn.Module, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="resnet_triton", dynamic=False, options=options)


@torch.no_grad()
def test_a_shape_is_captured_at_its_second_call_and_replayed(cuda):
    """Not counting the very first call, which torch.compile watches."""
    model = integral(sequence(_stem(), Residual(_downsample()), _head()))
    fast = graphed(model)
    for size, graphs in ((32, 0), (32, 0), (32, 1), (32, 1), (48, 1), (48, 1), (48, 2), (32, 2)):
        x = images(3, size=size)
        assert torch.equal(fast(x), model(x))
        assert len(cuda.graphs) == graphs
    assert cuda.graphs[0].replays == 2
    model[1].conv1.weight.mul_(2)  # in place: the graph reads it
    assert torch.equal(fast(x), model(x))
    assert len(cuda.graphs) == 2
    model[1].conv1.weight.data = model[1].conv1.weight.flip(0).contiguous()
    kept = fast(x)
    assert torch.equal(kept, model(x))
    fast(images(3, size=32) + 1)
    assert torch.equal(kept, model(x)), "a result is the caller's"


def test_a_graph_where_gradients_are_on_and_none_is_wanted(cuda):
    """AOTAutograd switches them off around it."""
    model, x = integral(sequence(conv(), nn.ReLU())).requires_grad_(False), images()
    fast = graphed(model)
    for _ in range(4):
        assert torch.equal(fast(x), model(x))
    assert [graph.replays for graph in cuda.graphs] == [1]


@torch.no_grad()
def test_the_graphs_of_an_optimized_model(cuda):
    """Each model has graphs of its own; an edit of the model is never missed; `report` counts."""
    model, x = optimize(integral(Outer()), cuda_graph=True), images()
    for _ in range(4):
        model(x)
    assert len(cuda.graphs) == 1
    assert "2x8x8x8 float32 replayed 2 times" in str(report(model, (1, 8, 8, 8)))
    handle = model.inner.register_forward_hook(_plus_one)
    with disabled(model):
        expected = model(x)
    assert torch.equal(model(x), expected)
    handle.remove()
    for name in SEEN.keys() - {"a module of another kind"}:
        SEEN[name](model)
        with disabled(model):
            expected = model(x)
        for _ in range(3):
            torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_two_models_of_one_function_keep_a_graph_each(cuda):
    models = [integral(Residual(None)) for _ in range(2)]
    models[1].conv1.weight.neg_()

    @torch.compile(backend="resnet_triton", dynamic=False, options={"cuda_graph": True})
    def call(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)

    for _ in range(3):
        for model in models:
            assert torch.equal(call(model, images()), model(images()))
    assert len(cuda.graphs) == 2


class Denoiser(nn.Module):
    """Several inputs, one of them integers and one that need not be there; tensors, a number and nothing come out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.steps = conv(), nn.Embedding(10, 8)

    def forward(self, x: Tensor, step: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        y = self.conv(x) + self.steps(step)[:, :, None, None]
        parts = y[:, 1:5:2, 1:] * 1, y.amax(1)[:, ::2], y[:, :1].neg().expand(-1, 4, -1, -1)
        return {"y": (y if mask is None else y * mask, y.sum((2, 3)), *parts), "pixels": x[0, 0].numel(), "mask": None}


@torch.no_grad()
def test_a_graph_of_several_inputs_and_results(cuda):
    """One for the sizes, strides and dtypes of all of them."""
    model, step, mask = integral(Denoiser()), torch.tensor([3, 5]), images() > 0
    model.steps.weight.round_()
    fast = torch.compile(model, backend="resnet_triton", dynamic=True, options={"cuda_graph": True})
    inputs = [
        (images(), step),
        (images(), step, mask),
        (images(), step, exact.channels_last(mask)),
        (images(2, size=12), step),
    ]
    calls = [(x + i, (s + i) % 10, *m) for i in range(3) for x, s, *m in inputs]
    answers = [(model(*call), fast(*call)) for call in calls]
    assert len(cuda.graphs) == 4
    assert sum(graph.replays for graph in cuda.graphs) >= 4
    for expected, actual in answers:
        assert all(map(torch.equal, actual["y"], expected["y"]))
        assert [t.stride() for t in actual["y"]] == [t.stride() for t in expected["y"]]
        assert (actual["pixels"], actual["mask"]) == (expected["pixels"], None)


@torch.no_grad()
def test_a_graph_that_computes_in_fp32_is_one_for_tf32_or_not(cuda):
    fast = graphed(integral(lambdas(lambda m, x: m.a(x.float()), a=conv())), cuda_graph=True)
    for allowed in (False, True):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            for _ in range(3):
                fast(images().half())
    assert len(cuda.graphs) == 2


UNGRAPHED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "an input that is written": (lambda: lambdas(lambda m, x: m.a(x.add_(1)), a=conv()), "changes an input"),
    "training": (lambda: sequence(conv(), nn.BatchNorm2d(8, momentum=0.5)).train(), "changes an input"),
    "random numbers": (lambda: lambdas(lambda m, x: m.a(x) + torch.rand(()), a=conv()), "the same each time"),
    "a branch": (
        lambda: lambdas(lambda m, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (m.a(x),)), a=conv()),
        "cond may take another branch",
    ),
    "what lies beside an input": (
        lambda: lambdas(lambda m, x: m.a(x) + x.as_strided((1,), (1,)), a=conv()), "as_strided may read past an input",
    ),
    "two results of one tensor": (
        lambda: lambdas(lambda m, x: (lambda y: (y, y[0]))(m.a(x)), a=conv()), "results share memory",  # type: ignore[return-value]
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", UNGRAPHED)
def test_what_no_graph_can_repeat(name, cuda):
    make, reason = UNGRAPHED[name]
    model = make() if name == "training" else integral(make())
    fast = torch.compile(model, backend="resnet_triton", options={"cuda_graph": True})
    with pytest.warns(RuntimeWarning, match=f"calls run without a graph: .*{reason}"):
        fast(images())
    for _ in range(3):
        fast(images())
    assert not cuda.graphs


# --- optimize --------------------------------------------------------------------------------------------------------


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def helper(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x).relu()


class Outer(nn.Module):
    """A model that is nobody's but its author's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.gain = Inner(), norm(), 2
        self.head = _head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.inner(x)) * self.gain)


def used(call: Callable[..., Any], *args: Any) -> Counter[Any]:
    before = Counter(dispatch.calls)
    call(*args)
    return dispatch.calls - before


@torch.no_grad()
def test_optimize_and_revert():
    model, x = integral(Outer()), images()
    expected, state, hook = model(x), dict(model.state_dict()), model.register_forward_hook(lambda *a: None)
    names = set(vars(model))
    assert optimize(model) is model
    assert type(model).__name__ == "Outer"
    assert isinstance(model, Outer)
    assert list(model.state_dict()) == list(state)
    assert model.inner.conv.weight.is_contiguous(), "the model's own code may count on it"
    assert torch.equal(model(x), expected)
    assert used(model, x) == {("conv_bn_relu", "torch"): 1, ("avg_pool_linear", "torch"): 1}
    with disabled(model):
        assert not used(model, x)
    assert torch.equal(refresh(model)(x), expected)
    assert not optimize(model, kernels="triton").training
    with pytest.raises(ValueError, match=r"no whole ResNet of .*, which freeze=True is for; leave it out$"):
        optimize(model, freeze=True)
    assert used(model, x) == {("conv_bn_relu", "triton"): 1, ("avg_pool_linear", "triton"): 1}
    assert revert(model) is model
    assert type(model) is Outer
    assert set(vars(model)) == names
    assert not used(model, x)
    hook.remove()


@torch.no_grad()
@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: torch.load(io.BytesIO(_saved(m)), weights_only=False),
        lambda m: optimize(m, inplace=False),
    ],
    ids=["deepcopy", "pickle", "torch.save", "inplace=False"],
)
def test_copies_stay_optimized_and_use_their_own_parameters(copied):
    model, x = integral(Outer()), images()
    optimize(model)(x)
    other = copied(model)
    assert compiled.origin(other) is Outer
    other.inner.conv.weight.zero_()
    assert used(other, x) == {("conv_bn_relu", "torch"): 1, ("avg_pool_linear", "torch"): 1}
    with disabled(model), disabled(other):
        expected, zeroed = model(x), other(x)
    assert torch.equal(model(x), expected)
    assert torch.equal(other(x), zeroed)
    assert not torch.equal(zeroed, expected)
    assert model._triton_programs.made == 1


def _saved(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def _patched(cls: type, name: str, code: Callable[..., Any]) -> Callable[[], None]:
    written = vars(cls)[name]
    setattr(cls, name, code)
    return lambda: setattr(cls, name, written)


def _registered_again(module: nn.Module) -> Callable[[], None]:
    """The hook that is there, registered so that it is told keywords, too."""
    (hook,) = module._forward_hooks.values()
    module._forward_hooks.clear()
    return module.register_forward_hook(hook, with_kwargs=True).remove


def _told(module: Any, args: Any, *rest: Any) -> Tensor | None:
    return None if len(rest) == 1 else rest[-1] + 1


def _doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        y = function(*args, **kwargs)
        return 2 * y if isinstance(y, Tensor) else y

    return call


def _plus_one(module: Any, args: Any, y: Tensor) -> Tensor:
    return y + 1


# Each edit of a model returns what undoes it. Those of the second list are noticed by torch.compile alone.
UNSEEN: dict[str, Callable[[Any], Callable[[], Any]]] = {
    "a hook": lambda m: m.inner.register_forward_hook(_plus_one).remove,
    "what a hook is told": lambda m: _registered_again(m.inner),
    "a hook before": lambda m: m.inner.conv.register_forward_pre_hook(lambda module, args: (args[0] + 1,)).remove,
    "forward of a class": lambda m: _patched(Inner, "forward", lambda self, x: self.helper(x) + 7),
    "a method of a class": lambda m: _patched(Inner, "helper", lambda self, x: self.conv(x) + 7),
    "every call": lambda m: _patched(nn.Module, "_call_impl", _doubled(nn.Module._call_impl)),
    "PyTorch's forward": lambda m: _patched(
        nn.Conv2d, "forward", lambda self, x: F.conv2d(x, self.weight, padding=1) + 7
    ),
    "a hook on all modules": lambda m: register_module_forward_hook(lambda module, args, y: y + 1).remove,
}
SEEN: dict[str, Callable[[Any], Any]] = {
    "forward of an instance": lambda m: setattr(m.inner, "forward", lambda x: 2 * x),
    "an attribute": lambda m: setattr(m, "gain", 3),
    "a module": lambda m: setattr(m.inner, "conv", integral(conv(bias=True))),
    "a module of another kind": lambda m: setattr(m, "inner", nn.Identity()),
    "a parameter": lambda m: setattr(m.inner.conv, "weight", nn.Parameter(m.inner.conv.weight + 1)),
    "data": lambda m: setattr(m.inner.conv.weight, "data", m.inner.conv.weight.data.flip(0).contiguous()),
    "in place": lambda m: m.inner.conv.weight.add_(1),
    "eps": lambda m: setattr(m.norm, "eps", 3.0),
}


@torch.no_grad()
@pytest.mark.parametrize("edit", [*UNSEEN, *SEEN])
def test_no_edit_is_missed(edit):
    model, plain, x = integral(Outer()), integral(Outer()), images()
    if edit == "what a hook is told":
        for m in (model, plain):
            m.inner.register_forward_hook(_told)
    optimize(model)(x)
    plain.compile(backend=resnet_triton)
    before = plain(x)
    undo = [{**UNSEEN, **SEEN}[edit](m) for m in (model, plain)]
    try:
        expected = revert(copy.copy(model)).forward(x) if edit not in UNSEEN else None
        with disabled(model):
            eager = model(x)
        assert expected is None or torch.equal(eager, expected)
        torch.testing.assert_close(model(x), eager)
        assert not torch.equal(eager, before), "the edit changes nothing"
        if edit in UNSEEN and edit != "a hook on all modules":
            assert torch.equal(plain(x), before), "torch.compile notices by itself: nothing to watch"
    finally:
        for back in undo[::-1]:
            if callable(back) and edit in UNSEEN:
                back()
    if edit in UNSEEN:
        assert torch.equal(model(x), before), "stale after it was undone"


@pytest.mark.slow
@torch.no_grad()
def test_many_models_of_a_class_in_every_mode_stay_compiled():
    """Dynamo keeps eight variants of one function; each model and grad mode has a function of its own."""
    x = images()
    for _ in range(12):
        model = optimize(integral(Outer()))
        model(x)
        assert used(model, x) == {("conv_bn_relu", "torch"): 1, ("avg_pool_linear", "torch"): 1}
    for dtype in (torch.float32, torch.float16):
        model.to(dtype)
        for mode in (torch.no_grad, torch.inference_mode):
            for n in (1, 2, 3):
                with mode():
                    assert used(model, images(n).to(dtype))
                    assert used(model, images(n).to(dtype)), (dtype, mode, n)


def test_with_gradients_the_model_runs_as_it_was_written():
    model = optimize(integral(Outer()))
    reference = revert(copy.deepcopy(model))
    for m in (model, reference):
        m(images()).sum().backward()
    assert torch.equal(model.inner.conv.weight.grad, reference.inner.conv.weight.grad)
    assert not used(model, images())
    for p in model.parameters():
        p.requires_grad_(False)
    assert used(model, images())


@torch.inference_mode()
def test_a_model_that_switches_gradients_on_in_inference_mode():
    """There are none, whatever the switch says."""
    model = integral(lambdas(torch.enable_grad()(lambda m, x: m.a(x).relu()), a=conv()))
    x = images()
    expected = model(x)
    assert torch.equal(optimize(model)(x), expected)
    assert used(model, x) == {(CBR, "torch"): 1}


class Called(nn.Module):
    """Names that are also modes of ours, a call and a subclass hook of its own, and a view of what comes out."""

    kernels = "its own"

    def __init_subclass__(cls, tag: str) -> None:
        raise TypeError("a subclass that nobody wrote")

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.cuda_graph, self._options, self._programs, self._moved, self._original = conv(), 3, 0, 0, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        assert self.kernels == "its own"
        return self.conv(x).view(len(x), -1) * self.cuda_graph

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


@pytest.mark.parametrize("training", [False, True])
def test_a_model_of_an_unusual_class(training):
    model = integral(Called()).train(training)
    with torch.set_grad_enabled(training):
        expected = model(images())
        assert torch.equal(optimize(model)(images()), expected)
        with disabled(model):
            assert torch.equal(model(images()), expected)
        assert (report(model, (2, 8, 8, 8)).calls[0].operator) == CBR
        assert torch.equal(copy.deepcopy(model)(images()), expected)
    assert vars(revert(model)).keys() == vars(Called()).keys()


@torch.no_grad()
def test_a_class_that_pickles_itself():
    model = optimize(torch.compile(conv(), backend="eager"))
    assert torch.equal(copy.deepcopy(model)(images()), model(images()))
    traced = optimize(torch.fx.symbolic_trace(sequence(conv())).eval())
    expected = traced(images())
    assert torch.equal(pickle.loads(pickle.dumps(traced))(images()), expected)


@torch.no_grad()
def test_a_part_and_then_the_whole():
    model = integral(sequence(sequence(conv()), nn.ReLU()))
    expected = model(images())
    optimize(model[0])(images())
    whole = optimize(model, inplace=False)
    assert torch.equal(whole(images()), expected)
    assert torch.equal(revert(model)(images()), expected)


@pytest.mark.slow
@torch.no_grad()
def test_who_changes_a_model_at_each_call_is_not_compiled_each_time():
    model, x = optimize(integral(Outer())), images()

    def call_with_a_hook() -> None:
        handle = model.inner.register_forward_hook(_plus_one)
        with disabled(model):
            expected = model(x)
        assert torch.equal(model(x), expected)
        handle.remove()

    for _ in range(compiled._LIMIT):
        call_with_a_hook()
    with pytest.warns(RuntimeWarning, match="runs as it was written from now on"):
        call_with_a_hook()
    for _ in range(3):
        call_with_a_hook()
    assert not used(model, x)
    assert used(refresh(model), x)


@torch.no_grad()
def test_two_inputs_and_no_tensor():
    model = optimize(integral(lambdas_of_two()))
    with disabled(model):
        expected = model(images(), scale=2, other=images())
    assert torch.equal(model(images(), scale=2, other=images()), expected)
    assert torch.equal(model(images(), scale=1, other=None), model(images()))


def lambdas_of_two() -> nn.Module:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: Tensor, other: Tensor | None = None, scale: int = 1) -> Tensor:
            y = self.conv(x) if other is None else self.conv(x) + self.conv(other)
            return y * scale

    return Two()


@torch.no_grad()
def test_replicas_of_data_parallel_stay_compiled_and_use_their_own_parameters(monkeypatch):
    module = sys.modules[nn.parallel.replicate.__module__]
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(
        module, "_broadcast_coalesced_reshape", lambda ts, devices, detach: [[t.clone() for t in ts] for _ in devices]
    )
    model, x = optimize(integral(Outer())), images()
    with disabled(model):
        expected = model(x)
    for _ in range(2):
        one, other = nn.parallel.replicate(model, [0, 1], detach=True)
        other.inner.conv.weight.zero_()
        assert torch.equal(one(x), expected)
        assert not torch.equal(other(x), expected)
        assert used(other, x) == {("conv_bn_relu", "torch"): 1, ("avg_pool_linear", "torch"): 1}
    (program,) = model._triton_programs.by_mode.values()
    assert len(torch._dynamo.eval_frame._debug_get_cache_entry_list(program.code)) == 1


@torch.no_grad()
def test_a_copy_of_a_part_keeps_no_more_alive():
    model = lambdas(lambda m, x: m.a(x).relu()[0] * 1, a=conv())
    y = torch.compile(model, backend="resnet_triton")(images(4))
    assert y.untyped_storage().size() == y.numel() * y.element_size()


@torch.no_grad()
def test_sizes_of_a_pool_with_ceil_mode_compile_nothing_new():
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return resnet_triton(graph, inputs)

    fast = torch.compile(sequence(conv(), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)), backend=counted)
    for size in (40, 41, 50, 43, 37, 60):
        fast(images(2, size=size))
    assert len(graphs) == 2


class Listed(nn.Module):
    """One compiled module by name, and one in a plain list, in which nobody finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.named, self.listed = optimize(integral(sequence(conv()))), [optimize(integral(sequence(conv())))]

    def forward(self, x: Tensor) -> Tensor:
        return self.listed[0](self.named(x))


@torch.no_grad()
def test_report_of_parts_that_are_not_named_or_that_torch_compile_was_given():
    assert [call.name for call in report(Listed().eval(), (2, 8, 8, 8)).calls] == ["named.0", "0"]
    part = torch.compile(optimize(integral(sequence(conv()))), backend="aot_eager")
    names = [call.name for call in report(nn.Sequential(part, conv()).eval(), (2, 8, 8, 8)).calls]
    assert [name.partition(".")[0] for name in names] == ["0", "1"]


@torch.no_grad()
def test_report_takes_the_arguments_of_a_call():
    calls = report(nn.DataParallel(optimize(Denoiser().eval())), (images(), torch.tensor([3, 5]))).calls
    assert (calls[0].name, calls[0].operator) == ("conv", CBR)


def test_report_says_what_the_model_raised():
    with pytest.raises(ValueError, match=r"^Conv2d does not take zeros of \(1, 3, 9, 9\): Given groups=1"):
        report(optimize(conv().eval()), (1, 3, 9, 9))


class Broken(nn.Module):
    """torch.compile compiles it once for all of its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        torch._dynamo.graph_break()
        return y.view(x.shape).relu()


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@torch.no_grad()
def test_report_counts_each_call_of_a_graph(kernels):
    model = optimize(integral(sequence(Broken(), Broken(), Broken())), kernels=kernels)
    calls = report(model, (2, 8, 8, 8)).calls
    assert ours(calls) == [CBR] * 3
    assert [call.name for call in calls if call.operator == CBR] == ["0.conv", "1.conv", "2.conv"]


@torch.no_grad()
def test_report_names_convolutions_that_are_not_called():
    model = integral(sequence(lambdas(lambda m, x: F.conv2d(F.conv2d(x, m.a.weight), m.b.weight), a=conv(), b=conv())))
    assert [call.name for call in report(model, (2, 8, 8, 8)).calls] == ["0.a", "0.b"]


@pytest.mark.parametrize("make", [optimize, functools.partial(torch.compile, backend="resnet_triton"), sequence])
def test_report_changes_nothing(make):
    inner = lambdas(lambda m, x: m.d(m.b(m.a(x.add_(1)))), a=conv(), b=norm(), d=nn.Dropout())
    model, x = make(inner.train()), images()
    before = {name: t.clone() for name, t in model.state_dict().items()}, x.clone(), dispatch.calls.copy()
    random, buffers = torch.get_rng_state(), dict(inner.b.named_buffers())
    report(model, (x,))
    report(model.eval(), (x,))
    assert all(torch.equal(t, before[0][name]) for name, t in model.state_dict().items())
    assert all(t is buffers[name] for name, t in inner.b.named_buffers())
    assert torch.equal(x, before[1])
    assert torch.equal(torch.get_rng_state(), random)
    assert dispatch.calls == before[2]


@pytest.mark.skipif(not compiled._ISOLATES, reason="this torch counts all that it compiles of a method together")
@torch.no_grad()
def test_reports_do_not_use_up_what_torch_compiles():
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            assert ours(report(integral(Broken()), (2, 8, 8, 8)).calls) == [CBR]
        assert used(optimize(integral(Broken())), images())


@torch.no_grad()
def test_report_counts_calls_and_not_replays(cuda):
    one = Broken()
    assert ours(report(optimize(integral(sequence(*[one] * 5))), (2, 8, 8, 8)).calls) == [CBR] * 5


@torch.no_grad()
def test_report_names_each_convolution():
    layers = nn.ConvTranspose2d(8, 8, 1), norm(), conv(groups=4), conv(groups=8)
    model = integral(nn.Sequential(_stem(), Residual(_downsample()), *layers, _head()))
    lines = str(report(model, (1, 8, 32, 32))).splitlines()
    rows = [line.split(maxsplit=3) for line in lines[1:-1]]
    assert [row[:2] for row in rows] == [
        ["0.0", "stem"], ["1.conv1", "conv_bn_relu"], ["1.conv2", "conv_bn_relu"], ["2", "aten.convolution"],
        ["3", "aten._native_batch_norm_legit_no_training"], ["4", "conv_bn_relu"], ["5", "conv_bn_relu"],
        ["6.2", "avg_pool_linear"],
    ]  # fmt: skip
    assert lines[4].endswith("transposed convolution")
    assert lines[5].endswith("none of our operators computes it")
    optimize(model, kernels="triton")
    kernels = [c.backend for c in report(model, (1, 8, 32, 32)).calls]
    assert kernels == ["triton", "triton", "triton", "torch", "torch", "triton", "triton", "triton"]
    found = str(report(model, (1, 8, 32, 32)))
    assert "depthwise path" in found
    assert "grouped path" in found


class Looks(nn.Module):
    """A convolution, and code that shows how its result lies in memory."""

    def __init__(self, look: Callable[[Tensor], Tensor], look_before: Callable[[Tensor], Any] = lambda w: w) -> None:
        super().__init__()
        self.conv, self.look, self.look_before = conv(), look, look_before

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        filters = self.look_before(self.conv.weight)
        return self.look(F.conv2d(x, filters, padding=1)).amax((2, 3))


class Flatten(nn.Module):
    """Its result is a view of contiguous memory only, but nobody writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv(), nn.Linear(512, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x), inplace=True).flatten(1)).relu_()


COPIES = "each call copies"
MOVED: dict[str, Callable[[], nn.Module]] = {
    "logits": Outer,
    "flat logits": Flatten,
    "scaled logits": lambda: Looks(lambda y: torch.addcmul(torch.ones(8, 1, 1), y, torch.full((8, 1, 1), 2.0))),
    "a flat one, written": lambda: Looks(lambda y: (y.flatten(1).mul_(2), y)[1]),
    "one that was flat, written": lambda: Looks(lambda y: (y.contiguous(), y.mul_(2))[0]),
    "strides": lambda: Looks(lambda y: y.as_strided((2, 8, 4, 4), (512, 64, 8, 1))),
    "random numbers": lambda: Looks(lambda y: F.dropout(y, 0.5, training=True)),
    "ties": lambda: sequence(conv(), conv(), nn.AdaptiveAvgPool2d(1)),
    "pixels": lambda: sequence(conv(), norm()),
    "a view": lambda: Called(),
    "parts of one tensor": Outer,
    "a filter": lambda: lambdas(
        lambda m, x: (m.v.copy_(m.a(x).sum((0, 2, 3))), m.a.weight[: len(x)].flatten(1))[1], a=conv()
    ),
    "a filter, written": lambda: Looks(lambda y: y, lambda w: w.mul_(1)),
    "a filter, read": lambda: Looks(lambda y: y, lambda w: w + w.reshape(-1, 4)[:, 1:].sum()),
}
STAY = {"strides", "ties", "a view", "parts of one tensor", "a filter", "a filter, written"}


@pytest.mark.filterwarnings(f"default:{COPIES}")
@pytest.mark.parametrize("name", MOVED)
@torch.no_grad()
def test_filters_are_moved_once_where_nobody_can_tell(name, recwarn):
    """To channels_last memory, by a compiled call; training finds them as they were."""
    model, x = integral(MOVED[name]()), images()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    if name == "parts of one tensor":
        weights[0].data = torch.cat([weights[0].data] * 2)[8:]
    if name == "ties":
        weights[0].data = weights[1].data
    expected, state, moves = model(x), model.state_dict(), name not in STAY
    optimize(model, kernels="triton")
    for training in (False, True, False):
        model.train(training)
        assert training or torch.equal(model(x), expected)
        assert all(w.is_contiguous() for w in weights) is (training or not moves)
    assert torch.equal(model(torch.cat([x, x]))[:2], expected)  # compiled anew, for any number of images
    assert all(w.is_contiguous() for w in weights) is not moves
    assert strides(model(x)) == strides(expected)
    assert (COPIES in str(report(model, x.shape))) is not moves
    with pytest.raises(RuntimeError, match="expected input"):
        model(x[:, :1])
    assert any(COPIES in str(warning.message) for warning in recwarn) is not moves
    assert all(w.is_contiguous() for w in weights) is not moves
    model.load_state_dict({n: t.clone(memory_format=torch.contiguous_format) for n, t in state.items()}, assign=True)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous() for w in weights) is not (moves or name in ("parts of one tensor", "ties"))
    assert model._triton_programs.made == 1
    revert(model)
    assert all(w.is_contiguous() for w in weights)
    assert "_triton_moved" not in vars(model)


@torch.no_grad()
def test_an_input_that_is_part_of_a_moved_filter_and_written():
    model = optimize(integral(lambdas(lambda m, x: m.a(x.mul_(2)).amax((2, 3)), a=conv())), kernels="triton")
    model(images())
    with pytest.raises(RuntimeError, match="writes is a part of its filters, expected a copy"):
        model(model.a.weight.data[2:5])


class Times(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv()

    def forward(self, x: Tensor, value: float) -> Tensor:
        return (self.a(x) * value).amax((2, 3))


@torch.no_grad()
def test_moved_filters_and_a_number_that_changes():
    """torch.compile makes a tensor of it."""
    model, x = integral(Times()), images()
    values = (0.5, 0.25, 2.0, 4.0)
    expected = [model(x, v) for v in values]
    optimize(model, kernels="triton")
    assert all(torch.equal(model(x, v), y) for v, y in zip(values, expected, strict=True))
    assert used(model, x, 8.0) == {("conv_bn_relu", "triton"): 1}
    assert not model.a.weight.is_contiguous()


class Flaky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls = conv(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.conv(x).amax((2, 3))
        torch._dynamo.graph_break()
        if self.calls == 1:
            raise RuntimeError("busy")
        return y


@torch.no_grad()
def test_an_error_of_the_model_is_raised_once():
    """Other filters would not mend it."""
    model = optimize(integral(Flaky()), kernels="triton")
    with pytest.raises(RuntimeError, match="busy"):
        model(images())
    assert model.calls == 1
    assert not model.conv.weight.is_contiguous()


class FeatureList(nn.ModuleDict):
    """As timm's models return features."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x := module(x) for module in self.values()]


@torch.no_grad()
def test_a_list_that_is_called():
    model, x = integral(FeatureList({"a": conv(), "b": conv()})), images()
    expected = model(x)
    assert all(map(torch.equal, optimize(model)(x), expected))
    assert used(model, x) == {("conv_bn_relu", "torch"): 2}


@torch.no_grad()
def test_a_model_whose_first_call_makes_its_parameters():
    model = revert(optimize(nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.AdaptiveAvgPool2d(1)).eval()))
    y = optimize(model)(images())
    with disabled(model):
        torch.testing.assert_close(y, model(images()))
    assert used(model, images()) == {(CBR, "torch"): 1, ("global_avg_pool", "torch"): 1}


@torch.inference_mode()
def test_a_graph_that_another_backend_has_copied():
    """A copy by `fx.Transformer` has none of Dynamo's fakes."""

    def copied(graph, inputs):
        return resnet_triton(torch.fx.Transformer(graph).transform(), inputs)

    model, x = integral(conv()), images()
    assert torch.equal(torch.compile(model, backend=copied)(x), model(x))


def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(ValueError, match="compiled by TorchScript; optimize the module"):
        optimize(torch.jit.trace(conv(), images()))
    with pytest.raises(ValueError, match="ModuleList is never called itself; optimize the modules in it"):
        optimize(nn.ModuleList([conv()]))


@pytest.mark.slow
def test_a_checkout_offers_the_entry_point():
    """Without importing Dynamo, which takes seconds."""
    code = """
import sys, torch, resnet_triton
assert "torch._dynamo" not in sys.modules
assert "resnet_triton" in torch.compiler.list_backends()
model, x = torch.nn.Conv2d(8, 8, 3), torch.ones(1, 8, 5, 5)
with torch.no_grad():
    torch.testing.assert_close(torch.compile(model, backend="resnet_triton")(x), model(x))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
