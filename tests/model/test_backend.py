"""The backend of torch.compile: what it finds in a model's graph, and CUDA graphs of what it makes."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import exact
import pytest
import torch
import torch.nn.functional as F
from small_models import (
    ADD,
    CBR,
    LEFT,
    POOL,
    Affine,
    Denoiser,
    Frozen,
    Residual,
    conv,
    downsample,
    head,
    images,
    integral,
    lambdas,
    norm,
    ours,
    sequence,
    stem,
    strides,
    used,
)
from torch import Tensor, nn

from resnet_triton import backend
from resnet_triton.backend import resnet_triton
from resnet_triton.backend.compile import compile_graph
from resnet_triton.ops import NONE, Activation
from resnet_triton.ops.trace import Call

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def _frozen(m: Any, x: Tensor, eps: float, alpha: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    mean, var, weight = (t.reshape(1, -1, 1, 1) for t in (m.v.to(dtype or m.v.dtype), m.v + 5, m.v + 2))
    scale = weight * torch.add(var, eps, alpha=alpha).rsqrt()
    return m.a(x) * scale + (mean - mean * scale)


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
    "shortcut": (lambda: Residual(downsample()), [CBR, CBR]),
    "shortcut first": (lambda: Residual(downsample(), order=1), [CBR, CBR]),
    "frozen shortcut": (lambda: Residual(sequence(downsample()[0], Frozen(8)), norm=Frozen), [CBR, CBR]),
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
    "dropout in a head": (lambda: sequence(*head()[:2], nn.Dropout(), head()[2]), ["avg_pool_linear"]),
    "add, relu": (lambda: lambdas(lambda m, x: F.relu(F.avg_pool2d(x, 1) + x)), [ADD]),
    "stem": (stem, ["stem"]),
    "stem without relu": (lambda: sequence(stem()[0], stem()[1], stem()[3]), [CBR, POOL]),
    "another pool": (lambda: sequence(*list(stem())[:3], nn.MaxPool2d(2)), [CBR, POOL]),
    "pool with ceil_mode": (lambda: nn.MaxPool2d(3, 2, ceil_mode=True), [POOL]),
    "dilated pool": (lambda: nn.MaxPool2d(3, 2, 1, dilation=2), []),
    "dilated pool with ceil_mode": (lambda: nn.MaxPool2d(3, 2, 1, dilation=2, ceil_mode=True), []),
    "pool with indices": (lambda: lambdas(lambda m, x: F.max_pool2d_with_indices(x, 2)[1].float()), []),
    "head": (head, ["avg_pool_linear"]),
    "head without bias": (lambda: sequence(head()[0], nn.Flatten(), nn.Linear(8, 4, bias=False)), ["avg_pool_linear"]),
    "head by mean": (lambda: lambdas(lambda m, x: m.fc(x.mean((2, 3))), fc=nn.Linear(8, 4)), ["avg_pool_linear"]),
    "mean": (lambda: nn.AdaptiveAvgPool2d(1), ["global_avg_pool"]),
    "a mean of all": (lambda: lambdas(lambda m, x: m.a(x).mean(None, keepdim=True), a=conv()), [CBR]),
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
        lambda: lambdas(lambda m, x: F.batch_norm(m.a(x), m.v * 2, m.v + 1, eps=3.0), a=conv(bias=True)),
        [CBR],
    ),
    "a negative eps": (
        lambda: lambdas(lambda m, x: torch.batch_norm(m.a(x), None, None, m.v, m.v + 5, False, 0.0, -1.0, False),
                        a=conv()),
        [CBR],
    ),
    "a negative eps of a frozen norm": (lambda: lambdas(lambda m, x: _frozen(m, x, -1.0), a=conv()), [CBR]),
    "an integer in a frozen norm": (lambda: lambdas(lambda m, x: _frozen(m, x, 0.5, dtype=torch.int), a=conv()), [CBR]),
    "an eps of a frozen norm, several times": (lambda: lambdas(lambda m, x: _frozen(m, x, 0.5, 6), a=conv()), [CBR]),
    "no pixels": (lambda: lambdas(lambda m, x: m.a(x)[:, :, :0].mean((2, 3), True).isnan().float(), a=conv()), [CBR]),
    "no pixels, linear": (
        lambda: lambdas(lambda m, x: m.b(m.a(x)[:, :, :0].mean((2, 3))).isnan().float(), a=conv(), b=nn.Linear(8, 4)),
        [CBR, "linear"],
    ),
    "no channels": (lambda: lambdas(lambda m, x: F.conv2d(x[:, :0], m.v.new_ones(8, 0, 1, 1))), [LEFT]),
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
    backend = functools.partial(compile_graph, options={"kernels": kernels}, record=found)
    y = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(x.clone())
    assert ours(found) == expected
    assert {call.backend for call in found if call.operation is not None} <= {kernels}
    assert torch.equal(y, answer)
    assert strides(y) == strides(answer)


@torch.no_grad()
def test_vectors_of_16_bits_are_made_in_one_step_each(monkeypatch):
    """In fp32, without a cast first."""
    graphs, rewrite = [], backend.rewrite.rewrite
    monkeypatch.setattr(backend.compile, "rewrite", lambda gm, *rest: (rewrite(gm, *rest), graphs.append(gm.graph)))
    model = integral(lambdas(lambda m, x: m.b(m.a(x)) * 0.5, a=conv(bias=True), b=norm())).half()
    x = exact.channels_last(images().half())
    expected = model(x)
    assert torch.equal(torch.compile(model, backend="resnet_triton")(x), expected)
    targets = Counter(node.target for node in graphs[0].nodes if node.op == "call_function")
    assert targets == {torch.ops.aten.addcmul.default: 3, torch.ops.resnet_triton.conv_bn_relu.default: 1}


@torch.no_grad()
def test_constants_are_fp32_whatever_the_default_dtype():
    model, x = integral(lambdas(lambda m, x: m.a(x) * 1e-8, a=conv(bias=True))), images()
    torch.set_default_dtype(torch.float16)
    try:
        y = torch.compile(model, backend="resnet_triton")(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert y.any()
    torch.testing.assert_close(y, model(x))


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
    backend = functools.partial(compile_graph, options={"kernels": kernels}, record=found)
    y = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(x)
    convolutions = [call.operation for call in found if call.operator == CBR]
    assert [c.activation for c in convolutions] == [expected for expected, _ in cases]
    assert all(c.residual is not None for c in convolutions)
    torch.testing.assert_close(y, model(x), rtol=1e-6, atol=1e-6)


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


@torch.no_grad()
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_group_norm_takes_values_as_the_model_lays_them_out(memory_format, monkeypatch):
    """For what torch 2.14 says of its result's strides does not follow from its argument's."""
    graphs, rewrite = [], backend.rewrite.rewrite
    monkeypatch.setattr(backend.compile, "rewrite", lambda gm, *rest: (rewrite(gm, *rest), graphs.append(gm.graph)))
    model = integral(sequence(conv(), nn.GroupNorm(2, 8), nn.ReLU()))
    x = images().contiguous(memory_format=memory_format)
    y = torch.compile(model, backend="resnet_triton")(x)
    torch.testing.assert_close(y, model(x))
    assert strides(y) == strides(model(x))
    (node,) = graphs[0].find_nodes(op="call_function", target=torch.ops.aten.native_group_norm.default)
    assert node.args[0].meta["val"].is_contiguous(memory_format=memory_format)


class Gated(nn.Module):
    """What a convolution's result may be added to or multiplied by, for which sizes are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate = conv(), nn.Conv2d(8, 8, 1)
        self.one, self.vector = nn.Parameter(torch.ones(1, 8, 8, 8)), nn.Parameter(torch.ones(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) * self.gate(x.mean((2, 3), keepdim=True))
        y = self.a((self.a(y) + self.one).relu()) * self.vector
        return (y + self.vector).relu() + x


@torch.no_grad()
@pytest.mark.parametrize("dims", [(0,), (0, 2, 3)])
@pytest.mark.parametrize(
    "make",
    [
        lambda: conv(bias=True),
        lambda: sequence(conv(), nn.ReLU(), nn.MaxPool2d(2), head()),
        Gated,
        lambda: lambdas(lambda m, x: (lambda y: y @ y.t())(m.a(x).relu().flatten(1)), a=conv()),
    ],
    ids=["conv", "pools", "gates", "products of images"],
)
def test_sizes_that_are_not_known_before_the_call(make, dims):
    model, x = integral(make()), images(3)
    fast = torch.compile(model, backend="resnet_triton", fullgraph=True)
    for dim in dims:
        torch._dynamo.decorators.mark_unbacked(x, dim)
    for given in (x, images(2), images(1)):
        expected = model(given)
        torch.testing.assert_close(fast(given), expected)
        assert strides(fast(given)) == strides(expected)


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

    model = integral(nn.Sequential(stem(), Residual(downsample()), head()))
    fast = torch.compile(model, backend=count)
    for n in (1, 2, 3, 8):
        x = images(n, size=32)
        assert torch.equal(fast(x), model(x))
    assert len(graphs) == 2


@torch.no_grad()
def test_edits_of_weights_show():
    model, x = integral(Residual(downsample())), images()
    fast = torch.compile(model, backend="resnet_triton")
    fast(x)
    model.conv1.weight.mul_(2)
    model.norm1.running_mean.add_(1)
    assert torch.equal(fast(x), model(x))
    model.conv2.weight = nn.Parameter(model.conv2.weight.flip(0))
    model.conv1.weight.data = model.conv1.weight.data.contiguous(memory_format=torch.channels_last).neg()
    assert torch.equal(fast(x), model(x))


def test_gradients_are_pytorchs():
    model = integral(Residual(downsample()))
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
def test_inductor_captures_nothing_in_our_graphs(monkeypatch):
    from torch._inductor import config as inductor  # seconds

    asked = []

    def compile_fx_inner(gm, *arguments, **options):
        asked.append(inductor.triton.cudagraphs)
        return lambda values: gm(*values)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", compile_fx_inner)
    model, x = sequence(conv(), nn.ReLU()).eval(), images()
    fast = torch.compile(model, backend="resnet_triton", options={"rest": "inductor"})
    with inductor.patch({"triton.cudagraphs": True}):
        torch.testing.assert_close(fast(x), model(x))
    assert asked == [False]


@torch.no_grad()
def test_what_inductor_cannot_compile_runs_all_the_same(monkeypatch):
    def compile_fx_inner(*arguments, **options):
        raise ValueError("Invalid ranges\nmore")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", compile_fx_inner)
    model, x = integral(sequence(conv(), nn.ReLU())), images()
    fast = torch.compile(model, backend="resnet_triton", options={"rest": "inductor"})
    with pytest.warns(RuntimeWarning, match=r"operator by operator here: ValueError: Invalid ranges$"):
        assert torch.equal(fast(x), model(x))


def _gate(m: Any, x: Tensor) -> Tensor:
    return m.n(m.a(x)) * m.b(x.mean((2, 3), keepdim=True)).relu()


def _parameter(*size: int) -> nn.ParameterList:
    return nn.ParameterList([torch.randn(*size)])


INVARIANT: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: sequence(conv(), norm(), nn.ReLU()),
    "gate": lambda: lambdas(_gate, a=conv(), n=norm(), b=nn.Conv2d(8, 8, 1)),
    "gate and shift": lambda: lambdas(
        lambda m, x: m.a(x) * x.mean((2, 3), keepdim=True) + m.p[0], a=conv(), p=_parameter(8, 1, 1)
    ),
    "scale and gate": lambda: lambdas(
        lambda m, x: m.a(x) * m.p[0] + x.mean((2, 3), keepdim=True), a=conv(), p=_parameter(8, 1, 1)
    ),
    "position": lambda: lambdas(lambda m, x: m.n(m.a(x)) + m.p[0], a=conv(), n=norm(), p=_parameter(1, 8, 9, 9)),
    "position of an activation": lambda: lambdas(
        lambda m, x: (F.relu(m.a(x)) + m.p[0]).relu(), a=conv(), p=_parameter(1, 8, 9, 9)
    ),
    "residual": lambda: Residual(None),
}


