"""The tuner without a GPU: made-up times, kernels in the interpreter, real files and a real compiler."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import run as run_compiled
from exact import conv_reference
from test_robust_processes import ended

from resnet_triton.config import ConvConfig, ConvShape, choice, conv_heuristic, table
from resnet_triton.config.candidates import candidates, neighbours
from resnet_triton.config.targets import KNOWN
from resnet_triton.ops import ConvBnRelu, interpreter
from resnet_triton.support.terminal import bar
from resnet_triton.support.timing import Spread
from resnet_triton.tools import cli, tune
from resnet_triton.tools.ask import NEEDS
from resnet_triton.tuner import search, trial

GPU = KNOWN[90]
CPU = torch.device("cpu")
IS_EXACT = trial.Trial.is_exact
SMALL = ConvShape(2, 16, 6, 6, 16, 3, 3, padding=(1, 1), residual=True)
STRIDED = ConvShape(2, 16, 6, 6, 32, 3, 3, (2, 2), (1, 1))
LARGE = ConvShape(2, 64, 8, 8, 64, 3, 3, padding=(1, 1))
LAYERS = {SMALL: ["layer1.0.conv2"], STRIDED: ["layer2.0.conv1"], LARGE: ["layer1.0.conv1", "layer1.1.conv1"]}


class Compiler:
    """Finds every configuration sound, except those in `slow` and `unusable`."""

    def __init__(self) -> None:
        self.slow: set[ConvConfig] = set()
        self.unusable: set[ConvConfig] = set()
        self.submitted: list[tuple[ConvShape, ConvConfig]] = []

    def submit(self, shape: ConvShape, chosen: ConvConfig) -> Future[list[str]]:
        self.submitted.append((shape, chosen))
        done: Future[list[str]] = Future()
        faults = [f"{trial.SLOW}spills 8 bytes"] * (chosen in self.slow) + ["a race"] * (chosen in self.unusable)
        done.set_result(faults)
        return done


class Rig:
    """A bench with a clock that moves one second per timing, and made-up times."""

    def __init__(self) -> None:
        self.now = 0.0
        self.compiler = Compiler()
        self.timed: list[tuple[ConvShape, ConvConfig, int]] = []
        self.microseconds: Callable[[ConvConfig, int], float] = lambda config, replays: config.block_m + config.block_c
        self.before: Callable[[], object] = lambda: None

    def time(self, subject: trial.Trial, chosen: ConvConfig, *, replays: int, meter: Any) -> Spread:
        self.before()
        self.now += 1
        self.timed.append((subject.shape, chosen, replays))
        p50 = self.microseconds(chosen, replays) * 1e-6
        return Spread(p50, p50 * 0.9, p50 * 1.1)

    @property
    def bench(self) -> search.Bench:
        compilers = lambda: contextlib.nullcontext(self.compiler)  # noqa: E731
        return search.Bench(CPU, GPU, "570.86.15", 0, compilers, clock=lambda: self.now)

    def tune(self, **changes: Any) -> dict[str, Any]:
        options: dict[str, Any] = {
            "budget": 1e9, "batches": [2], "dtypes": ["float16"], "families": ["resnet18"], "out": None, "again": False,
            "jobs": 1, "bar": bar, "bench": self.bench, **changes,
        }  # fmt: skip
        return tune.run(**options)


@pytest.fixture
def rig(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """Three layers instead of a network's, few candidates, no real times, and no check."""
    made = Rig()
    monkeypatch.setattr(tune, "workload", lambda *a: LAYERS)
    monkeypatch.setattr(trial.Trial, "is_exact", lambda subject, chosen: True)
    monkeypatch.setattr(search, "COUNT", 4)
    monkeypatch.setattr(trial.Trial, "time", lambda subject, chosen, **k: made.time(subject, chosen, **k))
    return made


def known() -> dict[ConvShape, table.Entry]:
    path = table.path_of(GPU.name)
    return table.load(path).entries if path.exists() else {}


# --- the whole flow --------------------------------------------------------------------------------------------------


