"""The convolutions in Gluon, executed from their PTX: bit for bit like fp64, nothing left unordered."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from exact import assert_exact, channels_last, conv_call, conv_reference, generator, offset_by_one, plan, rounded
from gluon import compiled, ptx
from simulator import simulate
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from resnet_triton.config import ConvConfig, ConvShape, is_legal
from resnet_triton.config.conv import shared_memory, tiles
from resnet_triton.config.targets import KNOWN
from resnet_triton.kernels.launch import Launch
from resnet_triton.machine_code import verdict
from resnet_triton.ops import NONE, RELU, Activation, gluon
from resnet_triton.ops.in_graph import dependent_launches


class Case(NamedTuple):
    """A convolution and how it is tiled; `programs` take its tiles in turn."""

    size: tuple[int, int, int, int]  # n, c, h, w
    k: int
    box: tuple[int, int, int]
    block_k: int
    stages: int
    filter: int = 3
    stride: int = 1
    residual: bool = False
    shortcut: int = 0
    split: int = 1
    programs: int = 2
    dtype: str = "float16"
    activation: Activation = RELU
    affine: bool = True
    kernel: str = "hopper_conv"
    short_stride: int = 2

    @property
    def shape(self) -> ConvShape:
        r, strides = self.filter, (self.stride, self.stride)
        short = ()
        if self.shortcut:
            apart = self.short_stride
            short = (self.shortcut, *(apart * side for side in self.out), (apart, apart))
        return ConvShape(
            *self.size, self.k, r, r, strides, (r // 2, r // 2), (1, 1), self.dtype,
            "tf32" if self.dtype == "float32" else "ieee", self.residual, *short,
        )  # fmt: skip

    @property
    def out(self) -> tuple[int, int]:
        return tuple((side - 1) // self.stride + 1 for side in self.size[2:])

    @property
    def config(self) -> ConvConfig:
        channels = 128 // self.shape.itemsize
        return ConvConfig(
            prod(self.box), self.block_k, channels, 4, self.stages, self.box, self.split, kernel=self.kernel
        )


def case64(
    n: int, h: int, w: int, images: int, stages: int, programs: int, *, dtype: str = "float16", residual: bool = False,
    activation: Activation = RELU, affine: bool = True,
) -> Case:  # fmt: skip
    """One of 64 channels by 64 filters, two rows of `images` a tile."""
    return Case(
        (n, 64, h, w), 64, (2, 1, images), 64, stages, residual=residual, programs=programs, dtype=dtype,
        activation=activation, affine=affine, kernel="hopper_conv64",
    )  # fmt: skip


def few(
    n: int, c: int, h: int, w: int, k: int, rows: int, *, split: int = 1, filter: int = 3, stride: int = 1,
    residual: bool = False, shortcut: int = 0, dtype: str = "float16", activation: Activation = RELU,
    affine: bool = True,
) -> Case:  # fmt: skip
    """One for few images: a box of `rows` rows of 8 pixels."""
    return Case(
        (n, c, h, w), k, (rows, 8, 1), 64, 1, filter, stride, residual, shortcut, split, 0, dtype, activation, affine,
        "hopper_few",
    )  # fmt: skip


NAN, INF = float("nan"), float("inf")
LEAKY = Activation("leaky_relu", 0.25)
CASES = {
    # every tile form, with tails of images, rows, columns, channels and filters
    "2x64 by 64": Case((9, 72, 5, 6), 72, (1, 16, 8), 64, 6),
    "2x64 by 128": Case((5, 64, 6, 7), 136, (4, 8, 4), 128, 5, programs=1),
    "2x64 by 256": Case((3, 40, 5, 5), 264, (4, 8, 4), 256, 3, filter=1, programs=3),
    "2x128 by 64": Case((7, 24, 6, 9), 64, (4, 8, 8), 64, 4, programs=3),
    "2x128 by 128": Case((130, 64, 2, 2), 128, (1, 1, 256), 128, 3, filter=1),
    "images alone": Case((130, 128, 2, 3), 64, (1, 1, 128), 64, 6, programs=3),
    "two columns": Case((70, 64, 3, 3), 64, (1, 2, 64), 64, 6),
    "one image": Case((1, 64, 11, 13), 64, (8, 16, 1), 64, 6),
    # residuals: one tile, two and many by a program, halves of images and of rows; of columns, see "bfloat16"
    "residual": Case((130, 64, 1, 2), 72, (1, 1, 128), 64, 6, residual=True, programs=1),
    "residual, wide": Case((5, 64, 6, 7), 136, (4, 8, 4), 128, 5, residual=True, programs=3),
    "residual, 2x128": Case((3, 64, 6, 9), 64, (4, 8, 8), 64, 4, residual=True, activation=NONE),
    "residual, one image": Case((3, 64, 9, 13), 64, (8, 16, 1), 64, 6, residual=True),
    # stride 2
    "stride 2": Case((9, 64, 8, 12), 64, (1, 8, 16), 64, 6, stride=2),
    "stride 2, rows": Case((5, 64, 9, 12), 64, (4, 4, 8), 64, 6, stride=2, programs=1),
    "stride 2, one image": Case((2, 40, 11, 18), 64, (4, 32, 1), 64, 6, stride=2),
    "stride 2, 1x1": Case((9, 72, 8, 12), 128, (2, 8, 8), 128, 5, filter=1, stride=2),
    # shortcuts
    "shortcut": Case((9, 64, 5, 6), 72, (1, 16, 8), 64, 6, shortcut=72, programs=1),
    "shortcut, rows": Case((5, 64, 6, 7), 136, (4, 8, 4), 128, 5, shortcut=32, affine=False),
    # two rows: a column of taps at a time
    "two rows": Case((3, 72, 5, 6), 72, (2, 8, 8), 64, 3, residual=True, programs=2),
    "two rows, one image": Case((1, 64, 5, 70), 64, (2, 64, 1), 64, 3, programs=3, dtype="bfloat16"),
    "two rows by 128, shortcut": Case((5, 128, 4, 7), 128, (2, 8, 8), 128, 2, shortcut=96, programs=1),
    "two rows, split, shortcut": Case(
        (2, 64, 5, 6), 64, (2, 8, 8), 64, 3, split=3, shortcut=128, programs=2, short_stride=1
    ),
    # shares of the reduction
    "split": Case((2, 128, 5, 6), 128, (4, 8, 4), 128, 5, split=2, programs=2),
    "split, residual": Case((2, 64, 9, 6), 64, (4, 8, 4), 64, 6, split=3, residual=True, programs=3),
    "split, shortcut": Case((2, 128, 5, 6), 64, (4, 8, 4), 64, 6, split=2, shortcut=64, programs=1),
    # runs of pixels of several images
    "run": Case((3, 72, 5, 7), 72, (1, 1, 128), 64, 6, filter=1, residual=True, programs=1),
    "run, shortcut": Case((5, 64, 5, 7), 64, (1, 1, 128), 64, 6, filter=1, shortcut=96, short_stride=1),
    # the other type
    "bfloat16": Case((9, 72, 5, 6), 72, (1, 8, 16), 64, 6, residual=True, dtype="bfloat16", activation=LEAKY),
    # ping-pong: one tile and many by a program, odd numbers of them and even; two rows are one tap at a time
    "ping-pong": Case((9, 72, 5, 6), 136, (4, 8, 4), 128, 5, programs=2, kernel="hopper_pingpong"),
    "ping-pong, residual": Case(
        (130, 64, 1, 4), 72, (1, 1, 128), 64, 6, residual=True, programs=1, kernel="hopper_pingpong"
    ),
    "ping-pong, residual, two rows": Case(
        (9, 64, 4, 6), 128, (2, 8, 8), 128, 3, residual=True, programs=1, kernel="hopper_pingpong", dtype="bfloat16"
    ),
    "ping-pong, 2x128": Case((3, 40, 9, 12), 64, (4, 8, 8), 64, 4, stride=2, programs=3, kernel="hopper_pingpong"),
    "ping-pong, run": Case((5, 72, 9, 7), 72, (1, 1, 128), 128, 4, filter=1, programs=1, kernel="hopper_pingpong"),
    # TF32
    "tf32, residual": Case((3, 36, 2, 5), 68, (1, 16, 8), 64, 6, residual=True, dtype="float32", programs=1),
    "tf32, wide, stride 2": Case((5, 44, 6, 8), 132, (2, 8, 8), 128, 5, stride=2, dtype="float32"),
    "tf32, shortcut": Case((5, 32, 2, 6), 64, (1, 16, 8), 64, 6, shortcut=36, dtype="float32"),
    "tf32, 2x128, split": Case((2, 72, 5, 6), 64, (4, 8, 8), 64, 4, split=3, programs=3, dtype="float32"),
    # 64 channels: odd and even sides, tails of images, one tile and many by a program
    "64, one pixel": case64(1, 1, 1, 32, 11, 3, residual=True),
    "64, 32 images": case64(40, 3, 5, 32, 11, 2, dtype="bfloat16", activation=LEAKY),
    "64, 32 images, residual": case64(40, 3, 5, 32, 5, 3, residual=True, activation=NONE, affine=False),
    "64, 64 images": case64(60, 4, 3, 64, 11, 1, activation=NONE),
    "64, 64 images, residual": case64(70, 4, 3, 64, 9, 2, residual=True),
    "64, 128 images": case64(130, 2, 3, 128, 5, 1, affine=False),
    "64, 128 images, residual": case64(128, 3, 4, 128, 5, 1, residual=True, dtype="bfloat16"),
    # few images: each height of a box with tails of rows and columns, strides, residuals, shortcuts, shares
    "few": few(2, 64, 5, 9, 128, 4),
    "few, 2 rows, residual": few(1, 64, 3, 8, 64, 2, residual=True, dtype="bfloat16", affine=False),
    "few, 8 rows": few(1, 64, 9, 7, 64, 8, activation=NONE, residual=True),
    "few, two slabs": few(1, 128, 4, 8, 64, 2),
    "few, 1x1": few(1, 192, 5, 9, 64, 4, filter=1, residual=True),
    "few, 1x1, stride 2": few(2, 128, 5, 18, 64, 2, filter=1, stride=2, split=2),
    "few, stride 2": few(1, 64, 10, 18, 128, 2, stride=2),
    "few, stride 2, split": few(2, 128, 10, 6, 64, 4, stride=2, split=2, dtype="bfloat16", activation=LEAKY),
    "few, split": few(1, 192, 5, 7, 64, 4, split=3, residual=True),
    "few, shortcut": few(1, 64, 5, 7, 64, 4, shortcut=64)._replace(short_stride=1),
    "few, run": few(3, 128, 3, 7, 128, 2, filter=1, split=2, residual=True)._replace(box=(1, 1, 16)),
    "few, run, shortcut": few(5, 64, 5, 3, 64, 8, filter=1, shortcut=64)._replace(box=(1, 1, 64), short_stride=1),
    "few, split, shortcut": few(1, 512, 3, 7, 64, 2, split=8, shortcut=128, affine=False),
}


SLOW = {
    "2x64 by 256", "2x128 by 128", "images alone", "residual", "residual, wide", "residual, 2x128", "stride 2, rows",
    "stride 2, one image", "shortcut", "two rows, one image", "two rows by 128, shortcut", "split",
    "64, 32 images, residual", "64, 64 images", "64, 128 images, residual", "few, 2 rows, residual", "few, 8 rows",
    "few, two slabs", "few, 1x1", "few, stride 2", "few, shortcut",
    "run", "run, shortcut", "few, run, shortcut",
    "tf32, wide, stride 2", "tf32, shortcut", "tf32, 2x128, split",
}  # fmt: skip
"""What differs from another case in one respect, in which a third differs, too."""


def launch(case: Case, *, special: bool = False) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """The launch, the output that it fills, and what is right in fp64; if `special`, of data that are not finite."""
    statistics = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
    call = conv_call(
        generator(torch.device("cpu"), 0), case.shape, activation=case.activation, affine=case.affine,
        bn_dtype=statistics,
    )  # fmt: skip
    if special:
        call.x[0, 0, 0, 0], call.weight[1, 0, 0, -1], call.weight[2, -1, -1, 0] = INF, -INF, NAN
    out = torch.full_like(call.output(), 777.0 if special else NAN)
    (found,) = replace(call, tile=case.config).launches(out, KNOWN[90])
    if case.programs:
        assert found.grid[0] <= found.arguments["items"] == tiles(case.config, case.shape) * case.split
        found.grid = (min(case.programs, found.arguments["items"]),)
    return found, out, conv_reference(call)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_exact(name: str) -> None:
    case = CASES[name]
    assert is_legal(case.config, case.shape, KNOWN[90])
    found, out, expected = launch(case)
    code = compiled(found)
    assert code.metadata.shared <= shared_memory(case.config, case.shape)
    result = simulate(found, code.asm["ptx"], early=found.parameters)
    assert_exact(out, rounded(expected, out.dtype))
    assert not result.faults
    if case.split > 1:
        assert not found.arguments["semaphores_ptr"].any()


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0)], ids=str)  # 0, 1, 2 is that of `test_exact`
@pytest.mark.parametrize("name", ["split, residual", "few, split"])
def test_any_share_may_be_the_last(name: str, order: tuple[int, ...]) -> None:
    """Whoever arrives last sums the shares, in their order: the same bits."""
    found, out, expected = launch(CASES[name])
    places = [(i, 0, 0) for i in (*order, *range(3, found.grid[0]))]
    assert not simulate(found, ptx(found), programs=places, early=found.parameters).faults
    assert_exact(out, rounded(expected, out.dtype))


@pytest.mark.parametrize("name", ["two rows, split, shortcut", "64, one pixel", "few, stride 2"])
def test_padding_times_infinity_is_nan(name: str) -> None:
    """No tap is skipped, nothing that is not finite gets beside its place, and an activation keeps it."""
    found, out, expected = launch(CASES[name], special=True)
    assert not simulate(found, ptx(found), early=found.parameters).faults
    torch.testing.assert_close(out, expected.to(out.dtype), rtol=0, atol=0, equal_nan=True)
    assert expected.isnan().any()


@pytest.mark.parametrize(("name", "activation"), [("one image", "silu"), ("few", "gelu")])
def test_activations_that_round(name: str, activation: str) -> None:
    """Within one unit of the output's last place; what the others compute is exact."""
    found, out, expected = launch(CASES[name]._replace(activation=Activation(activation)))
    assert not simulate(found, ptx(found), early=found.parameters).faults
    torch.testing.assert_close(out, expected.to(out.dtype), rtol=2**-10, atol=2**-20)