@torch.no_grad()
@pytest.mark.parametrize("name", INVARIANT)
def test_batch_invariant(name):
    """Nor is anything fused for one image that is not for several: a vector for a channel may be an image's."""
    torch.manual_seed(0)
    model, x = INVARIANT[name]().half().eval(), torch.randn(5, 8, 9, 9).half()
    fast = torch.compile(model, backend="resnet_triton", options={"batch_invariant": True})
    assert torch.equal(fast(x)[3:4], fast(x[3:4]))
    assert used(fast, x) == used(fast, x[:1])


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: sequence(conv(), nn.ConvTranspose2d(8, 8, 2)), r"convolution \(transposed convolution\); leave it"),
        (lambda: lambdas(lambda m, x: m.a(x).flatten(2) @ x.flatten(2).mT, a=conv()), "bmm; leave it out"),
        (lambda: lambdas(lambda m, x: m.a(x)[1].as_strided((2, 2), (1, 1), 1), a=conv()), r"convolution \(as_strided"),
        (lambda: lambdas(lambda m, x: m.t(m.a(x).flatten(2)), a=conv(),
                         t=nn.TransformerEncoderLayer(64, 2, 8, batch_first=True)), "_transformer_encoder_layer_fwd;"),
        (lambda: lambdas(lambda m, x: torch.cond(x.sum() > 0, m.b, m.a, (x,)), a=conv(), b=conv()), "cond;"),
    ],
    ids=["transposed", "bmm", "as_strided", "transformer", "branch"],
)  # fmt: skip
@torch.no_grad()
def test_sums_of_pytorch_are_not_promised_to_be_batch_invariant(model, why):
    fast = torch.compile(model().eval(), backend="resnet_triton", options={"batch_invariant": True})
    with pytest.raises(Exception, match=f"batch_invariant=True cannot be kept by what runs on PyTorch, {why}"):
        fast(images())


