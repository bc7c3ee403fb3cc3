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

from resnet_triton import models, report
from resnet_triton.graphs import fingerprint, runner

pytestmark = pytest.mark.usefixtures("no_grad")


IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "weight": lambda m: m.layer1[0].conv1.weight.mul_(2),
    "weight-data": lambda m: m.fc.weight.data.mul_(2),
    "statistics": lambda m: m.layer4[0].bn2.running_var.mul_(2),
    "load_state_dict": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
}


@pytest.mark.parametrize("edit", IN_PLACE)
def test_edits_in_place_need_no_new_graph(cuda, edit):
    model, x = small(), images()
    captured(model, x)
    before = model(x)
    IN_PLACE[edit](model)
    assert torch.equal(model(x), model._forward_impl(x))
    assert not torch.equal(model(x), before)
    assert len(cuda.graphs) == 1
    assert cuda.graphs[0].replays == 3


def set_data(parameter: Any, change: Callable[[Tensor], Tensor]) -> None:
    parameter.data = change(parameter.data)


def narrow(model: Any) -> None:
    """Fewer classes, in the memory that was there."""
    set_data(model.fc.weight, lambda t: t[:7])
    set_data(model.fc.bias, lambda t: t[:7])


def trained(model: Any) -> None:
    with torch.no_grad():
        model.train()(images(4))
    model.eval()
    model.bn1.train()


REPLACED: dict[str, Callable[[Any], Any]] = {
    "data": lambda m: set_data(m.conv1.weight, lambda t: t * 2),
    "data-transposed": lambda m: set_data(m.fc.weight, lambda t: t.t()),
    "data-narrower": narrow,
    "parameter": lambda m: setattr(m.fc, "bias", nn.Parameter(m.fc.bias * 2)),
    "parameter-removed": lambda m: setattr(m.fc, "bias", None),
    "buffer": lambda m: setattr(m.bn1, "running_mean", m.bn1.running_mean + 1),
    "load_state_dict-assign": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True),
    "eps": lambda m: setattr(m.bn1, "eps", 0.5),
    "stride": lambda m: setattr(m.layer1[0].conv2, "dilation", (2, 2)) or setattr(m.layer1[0].conv2, "padding", (2, 2)),
    "module": lambda m: setattr(m, "fc", nn.Linear(512, 4)),
    "module-deeper": lambda m: setattr(m.layer3[0], "bn1", nn.BatchNorm2d(256).eval()),
    "block-appended": lambda m: m.layer1.append(models.BasicBlock(64, 64).eval()),
    "block-removed": lambda m: m.layer1.__delitem__(0),
    "pool": lambda m: setattr(m.maxpool, "kernel_size", 5) or setattr(m.maxpool, "padding", 2),
    "activation": lambda m: setattr(m.layer2[0], "relu", nn.SiLU()),
    "hook": lambda m: m.layer4[0].register_forward_hook(doubled),
    "pre-hook": lambda m: m.fc.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 2,)),
    "forward": lambda m: setattr(m.layer2[0].bn1, "forward", lambda x: x * 3),
    "parametrization": lambda m: nn.utils.parametrizations.spectral_norm(m.fc) and m.fc.eval(),
    "training": lambda m: m.layer3[0].bn1.train(),
    "trained": trained,
}


@pytest.mark.parametrize("edit", REPLACED)
def test_other_edits_show_at_the_next_call(cuda, edit):
    model, x = small(), images()
    captured(model, x)
    before = model(x)
    assert cuda.graphs[0].replays == 1
    REPLACED[edit](model)
    expected = copy.deepcopy(model)._forward_impl(x)
    for _ in range(3):
        y = model(x)
        if edit not in ("training", "trained"):  # those move the statistics
            assert torch.equal(y, expected)
        assert not torch.equal(y, before)
    assert cuda.graphs[0].replays == 1  # not one call took the old graph's answer


@pytest.mark.parametrize("edit", ["data", "parameter", "eps", "module"])
def test_captured_again(cuda, edit):
    model, x = small(), images()
    captured(model, x)
    model(x)
    REPLACED[edit](model)
    model(x)
    assert len(cuda.graphs) == 2
    assert torch.equal(model(x), model._forward_impl(x))
    assert [g.replays for g in cuda.graphs] == [1, 1]


def test_an_edit_between_captures(cuda):
    model = small()
    captured(model, images(1))
    model.bn1.eps = 0.5
    captured(model, images(2))
    model.bn1.eps = 1e-5  # as when the first was captured, not the second
    for n in (2, 1, 2, 1):
        assert torch.equal(model(images(n)), model._forward_impl(images(n)))
    assert [g.replays for g in cuda.graphs[:2]] == [0, 0]


def test_the_memory_of_a_graph_outlives_the_parameter(cuda):
    """A replay that turns out to be outdated must not have read memory that was given away."""
    model, x = small(), images()
    captured(model, x)
    cuda.graphs.clear()  # the fake's records keep memory too
    addresses = {t.data_ptr() for t in model._runner._fingerprint._memory}
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


def test_a_parameter_deleted(cuda):
    model, x = small(), images()
    captured(model, x)
    del model.fc.bias
    with pytest.raises(AttributeError, match="bias"):
        model(x)


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


def test_a_report_leaves_the_graphs_alone(cuda):
    model, x = small(), images()
    captured(model, x)
    report(model, tuple(x.shape))
    model(x)
    assert len(cuda.graphs) == 1
    assert cuda.graphs[0].replays == 1


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
    assert any(reason in noted for noted in model._runner.eager)


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


def test_compiled(cuda):
    torch._dynamo.reset()
    model, x = small(), images()
    captured(model, x)
    expected, noted = model(x), dict(model._runner.eager)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected, rtol=1e-4, atol=1e-4)
    assert cuda.graphs[0].replays == 1
    assert model._runner.eager == noted
    torch._dynamo.reset()


def test_symbolically_traced(cuda):
    model, x = small(), images()
    captured(model, x)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model._forward_impl(x))


def test_wrong_inputs_raise_as_ever(cuda):
    model = small()
    captured(model, images())
    for _ in range(3):
        with pytest.raises(ValueError, match="x has 1 channels, expected 3"):
            model(images()[:, :1])
        with pytest.raises(ValueError, match="expected 4 dimensions"):
            model(images()[0])
    assert len(cuda.graphs) == 1
    assert torch.equal(model(images()), model._forward_impl(images()))


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
    assert any(reason in noted for noted in model._runner.eager)


def test_hooks_on_a_stage_fire(cuda):
    model, x = small(), images()
    plain = model(x)
    model.layer2.register_forward_hook(doubled)
    assert not torch.equal(model(x), plain)


def test_a_demand_that_cannot_be_met_warns_once(cuda):
    model = small(cuda_graph=True)
    with pytest.warns(RuntimeWarning, match="cuda_graph=True, but calls run without a graph: grad mode is on"):
        with_grad(model, images())
    with_grad(model, images())  # a second warning would be an error
    model(images())
    assert len(cuda.graphs) == 1
