"""`batch_invariant=True`: what comes out for an image is the same, bit for bit, alone and in any batch."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from compiling import run
from exact import offset_by_one, pretending
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from resnet_triton import config, models, ops, optimize, report, resnet18, resnet50
from resnet_triton import functional as F
from resnet_triton.config.targets import KNOWN
from resnet_triton.ops import interpreter
from resnet_triton.ops.dispatch import Modes
from resnet_triton.ops.trace import trace

BATCHES = (1, 2, 31, 32, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Operation = Callable[..., Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conv(c: int, k: int, size: int = 3, **options: Any) -> Operation:
    weight = normal(k, c, size, size) / (c * size * size) ** 0.5
    norm = [normal(k), normal(k).abs() + 0.5, normal(k), normal(k)]
    residual = options.pop("residual", False)

    def call(x: Tensor, **modes: Any) -> Tensor:
        added = {"residual": x} if residual else {}
        return F.conv_bn_relu(
            x, weight.to(x), *(t.to(x.device) for t in norm), padding=size // 2, **options, **added, **modes
        )

    return call


def stem(x: Tensor, **modes: Any) -> Tensor:
    norm = [t.to(x.device) for t in (normal(64), normal(64).abs() + 0.5)]
    return F.stem(x, (normal(64, 3, 7, 7) / 12).to(x), *norm, **modes)


def linear(x: Tensor, **modes: Any) -> Tensor:
    return F.linear(x[:, :, 0, 0], normal(40, x.shape[1]).to(x), normal(40).to(x), **modes)


def head(x: Tensor, **modes: Any) -> Tensor:
    return F.avg_pool_linear(x, normal(40, x.shape[1]).to(x), normal(40).to(x), **modes)


OPERATIONS: dict[str, tuple[Operation, tuple[int, int, int]]] = {
    "3x3 with a residual": (conv(64, 64, residual=True), (64, 9, 11)),
    "3x3 at stride 2": (conv(64, 96, stride=2), (64, 8, 10)),
    "1x1": (conv(72, 48, size=1), (72, 5, 7)),
    "groups": (conv(4, 56, groups=14), (56, 7, 9)),
    "split": (conv(256, 32), (256, 3, 3)),
    "odd channels": (conv(21, 19), (21, 6, 7)),
    "stem": (stem, (3, 15, 18)),
    "global_avg_pool": (F.global_avg_pool, (70, 7, 9)),
    "linear": (linear, (100, 1, 1)),
    "avg_pool_linear": (head, (72, 7, 7)),
}


def alone(operation: Operation, batch: Tensor, **modes: Any) -> Tensor:
    return torch.cat([operation(batch[i : i + 1].clone(), **modes) for i in range(len(batch))])


@pytest.fixture(autouse=True)
def products_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """On some CPUs NumPy's BLAS sums a row by where it stands in its tile, which is no fault of a kernel."""
    monkeypatch.setattr(np, "matmul", lambda a, b: np.einsum("mk,kn->mn", a, b))


@pytest.fixture
def ways(device: torch.device) -> list[str]:
    return ["torch", "triton"] if device.type == "cuda" or interpreter.active() else ["torch"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_image_is_computed_alike_in_any_batch(
    device: torch.device, ways: list[str], name: str, dtype: torch.dtype
) -> None:
    operation, size = OPERATIONS[name]
    batch = normal(3, *size).to(device, dtype)
    batch[1, 0, 0, 0] = float("nan")  # which is nobody else's concern
    for kernels in ways:
        modes: dict[str, Any] = {"batch_invariant": True, "kernels": kernels}
        expected = alone(operation, batch, **modes)
        assert expected[[0, 2]].isfinite().all()
        layouts = [offset_by_one(batch)]
        if kernels == "torch":
            layouts += [batch, batch.contiguous(memory_format=torch.channels_last)]
        for rest in layouts:
            assert _same(operation(rest, **modes), expected), kernels
        order = torch.tensor([2, 0], device=device)
        assert _same(operation(batch[order], **modes), expected[order]), kernels


def _same(actual: Tensor, expected: Tensor) -> bool:
    return torch.equal(actual.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))


@pytest.mark.skipif(not interpreter.active(), reason="what differs on a GPU depends on its tables")
def test_without_the_mode_the_batch_shows() -> None:
    """The comparison above notices another order of sums."""
    operation, size = OPERATIONS["avg_pool_linear"]
    batch = normal(20, *size)
    assert not torch.equal(operation(batch, kernels="triton"), alone(operation, batch, kernels="triton"))


@pytest.mark.parametrize(("name", "n"), [("split", 7), ("split", 40)])
def test_shared_tiles_are_among_them(name: str, n: int) -> None:
    c, h, w = OPERATIONS[name][1]
    shape = config.ConvShape(n, c, h, w, 32, 3, 3, (1, 1), (1, 1), dtype="float16")
    assert config.invariant(shape, KNOWN[90]).split_k > 1


