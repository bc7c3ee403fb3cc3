"""`optimize` of models of other people's: compiled in place, edited, reported, their filters moved."""

from __future__ import annotations

import abc
import copy
import functools
import gc
import io
import pickle
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    CBR,
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
from torch.nn.modules.module import register_module_forward_hook

from resnet_triton import compiled_report, disabled, filters, optimize, programs, refresh, report, revert
from resnet_triton.backend import resnet_triton
from resnet_triton.ops import dispatch, original

pytestmark = pytest.mark.usefixtures("fresh_compiler")


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
        self.head = head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.inner(x)) * self.gain)


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
    assert original.origin(other) is Outer
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
        first = report(model, (2, 8, 8, 8)).calls[0]
        assert first.operator == ("aten.convolution" if training else CBR)
        assert torch.equal(copy.deepcopy(model)(images()), expected)
    assert vars(revert(model)).keys() == vars(Called()).keys()


T = TypeVar("T")


class Mixin:
    __slots__ = ()

    def __init_subclass__(cls, tag: str = "") -> None:
        assert tag, "a subclass that nobody wrote"


class Describes(Protocol):
    def describe(self) -> str: ...


class AbstractFirst(abc.ABC, Outer):
    def train(self, mode: bool = True) -> Any:
        assert self.gain, "its own is called, too"
        return super().train(mode)


class GenericFirst(Generic[T], Outer):
    pass


class ProtocolFirst(Describes, Outer):
    pass


class MixinFirst(Mixin, Outer, tag="written"):
    pass


@pytest.mark.parametrize("cls", [AbstractFirst, GenericFirst, ProtocolFirst, MixinFirst])
@torch.no_grad()
def test_a_class_whose_first_base_has_no_dict(cls):
    model, x = integral(cls()), images()
    expected = model(x)
    optimize(model)
    for m in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(m, cls)
        assert torch.equal(m(x), expected)
        assert used(m.train().eval(), x) == {("conv_bn_relu", "torch"): 1, ("avg_pool_linear", "torch"): 1}
        assert ours(report(m, x.shape).calls) == [CBR, "avg_pool_linear"]
        m.register_parameter("unused", nn.Parameter(torch.ones(1)))
        nn.utils.parametrize.register_parametrization(m, "unused", nn.Identity())  # which makes a subclass of its own
        assert used(m, x) == {("conv_bn_relu", "torch"): 1, ("avg_pool_linear", "torch"): 1}
        nn.utils.parametrize.remove_parametrizations(m, "unused")
        assert type(revert(m)) is cls
        assert torch.equal(m(x), expected)


class Final(type):
    def __new__(cls, name: str, bases: tuple[type, ...], members: dict[str, Any]) -> Any:
        if any(isinstance(base, Final) for base in bases):
            raise TypeError("it is final")
        return super().__new__(cls, name, bases, members)


class Sealed(Outer, metaclass=Final):
    pass


def test_a_class_without_subclasses_is_refused():
    model = Sealed()
    names = set(vars(model))
    with pytest.raises(TypeError, match=r"^Sealed has no subclasses \(it is final\), expected a class"):
        optimize(model)
    assert type(model) is Sealed
    assert set(vars(model)) == names


@torch.no_grad()
def test_sizes_of_one_model_are_no_news_of_another(monkeypatch):
    """Each is compiled for the sizes of its first call, which are numbers, and then for any."""
    found = []
    monkeypatch.setattr("resnet_triton.backend.compile.compile_calls", lambda calls, jobs: found.append(len(calls)))
    for n in (2, 3):
        model = optimize(conv().eval())
        model(images(n))
        model(images(n + 4))
    assert found == [1, 0, 1, 0]


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
def test_a_model_around_modules_of_torchscript():
    """They run as they are, so edits and hooks of theirs show; what they count is undone after a report."""
    inner = integral(lambdas(lambda m, x: m.a(x) + m.v.add_(1).sum(), a=conv()))
    model, plain = (integral(lambdas(lambda m, x: m.b(m.a(x)), b=conv())) for _ in range(2))
    for m in model, plain:
        m.a = torch.jit.trace(copy.deepcopy(inner), images(), check_trace=False)
    copied, x = optimize(model, inplace=False), images()
    for made in optimize(model), torch.compile(model, backend="resnet_triton"):
        report(made, (2, 8, 8, 8))
    expected = plain(x)
    for made in model, copied:
        assert torch.equal(made(x), expected)
    edits: list[Callable[[Any], Any]] = [
        lambda m: m.a.a.weight.mul_(2),
        lambda m: setattr(m.a.a, "weight", nn.Parameter(m.a.a.weight + 1)),
        lambda m: m.a.register_forward_hook(_plus_one),
    ]
    for edit in edits:
        edit(model)
        edit(plain)
        assert torch.equal(model(x), plain(x))