def test_most_expected_time_first_and_the_next_shape_compiles_meanwhile(rig: Rig) -> None:
    rig.tune()
    assert list(dict.fromkeys(shape for shape, _, _ in rig.timed)) == [LARGE, SMALL, STRIDED]
    before_first_timing = rig.compiler.submitted[: rig.compiler.submitted.index((SMALL, conv_heuristic(SMALL, GPU)))]
    assert {shape for shape, _ in before_first_timing} == {LARGE}
    header = table.load(table.path_of(GPU.name))
    assert (header.gpu, header.driver, header.torch) == (GPU.name, "570.86.15", torch.__version__)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", header.date)
    last_of_large = max(i for i, (shape, _) in enumerate(rig.compiler.submitted) if shape == LARGE)
    assert rig.compiler.submitted.index((SMALL, conv_heuristic(SMALL, GPU))) < last_of_large


def test_the_search_goes_from_neighbour_to_neighbour(rig: Rig) -> None:
    """Two steps from what the cost model proposes: fewer stages, then shorter rows of channels."""
    first = candidates(LARGE, GPU, 4)
    start = next(c for c in first[1:] if c.num_stages == 4)
    step = next(c for c in neighbours(start, LARGE, GPU) if c.num_stages == 3)
    goal = next(c for c in neighbours(step, LARGE, GPU) if c.block_c == 32)
    assert {step, goal}.isdisjoint(first)
    path = {start: 30.0, step: 20.0, goal: 10.0}
    rig.microseconds = lambda config, replays: path.get(config, 40.0)
    rig.tune()
    config, timing = known()[LARGE]
    assert config == goal
    assert timing is not None
    assert (timing.us, timing.p20_us, timing.p80_us, timing.heuristic_us) == (10.0, 9.0, 11.0, 40.0)


def test_faulty_code_is_not_timed_but_for_the_heuristics_choice(rig: Rig) -> None:
    first = candidates(LARGE, GPU, 4)
    rig.compiler.slow = {*first[:3]}
    rig.tune()
    timed = {config for shape, config, replays in rig.timed if shape == LARGE and replays == search.REPLAYS}
    assert first[0] in timed
    assert timed.isdisjoint(first[1:3])
    assert first[3] in timed


def test_what_is_worse_than_slow_is_never_timed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a race, or code that does not compile. If the heuristic's choice is such, nothing is to be beaten, and of a
    shape that has no other nothing is written."""
    first = candidates(LARGE, GPU, 4)
    rig.compiler.unusable = {*first[:2]}
    monkeypatch.setattr(search, "candidates", lambda shape, *a: candidates(shape, *a) if shape == LARGE else first[:1])
    rig.tune()
    timed = {config for shape, config, _ in rig.timed if shape == LARGE}
    assert timed.isdisjoint(first[:2])
    assert first[2] in timed
    config, timing = known()[LARGE]
    assert config in timed
    assert timing is not None
    assert timing.us == timing.heuristic_us
    assert set(known()) == {LARGE}


def test_a_win_that_does_not_repeat_is_none(rig: Rig) -> None:
    """The least of many noisy times is too low; a second, longer look decides."""
    start = conv_heuristic(LARGE, GPU)
    rig.microseconds = lambda config, replays: 5.0 if config == start or replays == search.REPLAYS else 6.0
    rig.microseconds, plain = (lambda c, r: plain(c, r) - (c != start and r == search.REPLAYS)), rig.microseconds
    rig.tune()
    assert known()[LARGE].config == start


# --- exactness -------------------------------------------------------------------------------------------------------


class Sabotage:
    """A launch that does what `deed` does to the output."""

    def __init__(self, deed: Callable[[], object]) -> None:
        self.run = deed


@pytest.fixture
def sabotaged(monkeypatch: pytest.MonkeyPatch) -> Callable[[ConvConfig, str], None]:
    """Check again, and make the kernel wrong in one configuration: "one element" is off, or all are "unwritten"."""

    monkeypatch.setattr(trial.Trial, "is_exact", IS_EXACT)

    def plant(victim: ConvConfig, how: str) -> None:
        plan = trial.launches_of

        def planted(call: Any, out: torch.Tensor, chosen: ConvConfig, *rest: Any) -> Any:
            launches = plan(call, out, chosen, *rest)
            if chosen != victim:
                return launches
            return () if how == "unwritten" else (*launches, Sabotage(lambda: out[-1, -1, -1, -1].add_(1)))

        monkeypatch.setattr(trial, "launches_of", planted)

    return plant


@pytest.mark.parametrize("how", ["one element", "unwritten"])
def test_a_wrong_winner_is_refused_and_the_next_best_taken(
    rig: Rig, sabotaged: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    monkeypatch.setattr(tune, "workload", lambda *a: {SMALL: LAYERS[SMALL]})
    rig.tune()
    winner = known()[SMALL].config
    sabotaged(winner, how)
    result = rig.tune(again=True)
    replaced = known()[SMALL].config
    assert replaced != winner
    ranked = sorted({c for s, c, _ in rig.timed if s == SMALL}, key=lambda c: rig.microseconds(c, 0))
    assert rig.microseconds(replaced, 0) == rig.microseconds(ranked[1], 0)
    error = capsys.readouterr().err
    assert re.search(r"^resnet-triton: warning: ConvConfig\(.*\) gives a wrong answer for ConvShape\(", error, re.M)
    assert [len(row["wrong"]) for row in result["rows"] if row["layer"] == "layer1.0.conv2"] == [1]


def test_nothing_is_written_for_a_shape_that_is_always_wrong(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial.Trial, "is_exact", lambda subject, chosen: subject.shape != SMALL)
    result = rig.tune()
    assert set(known()) == {STRIDED, LARGE}
    row = next(row for row in result["rows"] if row["layer"] == "layer1.0.conv2")
    assert row["config"] is row["timing"] is None
    assert len(row["wrong"]) > 4


def test_what_the_output_held_before_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is reused: a kernel that writes nothing may find the right answer there."""
    monkeypatch.setattr(trial, "launches_of", lambda *a: ())
    monkeypatch.setattr(ConvBnRelu, "output", trial.exact_answer)
    assert not trial.Trial(SMALL, CPU, 0).is_exact(ConvConfig(32, 32, 16, 4, 2))


