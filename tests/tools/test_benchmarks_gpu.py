"""The programme for a GPU's first lease, rehearsed: it resumes, outlives crashes and hangs, and heeds red checks."""

import dataclasses
import json
import tarfile
import time
from pathlib import Path

import pytest
from synthetic_results import GPU, row

gpu = pytest.importorskip("benchmarks.gpu")
from benchmarks import gpu_steps, gpu_tools  # noqa: E402

FAULTY = """
import os, time

def steps(setting):
    yield "good", lambda: {"us": 1}
    yield "crash", lambda: os._exit(3)
    yield "error", lambda: 1 / 0
    yield "hang", lambda: time.sleep(600)
    yield "last", lambda: {"us": 2}

def endless(setting):
    yield "good", lambda: {"us": 1}
    yield "hang", lambda: time.sleep(600)

def good(setting):
    yield "good", lambda: {"us": 1}

def broken(setting):
    raise ImportError("no such thing")
"""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "faulty.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return tmp_path


def small(name):
    """A phase of the programme, cut to what a test can wait for."""
    phase = next(phase for phase in gpu.PHASES if phase.name == name)
    fewer = {"batches": [1], "dtypes": ["float16"], "alternatives": ["eager graph", "ours graph"]}
    options = {key: fewer.get(key, value) for key, value in phase.options.items()}
    return dataclasses.replace(phase, options=options, limit=300, step_limit=300, spare=0)


@pytest.mark.slow
def test_rehearsal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RESNET_TRITON_COMMIT", "abc")
    names = ["exact", "ceilings", "layers", "tune", "model-tuned", "sanitizer", "counters", "kernels"]
    phases = tuple(map(small, names))
    gpu.run(phases, tmp_path, 900, rehearse=True)
    journals = {name: gpu_steps.read(tmp_path / f"{name}.json") for name in names}
    for name, journal in journals.items():
        assert journal["complete"], (name, (tmp_path / f"{name}.log").read_text())
        assert journal["rows"], name
        assert not [row for row in journal["rows"].values() if "error" in row], name
        assert {"device", "driver", "clocks", "torch", "triton", "date", "heat"} <= set(journal["environment"])
        assert (journal["environment"]["commit"], journal["rehearsal"]) == ("abc", True)
    rows = journals["exact"]["rows"]
    assert all(row["exact"] for row in rows.values())
    assert {"conv1 float16 1", "fc float16 1"} <= set(rows)
    found = gpu.collect(journals)
    kinds = [(row.suite, row.alternative, row.correct) for row in found.rows]
    assert kinds[:2] == [("model", "eager", True), ("model", "ours graph, tuned", True)]
    assert len(kinds) == 2 + 2 * 3
    assert {kind[0] for kind in kinds[2:]} == {"kernel"}
    assert [ceiling["name"] for ceiling in found.ceilings] == ["copy", "matmul", "matmul"]
    table = json.loads((tmp_path / "nvidia-h200.json").read_text())
    assert len(table["entries"]) == 1
    with tarfile.open(tmp_path / gpu.ARCHIVE) as tar:
        assert {f"{name}.json" for name in names} | {"nvidia-h200.json", "exact.log"} <= set(tar.getnames())
    text = gpu.summary(tmp_path)
    assert len(text) < 60
    assert text[0].startswith("REHEARSAL")
    assert f"exact: {len(rows)} of {len(rows)}" in text
    capsys.readouterr()
    gpu.run(phases, tmp_path, 300, rehearse=True)
    assert capsys.readouterr().out.splitlines() == [f"{name}: complete already" for name in names]


