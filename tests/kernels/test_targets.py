"""What other GPUs than Hopper's run: the PTX of their kernels, executed on a CPU and judged (`simulator/`).

They are A100 (sm_80), RTX A6000 (sm_86), RTX 4090 (sm_89), B200 (sm_100) and RTX 5090 (sm_120).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from calls import ON_INTEGERS
from compiling import TRITON, ptx, seen_by_compilers
from exact import assert_exact, conv_call, conv_reference, generator, rounded
from layers import Layer, layers, small, steps, tiles_written
from simulator import CHECKS, simulate
from torch import Tensor

from resnet_triton import ops
from resnet_triton.config.targets import KNOWN
from resnet_triton.kernels.launch import Launch

CPU = torch.device("cpu")
NUMBERS = [("float16", "ieee"), ("bfloat16", "ieee"), ("float32", "tf32"), ("float32", "ieee")]
LAYERS = [
    layer for archs in ((80, 86, 89), (100,), (120,)) for layer in layers(archs, (1, 256))
    if (layer.shape.dtype, layer.shape.precision) != NUMBERS[-1] or layer.name in ("layer2.0.conv2", "layer4.1.conv2")
]  # fmt: skip
"""A tile of several GPUs before Hopper is tried on one. fp32 is of one image; IEEE, which takes long, of two layers."""
GROUPS = sorted({(x.arch, x.shape.n, x.shape.dtype, x.shape.precision) for x in LAYERS})


def faults(launch: Launch, text: str, tiles: list[int] | None = None, schedule: int | None = None) -> list[str]:
    """What is wrong with a launch, or these tiles of it.

    Triton writes no fence between the making of a barrier and the load that ends there, 3.6.0 none between copies and
    products either.
    """
    unfenced = {"init"} if "cp.async.bulk" in text else {"proxy"} if TRITON == (3, 6) else set()
    checks, places = set(CHECKS) - unfenced, None
    if tiles is not None:
        places = [(tile, split, 0) for tile in tiles for split in range(launch.grid[1])]
    early = launch.parameters
    return simulate(launch, text, checks=checks, programs=places, early=early, schedule=schedule).faults


def made(layer: Layer) -> tuple[Launch, Tensor, Tensor]:
    """The launch of a layer on small images, where it writes, and what."""
    shape = small(layer.shape, layer.chosen)
    call = replace(conv_call(generator(CPU, 0), shape), tile=layer.chosen)
    out = call.output().fill_(float("nan"))
    with mock.patch.object(ops.conv, "conv_precision", return_value=shape.precision):
        (launch,) = call.launches(out, KNOWN[layer.arch])
    assert layer.chosen.kernel in launch.kernel.__name__
    return seen_by_compilers(launch), out, rounded(conv_reference(call), out.dtype)


def execute(found: list[Layer], arch: int, schedule: int | None = None) -> None:
    """Have one or two tiles of each layer computed."""
    work = [made(layer) for layer in found]
    texts = ptx([launch for launch, *_ in work], arch)
    for layer, (launch, out, expected), text in zip(found, work, texts, strict=True):
        assert f".target sm_{arch}" in text
        count = min(launch.grid[0], max(48 // steps(layer.shape, layer.chosen), 1), 2)
        tiles = random.Random(str(layer)).sample(range(launch.grid[0]), count)
        assert faults(launch, text, tiles, schedule) == [], layer
        written = ~out.isnan()
        assert_exact(out[written], expected[written], layer)
        assert tiles_written(written, layer.chosen) == count


def is_soon_done(group: tuple[int, int, str, str]) -> bool:
    """fp16; of sm_100 also the other products of its tensor cores."""
    arch, n, *numbers = group
    return (n, numbers[0]) == (256, "float16") or (arch == 100 and (n == 256 or numbers[1] == "tf32"))


@pytest.mark.parametrize("group", [
    pytest.param(x, id=f"sm_{x[0]}-n{x[1]}-{x[2]}-{x[3]}", marks=() if is_soon_done(x) else pytest.mark.slow)
    for x in GROUPS
])  # fmt: skip
def test_layers(group: tuple[int, int, str, str]) -> None:
    execute([x for x in LAYERS if (x.arch, x.shape.n, x.shape.dtype, x.shape.precision) == group], group[0])


@pytest.mark.parametrize("arch", [80, 100, 120])
def test_padding_times_infinity_is_nan(arch: int) -> None:
    """No tap is skipped, nothing that is not finite gets beside its place, and ReLU keeps it."""
    layer = next(x for x in LAYERS if (x.arch, x.shape.n, x.name) == (arch, 1, "layer1.0.conv1"))
    call = replace(conv_call(generator(CPU, 0), small(layer.shape, layer.chosen)), tile=layer.chosen)
    call.x[0, 0, 0, 0], call.weight[1, 0, 0, -1], call.weight[2, -1, -1, 0] = math.inf, -math.inf, math.nan
    out = call.output().fill_(777)
    launches = [seen_by_compilers(launch) for launch in call.launches(out, KNOWN[arch])]
    (text,) = ptx(launches, arch)
    assert faults(launches[0], text) == []
    expected = conv_reference(call)
    torch.testing.assert_close(out, expected.to(out.dtype), rtol=0, atol=0, equal_nan=True)
    assert expected.isnan().any()
    assert expected.isinf().any()
    assert expected.isfinite().any()


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 100, 120])
def test_a_schedule_gives_the_same(arch: int) -> None:
    """Of copies, loads and products as late as waits allow."""
    names = ("layer1.0.conv1", "layer2.0.conv2", "layer4.1.conv2")
    found = [x for x in LAYERS if x.arch == arch and x.name in names and x.shape.dtype != "float32"]
    assert {x.chosen.split_k > 1 for x in found} == {False, True}
    for seed in range(2):
        execute(found, arch, seed)


def test_layers_cover_what_they_claim() -> None:
    found = {(x.arch, x.chosen.kernel, x.chosen.split_k > 1, (x.shape.dtype, x.shape.precision)) for x in LAYERS}
    both = {"conv_pointer", "conv_box"}
    for archs, kernels in (((80, 86, 89), {"conv_pointer"}), ((100,), both), ((120,), both)):
        of, splits, numbers = (set(x) for x in zip(*(row[1:] for row in found if row[0] in archs), strict=True))
        assert of == kernels
        assert splits == {False, True}
        assert numbers == set(NUMBERS)


@pytest.mark.parametrize("arch", [80, 86, 89, 100, 120])
def test_operators(arch: int) -> None:
    work = []
    for name, make in ON_INTEGERS.items():
        call = make()
        out = call.output().fill_(float("nan"))
        launches = [seen_by_compilers(launch) for launch in call.launches(out, KNOWN[arch])]
        work.append((name, launches, out, call.reference()))
    texts = iter(ptx([launch for _, launches, *_ in work for launch in launches], arch))
    for name, launches, out, expected in work:
        assert [fault for launch in launches for fault in faults(launch, next(texts))] == [], name
        assert_exact(out, expected, name)


def one_copy_fewer(text: str) -> str:
    return re.sub(r"(cp\.async\.wait_group\s+)(\d+)", lambda match: f"{match[1]}{int(match[2]) + 1}", text)


def no_wait(before: str) -> Callable[[str], str]:
    """Without the last wait at an mbarrier before the first of some instructions."""

    def edit(text: str) -> str:
        end = text.index(before)
        wait = list(re.finditer(r"\{\s*\.reg \.pred[^}]*try_wait[^}]*\}", text[:end]))[-1]
        return text[: wait.start()] + text[wait.end() :]

    return edit


PLANTED: dict[str, tuple[int, str, Callable[[str], str]]] = {
    "a copy that is not waited for": (80, "race", one_copy_fewer),
    "no barrier between copies and products": (80, "race", lambda text: text.replace("bar.sync", "//")),
    "sums read before they are summed": (100, "release", no_wait("tcgen05.ld")),
    "products of what has not arrived": (100, "arrival", no_wait("tcgen05.mma")),
    "sums that nobody is told of": (100, "deadlock", lambda text: re.sub(r".*tcgen05\.commit.*", "", text)),
    "stores that are not waited for": (100, "race", lambda text: re.sub(r".*tcgen05\.wait::st.*", "", text)),
    "tensor memory freed too early": (
        100,
        "race",
        lambda text: re.sub(
            r"(.*tcgen05\.wait::ld[^\n]*)(.*?)([^\n]*tcgen05\.dealloc[^\n]*)", r"\1\n\3\n\2", text, count=1, flags=re.S
        ),
    ),
    "tensor memory that is kept": (100, "deadlock", lambda text: re.sub(r".*tcgen05\.dealloc.*", "", text)),
    "too few columns": (100, "bounds", lambda text: re.sub(r"(tcgen05\.(?:de)?alloc.*), \d+;", r"\1, 32;", text)),
    "pixels that have not arrived": (120, "arrival", no_wait("mma.sync")),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found(name: str) -> None:
    arch, check, edit = PLANTED[name]
    layer = next(x for x in LAYERS if (x.arch, x.shape.n, x.name) == (arch, 256, "layer2.0.conv1"))
    launch, *_ = made(layer)
    (text,) = ptx([launch], arch)
    assert faults(launch, text, [0]) == []
    assert check in {fault.partition(":")[0] for fault in faults(launch, edit(text), [0])}
