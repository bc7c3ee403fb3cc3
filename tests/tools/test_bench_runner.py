"""The runner: what is found is kept at once and not repeated; a crash costs itself alone. And the phases of a GPU."""

import errno
import tarfile
import time
from functools import partial
from types import SimpleNamespace

import planted_alternatives as planted
import pytest
import torch
from synthetic_results import CPU as CPU_ENVIRONMENT
from synthetic_results import row

from resnet_triton.bench import results, runner
from resnet_triton.bench.child import Child
from resnet_triton.bench.results import Results
from resnet_triton.bench.runner import OutOfTime, Phase, Run, run_apart, run_phase
from resnet_triton.tools import ask

gpu = pytest.importorskip("benchmarks.gpu")
from benchmarks import callers, gpu_phases  # noqa: E402

CPU = torch.device("cpu")


def phase(*steps):
    def generate(run):
        yield from steps

    return Phase("phase", generate)


def run(steps, folder, left=100.0):
    """Run steps as one phase, on what the folder has already; what the folder has then."""
    said = []
    run_phase(phase(*steps), Run(CPU, folder, results.resume(folder), time.monotonic() + left, said.append))
    return results.load(folder), said


# --- in this process -------------------------------------------------------------------------------------------------


def test_what_is_found_is_written_before_the_step_is_over(tmp_path):
    """And what the phase has started is ended, whatever happens."""
    ended = []

    def work():
        yield {"runs": 1}
        yield [row()]
        found = results.load(tmp_path)
        assert (found.rows, found.running, found.complete) == ([row()], ["phase", "step"], [])
        raise KeyboardInterrupt

    def steps(run):
        try:
            yield "step", work
        finally:
            ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        run_phase(Phase("phase", steps), Run(CPU, tmp_path, Results(), time.monotonic() + 9, print))
    assert results.load(tmp_path).rows == [row()]
    assert ended


def test_a_failure_is_a_part_of_the_results_and_others_go_on(tmp_path):
    def fails():
        yield [row()]
        yield {"wrong": 3}
        raise AssertionError("3 runs\nwrong")

    found, _ = run([("fails", fails), ("works", lambda: [{"runs": 2}])], tmp_path)
    assert [(s.name, s.failure, s.found) for s in found.steps] == [
        ("fails", "AssertionError: 3 runs wrong", {"wrong": 3}), ("works", None, {"runs": 2}),
    ]  # fmt: skip
    assert (found.rows, found.complete, found.running) == ([row()], ["phase"], None)


def test_a_second_run_goes_on_where_the_first_ran_out_of_time(tmp_path):
    done = []

    def late():
        done.append("late")
        if len(done) < 3:
            yield [row()]
            raise OutOfTime("come again")

    steps = [
        ("first", lambda: done.append("first") or []), ("late", late), ("short", lambda: done.append("short") or []),
    ]  # fmt: skip
    found, said = run(steps, tmp_path)
    assert (done, said) == (["first", "late", "short"], ["phase, late: come again"])
    assert ([s.name for s in found.steps], found.complete, found.rows) == (["first", "short"], [], [row()])
    found, said = run(steps, tmp_path, left=-1)
    assert (done, said) == (["first", "late", "short"], ["phase: no time left for late and what follows"])
    found, _ = run(steps, tmp_path)
    assert (done, found.complete) == (["first", "late", "short", "late"], ["phase"])


def test_a_phase_is_done_again_step_by_step(tmp_path):
    def again(old, *found):
        steps = [(str(i), partial(list, [{"us": us}]) if us else stop) for i, us in enumerate(found)]
        run_phase(phase(*steps), Run(CPU, tmp_path, results.resume(tmp_path), time.monotonic() + 9, print), old)

    def stop():
        raise KeyboardInterrupt

    def known():
        return [step.found["us"] for step in results.load(tmp_path).steps]

    again([], 1, 2)
    old = results.load(tmp_path).steps
    with pytest.raises(KeyboardInterrupt):
        again(old, 3, None)
    assert known() == [3, 2]
    again(old, 4, 4)
    assert known() == [3, 4], "what is new is not done again"
    assert results.load(tmp_path).complete == ["phase"]


# --- in processes of their own ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_that_crashes_or_hangs_costs_itself_alone(tmp_path):
    def apart(steps, limit):
        return run_apart(Phase(steps.__name__, steps, limit, step_limit=2), CPU, tmp_path, time.monotonic() + 300, {})

    assert apart(planted.broken_phase, 100) == "crashed before its first step: ImportError: no such thing"
    assert apart(planted.steps, 200) == "complete"
    found = results.load(tmp_path)
    ended = "ended the process or took more than 2 s: "
    assert [(s.name, s.found, (s.failure or "")[: len(ended)]) for s in found.steps] == [
        ("good", {"us": 1}, ""), ("crash", {}, ended), ("error", {}, "ZeroDivisionError: division by zero"),
        ("hang", {}, ended), ("last", {"us": 2}, ""),
    ]  # fmt: skip
    assert "Timeout" in (tmp_path / "steps.log").read_text(), "the log says where it hung"
    assert apart(planted.steps, 200) == "complete already"


