"""Races: they time what they say, and what is slow, wrong, broken or stuck shows as that and harms no other."""

import copy
import dataclasses
import os
import re
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import planted_alternatives as planted
import pytest
import torch
from test_robust_processes import ended

from resnet_triton import functional, optimize
from resnet_triton.bench import alternatives, check, race, results
from resnet_triton.bench.check import relative_error
from resnet_triton.bench.runner import OutOfTime, Run
from resnet_triton.bench.worker import Spec, network
from resnet_triton.ops import dispatch

SPEC = Spec(image=32, tiny=True)


@pytest.fixture(scope="module")
def rows():
    """A race in this process: what it judges."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(race, "connect", planted.inline)
        patch.setattr(race, "TURN", 0.05)
        faults = (planted.slow, planted.wrong, planted.late, planted.broken, planted.ours_in_disguise)
        others = map(planted.alternative, faults)
        with race.Race(SPEC, [planted.alternative(planted.right, ours=True), *others], print) as contest:
            contest.line_up(1, time.monotonic() + 200)
            *_, last = contest.measure(1, 0, time.monotonic() + 200, (5, 5))
    return {row.alternative: row for row in last}


def test_every_alternative_has_a_row_that_can_be_written(rows, tmp_path):
    assert list(rows) == ["right", "slow", "wrong", "late", "broken", "ours_in_disguise"]
    results.save(results.Results(list(rows.values())), tmp_path / "results.json")
    assert results.load(tmp_path).rows == list(rows.values())
    assert rows["right"].environment["torch"] == torch.__version__


def test_a_planted_slowdown_shows(rows):
    right, slow = rows["right"], rows["slow"]
    assert right.good
    assert slow.good
    assert planted.NAP <= slow.p50_s - right.p50_s < 2 * planted.NAP
    assert len(right.samples_s) > len(slow.samples_s) >= 5


def test_a_wrong_answer_shows_and_wins_nothing(rows):
    wrong, late = rows["wrong"], rows["late"]
    assert wrong.error_before > wrong.error_limit
    assert late.error_before <= late.error_limit < late.error_after, "it was right before it was timed"
    assert (wrong.correct, late.correct) == (False, False)
    mine = dataclasses.replace(late, ours=True)
    assert results.speedup([rows["slow"], mine, rows["right"]]) is None, "no speed-up on a red check"


def test_a_failure_says_why_in_one_line(rows):
    assert (rows["broken"].failure, rows["broken"].samples_s) == ("ValueError: no such thing", [])
    assert "this would compare ours with ours" in rows["ours_in_disguise"].failure


def test_ours_must_run_kernels_on_a_gpu(device):
    """Else PyTorch would be compared with PyTorch."""
    gpu, before = torch.device("cuda"), Counter(dispatch.calls)
    optimize(network(SPEC), kernels="torch")(torch.zeros(1, 3, 32, 32))
    check.right_code(True, torch.device("cpu"), before)
    with pytest.raises(RuntimeError, match="no kernel of ours ran"):
        check.right_code(True, gpu, before)
    functional.add_relu(*torch.zeros(2, 1, 4, 2, 2, device=device), kernels="triton")
    check.right_code(True, gpu, before)


def test_what_was_measured_is_there_before_the_race_is_over(monkeypatch):
    """Whoever stops after any of these rows has them, judged."""
    monkeypatch.setattr(race, "connect", planted.inline)
    chosen = [planted.alternative(planted.right, ours=True), planted.alternative(planted.slow)]
    with race.Race(SPEC, chosen, print) as c:
        c.line_up(1, time.monotonic() + 100)
        first = next(c.measure(1, 100, time.monotonic() + 100))
        assert [(row.alternative, row.good) for row in first] == [("right", True)]
        late = [row for some in c.measure(1, 0, time.monotonic() - 1, (0, 0)) for row in some]
    assert [row.failure for row in late] == ["skipped: the budget was used up"] * 2


class Told(planted.Inline):
    """Keeps what all were asked, and takes too long to prepare `late`; the others need a moment."""

    sent: ClassVar[list[str]] = []

    def send(self, message):
        self.sent.append((self.what[1].name, message[0]))
        super().send(message)

    def poll(self, limit):
        if self.request != "prepare" or (self.what[1].build is not planted.late and limit > 0):
            return True
        time.sleep(max(limit, 0))
        return False


def raced(run, *chosen):
    """What steps of a race where time is short have found beside rows, and how they failed."""
    found = {}
    for name, action in race.together(SPEC, chosen, [1, 2], run, seconds=0, rounds=(1, 1)):
        try:
            for some in action():
                if isinstance(some, dict):
                    found |= some
                else:
                    run.results.add(some)
        except Exception as error:
            found[name] = error
    return found


@pytest.fixture
def short(monkeypatch, tmp_path):
    """A run where time is short; in a race of this process, `late` is never ready."""
    monkeypatch.setattr(race, "connect", lambda spec, alternative, folder: (Told(spec, alternative),) * 2)
    Told.sent.clear()
    return Run(torch.device("cpu"), tmp_path, results.Results(), time.monotonic() + 9, print)


CHOSEN = planted.alternative(planted.right, ours=True), planted.alternative(planted.late, cold=True)


def test_where_time_is_short_all_compile_before_anything_is_timed(short):
    """Who is not ready by then fails alone. What another phase has measured stays, and is not that failure's victim."""
    run = short
    assert raced(run, *CHOSEN) == {}
    asked = [request for _, request in Told.sent]
    timing = asked.index("turn")
    assert asked.index("prepare") < timing
    assert "prepare" not in asked[timing:]
    compiling_first = ["late", "late", "right", "right"]
    assert [name for name, request in Told.sent if request == "prepare"] == compiling_first
    rows = {(row.alternative, row.batch): row for row in run.results.rows}
    assert {key for key, row in rows.items() if row.good} == {("right", 1), ("right", 2)}
    assert {row.first_call_s for row in rows.values()} == {None}
    assert all(rows["late", batch].failure.startswith("took more than ") for batch in (1, 2))

    broken = dataclasses.replace(planted.alternative(planted.broken, ours=True), name="right")
    assert raced(run, broken) == {"right failed": "ValueError: no such thing"}
    assert [row.good for row in run.results.rows if row.alternative == "right"] == [True, True]