def test_pytorch_takes_one_image_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda x, *rest: (seen.append(len(x)), real(x, *rest))[1])
    y = conv(4, 8, residual=False)(normal(3, 4, 5, 5), batch_invariant=True, kernels="torch")
    assert seen == [1, 1, 1]
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (1, 4, 5, 5)])
def test_batches_of_none_and_one(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    y = conv(4, 8)(x, batch_invariant=True)
    assert y.shape == (shape[0], 8, 5, 5)
    torch.testing.assert_close(y, conv(4, 8)(x))


def test_linear_of_a_vector() -> None:
    x, weight = normal(6), normal(3, 6)
    torch.testing.assert_close(F.linear(x, weight, batch_invariant=True), weight @ x)


# --- configurations --------------------------------------------------------------------------------------------------


@functools.cache
def shapes() -> list[config.ConvShape]:
    found: dict[config.ConvShape, None] = {}
    for build in (resnet18, resnet50):
        with torch.device("meta"):
            model = build().eval()
        for dtype in (torch.float16, torch.float32):
            calls = trace(model, (1, 3, 224, 224), dtype)
            found |= dict.fromkeys(call.shape for call in calls if call.operator == "conv_bn_relu")
    return list(found)


@pytest.mark.parametrize("arch", KNOWN)
def test_one_tile_for_all_batches(arch: int) -> None:
    for shape in shapes():
        found = [config.invariant(replace(shape, n=n), KNOWN[arch]) for n in BATCHES]
        assert len({replace(c, box=None) for c in found}) == 1
        assert len({c.kernel for c in found}) == 1
        found.append(config.invariant(replace(shape, n=0), KNOWN[arch]))  # as `report` asks for it
        for n, chosen in zip((*BATCHES, 0), found, strict=True):
            assert config.is_legal(chosen, replace(shape, n=n), KNOWN[arch]), (n, chosen)


def test_the_tile_stands_better_in_its_worst_case_than_one_for_a_single_image() -> None:
    """A tile that suits one image is bad for many, and the other way round."""
    from resnet_triton.config.heuristic import best_box, conv_heuristic
    from resnet_triton.config.invariant import ns_with_partials

    facts = KNOWN[90]
    shape = config.ConvShape(1, 256, 14, 14, 256, 3, 3, (1, 1), (1, 1), residual=True)

    def worst(chosen: config.ConvConfig) -> float:
        ratios = []
        for n in (1, 4, 16, 64, 256):
            at = replace(shape, n=n)
            fitted = chosen if chosen.box is None else replace(chosen, box=best_box(at, chosen.block_m))
            ratios.append(ns_with_partials(fitted, at, facts) / ns_with_partials(conv_heuristic(at, facts), at, facts))
        return max(ratios)

    ours = worst(config.invariant(shape, facts))
    assert ours < worst(conv_heuristic(shape, facts))
    assert ours < worst(conv_heuristic(replace(shape, n=256), facts))


@pytest.mark.parametrize("arch", KNOWN)
def test_one_stem_for_all_batches(arch: int) -> None:
    chosen = config.invariant_stem(64, 56, 56, KNOWN[arch])
    assert (chosen is None) == (config.stem_heuristic(1, 64, 56, 56, KNOWN[arch]) is None)


FREE = {"N", "M", "BOX_H", "BOX_W", "BOX_N", "VIEW", "Y_VIEW", "SHORT_VIEW"} | {"items", "STRIP", "STRIPS"}
"""What a launch may change with the batch: how many images, and which pixels share a tile. The last three are
`hopper_stem`'s: which rows of an image follow one another in a group."""


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_one_launch_for_all_batches(monkeypatch: pytest.MonkeyPatch, arch: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(interpreter, "active", lambda: False)  # which has no Gluon
    with torch.device("meta"):
        model = optimize(resnet18().eval(), batch_invariant=True)
    plans = []
    for n in BATCHES:
        launches = [launch for call in trace(model, (n, 3, 224, 224), dtype) for launch in call.launches(KNOWN[arch])]
        in_gluon = {launch.kernel.__name__ for launch in launches if launch.is_gluon}
        assert in_gluon == ({"hopper_stem_kernel"} if (arch, dtype) == (90, torch.float16) else set())
        plans.append(
            [(launch.kernel.__name__, launch.num_warps, launch.num_stages, _fixed(launch)) for launch in launches]
        )
    assert all(plan == plans[0] for plan in plans)


def _fixed(launch: Any) -> dict[str, Any]:
    return {k: v for k, v in launch.arguments.items() if isinstance(v, (int, float, str)) and k not in FREE}


@pytest.mark.skipif(not interpreter.active(), reason="plans launches of CPU tensors")
@pytest.mark.parametrize("name", ["3x3 with a residual", "global_avg_pool", "linear", "avg_pool_linear"])
def test_every_load_is_from_an_aligned_address(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """For by an address Triton chooses layouts, and a convolution its kernel."""
    from resnet_triton.kernels.launch import Launch

    seen: list[Launch] = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: (seen.append(launch), run(launch))[1])
    operation, size = OPERATIONS[name]
    operation(offset_by_one(normal(2, *size)), batch_invariant=True, kernels="triton")
    assert seen
    for launch in seen:
        held = [getattr(a, "base", a) for a in launch.arguments.values()]
        assert all(t.data_ptr() % 16 == 0 for t in held if isinstance(t, Tensor))


ARITHMETIC = """
import json, re, sys, torch
from resnet_triton import resnet18
from resnet_triton.codegen.compiler import specialise, triton_compile
from resnet_triton.convert import optimize
from resnet_triton.config.targets import KNOWN
from resnet_triton.ops.trace import trace
with torch.device("meta"):
    model = optimize(resnet18().eval(), batch_invariant=True)
found, arch = {}, int(sys.argv[3])
dtype = torch.float16
if sys.argv[2] == "tf32":
    dtype, torch.backends.cudnn.conv.fp32_precision = torch.float32, "tf32"
for n in (1, 3, 256):
    for call in trace(model, (n, 3, 224, 224), dtype):
        if call.name in sys.argv[1].split(","):
            for i, launch in enumerate(call.launches(KNOWN[arch])):
                ptx = triton_compile(specialise(launch), arch).asm["ptx"]
                kinds = "tcgen05.mma|wgmma|mma|fma|mul|add|div|cvt"
                sums = re.findall(rf"^\\s*(?:@%p\\d+ )?((?:{kinds})\\S*[.:]t?f(?:32|16)\\S*)", ptx, re.M)
                found.setdefault(f"{call.name} {i}", []).append(sums)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
@pytest.mark.parametrize(
    ("precision", "names"),
    [("float16", "conv1,layer2.0.conv1,layer3.1.conv2,layer4.1.conv2,fc"), ("tf32", "layer2.0.conv1,layer3.1.conv2")],
)
def test_machine_code_adds_in_the_same_order_for_all_batches(precision: str, names: str, arch: int) -> None:
    found = json.loads(run(ARITHMETIC, names, precision, str(arch)))
    sums = {name.split()[0] for name, (one, *_) in found.items() if re.search("mma|fma|add|div", " ".join(one))}
    assert sums == set(names.split(",")), "launches that pack or pool add nothing"
    for name, (one, three, many) in found.items():
        assert one == three == many, name


# --- models ----------------------------------------------------------------------------------------------------------


def small(block: type = models.BasicBlock) -> Any:
    torch.manual_seed(0)
    model = models.ResNet(block, [1, 1, 1, 1], num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


@pytest.mark.parametrize("block", [models.BasicBlock, models.Bottleneck])
@torch.inference_mode()
def test_logits_of_a_model(block: type) -> None:
    model = optimize(small(block), batch_invariant=True)
    assert all(m.batch_invariant for m in model.modules() if isinstance(m, (models.ResNet, block)))
    images = normal(6, 3, 64, 48)
    logits = alone(model, images)
    assert torch.equal(model(images), logits)
    assert torch.equal(model(images.flip(0)), logits.flip(0))
    torch.testing.assert_close(logits, small(block)(images), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_bytes_compiled_and_frozen() -> None:
    images = torch.randint(256, (3, 3, 40, 40), generator=torch.Generator().manual_seed(0)).byte()
    model = optimize(small(), batch_invariant=True, freeze=True)
    model.normalize = [0.5] * 3, [0.25] * 3
    assert torch.equal(model(images), alone(model, images))
    compiled = torch.compile(optimize(small(), batch_invariant=True), fullgraph=True, backend="aot_eager")
    floats = normal(3, 3, 40, 40)
    assert torch.equal(compiled(floats), alone(compiled, floats))


@torch.inference_mode()
def test_graphs(cuda: Any) -> None:
    model = optimize(small(), batch_invariant=True, cuda_graph=True)
    images = normal(3, 3, 40, 40)
    first, again = model(images), model(images)
    assert torch.equal(first, again)
    assert torch.equal(again, alone(model, images))
    model.batch_invariant = False  # is another model to the graph
    assert not model._triton_runner.holds()


@pytest.mark.parametrize("name", [name for name, operator in ops.OPERATORS.items() if operator.per_image])
def test_no_batch_is_so_large_that_pytorch_takes_it_over(name: str) -> None:
    with FakeTensorMode(), pretending(KNOWN[90]):
        one = torch.empty(1, 1, 1, 1, device="cuda")
        few, many = (one.expand(n, 1, 1, 1) for n in (5, 2**32))
        vector, rows, weight = (torch.empty(*size, device="cuda") for size in ((1,), (5, 1), (1, 1)))
        norm = ops.BatchNorm(vector, vector, None, None, 0.0)
        call: Any = {
            "conv_bn_relu": ops.ConvBnRelu(few, one, norm, ops.Geometry()),
            "stem": ops.Stem(few, torch.empty(1, 1, 7, 7, device="cuda"), norm),
            "global_avg_pool": ops.GlobalAvgPool(few),
            "linear": ops.Linear(rows, weight),
            "avg_pool_linear": ops.AvgPoolLinear(few, weight),
        }[name]
        large = replace(call, x=torch.empty(2**32, 1, device="cuda") if name == "linear" else many)
        assert [each.choose()[1].backend for each in (call, large)] == ["triton", "torch"]
        call, large = (replace(each, modes=Modes(batch_invariant=True)) for each in (call, large))
        assert call.choose()[1].backend == "triton"
        with pytest.raises(NotImplementedError, match="batch_invariant=True cannot run so large a batch"):
            large.choose()


def edit(name: str) -> Callable[[Any], Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None: ...

    return {
        "training": lambda m: m.train(),
        "a hook": lambda m: m.layer1[0].bn1.register_forward_hook(hook),
        "a hook on a block": lambda m: m.layer1[0].register_forward_hook(hook),
        "a hook on a stage": lambda m: m.layer2.register_forward_hook(hook),
        "a patched block": lambda m: setattr(m.layer1[0], "forward", lambda x: x),
        "another block": lambda m: m.layer1.__setitem__(0, nn.Sequential(nn.Conv2d(64, 64, 3, padding=1))),
        "a fresh block": lambda m: m.layer1.__setitem__(0, models.BasicBlock(64, 64).eval()),
        "another layer": lambda m: setattr(m.layer2[0], "bn2", nn.GroupNorm(4, 128)),
        "another shortcut": lambda m: setattr(m.layer2[0], "downsample", nn.Conv2d(64, 128, 1, 2)),
        "another activation": lambda m: setattr(m.layer1[0], "relu", nn.SiLU()),
        "another pool": lambda m: setattr(m, "maxpool", nn.AvgPool2d(2)),
        "another average": lambda m: setattr(m, "avgpool", nn.AdaptiveMaxPool2d(1)),
        "another classifier": lambda m: setattr(m, "fc", nn.Sequential(nn.Linear(512, 3))),
    }[name]


EDITS = (
    "training", "a hook", "a hook on a block", "a hook on a stage", "a patched block", "another block", "a fresh block",
    "another layer", "another shortcut", "another activation", "another pool", "another average", "another classifier",
)  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
@torch.no_grad()
def test_what_cannot_be_promised_is_refused(name: str) -> None:
    model = optimize(small(), batch_invariant=True)
    edit(name)(model)
    with pytest.raises(NotImplementedError, match="batch_invariant=True"):
        model(normal(2, 3, 40, 40))
    optimize(model, inplace=True)
    assert model(normal(2, 3, 40, 40)).shape[0] == 2


@torch.no_grad()
def test_a_model_without_a_classifier() -> None:
    model = optimize(small(), batch_invariant=True)
    model.fc = nn.Identity()
    images = normal(3, 3, 40, 40)
    assert torch.equal(model(images), alone(model, images))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_with_gradients_and_under_autocast() -> None:
    model, images = optimize(small(), batch_invariant=True), normal(3, 3, 40, 40)
    y = model(images)
    y.sum().backward()
    assert model.conv1.weight.grad is not None
    assert torch.equal(y, alone(model, images))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(images), alone(model, images))
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(Exception, match="cannot be compiled with gradients or autocast"):
        compiled(images)


def test_only_a_whole_resnet() -> None:
    with pytest.raises(ValueError, match=r"batch_invariant=True is for; leave it out, or torch.compile\(model, .*opt"):
        optimize(nn.Sequential(models.BasicBlock(8, 8)), batch_invariant=True)


def test_the_report_names_the_tile_of_all_batches(device: torch.device) -> None:
    model = optimize(resnet18().to(device).eval(), kernels="triton", batch_invariant=True)
    tiles = [[call_tile(row) for row in str(report(model, (n, 3, 224, 224))).splitlines()] for n in (1, 64)]
    assert any(tiles[0])
    assert tiles[0] == tiles[1]


def call_tile(row: str) -> str:
    return "".join(re.findall(r"tile \d+x\d+|shared by \d+", row))