@pytest.mark.slow
def test_a_phase_that_hangs_stops_at_its_limit(tmp_path):
    start = time.monotonic()
    endless = Phase("endless", planted.endless, limit=14, spare=1)
    assert run_apart(endless, CPU, tmp_path, start + 100, {}) == "out of time"
    assert time.monotonic() - start < 40
    found = results.load(tmp_path)
    assert [s.name for s in found.steps] == ["good"]
    assert (found.complete, found.running) == ([], None), "the next run tries the step again"
    assert run_apart(endless, CPU, tmp_path, time.monotonic() + 5, {}) == "no time left"


@pytest.fixture
def crashing(monkeypatch):
    """In place of the process of a phase: one that has ended at once."""
    told = []

    class Ended:
        process = SimpleNamespace(join=lambda limit: None, exitcode=1)

        def __init__(self, work, arguments, log, environ):
            told.append(arguments)

        end, last_words = (lambda self: None), (lambda self: "no such thing")

    monkeypatch.setattr(runner, "Child", Ended)
    return told


def test_a_step_under_way_when_an_earlier_run_was_killed_is_not_blamed_for_a_crash(tmp_path, crashing):
    results.save(Results(running=["phase", "step"]), tmp_path / results.FILE)
    how = run_apart(phase(), CPU, tmp_path, time.monotonic() + 100, {})
    assert how == "crashed before its first step: no such thing"
    assert (found := results.load(tmp_path)).steps == []
    assert (found.running, len(crashing)) == (None, 1)