@torch.no_grad()
def test_a_model_whose_first_call_makes_its_parameters():
    model = revert(optimize(nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.AdaptiveAvgPool2d(1)).eval()))
    y = optimize(model)(images())
    with disabled(model):
        torch.testing.assert_close(y, model(images()))
    assert used(model, images()) == {(CBR, "torch"): 1, ("global_avg_pool", "torch"): 1}


def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(ValueError, match="compiled by TorchScript; optimize the module"):
        optimize(torch.jit.trace(conv(), images()))
    with pytest.raises(ValueError, match="ModuleList is never called itself; optimize the modules in it"):
        optimize(nn.ModuleList([conv()]))


@torch.no_grad()
def test_what_must_run_on_kernels_does_not_pass_torchs_limit_of_compilations():
    invariant = torch.compile(conv(), backend="resnet_triton", options={"batch_invariant": True})
    for model in (invariant, optimize(integral(sequence(conv())), kernels="triton")):
        with torch._dynamo.config.patch(recompile_limit=2):
            if model is not invariant:
                for _ in range(3):  # which compiles nothing
                    with pytest.raises(RuntimeError, match="Given groups=1"):
                        model(images(c=7))
            model(images())
            for _ in range(2):
                with pytest.raises(Exception, match=r"at most 2 times .* the last time is refused; raise"):
                    model.half()(images().half())


@torch.no_grad()
def test_models_of_one_class_do_not_meet_torchs_limit_of_compilations():
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(3):
            assert used(optimize(integral(sequence(conv()))), images())


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


# --- edits -----------------------------------------------------------------------------------------------------------


def _patched(cls: type, name: str, code: Callable[..., Any]) -> Callable[[], None]:
    written = vars(cls)[name]
    setattr(cls, name, code)
    return lambda: setattr(cls, name, written)


def _registered_again(module: nn.Module) -> Callable[[], None]:
    """The hook that is there, registered so that it is told keywords, too."""
    (hook,) = module._forward_hooks.values()
    module._forward_hooks.clear()
    return module.register_forward_hook(hook, with_kwargs=True).remove


def _hooked_elsewhere(model: Any) -> Callable[[], None]:
    """The dicts of hooks are replaced by other empty ones, and then comes a call."""
    for module in model.modules():
        module._forward_hooks = OrderedDict()
    model(images())
    return model.inner.register_forward_hook(_plus_one).remove


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
    "a hook in another dict": lambda m: _hooked_elsewhere(m),
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
def test_who_changes_a_model_at_each_call_is_not_compiled_each_time():
    model, x = optimize(integral(Outer())), images()

    def call_with_a_hook() -> None:
        handle = model.inner.register_forward_hook(_plus_one)
        with disabled(model):
            expected = model(x)
        assert torch.equal(model(x), expected)
        handle.remove()

    for _ in range(programs._LIMIT):
        call_with_a_hook()
    with pytest.warns(RuntimeWarning, match="runs as it was written from now on"):
        call_with_a_hook()
    for _ in range(3):
        call_with_a_hook()
    assert not used(model, x)
    assert "new calls run as written, for its hooks, methods or modules were changed 16" in str(report(model, x.shape))
    optimize(model, kernels="triton")
    with pytest.raises(NotImplementedError, match=r"changed 16 times; resnet_triton\.refresh lets it"):
        call_with_a_hook()
    assert used(refresh(model), x)


def even(model: Any, x: Tensor) -> Tensor:
    if x.shape[-1] % 2:
        raise ValueError("an odd size")
    return model.a(x)


