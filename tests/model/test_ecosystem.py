"""What other tools do with a model, before and after `optimize`: the same, or one line that says what to do."""

from __future__ import annotations

import copy
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision_models
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel
from torchvision_models import close, image

from resnet_triton import functional, optimize, report, revert
from resnet_triton.ops import dispatch, operation, reference

fuse_conv_bn_eval = importlib.import_module("torch.nn.utils.fusion").fuse_conv_bn_eval


class Other(nn.Module):
    """A model that is not torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn1(self.conv1(x)).relu().mean((2, 3)))


def small() -> Any:
    """Two stages of torchvision's ResNet."""
    model: Any = torchvision_models.small()
    model.layer3, model.layer4, model.fc = nn.Sequential(), nn.Sequential(), nn.Linear(128, 10)
    return model


def other() -> nn.Module:
    torch.manual_seed(0)
    return Other().eval()


MODELS: dict[str, Callable[[], Any]] = {"torchvision": small, "other": other}


# --- tools that work -------------------------------------------------------------------------------------------------


def ensemble(model: Any, x: Tensor) -> Tensor:
    """Parameters differ, images do not."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.fc.bias.add_(1)
    parameters, buffers = torch.func.stack_module_state([model, other])
    call = functools.partial(torch.func.functional_call, copy.deepcopy(model).to("meta"))
    return torch.func.vmap(lambda p, b: call((p, b), (x,)))(parameters, buffers).detach()


def gradients_of_each_image(model: Any, x: Tensor) -> Tensor:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)["conv1.weight"]


def wrapped(model: Any, x: Tensor) -> Tensor:
    """As Accelerate does."""
    model._old_forward = model.forward
    model.forward = functools.update_wrapper(
        functools.partial(lambda m, x: m._old_forward(x) + 1, model), model.forward
    )
    y = model(x)
    model.forward = model._old_forward
    del model._old_forward
    return y


def fused(model: Any, x: Tensor) -> Tensor:
    model.conv1, model.bn1 = fuse_conv_bn_eval(model.conv1, model.bn1), nn.Identity()
    return model(x)


def assigned(model: Any, x: Tensor, device: str = "cpu") -> Tensor:
    state = {key: t.clone(memory_format=torch.contiguous_format) for key, t in model.state_dict().items()}
    model.to(device).load_state_dict(state, assign=True)
    return model(x)


def emptied(model: Any, x: Tensor) -> Tensor:
    state = copy.deepcopy(model.state_dict())
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    return model(x)


def renormed(norm: Callable[[Any], Any]) -> Callable[[Any, Tensor], Tensor]:
    return lambda model, x: norm(model.conv1) and model.eval()(x)


def parametrized(model: Any, x: Tensor) -> Tensor:
    """The module itself, which gets another class."""
    model.gain = nn.Parameter(torch.ones(3))
    parametrize.register_parametrization(model, "gain", nn.Softplus())
    return copy.deepcopy(model)(x) + model(x)


TOOLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "vmap": lambda m, x: torch.func.vmap(m, 1)(torch.stack([x, x + 1], 1)).detach(),
    "vmap of gradients": gradients_of_each_image,
    "ensemble": ensemble,
    "jvp": lambda m, x: torch.cat(torch.func.jvp(m, (x,), (x + 1,))).detach(),
    "trace": lambda m, x: torch.jit.trace(m, x[:1])(x),
    "a moving average": lambda m, x: AveragedModel(m).eval()(x),
    "a replica": lambda m, x: m._replicate_for_data_parallel()(x),
    "weight norm": renormed(parametrizations.weight_norm),
    "weight norm of old": renormed(nn.utils.weight_norm),
    "spectral norm": renormed(parametrizations.spectral_norm),
    "pruning of filters": renormed(lambda conv: prune.ln_structured(conv, "weight", 0.5, n=2, dim=0)),
    "a parametrized model": parametrized,
    "a wrapped forward": wrapped,
    "fuse_conv_bn_eval": fused,
    "quantization's wrapper": lambda m, x: torch.ao.quantization.QuantWrapper(m).eval()(x),
    "load_state_dict(assign=True)": assigned,
    "a meta device": functools.partial(assigned, device="meta"),
    "to_empty": emptied,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("tool", TOOLS)
def test_tools_work_as_before(tool: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what they leave can be reverted, to the strides that it would have without us."""
    monkeypatch.setattr(reference, "_CACHED", 10_000)  # else few images are one part of the stem's
    plain, model, x = MODELS[kind](), optimize(MODELS[kind]()), image()
    torch.manual_seed(1)
    expected = TOOLS[tool](plain, x)
    torch.manual_seed(1)
    close(TOOLS[tool](model, x), expected.detach())
    with torch.no_grad():
        expected = plain(x)
        close(revert(model)(x), expected)
    assert [type(m) for m in model.modules() if not parametrize.is_parametrized(m)] == [
        type(m) for m in plain.modules() if not parametrize.is_parametrized(m)
    ]
    for name, p in model.named_parameters():
        assert p.stride() == plain.get_parameter(name).stride(), name