def test_who_was_late_since_the_budget_was_used_up_is_tried_again(short):
    found = raced(dataclasses.replace(short, cut=True), *CHOSEN)
    assert {name: (type(error), str(error)) for name, error in found.items()} == dict.fromkeys(
        ["float32 1", "float32 2"], (OutOfTime, "no time for late")
    )
    assert {(row.alternative, row.batch) for row in short.results.rows if row.good} == {("right", 1), ("right", 2)}


def test_a_batch_size_without_a_reference_leaves_the_others(short, monkeypatch):
    reference = race.Race._reference

    def fails(self, batch):
        if batch == 1:
            raise RuntimeError("no memory")
        return reference(self, batch)

    monkeypatch.setattr(race.Race, "_reference", fails)
    found = raced(short, CHOSEN[0])
    assert {name: str(error) for name, error in found.items()} == {"float32 1": "no memory"}
    assert [(row.alternative, row.batch) for row in short.results.rows if row.good] == [("right", 2)]


def test_who_does_not_start_leaves_time_for_those_who_do(monkeypatch):
    class Silent(planted.Inline):
        def poll(self, limit):
            if self.what[1].build is planted.hang:
                time.sleep(max(limit, 0))
                return False
            return limit >= 0 or self.request == "hello"  # the answer has long been there

    monkeypatch.setattr(race, "connect", lambda spec, alternative, folder: (Silent(spec, alternative),) * 2)
    with race.Race(SPEC, [planted.alternative(planted.hang), CHOSEN[0]], print) as contest:
        contest.line_up(1, time.monotonic() + 3)
        *_, last = contest.measure(1, 0, time.monotonic() + 60, (1, 1))
    assert [(row.alternative, row.good) for row in last] == [("hang", False), ("right", True)]
    assert re.fullmatch(r"took more than [0-3] s to start", last[0].failure)