@torch.no_grad()
def test_a_call_that_raises_does_not_end_compilation():
    model, x = optimize(integral(lambdas(even, a=conv()))), images()
    for bad, error, words in [
        (x[..., 1:], ValueError, "^an odd size$"),
        (x[:, 1:], RuntimeError, "^Given groups=1, weight of size .*, but got 7 channels instead$"),
    ]:
        with pytest.raises(error, match=words):
            model(bad)
        assert used(model, x) == {("conv_bn_relu", "torch"): 1}


@torch.no_grad()
@pytest.mark.parametrize("breaks", [False, True])
def test_a_call_that_raises_does_nothing_twice(breaks):
    def counted(model: Any, x: Tensor) -> Tensor:
        model.count += 1
        if breaks:
            torch._dynamo.graph_break()
        return model.a(x)

    model = integral(lambdas(counted, a=conv()))
    model.count = 0
    with pytest.raises(RuntimeError, match=r"Given groups=1, weight of size .*, but got 7 channels instead"):
        optimize(model)(images(c=7))
    assert model.count == 1


@torch.no_grad()
def test_who_raises_at_each_call_is_not_compiled_each_time():
    model, x = optimize(integral(lambdas(even, a=conv()))), images()
    model(x)
    for _ in range(programs._LIMIT - 1):
        with pytest.raises(ValueError, match="odd"):
            model(x[..., 1:])
    with pytest.warns(RuntimeWarning, match="16 calls of Lambdas in a row"), pytest.raises(ValueError, match="odd"):
        model(x[..., 1:])
    for _ in range(2):  # which stays so
        assert used(model, x)
        assert not used(model, images(size=6))
        with pytest.raises(ValueError, match="odd"):
            model(x[..., 1:])
    assert "runs as written, for 16 calls in a row have raised" in str(report(model, x.shape))
    assert used(refresh(model), images(size=6))


@torch.no_grad()
def test_who_requires_kernels_is_not_given_up_for_errors():
    model, x = optimize(integral(lambdas(even, a=conv())), kernels="triton"), images()
    for _ in range(programs._LIMIT):
        with pytest.raises(ValueError, match="odd"):
            model(x[..., 1:])
    assert "runs as written" not in str(report(model, x.shape))
    assert used(model, x)


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


def _hooked(models: list[Any]) -> None:
    models[0].register_forward_hook(_plus_one)
    models[0](images())


GOING: dict[str, Callable[[list[Any]], Any]] = {
    "refreshed": lambda models: refresh(models[0]),
    "moved": lambda models: models[0].double(),
    "compiled anew": _hooked,
    "gone": list.clear,
}


@torch.no_grad()
@pytest.mark.parametrize("way", GOING)
def test_an_optimized_model_gives_its_graphs_back(cuda, way):
    """Dynamo would keep what it has compiled."""
    models = [optimize(integral(Outer()), cuda_graph=True)]
    for _ in range(3):
        models[0](images())
    models[0].to(torch.float32)
    graph = weakref.ref(cuda.graphs.pop())
    gc.collect()
    assert graph() is not None
    GOING[way](models)
    gc.collect()
    assert graph() is None