def test_a_step_that_crashes_or_hangs_costs_itself_alone(faulty, capsys):
    phases = (
        gpu.Phase("broken", "faulty:broken"),
        gpu.Phase("faulty", "faulty:steps", limit=120, step_limit=1),
    )
    gpu.run(phases, faulty, 200, rehearse=True)
    broken, others = capsys.readouterr().out.splitlines()
    assert broken.startswith("broken: crashed (broken.log)")
    assert others.startswith("faulty: complete, 5 steps, 3 failed")
    ended = {"error": "ended the process or took more than 1 s"}
    assert gpu_steps.read(faulty / "faulty.json")["rows"] == {
        "good": {"us": 1}, "crash": ended, "error": {"error": "ZeroDivisionError: division by zero"}, "hang": ended,
        "last": {"us": 2},
    }  # fmt: skip
    assert "Timeout" in (faulty / "faulty.log").read_text(), "the log says where it hung"


def test_a_phase_that_hangs_stops_at_its_limit(faulty, capsys):
    phases = (gpu.Phase("endless", "faulty:endless", limit=6), gpu.Phase("good", "faulty:good"))
    start = time.monotonic()
    gpu.run(phases, faulty, 60, rehearse=True)
    assert time.monotonic() - start < 30
    endless, good = capsys.readouterr().out.splitlines()
    assert endless.startswith("endless: out of time, 1 steps")
    assert good.startswith("good: complete, 1 steps")
    journal = gpu_steps.read(faulty / "endless.json")
    assert (journal["complete"], journal["running"]) == (False, None), "the next call tries the step again"


def test_no_time_left(faulty, capsys):
    gpu.run((gpu.Phase("good", "faulty:good", spare=45),), faulty, 50, rehearse=True)
    assert capsys.readouterr().out == "good: no time left\n"


def test_no_speed_up_on_a_red_check(tmp_path):
    def text(**ours):
        gpu_row = {"batch": 8, "dtype": "float16", "clock": "gpu", "l2": "warm", "environment": GPU}
        times = {"eager graph": 0.3, "compile default": 0.15, "resnet_triton": 0.1}
        rows = [row(name, ms=ms, **gpu_row, **(ours if ms == 0.1 else {})) for name, ms in times.items()]
        journal = {"environment": GPU, "rows": {"float16 8": {"rows": [dataclasses.asdict(r) for r in rows]}}}
        gpu_steps.write(tmp_path / "model.json", journal)
        return "\n".join(gpu.summary(tmp_path))

    assert (
        "float16 8: resnet_triton 100, compile default 150, eager graph 300 us\n  1.50x compile default: resnet_triton"
        in text()
    )
    for wrong in ({"correct": False}, {"p50_s": None, "failure": "no such kernel"}):
        assert "WRONG OR FAILED: resnet_triton" in text(**wrong)
        assert "x compile" not in text(**wrong)


SANITIZER = """#!/bin/sh
echo "========= ERROR SUMMARY: $PLANTED_ERRORS errors"
"""
PROFILER = """#!/bin/sh
echo "==PROF== Connected"
echo '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
echo '"0","conv_box_kernel","gpu__time_duration.sum","us","3.1"'
"""


def test_tools_are_read(tmp_path, monkeypatch):
    for name, text in (("compute-sanitizer", SANITIZER), ("ncu", PROFILER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    setting = gpu_steps.Setting(tmp_path / "tools.json", {}, False, time.monotonic() + 60)
    for errors in ("0", "3"):
        monkeypatch.setenv("PLANTED_ERRORS", errors)
        _, step = next(iter(gpu_tools.sanitizer(setting)))
        assert step()["clean"] is (errors == "0")
        assert step()["errors"] == int(errors)
    row = {"shape": {}, "us": 2.0, "times": 1}
    gpu_steps.write(tmp_path / "layers.json", {"rows": {"layer1.0.conv1 float16 1": row}})
    ((key, step),) = gpu_tools.counters(setting)
    assert key == "layer1.0.conv1 float16 1"
    assert step() == {"metrics": [["conv_box_kernel", "gpu__time_duration.sum", "3.1", "us"]]}
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match="no ncu here"):
        step()


def test_unknown_phases_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "new"), "--phases", "exact,nothing"])
    assert "no phase 'nothing', expected some of exact, ceilings, model" in capsys.readouterr().err
    assert not Path(tmp_path / "new").exists()
