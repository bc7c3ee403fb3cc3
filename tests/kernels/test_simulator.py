"""The kernels' compiled PTX, executed on a CPU and judged (`tests/simulator/`), and faults that it has to find."""

import functools
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from calls import ON_INTEGERS, data
from compiling import TRITON, oldest, ptx, seen_by_compilers
from exact import (
    KERNELS,
    channels_last,
    conv_call,
    conv_reference,
    depthwise_tiled,
    generator,
    plan,
    rounded,
    stem_call,
    stem_reference,
)
from simulator import CHECKS, Unknown, simulate
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from resnet_triton import ops
from resnet_triton.config import ConvConfig, ConvShape, is_legal
from resnet_triton.config.targets import KNOWN
from resnet_triton.kernels.avg_pool_linear import avg_pool_linear
from resnet_triton.kernels.conv_bn_relu import conv_bn_relu
from resnet_triton.kernels.hopper_stem import hopper_stem
from resnet_triton.kernels.launch import Launch
from resnet_triton.kernels.values import Convolution

FACTS = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait
from resnet_triton.kernels.hopper import async_load, async_store, group_barrier

@gluon.jit
def product(a_ptr, b_ptr, y_desc, SWIZZLE: gl.constexpr, A_TURNED: gl.constexpr, B_TURNED: gl.constexpr):
    memory: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=SWIZZLE, element_bitwidth=16, rank=2)
    spread: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, spread)), 1)
    columns = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(0, spread)), 0)
    a = gl.allocate_shared_memory(y_desc.dtype, [64, 64], memory)
    b = gl.allocate_shared_memory(y_desc.dtype, [64, 64], memory)
    out = gl.allocate_shared_memory(y_desc.dtype, [64, 64], y_desc.layout)
    a.store(gl.load(a_ptr + rows * 64 + columns))
    b.store(gl.load(b_ptr + rows * 64 + columns))
    fence_async_shared()
    group_barrier()
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    if A_TURNED:
        a = a.permute((1, 0))
    if B_TURNED:
        b = b.permute((1, 0))
    acc = warpgroup_mma(a, b, gl.zeros((64, 64), gl.float32, mma), is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    out.store(acc.to(y_desc.dtype))
    fence_async_shared()
    group_barrier()
    async_store(y_desc, [0, 0], out)
    tma.store_wait(0)

@gluon.jit
def move(x_desc, y_desc, row, column):
    box = gl.allocate_shared_memory(x_desc.dtype, x_desc.block_shape, x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    fence_async_shared()
    group_barrier()
    mbarrier.expect(ready, x_desc.block_shape[0] * x_desc.block_shape[1] * 2)
    async_load(x_desc, [row, column], ready, box)
    mbarrier.wait(ready, 0)
    async_store(y_desc, [row + 2, column], box)
    tma.store_wait(0)
"""
CPU = torch.device("cpu")
PADDED = {"r": 3, "s": 3, "padding": (1, 1)}


@dataclass
class Case:
    """Launches one after the other, what they write, and what they should."""

    launches: list[Launch]
    out: torch.Tensor
    expected: torch.Tensor

    def __post_init__(self) -> None:
        """As a compiler sees the kernels, also where they are interpreted."""
        self.launches = [seen_by_compilers(launch) for launch in self.launches]


def conv(shape: ConvShape, config: ConvConfig, programs: int = 2, legal: bool = True) -> Case:
    assert is_legal(config, shape, KNOWN[90]) == legal
    call = conv_call(generator(CPU, 0), shape)
    out, partials, semaphores = call.output().fill_(float("nan")), None, None
    if config.split_k > 1:
        partials = torch.full((16 * config.split_k * config.block_m * config.block_k,), float("nan"))
        semaphores = torch.zeros(16, dtype=torch.int32)
    launch = conv_bn_relu(
        Convolution(
            out, call.x, call.weight, call.batch_norm, call.geometry, call.residual, call.shortcut, call.activation,
            shape.precision, config, programs, partials, semaphores,
        )
    )  # fmt: skip
    return Case([launch], out, rounded(conv_reference(call), out.dtype))


def specialised_stem(n: int, h: int, w: int, strip: int) -> Case:
    made = stem_call(generator(CPU, 0), n, 3, h, w, 64, torch.float16)
    out, inputs = made.output().fill_(float("nan")), {"x": made.x, "weight": made.weight, "batch_norm": made.batch_norm}
    launch = hopper_stem(out=out, **inputs, mean=None, std=None, strip=strip, programs=2)
    return Case([launch], out, stem_reference(made))


def call(made: ops.Operation) -> Case:
    out = made.output().fill_(float("nan"))
    return Case(list(plan(made, out)), out, made.reference())


def infinite_group() -> Case:
    """Beside it sums are not numbers at first."""
    made: Any = ON_INTEGERS["groups"]()
    made.weight[4:8] = made.batch_norm.bn_weight[4:8] = 1
    made.x[0, 5, 4, 4] = math.inf
    return call(made)


def depthwise(rows: int, block_c: int) -> Case:
    with depthwise_tiled(rows, block_c):
        return call(ON_INTEGERS["depthwise"]())


def dependent_head() -> Case:
    """Two slabs of channels: weights of one are asked for before the wait."""
    made = ops.AvgPoolLinear(channels_last(data(2, 64, 2, 2)), data(10, 64), data(10), KERNELS)
    out, inputs = made.output().fill_(float("nan")), {"x": made.x, "weight": made.weight, "bias": made.bias}
    tile = {"block_p": 4, "block_k": 8, "block_c": 32, "num_warps": 4}
    return Case([avg_pool_linear(out=out, **inputs, **tile, dependent=True)], out, made.reference())


def specialised(m: int, k: int, stages: int, box: tuple[int, int, int], **fields: Any) -> ConvConfig:
    return ConvConfig(m, k, 64, 4, stages, box, kernel="hopper_conv", **fields)


def of_64(images: int, stages: int) -> ConvConfig:
    return ConvConfig(2 * images, 64, 64, 4, stages, (2, 1, images), kernel="hopper_conv64")


SPLIT = ConvShape(2, 64, 4, 4, 64, **PADDED, residual=True)
SHORTCUT = {"shortcut_c": 64, "shortcut_h": 8, "shortcut_w": 16, "shortcut_stride": (2, 2)}
HALF = ConvConfig(64, 64, 64, 4, 3)
CASES = {
    "hopper_conv of images": lambda: conv(ConvShape(3, 64, 3, 2, 64, **PADDED), specialised(128, 64, 3, (1, 1, 128))),
    "hopper_conv of rows, residual": lambda: conv(
        ConvShape(1, 64, 12, 20, 72, **PADDED, residual=True), specialised(128, 64, 3, (8, 16, 1))
    ),
    "hopper_conv at stride 2, shortcut": lambda: conv(
        ConvShape(2, 64, 8, 16, 64, 3, 3, (2, 2), (1, 1), **SHORTCUT), specialised(128, 64, 3, (4, 8, 4))
    ),
    "hopper_conv split": lambda: conv(SPLIT, specialised(128, 64, 3, (4, 4, 8), split_k=3), 3),
    "hopper_conv, tf32": lambda: conv(
        ConvShape(1, 32, 8, 16, 128, 1, 1, dtype="float32", precision="tf32"),
        replace(specialised(128, 128, 3, (8, 16, 1)), block_c=32),
    ),
    "hopper_pingpong, residual": lambda: conv(
        ConvShape(3, 64, 6, 5, 128, **PADDED, residual=True),
        replace(specialised(128, 128, 3, (4, 8, 4)), kernel="hopper_pingpong"), programs=1,
    ),
    "hopper_conv64": lambda: conv(ConvShape(3, 64, 4, 4, 64, **PADDED), of_64(32, 5)),
    "hopper_conv64, residual": lambda: conv(ConvShape(33, 64, 3, 4, 64, **PADDED, residual=True), of_64(32, 5)),
    "hopper_stem": lambda: specialised_stem(2, 16, 28, 2),
    "conv_box": lambda: conv(
        ConvShape(1, 32, 10, 6, 40, **PADDED, residual=True), ConvConfig(16, 32, 16, 4, 2).on((4, 4, 1))
    ),
    "conv_box by wgmma": lambda: conv(ConvShape(1, 64, 8, 8, 64, **PADDED, residual=True), HALF.on((8, 8, 1))),
    "conv_box of images": lambda: conv(ConvShape(2, 64, 2, 2, 64, **PADDED), HALF.on((1, 1, 64))),
    "conv_box split, shortcut": lambda: conv(
        ConvShape(1, 64, 8, 8, 64, **PADDED, shortcut_c=64, shortcut_h=8, shortcut_w=8),
        replace(HALF, split_k=3).on((8, 8, 1)),
    ),
    "conv_box, tf32": lambda: conv(
        ConvShape(1, 32, 8, 8, 64, **PADDED, dtype="float32", precision="tf32"),
        ConvConfig(64, 64, 32, 4, 3).on((8, 8, 1)),
    ),
    "conv_pointer": lambda: conv(ConvShape(1, 32, 10, 6, 40, **PADDED, residual=True), ConvConfig(16, 32, 16, 4, 2)),
    "conv_pointer by wgmma": lambda: conv(ConvShape(1, 32, 10, 12, 64, **PADDED), ConvConfig(64, 64, 32, 4, 3)),
    "conv_pointer of groups": lambda: infinite_group(),
    "conv_depthwise": lambda: depthwise(4, 64),
    "avg_pool_linear, dependent": lambda: dependent_head(),
}  # fmt: skip
CASES |= {
    name: lambda make=make: call(make()) for name, make in ON_INTEGERS.items() if name not in ("groups", "depthwise")
}
RACE = "conv_box as it was"
"""Its pixels are rows of a product and come through registers."""


def raced() -> Case:
    config = ConvConfig(128, 64, 64, 4, 3, (8, 16, 1))
    return conv(ConvShape(1, 128, 8, 16, 64, **PADDED), config, legal=False)


def fact(name: str, arguments: dict[str, Any], constants: dict[str, Any], out: torch.Tensor, expected: Any) -> Case:
    """A launch of one of FACTS, whose kernels exist only where they are compiled."""
    parameters = [SimpleNamespace(name=key, is_constexpr=key in constants) for key in (*arguments, *constants)]
    kernel = SimpleNamespace(fn=SimpleNamespace(__module__="facts", __name__=name), params=parameters)
    return Case([Launch(kernel, (1,), {**arguments, **constants})], out, expected)


def described(tensor: torch.Tensor, width: int, rows: int) -> Any:
    """A descriptor of boxes as wide as their swizzle."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=16, rank=2)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, width // 2], layout)


def product(width: int, a_turned: bool, b_turned: bool) -> Case:
    (a, b), y = data(2, 64, 64), torch.empty(64, 64, dtype=torch.float16)
    arguments = {"a_ptr": a.clone(), "b_ptr": b.clone(), "y_desc": described(y, 128, 64)}
    constants = {"SWIZZLE": width, "A_TURNED": a_turned, "B_TURNED": b_turned}
    return fact("product", arguments, constants, y, (a.T if a_turned else a) @ (b.T if b_turned else b))


def move(width: int, row: int, column: int) -> Case:
    x, y = data(20, 40), torch.full((20, 40), 7, dtype=torch.float16)
    expected = y.clone()
    for r, c in itertools.product(range(row, row + 16), range(column, column + width // 2)):
        if 0 <= r + 2 < 20 and 0 <= c < 40:
            expected[r + 2, c] = x[r, c] if 0 <= r < 20 else 0
    descriptors = {"x_desc": described(x, width, 16), "y_desc": described(y, width, 16)}
    return fact("move", {**descriptors, "row": row, "column": column}, {}, y, expected)


PRODUCTS = {
    f"product of {width} bytes{', A turned' * a}{', B turned' * b}": functools.partial(product, width, a, b)
    for width, a, b in itertools.product((128, 64, 32), (False, True), (False, True))
}
WIDTHS = (128, 64, 32)


@cache
def compiled() -> dict[str, list[str]]:
    """The PTX of every case's launches, and of the facts'."""
    moves = {f"move {width}": functools.partial(move, width, 0, 0) for width in WIDTHS}
    made = {
        name: make().launches
        for name, make in {**CASES, RACE: raced, "planted in": planted_in, **PRODUCTS, **moves}.items()
    }
    with TemporaryDirectory() as folder:
        Path(folder, "facts.py").write_text(FACTS)
        texts = iter(ptx([launch for launches in made.values() for launch in launches], 90, folder))
    return {name: [next(texts) for _ in launches] for name, launches in made.items()}


def simulated(name: str, case: Case, **options: Any) -> list[str]:
    """What is found. Triton writes no fence behind the making of a barrier, but in the stem 3.7 has one by chance."""
    unfenced = name.startswith("conv_box") or (name == "stem" and TRITON == (3, 6))
    checks = set(CHECKS) - {"init"} if unfenced else CHECKS
    texts = zip(case.launches, compiled()[name], strict=True)
    return [
        fault
        for launch, text in texts
        for fault in simulate(launch, text, checks=checks, **{"early": launch.parameters, **options}).faults
    ]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name.startswith("hopper") else ()) for name in CASES]
)  # of those, `test_hopper_conv.py` and `test_hopper_stem.py` have other cases
def test_kernels_are_exact_and_nothing_is_found(name):
    case = CASES[name]()
    found = simulated(name, case)
    by_wgmma = name in ("conv_pointer by wgmma", "conv_pointer of groups")
    if by_wgmma and TRITON == (3, 6):  # its PTX has no fence between copies and products
        assert {fault.partition(":")[0] for fault in found} == {"proxy"}
    else:
        assert found == []
    assert torch.equal(case.out, case.expected)


SCHEDULED = ("hopper_conv of rows, residual", "hopper_pingpong, residual", "hopper_conv64", "conv_box by wgmma")


@pytest.mark.parametrize(("name", "seed"), [
    pytest.param(name, seed, marks=[] if name in SCHEDULED and seed == 0 else pytest.mark.slow)
    for name in CASES for seed in range(4)
])  # fmt: skip
def test_any_schedule_gives_the_same(name, seed):
    case = CASES[name]()
    assert simulated(name, case, schedule=seed) == []
    assert torch.equal(case.out, case.expected)


def test_the_race_of_registers_is_in_the_ptx():
    """Until 3.7.1 Triton writes it there. In 3.8.0 ptxas does, and only machine code shows it."""
    case = raced()
    found = simulated(RACE, case)
    assert torch.equal(case.out, case.expected), "a product done at once has nothing to lose"
    late = raced()
    simulated(RACE, late, schedule=0)
    assert torch.equal(late.out, late.expected) == (found == []) == (TRITON >= (3, 8))
    for fault in found:
        assert re.match("registers: .* ldmatrix.* writes a register of a product that may still run", fault)


@pytest.mark.slow
def test_the_oldest_triton():
    paths = [str(oldest()), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "exact and hopper or race_of_registers"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "10 passed" in done.stdout


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_reads_its_operands_as_they_lie(name):
    case = PRODUCTS[name]()
    assert simulated(name, case) == []
    assert torch.equal(case.out, case.expected)
    assert "stmatrix" in compiled()[name][0]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("row", "column"), [(0, 0), (-3, 1), (9, -2), (20, 40)])
def test_a_box_is_padded_on_its_way_in_and_clipped_on_its_way_out(width, row, column):
    case = move(width, row, column)
    assert simulated(f"move {width}", case) == []
    assert torch.equal(case.out, case.expected)


def planted_in() -> Case:
    """Four tiles of one program, so that slots and both buffers of a residual come round again."""
    return conv(ConvShape(1, 192, 8, 64, 64, residual=True), specialised(128, 64, 3, (8, 16, 1)), 1)


Edit = Callable[[list[str]], None]


def find(lines: list[str], pattern: str, number: int = 0) -> int:
    return [i for i, line in enumerate(lines) if re.search(pattern, line)][number]


def change(pattern: str, old: str, new: str, number: int = 0) -> Edit:
    def edit(lines: list[str]) -> None:
        i = find(lines, pattern, number)
        assert old in lines[i], lines[i]
        lines[i] = lines[i].replace(old, new)

    return edit


def remove(pattern: str, number: int = 0, *, behind: str = "", lines_: int = 1) -> Edit:
    """Lines, the first of them the first with a pattern, behind another's first."""

    def edit(lines: list[str]) -> None:
        start = find(lines, behind) if behind else 0
        i = start + find(lines[start:], pattern, number)
        lines[i : i + lines_] = []

    return edit


WAIT = r"mbarrier\.try_wait"


def block(lines: list[str], number: int) -> slice:
    """The lines of a wait: it has a block with a label of its own."""
    i = find(lines, WAIT, number)
    start = next(k for k in range(i, 0, -1) if lines[k].strip() == "{")
    return slice(start, next(k for k in range(i, len(lines)) if lines[k].strip() == "}") + 1)


def wait_again(lines: list[str]) -> None:
    """For the phase of a slot that has been given back."""
    wait, i = lines[block(lines, 0)], find(lines, r"mbarrier\.arrive\.shared", 1)
    lines[i + 1 : i + 1] = wait


def wait_behind(lines: list[str]) -> None:
    """The wait for a residual, behind its use."""
    wait, i = lines[block(lines, 1)], find(lines, "stmatrix") - 1
    lines[i:i] = wait
    del lines[block(lines, 1)]


def elsewhere(lines: list[str]) -> None:
    """A read of what no kernel writes."""
    i = find(lines, r"ld\.shared\.v4")
    lines[i] = re.sub(r"\+\d+", "+200000", lines[i])


def no_wait(lines: list[str]) -> None:
    del lines[block(lines, 0)]


def other_parity(lines: list[str]) -> None:
    where, parity = re.search(r"\], (%r\d+)", lines[find(lines, WAIT)]), block(lines, 0).start
    lines.insert(parity, f"xor.b32 {where[1]}, {where[1]}, 1;")


def other_barrier(lines: list[str]) -> None:
    """The second group meets at the first one's."""
    lines[:] = [re.sub(r"bar\.sync\s+2,", "bar.sync 0,", line) for line in lines]


def read_sums(lines: list[str]) -> None:
    sums = re.search(r"\{(%r\d+)", lines[find(lines, "mma_async")])
    lines.insert(find(lines, "wgmma.commit_group") + 1, f"mov.b32 %r1, {sums[1]};")


def never_waits(lines: list[str]) -> None:
    """The warp that loads, which does not let the next launch in then."""
    let_in = find(lines, r"griddepcontrol\.launch_dependents")
    waits = [i for i, line in enumerate(lines[:let_in]) if re.search(r"griddepcontrol\.wait", line)]
    del lines[let_in], lines[waits[-1]]


PLANTED: dict[str, tuple[str, Edit]] = {
    "a residual used before its wait": ("arrival", wait_behind),
    "a slot given back a product early": ("release", change(r"wgmma\.wait_group", "aligned 1", "aligned 2")),
    "a buffer reused before its store has read it": ("store", remove(r"bulk\.wait_group")),
    "a store without a barrier": ("race", remove(r"bar\.sync", behind="stmatrix")),
    "a read of nothing": ("uninitialised", elsewhere),
    "a barrier made without a fence": ("init", remove(r"fence\.proxy", behind=r"mbarrier\.init")),
    "a store without a fence": ("proxy", remove(r"fence\.proxy", behind="stmatrix")),
    "sums read while they are summed": ("registers", read_sums),
    "a product without a fence": ("fence", remove(r"wgmma\.fence")),
    "two groups at one barrier": ("count", other_barrier),
    "more bytes than expected": ("bytes", change(r"expect_tx.*24576", "24576", "24560")),
    "a wait for what has passed": ("phase", wait_again),
    "fewer bytes than expected": ("deadlock", change(r"expect_tx.*24576", "24576", "24592")),
    "the launch before, not waited for": ("dependent", never_waits),
    "a load outside": ("bounds", change(r"ld\.global", "+ 0", "+ 65536")),
}
"""What only one check finds, and one for each."""
WORSE: dict[str, tuple[str, Edit]] = {
    "a slot used before its bytes are there": ("arrival", no_wait),
    "a wait for the phase before": ("phase", other_parity),
    "two groups at a barrier that counts one": ("count", change(r"mbarrier\.init.*, 2;", ", 2;", ", 1;")),
    "a slot never given back": ("deadlock", remove(r"mbarrier\.arrive\.shared")),
    "registers that nobody has left": ("deadlock", change(r"setmaxnreg\.inc.*232", "232", "240")),
}
"""What has more than one consequence."""


def plant(name: str) -> str:
    lines = compiled()["planted in"][0].splitlines()
    {**PLANTED, **WORSE}[name][1](lines)
    return "\n".join(lines)


def judged(launch: Launch, text: str, **options: Any) -> list[str]:
    return simulate(launch, text, **{"early": launch.parameters, **options}).faults


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_each_fault_is_found_by_its_own_check_alone(name):
    check, (launch,) = PLANTED[name][0], planted_in().launches
    found = judged(launch, plant(name))
    assert found
    assert {fault.partition(":")[0] for fault in found} == {check}
    assert judged(launch, plant(name), checks=set(CHECKS) - {check}) == []


@pytest.mark.slow
def test_what_an_earlier_launch_did_not_write_may_be_used_early():
    (launch,) = planted_in().launches
    text, names = plant("the launch before, not waited for"), set(launch.arguments)
    assert judged(launch, text, early=names) == []
    assert judged(launch, text, early=names - {"res_desc", "w_desc"}) != []


def test_every_check_has_its_fault():
    assert {check for check, _ in PLANTED.values()} | {"global"} == set(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORSE)
def test_other_faults_are_found(name):
    (launch,) = planted_in().launches
    assert any(fault.startswith(WORSE[name][0]) for fault in judged(launch, plant(name)))


@pytest.mark.slow
def test_two_programs_at_one_tile():
    (launch,), (text,) = planted_in().launches, compiled()["planted in"]
    twice = [(0, 0, 0), (0, 0, 0)]
    assert judged(launch, text) == []
    assert {fault.partition(":")[0] for fault in judged(launch, text, programs=twice)} == {"global"}
    assert judged(launch, text, programs=twice, checks=set(CHECKS) - {"global"}) == []


@pytest.mark.slow
def test_a_deadlock_names_who_waits_for_what():
    (launch,) = planted_in().launches
    faults = judged(launch, plant("a slot never given back"))
    (loader,) = [fault for fault in faults if "warp 10" in fault]
    assert re.search(r"waits for phase 0 of the barrier at \+\d+ .* lacks 1 arrivals and 0 bytes", loader)


def test_a_program_that_ends_while_a_load_is_under_way():
    (launch,), lines = move(128, 0, 0).launches, compiled()["move 128"][0].splitlines()
    del lines[block(lines, 0)]
    del lines[find(lines, r"global\.shared")]
    (fault,) = simulate(launch, "\n".join(lines)).faults
    assert re.match(r"arrival: program \(0, 0, 0\): ends while a load at the barrier at \+\d+", fault)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("frob.b32 %r1, %r2;", "frob.b32"),
        ("add.sat.s32 %r1, %r2, 1;", "add.sat.s32"),
        ("mov.u32 %r1, %clock;", "%clock"),
        ("ld.volatile.shared.b32 %r1, [%r2];", "ld.volatile"),
        (".local .b8 depot[8];", ".local"),
    ],
)
def test_what_is_not_known_is_an_error(line, what):
    (launch,), lines = planted_in().launches, compiled()["planted in"][0].splitlines()
    lines.insert(find(lines, "mbarrier"), line)
    with pytest.raises(Unknown, match=re.escape(what)):
        simulate(launch, "\n".join(lines))
