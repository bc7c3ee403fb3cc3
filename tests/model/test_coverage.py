"""report and precompile on torchvision's models and on models that contain one."""

from __future__ import annotations

import copy
import re
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from compiling import run
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torchvision_models import image, randomised, reasons, small, torchvision, tv

from resnet_triton import disabled, optimize, precompile, report
from resnet_triton.config.targets import KNOWN
from resnet_triton.ops import dispatch
from resnet_triton.ops.trace import trace


class Layers(tv.ResNet):
    """A subclass of which only the first layers are called, as encoders are."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))


# --- what runs where -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_every_call_of_a_resnet18_runs_on_a_kernel(device):
    """18 calls: the stem, 16 convolutions (3 shortcuts inside their blocks' last one), the head."""
    original = randomised(torchvision.models.resnet18(num_classes=10)).to(device)
    fast = optimize(original, kernels="triton", inplace=False)
    x = image()[:1, :, :32, :32].to(device)
    planned = Counter((c.operator, c.backend) for c in report(fast, tuple(x.shape)).calls)
    before = Counter(dispatch.calls)
    y = fast(x)
    assert dispatch.calls - before == planned
    assert planned == {
        ("stem", "triton"): 1,
        ("conv_bn_relu", "triton"): 16,
        ("avg_pool_linear", "triton"): 1,
    }
    torch.testing.assert_close(y, original(x), rtol=1e-3, atol=1e-3)  # TF32 on a GPU


ROWS = ["conv1", *(f"layer{i}.0.conv{j}" for i in range(1, 5) for j in (1, 2)), "fc"]


@pytest.mark.parametrize(
    ("kernels", "backend", "reason"),
    [("auto", "torch", "CPU tensors"), ("torch", "torch", 'kernels="torch" was asked for')],
    ids=["auto", "torch"],
)
def test_report(kernels, backend, reason):
    result = report(optimize(small(), kernels=kernels))
    assert [c.name for c in result.calls] == ROWS
    assert {(c.backend, c.reason) for c in result.calls} == {(backend, reason)}
    lines = str(result).splitlines()
    assert lines[0].split() == ["layer", "operator", "runs", "on", "why,", "or", "how"]
    assert len(lines) == 1 + len(ROWS) + 2
    for name, line in zip(ROWS, lines[1:], strict=False):
        assert line.split()[0] == name
        assert "PyTorch" in line
        assert line.endswith(reason)
    assert lines[-1].startswith("calls so far in this process: ")
    assert " on torch" not in lines[-1], "the column says PyTorch"
    of_images = report(optimize(small(), kernels=kernels), torch.zeros(1, 3, 224, 224)).calls
    assert [call.name for call in of_images] == ROWS
    assert reasons(small())["conv1"] == "not optimized: call optimize(model)"


def test_report_of_the_kernels(device):
    """On the kernels a row says how: which kernel, which tile."""
    result = report(optimize(small().to(device), kernels="triton"))
    assert {c.backend for c in result.calls} == {"triton"}
    rows = dict(zip(ROWS, str(result).splitlines()[1:], strict=False))
    assert {name for name, row in rows.items() if ", tile" in row} == set(ROWS) - {"conv1", "fc"}
    assert all(" Triton " in row for row in rows.values())


def test_report_of_a_watched_stem_and_head():
    """Where something watches a module, the separate operators run, so that what it watches happens."""
    model = optimize(small())
    model.maxpool.register_forward_hook(lambda *a: None)
    model.avgpool.register_forward_hook(lambda *a: None)
    operators = [c.operator for c in report(model, (2, 3, 64, 64)).calls]
    assert operators[:2] == ["conv_bn_relu", "aten.max_pool2d_with_indices"]
    assert operators[-2:] == ["aten.mean", "linear"]
    model = optimize(small())
    model.bn1.register_forward_hook(lambda *a: None)
    model.fc.register_forward_hook(lambda *a: None)
    operators = [c.operator for c in report(model, (2, 3, 64, 64)).calls]
    assert operators[:3] == ["aten.convolution", "aten.native_batch_norm", "max_pool2d"]  # ReLU is in place
    assert operators[-2:] == ["global_avg_pool", "aten.addmm"]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_report_changes_nothing(training):
    model = optimize(small()).train(training)
    state = copy.deepcopy(model.state_dict())
    calls = dict(dispatch.calls)
    result = report(model, (2, 3, 64, 64))
    assert dict(dispatch.calls) == calls
    assert result.counted == calls
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_an_empty_batch_takes_no_launches():
    """A detector's head may get none: descriptors of no images are an error of Triton's."""
    for call in trace(optimize(torchvision.models.resnet18().eval()), (0, 3, 64, 64), torch.float16):
        assert call.launches(KNOWN[90]) == ()


def test_report_of_a_huge_batch_takes_no_memory():
    result = report(optimize(small()), (100_000, 3, 224, 224))
    assert result.calls[0].ours.x.shape == (100_000, 3, 224, 224)


@pytest.mark.parametrize("optimized", [False, True], ids=["as it is", "optimized"])
@pytest.mark.parametrize("in_place", [False, True], ids=["returned", "in place"])
@torch.no_grad()
def test_report_of_what_torch_compile_was_given(in_place, optimized):
    """All of it is compiled, torchvision's ResNet and what is around it."""
    model = nn.Sequential(Layers(tv.BasicBlock, [1, 1, 1, 1]), nn.Conv2d(64, 8, 1), nn.BatchNorm2d(8)).eval()
    if optimized:
        optimize(model)
    if in_place:
        model.compile(backend="resnet_triton")
    else:
        model = torch.compile(model, backend="resnet_triton")
    result = report(model, (1, 3, 32, 32))
    assert ([c.operator for c in result.calls], result.replaced) == (["stem"] + ["conv_bn_relu"] * 3, {})


@pytest.mark.parametrize("compiled", ["inductor", "aot_eager", "in place"])
def test_report_of_what_torch_compile_was_given_for_another_backend(compiled):
    model = small()
    if compiled == "in place":
        model.compile()
    else:
        model = torch.compile(model, backend=compiled)
    name = compiled.replace("in place", "inductor")
    calls = report(model, (1, 3, 32, 32)).calls
    assert {call.operation for call in calls} == {None}
    assert {call.reason for call in calls} == {f"compiled by the backend '{name}': ours is backend='resnet_triton'"}


@torch.no_grad()
def test_report_of_a_model_around_a_compiled_part():
    """What surrounds the part is not compiled, and is reported as it runs; so is the part where it runs as written."""
    layers = Layers(tv.BasicBlock, [1, 1, 1, 1])
    model = optimize(nn.Sequential(layers, nn.Conv2d(64, 8, 1), nn.BatchNorm2d(8)).eval())
    rows = [(c.name, c.operator) for c in report(model, (1, 3, 32, 32)).calls]
    assert [name.partition(".")[0] for name, _ in rows] == ["0", "0", "0", "1", "2"]
    assert [operator for _, operator in rows[:3]] == ["stem", "conv_bn_relu", "conv_bn_relu"]
    assert [operator for _, operator in rows[3:]] == ["aten.convolution", "aten.native_batch_norm"]
    with disabled(layers):
        assert {c.operator.partition(".")[0] for c in report(model, (1, 3, 32, 32)).calls} == {"aten"}


WRITTEN = {
    "training mode": lambda model: model.train() and nullcontext(),
    "disabled": disabled,
    "a hook on all modules": lambda model: register_module_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("reason", WRITTEN)
def test_report_of_a_compiled_model_that_runs_as_written(reason):
    """Gradients are no part of it: what inference would run is reported, and of a model around it what runs there."""
    part = optimize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval())
    around = nn.Sequential(part, nn.Conv2d(8, 8, 1)).eval()
    outer = torch.compile(part, backend="resnet_triton")
    with WRITTEN[reason](part):
        calls, more, others = (report(m, (2, 3, 8, 8)).calls for m in (part, around, outer))
    assert {(c.operator.partition(".")[0], c.reason) for c in calls} == {("aten", reason)}
    assert ["outside what optimize takes" in c.reason for c in more] == [False] * len(calls) + [True]
    assert [c.operator for c in others] == ["conv_bn_relu"], "which calls its `forward`"
    assert [c.operator for c in report(part.eval(), (2, 3, 8, 8)).calls] == ["conv_bn_relu"]


# --- precompile ------------------------------------------------------------------------------------------------------

PRECOMPILE = """
import sys, threading, torch, triton
from resnet_triton import models, precompile
from resnet_triton.config.targets import KNOWN
from resnet_triton.ops import dispatch, original
from resnet_triton.ops.in_graph import dependent_launches
from resnet_triton.ops.trace import compile_calls, trace
from resnet_triton.tuner.precompile import pretend

pretend(90)  # a GPU that kernels are compiled for; none runs
triton.knobs.cache.dir = sys.argv[1]
dispatch._fallback_reason = lambda where, forced: None
compiled, threads = [], set()

def listener(*, src, cache_hit, **more):
    compiled.append((src.name, cache_hit))
    threads.add(threading.get_ident())

triton.knobs.compilation.listener = listener
model = models.ResNet(models.BasicBlock, [1, 1, 1, 1], num_classes=10).eval().half()
model.to(memory_format=torch.channels_last)
precompile(model, (2, 3, 64, 64))
launches = [launch for call in trace(model, (2, 3, 64, 64)) for launch in call.launches(KNOWN[90])]
dependent_launches.set(True)  # as in a graph
launches += [launch for call in trace(model, (2, 3, 64, 64)) for launch in call.launches(KNOWN[90])]
count = len(compiled)  # layers of several sizes may be one compilation
assert 6 < count <= len(launches) == 20 and not any(hit for _, hit in compiled), compiled
assert threading.get_ident() not in threads
for launch in launches:
    assert "ptx" in launch.compile().asm
assert len(compiled) == count, "what a call asks for is what was compiled"

def broken(*arguments, **options):
    raise RuntimeError("no compiler")

calls = trace(model.bfloat16(), (2, 3, 64, 64))[1::8]
conv, head = (call.launches(KNOWN[90])[0] for call in calls)
conv.kernel.compile = broken
compile_calls(calls, 2)
assert len(compiled) == count + 1 and head.compile().asm
try:
    print(conv.compile().asm)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
def test_precompile(tmp_path):
    """Side by side, what a call asks for then; one that fails harms none, and fails as it would have."""
    assert run(PRECOMPILE, str(tmp_path)) == "no compiler\n"


def test_precompile_where_nothing_is_compiled():
    precompile(optimize(small()))
    with pytest.raises(TypeError, match="model is a str, expected a torch"):
        precompile("resnet18")
    precompile(optimize(small()), image())
    with pytest.raises(ValueError, match=r"linear.Linear contains no ResNet of .* to precompile; leave it out"):
        precompile(nn.Linear(2, 2))


COMPILED = "torch.compile has it; leave it out, for the first call compiles"
NOT_OURS = {
    "as it is": (lambda model: model, "not optimized: call optimize(model)"),
    "compiled": (lambda model: torch.compile(model, backend="resnet_triton"), COMPILED),
    "compiled in place": (lambda model: model.compile(backend="resnet_triton") or model, COMPILED),
    "a part": (lambda model: nn.Sequential(torch.compile(model, backend="resnet_triton")), COMPILED),
    "trained": (lambda model: optimize(nn.Sequential(model.layer1)).train(), "training mode"),
}


@pytest.mark.parametrize("what", NOT_OURS)
def test_precompile_of_what_does_not_run_on_our_operators(what):
    make, words = NOT_OURS[what]
    with pytest.raises(ValueError, match=f"has nothing to precompile: {re.escape(words)}"):
        precompile(make(small()), (1, 64 if what == "trained" else 3, 64, 64))


def test_precompile_of_what_is_disabled():
    model = optimize(small())
    with disabled(model), pytest.raises(ValueError, match=r"ResNet has nothing to precompile: disabled$"):
        precompile(model)