@pytest.mark.parametrize("added", ["residual", "shortcut"])
def test_factors_are_rounded_to_tf32(added: str) -> None:
    """And not cut, which would make every sum smaller; nor is a residual rounded."""
    case = Case((1, 4, 8, 16), 64, (8, 16, 1), 64, 6, filter=1, dtype="float32", short_stride=1)
    case = case._replace(residual=True) if added == "residual" else case._replace(shortcut=4)
    call = conv_call(generator(torch.device("cpu"), 0), case.shape, affine=False, short_affine=False)
    near, residual = 1 + 3 * 2**-12, 1 + 2**-20
    for convolution in filter(None, (call, call.shortcut)):
        mean, var, *_, eps = convolution.batch_norm
        for tensor, value in ((convolution.x, near), (convolution.weight, near), (mean, 0), (var, 1 - eps)):
            tensor.fill_(value)
    if added == "residual":
        call.residual.fill_(residual)
    out = call.output()
    (found,) = replace(call, tile=case.config).launches(out, KNOWN[90])
    assert not simulate(found, ptx(found), early=found.parameters).faults
    tf32 = 1 + 2**-10 if hasattr(TensorDescriptor, "round_f32_to_tf32") else 1  # not of Triton 3.6.0
    product = 4 * tf32**2
    assert_exact(out, torch.full_like(out, product + (residual if added == "residual" else product)))