def test_wrong_runs_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a right run wrote is gone: here the first of three writes, and no other."""
    wrong_runs = pytest.importorskip("benchmarks.wrong_runs").wrong_runs
    assert wrong_runs(trial.Trial(SMALL, CPU, 0), ConvConfig(32, 32, 16, 4, 2), 2) == {"alone": 0}
    plan = trial.launches_of

    def once(*args: Any) -> Any:
        launches = [*plan(*args)]
        return (Sabotage(lambda: launches.pop().run() if launches else None),)

    monkeypatch.setattr(trial, "launches_of", once)
    assert wrong_runs(trial.Trial(SMALL, CPU, 0), ConvConfig(32, 32, 16, 4, 2), 3) == {"alone": 2}


@pytest.mark.parametrize(
    ("dtype", "precision"), [("float16", "ieee"), ("bfloat16", "ieee"), ("float32", "ieee"), ("float32", "tf32")]
)
def test_the_check_knows_the_answer(dtype: str, precision: str) -> None:
    """Against the tests' own reference, over more images than are computed at a time, and against the kernels."""
    shape = ConvShape(
        18, 16, 4, 4, 24, 3, 3, padding=(1, 1), dtype=dtype, precision=precision,
        shortcut_c=8, shortcut_h=8, shortcut_w=8, shortcut_stride=(2, 2),
    )  # fmt: skip
    call = trial.exact_call(shape, CPU, 3)
    assert torch.equal(trial.exact_answer(call), conv_reference(call).to(call.x.dtype))
    subject = trial.Trial(shape, CPU, 0)
    for config in (ConvConfig(32, 32, 16, 4, 2), ConvConfig(32, 32, 16, 4, 2, (1, 2, 16), swap=True)):
        assert subject.is_exact(config)


def test_data_sets_exceed_the_cache_twice_and_each_is_launched() -> None:
    subject = trial.Trial(SMALL, CPU, 100_000)
    tensors = [t for call in subject.calls for t in call.schema.tensors(call)] + subject.outputs
    assert len({t.data_ptr() for t in tensors}) == len(tensors)
    assert 200_000 < sum(t.numel() * t.element_size() for t in tensors) < 220_000
    assert len(trial.Trial(SMALL, CPU, 0).calls) == 1
    for out in subject.outputs:
        out.fill_(float("nan"))

    def meter(work: Callable[[], object], replays: int) -> list[float]:
        work()
        return [1.0] * replays

    launches = max(len(subject.calls), 10)
    assert subject.time(ConvConfig(16, 32, 16, 4, 2), replays=2, meter=meter).p50 == pytest.approx(1 / launches)
    assert not any(out.isnan().any() for out in subject.outputs)