@pytest.mark.slow
def test_processes_crash_and_hang_alone_and_start_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED_PID", str(tmp_path / "pid"))
    chosen = [*map(planted.alternative, (planted.forks, planted.late, planted.crash, planted.hang))]
    with race.Race(SPEC, chosen, print) as contest:
        folder, rows = contest.folder, {}
        for batch, seconds in ((1, 200), (2, 12)):
            contest.line_up(batch, time.monotonic() + 200)
            start = time.monotonic()
            for some in contest.measure(batch, 0, start + seconds):
                rows |= {(row.alternative, row.batch): row for row in some}
        assert time.monotonic() - start < 60
    assert rows["crash", 1].failure == "its process ended with code 7: about to crash"
    assert rows["crash", 2].good, "it gets another process for another batch size"
    assert rows["hang", 1].good
    assert re.fullmatch(r"skipped: the budget was used up, \d+ s into its first call", rows["hang", 2].failure)
    assert rows["forks", 2].good, "one that was ready in time is timed all the same"
    assert ended({int((tmp_path / "pid").read_text())}), "what an alternative has started is ended with it"
    assert not folder.exists()


@pytest.mark.slow
def test_workers_do_not_outlive_a_conductor_that_was_killed(tmp_path):
    script = """
        import sys, time
        from pathlib import Path
        from resnet_triton.bench.child import Child
        if __name__ == "__main__":
            log = Path(sys.argv[1])
            child = Child(time.sleep, (600,), log, {})
            while not log.exists():
                time.sleep(0.1)
            print(child.process.pid, flush=True)
            time.sleep(600)
    """
    (tmp_path / "conduct.py").write_text(textwrap.dedent(script))
    command = [sys.executable, str(tmp_path / "conduct.py"), str(tmp_path / "log.txt")]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as conductor:
        pid = int(conductor.stdout.readline())
        conductor.kill()
    assert ended({pid})


# --- alternatives ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A small model, two images, and its logits in fp64."""
    base = network(SPEC)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = network(SPEC).double()(images.double())
    return base, images, expected


def test_what_is_compared_on_a_cpu_and_on_a_gpu():
    cpu, gpu = (alternatives.alternatives(torch.device(kind)) for kind in ("cpu", "cuda"))
    expected = ["eager", "eager channels_last", "folded", "compile default", "compile default freezing", "ours"]
    assert list(cpu) == expected
    modes = [f"compile {mode}{freezing}" for mode in alternatives.COMPILE_MODES for freezing in ("", " freezing")]
    assert {*modes, "folded graph", "cudnn fused graph", "ours graph"} < set(gpu)
    assert [name for name, a in gpu.items() if a.ours] == ["ours", "ours graph"]


@pytest.mark.parametrize("name", ["eager", "eager channels_last", "folded", "ours"])
def test_alternatives_agree(small, name):
    base, images, expected = small
    (alternative,) = alternatives.select([name], torch.device("cpu"))
    images = alternative.images(images)
    assert images.is_contiguous(memory_format=torch.channels_last) is alternative.channels_last
    with torch.inference_mode():
        built = alternative.build(copy.deepcopy(base), images)
        assert relative_error(built(images), expected) < 1e-6
    filters = dict(built.named_parameters())["layer1.0.conv1.weight"]
    assert filters.is_contiguous(memory_format=torch.channels_last) is alternative.channels_last, "or cuDNN converts"


def test_cudnn_computes_the_model(small, monkeypatch):
    base, images, expected = small
    planted.cudnn_on_a_cpu(monkeypatch)
    with torch.inference_mode():
        assert relative_error(alternatives.cudnn_model(base, images)(images), expected) < 1e-6