# --- what a dependent launch does before it waits --------------------------------------------------------------------

WAIT, LET_IN, INPUT, RESIDUAL = (
    r"griddepcontrol\.wait",
    r"griddepcontrol\.launch_dependents",
    r"cp\.async\.bulk\.tensor",
    r"ld\.global",
)
FEW, LOOP = few(1, 64, 2, 8, 64, 2, residual=True), CASES["one image"]
STORE = "ld.param.b64 %rd1, [hopper_few_kernel_param_16];\nst.global.b16 [%rd1], %rs1;"


@pytest.mark.parametrize(
    ("case", "fault", "found"),
    [
        (FEW, "reads its input", r"cp\.async\.bulk.* loads x_desc at byte \d+ before griddepcontrol\.wait"),
        (FEW, "reads its residual", r"ld\.global.* reads res_ptr at byte \d+ before griddepcontrol\.wait"),
        (FEW, "stores", r"st\.global.* writes y_ptr at byte \d+ before griddepcontrol\.wait"),
        (FEW, "lets the next in", r"launch_dependents.* lets the next launch in before griddepcontrol\.wait"),
        (LOOP, "reads its input", r"cp\.async\.bulk.* loads x_desc at byte \d+ before griddepcontrol\.wait"),
        (LOOP, "lets the next in", r"launch_dependents.* lets the next launch in before griddepcontrol\.wait"),
    ],
)
def test_what_comes_before_the_wait_is_found(case: Case, fault: str, found: str) -> None:
    """A store of its results there may be to a buffer that the launch before the last one's still reads."""
    made, _, _ = launch(case)
    lines = ptx(made).splitlines()

    def where(what: str) -> list[int]:
        return [i for i, line in enumerate(lines) if re.search(what, line)]

    (let_in,) = where(LET_IN)
    wait = max(i for i in where(WAIT) if i < let_in)  # each group of warps has one
    assert simulate(made, "\n".join(lines), early=made.parameters).faults == []
    late = {"reads its input": INPUT, "reads its residual": RESIDUAL, "lets the next in": LET_IN}
    if fault == "stores":
        lines.insert(wait, STORE)
    else:
        later = next(i for i in where(late[fault]) if i > wait)
        lines.insert(later, lines.pop(wait))
    faults = simulate(made, "\n".join(lines), early=made.parameters).faults
    assert any(re.search(found, fault) for fault in faults), faults