def test_nor_are_those_with_gradients():
    fast = torch.compile(conv(), backend="resnet_triton", options={"batch_invariant": True})
    with pytest.raises(Exception, match="batch_invariant=True cannot be kept where grad mode is on"):
        fast(images())


@torch.inference_mode()
@pytest.mark.parametrize("rest", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_autocast_that_is_off_within_a_model(rest):
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return m.a(x.float())

    torch.manual_seed(0)
    model, x = lambdas(forward, a=conv()).eval(), torch.randn(2, 8, 9, 9)
    fast = torch.compile(model, backend="resnet_triton", options={"rest": rest})
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(x), expected)
        assert fast(x.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(fast(x), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "rewritten"), [({}, False), ({"kernels": "torch"}, True), ({"batch_invariant": True}, True)], ids=str
)
def test_on_a_cpu_a_graph_runs_as_it_is(monkeypatch, options, rewritten):
    """But where kernels are interpreted, as in all other tests."""
    model, x = sequence(conv(), norm(), nn.ReLU()).eval(), torch.randn(2, 8, 9, 9)
    monkeypatch.setattr("resnet_triton.backend.compile.interpreter.active", lambda: False)
    fast = torch.compile(model, backend="resnet_triton", options=options)
    assert used(fast, x) == ({(CBR, "torch"): 1} if rewritten else {})
    torch.testing.assert_close(fast(x), model(x))
    assert fast(x).is_contiguous()