@pytest.mark.parametrize("kind", ["conv", "head"])
def test_vmap_is_one_call_of_a_larger_batch(kind: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 2, 8, 5, 5), torch.randn(4, 8, 3, 3)
    residual, mean, var = torch.randn(2, 4, 5, 5), torch.zeros(4), torch.ones(4)

    def call(x: Tensor) -> Tensor:
        if kind == "head":
            return functional.linear(x[0, :, 0, 0], weight[:, :, 0, 0])  # of one row, which is no batch
        return functional.conv_bn_relu(x, weight, mean, var, residual=residual, padding=(1, 1))

    expected, before = torch.stack([call(images) for images in x]), dispatch.calls.total()
    close(torch.func.vmap(call)(x), expected)
    assert dispatch.calls.total() - before == (3 if kind == "head" else 1)
    close(torch.func.vmap(torch.func.vmap(call))(x[None]), expected[None])


# --- what PyTorch itself refuses in channels_last --------------------------------------------------------------------


def safetensors(model: Any) -> None:
    library = pytest.importorskip("safetensors.torch")
    library.save(model.state_dict())


def closure(optimizer: Any, model: Any) -> Tensor:
    optimizer.zero_grad()
    loss = model(image()).square().sum()
    loss.backward()
    return loss


def lbfgs(model: Any) -> None:
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1)
    optimizer.step(functools.partial(closure, optimizer, model))


@pytest.fixture
def sharded() -> Iterator[Callable[[Any], None]]:
    """FSDP2, in a group of this process alone."""
    distributed = pytest.importorskip("torch.distributed")
    fsdp = importlib.import_module("torch.distributed.fsdp")
    mesh = importlib.import_module("torch.distributed.device_mesh").init_device_mesh
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield functools.partial(fsdp.fully_shard, mesh=mesh("cpu", (1,)))
    finally:
        distributed.destroy_process_group()


CONTIGUOUS: dict[str, Callable[[Any], Any]] = {
    "parameters_to_vector": lambda m: nn.utils.parameters_to_vector(m.parameters()),
    "pruning of weights": lambda m: prune.l1_unstructured(m.conv1, "weight", 0.5),
    "safetensors": safetensors,
    "LBFGS": lbfgs,
}


@pytest.mark.parametrize("tool", [*CONTIGUOUS, "FSDP2"])
def test_what_needs_contiguous_filters(tool: str, sharded: Callable[[Any], None]) -> None:
    """The limit is PyTorch's, for any model in channels_last; if that changes, docs/compatibility.md can be shorter."""
    use = CONTIGUOUS.get(tool, sharded)
    for model in (small().to(memory_format=torch.channels_last), optimize(small())):
        with pytest.raises((RuntimeError, ValueError), match=r"view size|non.contiguous"):
            use(model)
    for way_out in (revert, lambda m: m.to(memory_format=torch.contiguous_format)):
        model = optimize(small())
        use(way_out(model))
    use(optimize(other()))