@pytest.mark.parametrize(
    ("kernel", "graph", "copied", "dependent"),
    [
        ("hopper_few", True, (), True),
        ("hopper_few", False, (), False),
        ("hopper_conv", True, (), True),
        ("hopper_conv", True, ("weight",), False),
        ("conv_pointer", True, (), False),
        ("hopper_few", True, ("weight",), False),
        ("hopper_few", True, ("batch_norm",), False),
        ("hopper_few", True, ("shortcut", "weight"), False),
        ("hopper_few", True, ("shortcut", "batch_norm"), False),
    ],
)
def test_dependent_launches(
    monkeypatch: pytest.MonkeyPatch, kernel: str, graph: bool, copied: tuple[str, ...], dependent: bool
) -> None:
    """In graphs alone, and not behind a copy of what is read before the wait."""
    monkeypatch.setattr(gluon.interpreter, "active", lambda: False)
    shape = ConvShape(1, 64, 16, 16, 64, 3, 3, padding=(1, 1), shortcut_c=64, shortcut_h=16, shortcut_w=16)
    call = conv_call(generator(torch.device("cpu"), 0), shape)

    def spread(value: Any, name: str, *rest: str) -> Any:
        """The value with one tensor as our kernels cannot read it."""
        part = getattr(value, name)
        if rest:
            part = spread(part, *rest)
        elif name == "weight":
            part = part.repeat(2, 1, 1, 1)[::2]
        else:
            part = part._replace(bn_bias=part.bn_bias.repeat(2)[::2])
        return value._replace(**{name: part}) if isinstance(value, tuple) else replace(value, **{name: part})

    call = spread(call, *copied) if copied else call
    configs = {"hopper_few": few(1, 64, 16, 16, 64, 4).config, "hopper_conv": CASES["one image"].config}
    may = dependent_launches.set(graph)
    call = replace(call, tile=configs.get(kernel, ConvConfig(64, 64, 32, 4, 3)))
    (made,) = call.launches(call.output(), KNOWN[90])
    dependent_launches.reset(may)
    assert (made.kernel.__name__, made.dependent) == (f"{kernel}_kernel", dependent)