@torch.no_grad()
def test_kernels_are_compiled_side_by_side_before_the_first_call(monkeypatch):
    """Once sizes are numbers: of sizes that may change they are compiled when they are known."""
    given = []
    monkeypatch.setattr(backend.compile, "compile_calls", lambda calls, jobs: given.append([*map(_about, calls)]))
    model = integral(sequence(conv(), norm(), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout()))
    fast = torch.compile(model, backend="resnet_triton")
    for n in (2, 3, 4):
        assert torch.equal(fast(images(n)), model(images(n)))
    assert given == [[(CBR, (2, 8, 8, 8)), (POOL, (2, 8, 8, 8))], []]


def _about(call: Call) -> tuple[str, tuple[int, ...]]:
    return call.operator, tuple(call.ours.x.shape)


@torch.inference_mode()
def test_a_gradient_that_a_model_takes_of_an_inference_tensor():
    model = lambdas(lambda m, x: torch.func.grad(lambda t: m.a(t).square().sum())(x), a=conv()).eval()
    x = torch.randn(2, 8, 9, 9)
    expected = model(x)
    assert expected.any()
    torch.testing.assert_close(torch.compile(model, backend="resnet_triton")(x), expected)


@torch.no_grad()
def test_a_copy_of_a_part_keeps_no_more_alive():
    model = lambdas(lambda m, x: m.a(x).relu()[0] * 1, a=conv())
    y = torch.compile(model, backend="resnet_triton")(images(4))
    assert y.untyped_storage().size() == y.numel() * y.element_size()