def test_a_full_disk_does_not_end_the_programme(tmp_path, crashing, monkeypatch, capsys):
    def full(results, path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(runner, "save", full)
    assert run_apart(phase(), CPU, tmp_path, time.monotonic() + 100, {}).startswith("crashed before")
    assert capsys.readouterr().out == f"cannot write {tmp_path / results.FILE} yet: No space left on device\n"


@pytest.mark.parametrize(("limit", "cut"), [(50.0, False), (200.0, True)])
def test_a_phase_knows_what_ends_it(tmp_path, crashing, limit, cut):
    run_apart(Phase("phase", phase().steps, limit), CPU, tmp_path, time.monotonic() + 100, {})
    assert [arguments[-1] for arguments in crashing] == [cut]


def test_last_words_are_those_of_this_process(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("of an earlier one\n")
    child = Child(print, ("its own",), log, {})
    child.process.join()
    assert child.last_words() == "its own"
    silent = Child(sum, ((),), log, {})
    silent.process.join()
    assert silent.last_words() == "it said nothing"


# --- the programme for a lent GPU ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rehearsal(tmp_path, capsys):
    names = ["exact", "callers", "layers", "models", "test-exact", "test-gpu", "test-contract", "test-invariant"]
    arguments = ["--out", str(tmp_path), "--budget", "900", "--rehearse", "--phases", ",".join(names)]
    assert gpu.main(arguments) == 0
    out = capsys.readouterr().out
    assert [line.split(",")[0] for line in out.splitlines()[: len(names)]] == [f"{name}: complete" for name in names]
    assert "REHEARSAL, no measurement" in out
    found = results.load(tmp_path)
    assert found.complete == names
    assert [step.failure for step in found.steps if step.failure] == []
    assert {"layer1.0.conv2 float16 1", "conv1 bfloat16 1"} <= {s.name for s in found.steps if s.phase == "exact"}
    rows = [(r.suite, r.alternative, r.good) for r in found.rows]
    assert rows[-2:] == [("model", "eager", True), ("model", "ours graph", True)]
    assert len(rows) == 2 + 2 * 3
    with tarfile.open(tmp_path / gpu.ARCHIVE) as tar:
        assert {"results.json", "results.html", "exact.log"} <= set(tar.getnames())


def test_a_tool_out_of_time_is_not_waited_for_with_its_children(tmp_path):
    start = time.monotonic()
    late = Run(torch.device("cuda"), tmp_path, Results(), start, print)
    assert gpu_phases._output(["sh", "-c", "echo begun; sleep 20 & wait"], late) == (None, "begun\n")
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    ("code", "cut", "failure"),
    [
        (1, True, "exit code 1; tests/a.py::b - wrong"),
        (None, False, "no time to finish"),
        (None, True, "the tests did not finish"),
    ],
)
def test_tests_are_counted(tmp_path, monkeypatch, code, cut, failure):
    text = "a PASSED\nb FAILED\n" + "=== short test summary info\nFAILED tests/a.py::b - wrong\n" * (code is not None)
    monkeypatch.setattr(gpu_phases, "_output", lambda command, run: (code, text))
    cuda = Run(torch.device("cuda"), tmp_path, Results(), time.monotonic() + 60, print, cut)
    ((_, step),) = gpu_phases.tests(cuda, file="tests/a.py", select="b", few="b", processes=2)
    found = []
    with pytest.raises(OutOfTime if code is None and cut else AssertionError, match=failure):
        found.extend(step())
    assert (found[0]["PASSED"], found[0]["FAILED"]) == (1, 1)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_caller_that_fails_is_no_figure(tmp_path, fails_at):
    calls = []

    def fails(x):
        calls.append(x)
        if len(calls) == fails_at:
            raise ValueError("no such thing")

    run = Run(CPU, tmp_path, Results(), time.monotonic() + 60, print)
    assert callers._images_a_second([len, len], torch.zeros(8), run) > 0
    with pytest.raises(ValueError, match="no such thing"):
        callers._images_a_second([len, fails], torch.zeros(8), run)


def test_the_files_that_phases_name_are_there():
    files = [p.steps.keywords.get("file") for p in gpu.PHASES if isinstance(p.steps, partial)]
    assert [file for file in files if file and not (gpu_phases.ROOT / file).exists()] == []
    assert any(files)


STEPS = [results.Step(name, "step", 1.0, None, {}, None) for name in ("exact", "models")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of the programme's with a row, two steps and two complete phases; no GPU is asked for."""
    monkeypatch.setitem(ask.NEEDS, "benchmarks.gpu", ())
    results.save(Results([row()], [], STEPS, ["exact", "models"]), tmp_path / results.FILE)
    return tmp_path


def programme(folder, monkeypatch, find, *arguments):
    """The programme's exit code. In place of a process, `find(phase, results, again)` changes the results."""

    def apart(phase, device, folder, end, environ, *, again):
        known = results.resume(folder)
        find(phase, known, again)
        results.save(known, folder / results.FILE)
        return "done"

    monkeypatch.setattr(gpu, "run_apart", apart)
    return gpu.main(["--out", str(folder), *arguments])


def test_phases_are_repeated_when_asked(folder, monkeypatch):
    asked, again = [], results.Step("exact", "step", 2.0, None, {}, None)
    code = programme(folder, monkeypatch, lambda *args: asked.append((args[0].name, args[2])), "--again", "exact")
    assert asked[:3] == [("exact", True), ("callers", False), ("layers", False)]
    found = results.load(folder)
    assert (code, found.steps, found.rows) == (1, STEPS, [row()]), "nothing is forgotten before it is done again"
    code = programme(folder, monkeypatch, lambda phase, known, a: a and known.add([again]), "--again", "exact")
    assert (code, results.load(folder).steps) == (0, [again, STEPS[1]])


FAILED, GOOD = (results.Step("exact", "new", 1.0, failure, {}, None) for failure in ("wrong", None))


@pytest.mark.parametrize(
    ("found", "phases", "code"),
    [
        (None, "exact,models", 0),  # complete already
        (None, "ceilings", 1),
        (FAILED, "exact,ceilings", 1),
        (GOOD, "exact,ceilings", 0),
        (KeyboardInterrupt, "ceilings", 130),
    ],
)
def test_a_programme_that_finds_nothing_fails(folder, monkeypatch, capsys, found, phases, code):
    def find(phase, known, again):
        if found is KeyboardInterrupt:
            raise KeyboardInterrupt
        known.add([found] if found else [])

    assert programme(folder, monkeypatch, find, "--phases", phases) == code
    err = capsys.readouterr().err
    assert err == f"resnet-triton: error: nothing was measured; {folder} has what it had, and logs\n" * (code == 1)
    assert results.load(folder).steps == STEPS + [found] * (found in (FAILED, GOOD))
    with tarfile.open(folder / gpu.ARCHIVE) as tar:
        assert results.FILE in tar.getnames()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_rehearsal_and_a_gpu_do_not_go_on_with_each_other(folder, monkeypatch, capsys, kind):
    monkeypatch.setitem(ask.NEEDS, "benchmarks.gpu --rehearse", ())
    step = results.Step("exact", "step", 1.0, None, {}, {**CPU_ENVIRONMENT, "device_kind": kind})
    results.save(Results(steps=[step], complete=["exact"]), folder / results.FILE)
    rehearse = ["--rehearse"] * (kind == "cuda")
    assert programme(folder, monkeypatch, lambda *args: None, *rehearse) == 2
    assert "cannot go on with; choose another --out\n" in capsys.readouterr().err