def test_a_candidate_is_timed_as_a_graph_would_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "active", lambda: False)
    call = trial.exact_call(ConvShape(1, 64, 8, 8, 64, 3, 3, padding=(1, 1)), CPU, 0)
    few, plain = ConvConfig(32, 64, 64, 4, 1, (4, 8, 1), kernel="hopper_few"), ConvConfig(64, 64, 32, 4, 3)
    made = [trial.launches_of(call, call.output(), chosen, "ieee", KNOWN[90])[0] for chosen in (few, plain)]
    assert [launch.dependent for launch in made] == [True, False]


# --- budget, resumption, interruption --------------------------------------------------------------------------------


def test_the_budget_ends_the_search_and_the_next_run_goes_on(rig: Rig) -> None:
    rig.tune()
    per_shape = {shape: sum(s == shape for s, _, _ in rig.timed) for shape in LAYERS}
    table.path_of(GPU.name).unlink()
    rig.timed.clear()

    budget = per_shape[LARGE] + 3
    result = rig.tune(budget=budget)
    assert len(rig.timed) == budget
    assert set(known()) == {LARGE}, "a shape whose search was cut short is not written"
    assert (len(result["rows"]), result["left"]) == (1, 2)

    rig.timed.clear()
    result = rig.tune()
    assert {shape for shape, _, _ in rig.timed} == {SMALL, STRIDED}
    assert (result["known_before"], result["left"]) == (1, 0)
    assert set(known()) == set(LAYERS)

    rig.timed.clear()
    rig.tune()
    assert rig.timed == []
    rig.tune(again=True)
    assert {shape for shape, _, _ in rig.timed} == set(LAYERS)