@torch.no_grad()
def test_sizes_of_a_pool_with_ceil_mode_compile_nothing_new():
    """torch 2.13 makes two graphs of these sizes, 2.11 three."""
    model = sequence(conv(), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True))

    def graphs(backend):
        found = []
        torch.compiler.reset()
        fast = torch.compile(model, backend=lambda graph, inputs: found.append(graph) or backend(graph, inputs))
        for size in (40, 41, 50, 43, 37, 60):
            fast(images(2, size=size))
        return len(found)

    assert graphs(resnet_triton) == graphs(lambda graph, inputs: graph)


@torch.inference_mode()
def test_a_graph_that_another_backend_has_copied():
    """A copy by `fx.Transformer` has none of Dynamo's fakes."""

    def copied(graph, inputs):
        return resnet_triton(torch.fx.Transformer(graph).transform(), inputs)

    model, x = integral(conv()), images()
    assert torch.equal(torch.compile(model, backend=copied)(x), model(x))


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


# --- CUDA graphs -----------------------------------------------------------------------------------------------------


def graphed(model: nn.Module, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="resnet_triton", dynamic=False, options=options)


@torch.no_grad()
def test_a_shape_is_captured_at_its_second_call_and_replayed(cuda):
    """Not counting the very first call, which torch.compile watches."""
    model = integral(sequence(stem(), Residual(downsample()), head()))
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


@torch.library.custom_op("tests::unsafe", mutates_args=(), tags=[torch.Tag.cudagraph_unsafe])
def unsafe(x: Tensor) -> Tensor:
    return x.clone()


@unsafe.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


UNGRAPHED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "an input that is written": (lambda: lambdas(lambda m, x: m.a(x.add_(1)), a=conv()), "changes an input"),
    "training": (lambda: sequence(conv(), nn.BatchNorm2d(8, momentum=0.5)).train(), "changes an input"),
    "random numbers": (lambda: lambdas(lambda m, x: m.a(x) + torch.rand(()), a=conv()), "the same each time"),
    "an operator that says so": (lambda: lambdas(lambda m, x: unsafe(m.a(x)), a=conv()), "may not be in a graph"),
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
