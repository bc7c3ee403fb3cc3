"""Edits of a captured model show at its next call, and calls that need every operator get them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda import captured, doubled, images, small, with_grad
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_triton.graphs import fingerprint, runner

pytestmark = pytest.mark.usefixtures("no_grad")


def set_data(parameter: Any, change: Callable[[Tensor], Tensor]) -> None:
    parameter.data = change(parameter.data)


def test_a_replaced_buffer(cuda):
    model, x = small(), images()
    captured(model, x)
    model.bn1.running_mean = torch.randn(64)
    assert torch.equal(model(x), model._forward_impl(x))


def test_the_memory_of_a_graph_outlives_the_parameter(cuda):
    """A replay that turns out to be outdated must not have read memory that was given away."""
    model, x = small(), images()
    captured(model, x)
    cuda.graphs.clear()  # the fake's records keep memory too
    addresses = {t.data_ptr() for t in model._triton_runner._fingerprint._memory}
    assert addresses == {t.data_ptr() for t in model.state_dict().values() if t.is_floating_point()}
    set_data(model.conv1.weight, torch.clone)
    assert model.conv1.weight.data_ptr() not in addresses  # taken, as long as the fingerprint lives


@pytest.mark.parametrize("data", ["replaced", "resized"])
def test_a_weight_that_is_a_plain_attribute(cuda, data):
    model, x = small(), images()
    as_attribute(model.fc, model.fc.weight.detach())
    model.fc.bias = None
    captured(model, x)
    assert torch.equal(model(x), model._forward_impl(x))
    set_data(model.fc.weight, lambda t: t * 2 if data == "replaced" else t[:7])
    for _ in range(2):
        assert torch.equal(model(x), model._forward_impl(x))
    assert [graph.replays for graph in cuda.graphs] == [1, 1]


def test_a_dtype_in_the_same_memory():
    layer = nn.Linear(8, 8).half()
    before = fingerprint.Fingerprint(layer)
    assert before.holds()
    set_data(layer.weight, lambda t: t.view(torch.bfloat16))
    assert not before.holds()


def test_a_value_that_cannot_be_compared(cuda):
    model, x = small(), images()
    model.note = torch.zeros(2)
    captured(model, x)
    model.note = torch.zeros(2)
    assert torch.equal(model(x), model._forward_impl(x))
    assert len(cuda.graphs) == 2


# --- calls that need every operator ----------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def with_autocast(model: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def with_a_mode(model: Any, x: Tensor) -> Tensor:
    with Watch():
        return model(x)


def with_a_global_hook(model: Any, x: Tensor) -> Tensor:
    handle = nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    try:
        return model(x)
    finally:
        handle.remove()


def with_a_tangent(model: Any, x: Tensor) -> Tensor:
    with warnings.catch_warnings(), torch.autograd.forward_ad.dual_level():
        warnings.simplefilter("ignore")
        return model(x)


def with_jit_trace(model: Any, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, x, check_trace=False)(x + 1)


CALLS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "grad": (with_grad, "grad mode is on"),
    "autocast": (with_autocast, "autocast is on"),
    "mode": (with_a_mode, "sees every operator"),
    "global-hook": (with_a_global_hook, "a hook on all modules"),
    "tangent": (with_a_tangent, "sees every operator"),
    "jit-trace": (with_jit_trace, "sees every operator"),
    "double": (lambda m, x: m.double()(x.double()), "not a batch of images in"),
    "empty": (lambda m, x: m(x[:0]), "not a batch of images in"),
}


@pytest.mark.parametrize("kind", CALLS)
def test_calls_without_a_graph(cuda, kind):
    call, reason = CALLS[kind]
    model, x = small(), images()
    reference = copy.deepcopy(model)
    reference.cuda_graph = False
    captured(model, x)
    for _ in range(3):
        assert torch.equal(call(model, x), call(reference, x))
    assert len(cuda.graphs) == 1
    assert cuda.graphs[0].replays == 0
    assert any(reason in noted for noted in model._triton_runner.eager)


def test_vmap_sees_every_operator():
    reasons = []
    torch.vmap(lambda x: reasons.append(runner.uncaptured_call_reason(x)) or x)(torch.zeros(5, 2, 3, 4, 4))
    assert reasons == ["a transform, a tracer or a mode sees every operator"]


def test_a_stream_that_is_being_captured(cuda):
    model, x = small(), images()
    captured(model, x)
    cuda.available = False
    assert torch.equal(model(x), model._forward_impl(x))
    assert cuda.graphs[0].replays == 0


def test_symbolically_traced(cuda):
    model, x = small(), images()
    captured(model, x)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model._forward_impl(x))


class Counting(nn.ReLU):
    """Does more than compute."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def wrapped(t: Tensor) -> nn.Parameter:
    """It has no memory, but tensors in it that have."""
    return nn.Parameter(TwoTensor(t.detach(), t.detach()))


def as_attribute(layer: Any, weight: Tensor) -> None:
    """As those leave it who prune, shard or replicate."""
    del layer.weight
    vars(layer)["weight"] = weight


OBSTACLES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook": (lambda m: m.layer2[0].bn1.register_forward_hook(doubled), "layer2.0.bn1 has a hook"),
    "layer-hook": (lambda m: m.layer2.register_forward_hook(doubled), "layer2 has a hook"),
    "training": (lambda m: m.layer3[0].bn2.train(), "layer3.0.bn2 is in training mode"),
    "module": (lambda m: setattr(m.layer1[0], "relu", Counting()), "layer1.0.relu is a Counting"),
    "list": (lambda m: setattr(m.maxpool, "stride", [2, 2]), "maxpool has a list"),
    "subclass": (lambda m: setattr(m.fc, "weight", wrapped(m.fc.weight)), "fc has a tensor of another kind"),
    "subclass-as-attribute": (lambda m: as_attribute(m.fc, wrapped(m.fc.weight)), "fc has a tensor of another kind"),
}


@pytest.mark.parametrize("kind", OBSTACLES)
def test_models_without_a_graph(cuda, kind):
    edit, reason = OBSTACLES[kind]
    model = small()
    edit(model)
    captured(model, images(), images(3))
    assert not cuda.graphs
    assert any(reason in noted for noted in model._triton_runner.eager)


def test_a_demand_that_cannot_be_met_warns_once(cuda):
    model = small(cuda_graph=True)
    with pytest.warns(RuntimeWarning, match="cuda_graph=True, but calls run without a graph: grad mode is on"):
        with_grad(model, images())
    with_grad(model, images())  # a second warning would be an error
    model(images())
    assert len(cuda.graphs) == 1
