"""`resnet-triton bench` as a user meets it: what it writes, what it says of a wrong answer, and Ctrl-C."""

import json
from functools import partial
from pathlib import Path

import planted_alternatives as planted
import pytest

from resnet_triton.bench import alternatives, ceilings, command, race, results, worker
from resnet_triton.bench.worker import Spec
from resnet_triton.tools import cli

pytest.importorskip("matplotlib")
BENCH = ["bench", "--device", "cpu", "--image", "32", "--batches", "1", "--budget", "200", "--out"]
TINY = Spec(image=32, tiny=True)


@pytest.fixture
def contest(monkeypatch):
    """Planted alternatives in place of the real ones, in this process, and one layer."""

    def contest(*planted):
        chosen = {a.name: a for a in planted}
        monkeypatch.setattr(alternatives, "alternatives", lambda device: chosen)
        monkeypatch.setattr(command, "alternatives", lambda device: chosen)

    monkeypatch.setattr(race, "connect", planted.inline)
    monkeypatch.setattr(race, "TURN", 0.01)
    monkeypatch.setattr(race, "steps", partial(race.steps, rounds=(3, 3)))
    monkeypatch.setattr(race, "network", lambda spec: worker.network(TINY))
    monkeypatch.setattr(worker, "network", lambda spec, network=worker.network: network(TINY))
    monkeypatch.setitem(ceilings._COPY, "cpu", 1 << 20)
    cases = command.cases.cases
    monkeypatch.setattr(command.cases, "cases", lambda *args: cases(*args)[1:2])
    return contest


@pytest.mark.slow
def test_a_run(contest, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # or long cells are folded
    contest(planted.alternative(planted.right, ours=True), planted.alternative(planted.slow))
    assert cli.main([*BENCH, str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.html", "results.json", "results.md"]
    found = results.load(tmp_path)
    assert [(row.suite, row.alternative) for row in found.rows[:2]] == [("model", "right"), ("model", "slow")]
    assert {row.layer for row in found.rows[2:]} == {"layer1.0.conv1"}
    assert [c.name for c in found.ceilings] == ["copy", "matmul"]
    assert found.complete == ["ceilings", "model float32", "layers"]
    assert f"{results.speedup(found.rows[:2]):.2f}×" in capsys.readouterr().out


def test_a_wrong_answer_fails_the_command_and_claims_nothing(contest, tmp_path, capsys):
    contest(planted.alternative(planted.late, ours=True), planted.alternative(planted.slow))
    assert cli.main([*BENCH, str(tmp_path), "--suites", "model", "--json"]) == 1
    out, err = capsys.readouterr()
    assert [row["correct"] for row in json.loads(out)["rows"]] == [False, True]
    assert "resnet-triton: error: resnet18, 32x32, batch 1, float32, wall clock: late: gives a wrong answer" in err
    page = (tmp_path / "results.html").read_text()
    assert "ours is WRONG" in page
    assert "as fast as" not in page


@pytest.mark.slow
def test_a_phase_that_fails_is_named_and_the_others_go_on(contest, tmp_path, capsys, monkeypatch):
    contest(planted.alternative(planted.right, ours=True))
    monkeypatch.setattr(race.Race, "_reference", lambda *args: 1 / 0)
    assert cli.main([*BENCH, str(tmp_path)]) == 1
    assert "error: model float32, float32 1: ZeroDivisionError: division by zero" in capsys.readouterr().err
    assert {row.layer for row in results.load(tmp_path).rows} == {"layer1.0.conv1"}


@pytest.mark.parametrize(
    ("option", "message"),
    [("--dtypes", "no dtype 'x', expected"), ("--baselines", "no alternative 'x' on"), ("--models", "no model 'x', ")],
)
def test_what_cannot_be_run_is_named(tmp_path, capsys, option, message):
    assert cli.main(["bench", option, "x", "--out", str(tmp_path / "none")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_defaults():
    cpu = command.plan(device="cpu", out=Path("x"))
    assert (cpu.batches, cpu.dtypes, cpu.suites, cpu.budget) == ((1, 4, 16), ("float32",), ("model", "kernel"), 480)
    some = command.plan(device="cpu", baselines=["eager"], out=Path("x"))
    assert [a.name for a in some.alternatives] == ["eager", "ours"]
