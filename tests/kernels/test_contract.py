"""The contract with PyTorch, row by row, on PyTorch and on every path of the kernels: see `contract/`."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import contract
import pytest
import torch
from contract.subjects import SUBJECTS
from contract.term import Args, Term, call, differs, outcome
from exact import choosing, pretending
from torch import Tensor, nn

from resnet_triton import config
from resnet_triton.config import ConvConfig, ConvShape, StemConfig, supports_descriptors
from resnet_triton.config.device import facts
from resnet_triton.config.targets import KNOWN
from resnet_triton.kernels.launch import Launch
from resnet_triton.ops import dispatch, linear

POINTER = ConvConfig(64, 16, 16, 4, 2)
BOX = ConvConfig(64, 16, 16, 4, 2, box=(4, 8, 2), swap=True)
BOX_OF_ONE_ROW = ConvConfig(64, 16, 16, 4, 2, box=(1, 8, 8), swap=True)
FUSED = ("stem", "model")
"""Their stem has no descriptors in fp32."""


def _choice(way: str, shape: ConvShape, device: Any, *, descriptors: bool) -> ConvConfig:
    if way == "pointer" or not descriptors or not supports_descriptors(shape):
        return POINTER
    plain = shape.stride == (1, 1) and not shape.shortcut_c
    return BOX if plain else BOX_OF_ONE_ROW


def _stem_tile(n: int, k: int, p: int, q: int, device: Any) -> StemConfig | None:
    return StemConfig(16, 16, 8, 4, 2) if device.has_descriptors else None


@contextlib.contextmanager
def forced(way: str, device: torch.device) -> Iterator[list[Launch]]:
    """Make the kernels take one way, and list their launches."""
    launches: list[Launch] = []
    run = Launch.run

    def recorded(launch: Launch) -> Any:
        launches.append(launch)
        return run(launch)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Launch, "run", recorded))
        stack.enter_context(choosing(functools.partial(_choice, way)))
        if device.type == "cpu":  # small tiles for small images
            stack.enter_context(mock.patch.object(config, "stem_heuristic", _stem_tile))
        if way == "pointer":
            stack.enter_context(pretending(KNOWN[80]))
        if way == "two launches":
            stack.enter_context(mock.patch.object(linear, "HEAD_IMAGES", 0))
        yield launches


def arguments(row: Term, dtype: torch.dtype, device: torch.device) -> Args:
    args = SUBJECTS[row.subject].arguments(dtype, device, row.sizes)
    row.edit(args)
    return args


def checks() -> Iterator[Any]:
    for number, row in enumerate(contract.ROWS):
        for way in contract.ways(row):
            marks = [pytest.mark.gpu] if row.needs_gpu else []
            if row.subject == "model" and way == ("pointer", "descriptor")[number % 2]:
                marks.append(pytest.mark.slow)  # it takes a model's time: the other way stays
            yield pytest.param(row, way, id=f"{row.subject}: {row.case}: {row.promise}: {way}", marks=marks)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter, of NaN and overflow
@pytest.mark.parametrize(("row", "way"), list(checks()))
def test_row(device: torch.device, row: Term, way: str) -> None:
    if way == "descriptor" and not facts(device).has_descriptors:
        pytest.skip("no descriptors on this GPU")
    dtypes = [d for d in row.dtypes if not (way == "descriptor" and row.subject in FUSED and d == torch.float32)]
    if not dtypes:
        pytest.skip("the stem has no descriptors in fp32")
    if way != "torch" and device.type == "cpu":  # the interpreter is slow: one in turn
        turn = contract.ROWS.index(row) + (way == "descriptor")
        dtypes = [dtypes[turn % len(dtypes)]]
    for dtype in dtypes:
        check(row, way, dtype, device)


def test_every_case_has_a_row_for_every_operator_or_a_reason() -> None:
    proven = {(row.case, row.subject) for row in contract.ROWS}
    everything = {(case, subject) for case in contract.CASES for subject in SUBJECTS}
    assert proven | contract.ABSENT.keys() == everything
    assert not proven & contract.ABSENT.keys()
    assert len({(row.subject, row.case, row.promise) for row in contract.ROWS}) == len(contract.ROWS)


def test_what_is_proven_elsewhere_is_proven_there() -> None:
    named = [reason.split("::") for reason in contract.ABSENT.values() if "::" in reason]
    assert named
    for file, name in named:
        assert f"def {name}(" in (Path(__file__).parents[2] / file).read_text()


def test_a_deviation_says_why() -> None:
    for row in contract.ROWS:
        deviates = row.expected is not None or (row.raises is not None and row.theirs is None)
        assert bool(row.because) == deviates, row.promise


def deviations() -> list[str]:
    """As docs/reliability.md lists them: a line for all operators that deviate alike, and why."""
    subjects: dict[tuple[str, str, str], list[str]] = {}
    for row in contract.ROWS:
        if row.because:
            alike = f"{row.case}: {row.promise}", row.expectation, row.because
            subjects.setdefault(alike, []).append(f"`{row.subject}`")
    return [f"| {case} | {what} | {', '.join(names)} | {why} |" for (case, what, why), names in subjects.items()]


def test_the_page_lists_every_deviation_and_no_other() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")
    table = page.partition("\n## Contract with PyTorch\n")[2].partition("\n## ")[0]
    listed = [line for line in table.splitlines() if line.startswith("| ")][2:]
    missing = [line for line in deviations() if line not in listed]
    gone = [line for line in listed if line not in deviations()]
    assert not missing, "docs/reliability.md lacks:\n" + "\n".join(missing)
    assert not gone, "docs/reliability.md lists, and the contract does not:\n" + "\n".join(gone)


def check(row: Term, way: str, dtype: torch.dtype, device: torch.device) -> None:
    subject = SUBJECTS[row.subject]
    theirs = outcome(lambda: row.act(subject.theirs, arguments(row, dtype, device)))
    args = arguments(row, dtype, device)
    kernels = "auto" if way == "torch" and (row.refused or device.type == "cpu") else way
    kernels = kernels if kernels in ("auto", "torch") else "triton"
    before, kept = Counter(dispatch.calls), held(args)
    with forced(way, device) as launches:
        ours = outcome(lambda: row.act(functools.partial(subject.ours, kernels=kernels), args))
    backends = {backend for _, backend in dispatch.calls - before}

    if way == "kernels" and not row.raises:
        assert isinstance(ours, NotImplementedError), f"{ours}, expected NotImplementedError"
        assert row.refused in str(ours)
        return
    if row.raises:
        assert not launches
        error, words = row.raises
        assert isinstance(ours, error), f"{ours!r}, expected {error.__name__}"
        assert words in str(ours)
        assert "\n" not in str(ours)
        if row.theirs is None:
            assert not isinstance(theirs, Exception), f"no deviation: PyTorch raises {theirs!r}, too"
        else:
            assert isinstance(theirs, row.theirs), f"PyTorch gave {theirs!r}, expected {row.theirs.__name__}"
        return
    expected = theirs
    if row.expected is not None and (way != "torch" or not row.kernels_alone):
        with torch.no_grad():
            expected = (row.expected(arguments(row, dtype, device)),)
        if device.type == "cpu":
            assert differs(theirs, expected, row.tolerance), "no deviation: PyTorch's answer is the same"
    if difference := differs(ours, expected, row.tolerance):
        raise AssertionError(f"{dtype}: {difference}")
    assert row.act is not call or "then" in args or kept == held(args), "an input was changed"
    taken(row, way, ours, launches, backends)


def taken(row: Term, way: str, ours: Any, launches: list[Launch], backends: set[str]) -> None:
    """Nothing stood in for what was to run."""
    names = {launch.kernel.__name__ for launch in launches}
    if way == "torch":
        assert (names, backends) == (set(), {"torch"})
    elif ours[0].numel() == 0:
        assert not names
    else:
        wanted = SUBJECTS[row.subject].ways["pointer" if row.pointers else way]
        if row.subject == "model":  # where an odd number of columns has no descriptor
            wanted, names = wanted | {"conv_pointer_kernel"}, names | {"conv_pointer_kernel"}
        assert names == wanted
        assert backends == {"triton"}
    for launch in launches:
        for name, value in row.launched.items():
            assert launch.arguments.get(name, value) == value, name


def held(args: Args) -> list[bytes]:
    """The bits of every tensor of a call."""
    state = [t for m in args.values() if isinstance(m, nn.Module) for t in m.state_dict().values()]
    tensors = [t for t in [*args.values(), *state] if isinstance(t, Tensor)]
    return [t.detach().cpu().resolve_neg().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors]