# --- where it cannot run ---------------------------------------------------------------------------------------------


MANY = ConvShape(1024, 8, 4, 4, 128)
"""Few multiplications, yet enough pixels for a warp-specialised kernel to be chosen."""


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU of compute capability 9.0 whose driver refuses Gluon's kernels, and what it was given."""
    tried, run = [], Launch.run

    def driver(launch: Launch) -> None:
        tried.append(launch.kernel.__name__)
        if launch.is_gluon:
            raise RuntimeError("Triton Error [CUDA]: invalid argument\nmore")
        run(launch)

    monkeypatch.setattr(gluon.interpreter, "active", lambda: False)
    monkeypatch.setattr(gluon, "_refused", False)
    monkeypatch.setattr(Launch, "run", driver)
    monkeypatch.setattr("resnet_triton.ops.operation._asynchronous", lambda where, facts: False)
    monkeypatch.setattr("resnet_triton.ops.dispatch._fallback_reason", lambda where, forced: None)
    return tried


def test_a_driver_that_refuses_leads_to_the_next_kernel(fails: list[str]) -> None:
    call = conv_call(generator(torch.device("cpu"), 0), MANY)
    expected = rounded(conv_reference(call), torch.float16)
    warning = (
        "hopper_conv_kernel cannot run here (RuntimeError: Triton Error [CUDA]: invalid argument); "
        "other kernels run in place of those in Gluon, slower"
    )
    with pytest.warns(UserWarning, match=re.escape(warning)):
        assert_exact(call.compute(), expected)
    assert_exact(call.compute(), expected)  # and no warning
    assert [name for name in fails if name.startswith("hopper")] == ["hopper_conv_kernel"], "tried once"