def test_waiting_for_a_compiler_is_part_of_the_budget(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Never(Future[list[str]]):
        def result(self, timeout: float | None = None) -> list[str]:
            assert timeout is not None
            return super().result(timeout)

    monkeypatch.setattr(rig.compiler, "submit", lambda shape, chosen: Never())
    start = time.monotonic()
    result = rig.tune(budget=0.2)
    assert time.monotonic() - start < 10
    assert result["left"] == 3


def test_entries_of_another_triton_are_tuned_again(rig: Rig) -> None:
    rig.tune()
    path = table.path_of(GPU.name)
    old = table.load(path)
    config, timing = old.entries[SMALL]
    assert timing is not None
    old.entries[SMALL] = table.Entry(config, replace(timing, triton="3.1.4"))
    table.save(old, path)
    rig.timed.clear()
    rig.tune()
    assert {shape for shape, _, _ in rig.timed} == {SMALL}


def test_other_entries_and_facts_stay(rig: Rig) -> None:
    other = replace(LARGE, dtype="bfloat16")
    kept = table.Entry(ConvConfig(64, 64, 64, 4, 2))
    facts = table.Facts(90, 132, 227 * 1024, 64, 32, 228 * 1024)
    table.save(table.Table(GPU.name, facts=facts, entries={other: kept}), table.path_of(GPU.name))
    rig.tune()
    assert table.load(table.path_of(GPU.name)).facts == facts
    assert known()[other] == kept
    assert set(known()) == {other, *LAYERS}


@pytest.mark.parametrize("moment", [1, 2, 20, 40])
def test_an_interrupt_between_timings_leaves_what_was_done(
    rig: Rig, capsys: pytest.CaptureFixture[str], moment: int
) -> None:
    def interrupt() -> None:
        if len(rig.timed) == moment:
            raise KeyboardInterrupt

    rig.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        rig.tune()
    begun = list(dict.fromkeys(shape for shape, _, _ in rig.timed))
    assert set(known()) in (set(begun[:-1]), set(begun))
    assert f"interrupted: {len(known())} shapes tuned, {3 - len(known())} left" in capsys.readouterr().err
    rig.before = lambda: None
    rig.tune()
    assert set(known()) == set(LAYERS)


# --- files and commands ----------------------------------------------------------------------------------------------


def test_files_that_cannot_be_gone_on_with(rig: Rig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "mine.json"
    table.save(table.Table("NVIDIA H100"), path)
    with pytest.raises(ValueError, match=r"mine\.json was tuned for 'NVIDIA H100', expected 'NVIDIA H200'"):
        rig.tune(out=path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"mine\.json: expected an object"):
        rig.tune(out=path)
    assert path.read_text() == "[]"
    with pytest.raises(ValueError, match=r"cannot write to .*absent, expected a writable folder"):
        rig.tune(out=folder / "absent" / "mine.json")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"cannot write to .*, expected a writable folder; name one in RESNET_"):
        rig.tune()
    assert rig.timed == []


def test_unknown_models_and_dtypes_are_named() -> None:
    with pytest.raises(ValueError, match="no model 'vgg16', expected some of resnet18"):
        tune.workload(["resnet18", "vgg16"], [1], ["float16"], 32)
    with pytest.raises(ValueError, match="no dtype 'int8'"):
        tune.workload(["resnet18"], [1], ["int8"], 32)


def test_each_precision_of_fp32_has_its_shapes() -> None:
    found = tune.workload(["resnet18"], [1, 2], ["tf32", "float32", "bfloat16"], 32)
    numbers = {(s.n, s.dtype, s.precision) for s in found}
    kinds = [("float32", "tf32"), ("float32", "ieee"), ("bfloat16", "ieee")]
    assert numbers == {(n, *kind) for n in (1, 2) for kind in kinds}


def test_the_command(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    asked = []
    monkeypatch.setattr(tune, "workload", lambda *a: asked.append(a) or LAYERS)
    monkeypatch.setattr(tune, "gpu_bench", lambda jobs: rig.bench)
    monkeypatch.setitem(NEEDS, "tune", ())
    monkeypatch.setenv("COLUMNS", "160")
    line = "tune --batches 1,64 --dtypes float16,tf32 --models resnet18,resnet34 --budget 900"
    assert cli.main(line.split()) == 0
    assert asked == [(["resnet18", "resnet34"], [1, 64], ["float16", "tf32"], 224)]
    out = capsys.readouterr().out
    assert re.search(r"layer1\.0\.conv1 +2 +2 +float16 +\d+\.\d +\d+\.\d +\d\.\d\dx +\S+ by \d+ by \d+, ", out)
    assert out.endswith(f"3 shapes tuned, 0 known before, 0 left: {folder / 'nvidia-h200.json'}\n")

    assert cli.main(["tune", "--out", str(folder / "mine.json")]) == 0
    assert f"models read {folder / 'nvidia-h200.json'}: copy it there, or name" in capsys.readouterr().out

    wrong = known()[LARGE].config
    monkeypatch.setattr(trial.Trial, "is_exact", lambda subject, chosen: chosen != wrong)
    path = folder / "mine.json"
    assert cli.main(["tune", "--json", "--again", "--out", str(path)]) == 1, "a wrong kernel is a failed check"
    result = json.loads(capsys.readouterr().out)
    assert len(result["rows"]) == len(table.load(path).entries) == 3


def test_a_folder_of_ones_own(rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where the package's may not be written to."""
    mine = tmp_path / "tables"
    mine.mkdir()
    rig.microseconds = lambda config, replays: 5.0 if config.num_stages == 2 else 40.0
    monkeypatch.setenv("RESNET_TRITON_TABLES", str(mine))
    rig.tune()
    assert choice.lookup(LARGE, GPU) == table.load(mine / "nvidia-h200.json").entries[LARGE].config
    assert choice.timed(LARGE, GPU)
    monkeypatch.delenv("RESNET_TRITON_TABLES")
    choice.forget()
    assert not choice.timed(LARGE, GPU)


def no_memory() -> None:
    raise torch.OutOfMemoryError


@pytest.mark.parametrize("way", ["no time", "too little time", "no memory", "no safe code", "all known"])
def test_a_run_that_tunes_nothing_fails(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, way: str
) -> None:
    monkeypatch.setattr(tune, "gpu_bench", lambda jobs: rig.bench)
    monkeypatch.setitem(NEEDS, "tune", ())
    path = folder / "mine.json"
    table.save(table.Table(GPU.name, entries={replace(LARGE, n=9): table.Entry(ConvConfig(64, 64, 64, 4, 2))}), path)
    if way == "all known":
        rig.tune(out=path)
    before = path.read_bytes()
    if way == "no safe code":
        monkeypatch.setattr(search, "candidates", lambda shape, *a: candidates(shape, *a)[:1])
        monkeypatch.setattr(search, "neighbours", lambda *a: [])
        rig.compiler.unusable = {candidates(shape, GPU, 4)[0] for shape in LAYERS}
    elif way == "no memory":
        rig.before = no_memory
    elif way == "no time":
        monkeypatch.setattr(search.Search, "run", lambda *a: (_ for _ in ()).throw(search.OutOfTime))
    code = cli.main(["tune", "--json", "--budget", "1", "--out", str(path)])
    out, err = capsys.readouterr()
    assert [row["timing"] for row in json.loads(out)["rows"] if row["timing"]] == []
    assert (code, "error: no shape was tuned, and " in err) == ((0, False) if way == "all known" else (1, True))
    assert path.read_bytes() == before


# --- compiling ahead -------------------------------------------------------------------------------------------------

AHEAD = """
import json
import torch
from triton import knobs
from resnet_triton.tuner import precompile, trial
from resnet_triton.config import ConvConfig, ConvShape
from resnet_triton.config.targets import KNOWN

short = {"shortcut_c": 32, "shortcut_h": 16, "shortcut_w": 16, "shortcut_stride": (2, 2)}
layer = ConvShape(8, 64, 8, 8, 128, 3, 3, padding=(1, 1), **short)
stem = ConvShape(2, 3, 32, 32, 64, 7, 7, (2, 2), (3, 3), dtype="float32", precision="tf32")
pairs = [(layer, ConvConfig(64, 64, 32, 4, 3, (1, 8, 8), swap=True)), (layer, ConvConfig(32, 32, 32, 4, 2, None, 3)),
         (stem, ConvConfig(32, 32, 32, 4, 2))]
spills = layer, ConvConfig(256, 128, 64, 8, 3, (1, 2, 128), swap=True)
nonsense = layer, ConvConfig(48, 64, 32, 4, 3)


def main():
    with precompile.Compilers(KNOWN[90], 1) as compiler:
        futures = [compiler.submit(*pair) for pair in (*pairs, spills, nonsense)]
        assert compiler.submit(*pairs[0]) is futures[0]
        faults = [future.result() for future in futures]
    hits = []
    knobs.compilation.listener = lambda *, cache_hit, **rest: hits.append(cache_hit)
    precompile.pretend(90)
    for shape, chosen in pairs:  # the launch itself, on tensors with memory, up to where the GPU would be needed
        call = trial.exact_call(shape, torch.device("cpu"), 0)
        out = torch.empty(shape.n, shape.k, shape.p, shape.q, dtype=call.x.dtype, memory_format=torch.channels_last)
        launches = trial.launches_of(call, out, chosen, shape.precision, KNOWN[90])
        for launch in launches:
            launch.compile()
    print(json.dumps([faults, hits, torch.cuda.is_initialized()]))


if __name__ == "__main__":
    main()
"""


def as_file(tmp_path: Path, script: str) -> str:
    """A line that runs the script as a module would be: spawned processes import it again."""
    (tmp_path / "script.py").write_text(script)
    return f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); import script; script.main()"


@pytest.mark.slow
def test_a_launch_finds_what_another_process_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    (*sound, spills, nonsense), hits, initialised = json.loads(run_compiled(as_file(tmp_path, AHEAD)))
    assert sound == [[], [], []]
    assert re.fullmatch(trial.SLOW + r"spills \d+ bytes", spills[0])
    assert len(nonsense) == 1
    assert "\n" not in nonsense[0]
    assert hits == [True] * 3
    assert not initialised


ORPHAN = """
import os, signal
from resnet_triton.tuner import precompile
from resnet_triton.config.targets import KNOWN

def main():
    pool = precompile.Compilers(KNOWN[90], 1)._pool
    blocked = pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, ()).result()
    assert signal.SIGINT in blocked, "Ctrl-C is the parent's business"
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_compilers_end_with_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(ORPHAN + "\n\nif __name__ == '__main__':\n    main()\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, tmp_path / "script.py"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert ended({int(done.stdout)})