@torch.no_grad()
def test_weights_of_an_optimized_model_go_with_it():
    """At once, and not when the garbage collector comes."""
    model = optimize(integral(sequence(conv(), nn.ReLU())))
    for _ in range(2):
        model(images())
    weight = weakref.ref(model[0].weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_a_class_that_was_optimized_goes_with_its_last_object():
    """fx makes a class for each of its modules. Models of one class get one."""
    first, second = (optimize(sequence(conv())) for _ in range(2))
    assert type(first) is type(second) is not nn.Sequential
    model = torch.fx.symbolic_trace(integral(sequence(conv(), nn.ReLU())))
    cls = weakref.ref(type(model))
    optimize(model)
    del model
    for _ in range(2):  # the class that was made of it goes first
        gc.collect()
    assert cls() is None


# --- reports ---------------------------------------------------------------------------------------------------------


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


def test_report_says_once_what_graphs_of_several_functions_have_done():
    model, said = optimize(integral(sequence(conv()))), "graphs: none; calls without: none counted"
    for mode, how_many in ((torch.no_grad, ""), (torch.inference_mode, " (2 functions)")):
        with mode():
            model(images())
        assert report(model, (2, 8, 8, 8)).graphs == {"": f"cuda_graph='auto'; {said}{how_many}"}


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


@pytest.mark.skipif(not compiled_report._ISOLATES, reason="this torch counts all that it compiles of a method together")
@torch.no_grad()
def test_reports_do_not_use_up_what_torch_compiles():
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            assert ours(report(integral(Broken()), (2, 8, 8, 8)).calls) == [CBR]
        assert used(optimize(integral(Broken())), images())


@torch.no_grad()
def test_report_names_each_convolution():
    layers = nn.ConvTranspose2d(8, 8, 1), norm(), conv(groups=4), conv(groups=8)
    model = integral(nn.Sequential(stem(), Residual(downsample()), *layers, head()))
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
    assert "conv_depthwise" in found
    assert "conv_pointer" in found


# --- filters ---------------------------------------------------------------------------------------------------------


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
@pytest.mark.filterwarnings("ignore:each call copies 1 filters")
def test_nothing_is_compiled_nor_moved_while_somebody_captures(monkeypatch):
    """It would be done when the graph is replayed, if ever, and memory be free by then."""
    model, x = integral(sequence(conv(), norm())), images()
    expected, memory = model(x), [p.data_ptr() for p in model.parameters()]
    optimize(model)
    for where in (programs, filters):
        monkeypatch.setattr(where, "capturing", lambda t: True)
    with pytest.warns(RuntimeWarning, match="Sequential is captured as it was written, for it has not been called"):
        assert torch.equal(model(x), expected)
    optimize(model, kernels="triton")
    with pytest.raises(NotImplementedError, match="cannot run this call: Sequential has not been called like this"):
        model(x)
    assert programs.made(model) == []
    monkeypatch.setattr(programs, "capturing", lambda t: False)
    model(x)
    model.train().eval()
    assert [p.data_ptr() for p in model.parameters()] == memory
    monkeypatch.undo()
    model.eval()(x)
    memory = [p.data_ptr() for p in model.parameters()]
    for where in (programs, filters):
        monkeypatch.setattr(where, "capturing", lambda t: True)
    assert torch.equal(model(x), expected)  # compiled before
    model.train()
    assert [p.data_ptr() for p in model.parameters()] == memory
    monkeypatch.undo()
    model.train()
    assert model[0].weight.is_contiguous()


@torch.no_grad()
def test_moved_filters_that_come_to_share_their_memory_stay():
    """With another process, or with another filter."""
    model, x = integral(sequence(conv(), conv(), conv())), images()
    expected = model(x)
    optimize(model, kernels="triton")(x)
    model[0].share_memory()
    model[2].weight.data = model[1].weight.data
    memory = [m.weight.data_ptr() for m in model]
    assert [m.weight.data_ptr() for m in model.train()] == memory
    assert model[0].weight.is_shared()
    assert not torch.equal(model(x), expected), "its filters are others"
    assert [m.weight.data_ptr() for m in revert(model)] == memory


@pytest.mark.filterwarnings(f"ignore:{COPIES}")
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["the view first", "the view last"])
@torch.no_grad()
def test_models_that_share_a_filter(order):
    """One of them views what the convolution returns, so the filter has to stay for it, whoever moves it."""
    shared, x = conv(), images()
    models = [lambdas(lambda m, x: m.a(x).view(len(x), -1), a=shared), lambdas(lambda m, x: m.a(x).relu(), a=shared)]
    expected = [integral(model)(x) for model in models]
    for model in models:
        optimize(model, kernels="triton")
    for mode in (torch.no_grad, torch.inference_mode):
        for i in order * 2:
            with mode():
                y = models[i](x)
                assert torch.equal(y, expected[i])
                assert strides(y) == strides(expected[i])
                assert used(models[i], x) == {(CBR, "triton"): 1}
    with pytest.raises(RuntimeError, match="expected input"):
        models[0](x[:, :1])
    revert(models[1])
    assert shared.weight.is_contiguous()
    assert torch.equal(models[0](x), expected[0])


@torch.no_grad()
def test_an_input_that_is_part_of_a_moved_filter_and_written():
    model = optimize(integral(lambdas(lambda m, x: m.a(x.mul_(2)).amax((2, 3)), a=conv())), kernels="triton")
    model(images())
    with pytest.raises(RuntimeError, match="writes is a part of its filters, expected a copy"):
        model(model.a.weight.data[2:5])


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