def test_a_compiler_that_refuses_what_is_to_be_judged_leads_to_the_next_kernel(
    fails: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an unknown Triton, kernels are compiled and judged before they are launched."""
    monkeypatch.setattr("resnet_triton.ops.operation._asynchronous", lambda where, facts: True)
    monkeypatch.setattr(verdict, "compilers", lambda: ("99", ""))
    monkeypatch.setattr(verdict, "hazards", lambda compiled: ())

    def compiler(launch: Launch) -> None:
        if launch.is_gluon:
            raise RuntimeError("PTXASError")

    monkeypatch.setattr(Launch, "compile", compiler)
    call = conv_call(generator(torch.device("cpu"), 0), MANY)
    expected = rounded(conv_reference(call), torch.float16)
    with pytest.warns(UserWarning, match=r"hopper_conv_kernel cannot run here \(RuntimeError: PTXASError\)"):
        assert_exact(call.compute(), expected)
    assert_exact(call.compute(), expected)
    assert fails == ["conv_box_kernel"] * 2

    monkeypatch.setattr(gluon, "_refused", False)
    monkeypatch.setattr(Launch, "is_gluon", False)
    monkeypatch.setattr(Launch, "compile", lambda launch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call.compute()


def test_errors_of_other_kernels_stay_errors(fails: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "is_gluon", False)

    def broken(launch: Launch) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Launch, "run", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        conv_call(generator(torch.device("cpu"), 0), MANY).compute()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert"),
        torch.OutOfMemoryError("no memory"),
        RuntimeError("Triton Error CUDA: out of memory"),
        RuntimeError("Triton Error CUDA: operation not permitted when stream is capturing"),
        RuntimeError("Triton Error CUDA: operation failed due to a previous error during capture"),
    ],
)
def test_errors_that_are_not_the_kernels_leave_it_in_use(
    fails: list[str], monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    """As of a kernel before it, which every later launch reports."""
    given, sticky = [], "assert" in str(error)

    def broken(launch: Launch) -> None:
        given.append(launch.kernel.__name__)
        if launch.is_gluon or sticky:
            raise error

    monkeypatch.setattr(Launch, "run", broken)
    for _ in range(2):
        with pytest.raises(type(error), match=str(error)):
            conv_call(generator(torch.device("cpu"), 0), MANY).compute()
    assert given == 2 * ["hopper_conv_kernel", *["conv_box_kernel"] * sticky]


def test_other_kernels_that_are_interrupted_replace_none(fails: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do they, while they are tried, in another thread."""
    given, elsewhere = [], []

    def interrupted(launch: Launch) -> None:
        given.append(launch.kernel.__name__)
        if len(given) == 1:
            raise RuntimeError("invalid argument")
        thread = threading.Thread(target=lambda: elsewhere.append(gluon.facts(torch.device("cpu")).gluon))
        thread.start()
        thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(Launch, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        conv_call(generator(torch.device("cpu"), 0), MANY).compute()
    assert given == ["hopper_conv_kernel", "conv_box_kernel"]
    assert elsewhere == [True]
    assert gluon.facts(torch.device("cpu")).gluon


@pytest.mark.parametrize("modes", [{"batch_invariant": True}, {"unaligned": True}, {}], ids=str)
def test_other_kernels_by_name(fails: list[str], monkeypatch: pytest.MonkeyPatch, modes: dict[str, bool]) -> None:
    """Batch-invariant calls and unaligned tensors have kernels of their own."""
    layout = offset_by_one if "unaligned" in modes else channels_last
    call = conv_call(generator(torch.device("cpu"), 0), MANY, layout=layout)
    call = replace(call, modes=call.modes._replace(batch_invariant="batch_invariant" in modes))
    (found,) = plan(call)
    assert (found.kernel.__name__ == "hopper_conv_kernel") == (not modes)