@pytest.mark.filterwarnings("ignore")  # FSDP's, about a single process
@pytest.mark.parametrize("kind", ["torchvision", pytest.param("other", marks=pytest.mark.slow)])
def test_shards(kind: str, sharded: Callable[[Any], None]) -> None:
    """What FSDP2 shares out stays shared: a step of an optimizer shows. A model that was sharded is reverted, too."""
    plain, model = MODELS[kind](), MODELS[kind]()
    sharded(model)
    model(image())
    optimize(model)
    for m in (plain, model):
        m(image()).square().sum().backward()
        torch.optim.SGD(m.parameters(), 1e-4).step()
    with torch.no_grad():
        close(model(image()), plain(image()))
        close(revert(model)(image()), plain(image()))
    model = optimize(MODELS[kind]()).to(memory_format=torch.contiguous_format)
    sharded(model)
    with torch.no_grad():
        before = model(image())
        close(revert(model)(image()), before)
    assert [base for base in type(model).__mro__ if base.__module__.startswith("resnet_triton")] == []


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", ["export", "trace"])
@torch.no_grad()
def test_onnx_gets_operators_of_pytorch(
    how: str, kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From both exporters, whatever the model's modes are; they say themselves that they are at work."""
    model, x = MODELS[kind]().to(device), image().to(device)
    expected = model(x)
    optimize(model, kernels="triton")
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    made: Any = (
        torch.export.export(model, (x,)).module() if how == "export" else torch.jit.trace(model, x, check_trace=False)
    )
    written = str(made.graph) if how == "export" else str(made.inlined_graph)
    assert not re.search("resnet_triton(::|[.])(stem|conv_bn_relu|avg_pool_linear)", written)
    close(made(x), expected)


def test_scripting_a_compiled_model_names_the_way_out() -> None:
    with pytest.raises(NotImplementedError, match=r"script cannot compile an optimized Other; use .*revert it"):
        torch.jit.script(nn.Sequential(optimize(other())))


# --- what is said ----------------------------------------------------------------------------------------------------


class Conv2d(nn.Conv2d):
    """As LoRA has it."""


class Two(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.model(x) + self.model(y)


@pytest.mark.parametrize("kind", MODELS)
def test_report_of_what_zeros_do_not_fit(kind: str) -> None:
    model = optimize(Two(MODELS[kind]()))
    with pytest.raises(ValueError, match=r"^Two does not take zeros of \(1, 3, 9, 9\): .*'y'; give another size, as"):
        report(model, (1, 3, 9, 9))
    with pytest.raises(ValueError, match=r"^Two does not take these arguments: .*'y'; give all arguments of a call"):
        report(model, torch.zeros(1, 3, 9, 9))


class Detector(nn.Module):
    """Goes on with what it has found."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small()

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        return y[y > 0].nonzero()


def test_report_of_a_model_that_looks_at_values() -> None:
    with pytest.raises(ValueError, match=r"^Detector cannot be traced, .*\(aten.*\); report a module in it"):
        report(optimize(Detector().eval()))


def test_filters_in_another_memory_format_are_reported(device: torch.device) -> None:
    """`optimize` moves them again."""
    changes: list[Callable[[Any], Any]] = [
        lambda m: m.load_state_dict({k: t.contiguous() for k, t in m.state_dict().items()}, assign=True),
        lambda m: m.to(memory_format=torch.contiguous_format),
        lambda m: m.to("meta").to_empty(device=device),  # which keeps the memory format
    ]
    model = optimize(small().to(device), kernels="triton")
    for change, copied in zip(changes, (5, 5, 0), strict=True):
        assert reported_copies(model) == 0
        change(model)
        assert reported_copies(model) == copied
        optimize(model, kernels="triton")


def reported_copies(model: nn.Module) -> int:
    return str(report(model, (1, 3, 32, 32))).count("each call copies its filters")


def test_what_keeps_a_gpu_off_the_kernels_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation, "_told", set())
    monkeypatch.setattr(Tensor, "is_cuda", True)
    model, x = optimize(small(), cuda_graph=False), image()
    with pytest.warns(RuntimeWarning, match="stem runs on PyTorch, .* because a gradient is wanted; .*inference_mode"):
        model(x)
    model(x)
    with torch.no_grad(), torch.autocast("cpu"):
        with pytest.warns(RuntimeWarning, match="stem runs on PyTorch, .* because autocast is on; call .* without it"):
            model(x)
        model(x)
    model = small()
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        prune.identity(conv, "weight")
    with pytest.warns(RuntimeWarning, match="6 of 6 convolutions run on PyTorch, most of them .*: a hook or a forward"):
        optimize(model)
    optimize(small().train())
