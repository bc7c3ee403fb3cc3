"""The model suite: it times what it says, and what is slow, wrong, broken or stuck shows as that and harms no other."""

import dataclasses
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import planted_alternatives as planted
import pytest
import torch

from resnet_triton.bench import alternatives, engines, model, results
from resnet_triton.bench.check import relative_error
from resnet_triton.bench.worker import Spec, network

SPEC = Spec(image=32, tiny=True)


def gone(pid):
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().split()[2] == "Z"


@pytest.fixture(scope="module")
def rows():
    """What a race of planted alternatives leaves at two batch sizes."""
    chosen = [
        planted.alternative(planted.right, ours=True), planted.alternative(planted.slow),
        planted.alternative(planted.late), planted.alternative(planted.broken),
        planted.alternative(planted.crash, cold=True), planted.alternative(planted.counts_starts, cold=True),
    ]  # fmt: skip
    with model.Race(SPEC, chosen) as race:
        found = race.measure(1, 2, time.monotonic() + 300) + race.measure(2, 1, time.monotonic() + 300)
        found = model.with_warm_starts(found, "float32", 1, race.warm_start(1, time.monotonic() + 300))
    return {(row.alternative, row.batch): row for row in found}


def test_every_alternative_has_a_row_that_the_schema_accepts(rows):
    assert len(rows) == 12
    data = {"format": results.FORMAT, "version": results.VERSION, "ceilings": [], "predictions": []}
    assert results.check({**data, "rows": [dataclasses.asdict(row) for row in rows.values()]}) is None


def test_a_planted_slowdown_shows(rows):
    right, slow = rows["right", 1], rows["slow", 1]
    assert right.good
    assert slow.good
    assert planted.NAP <= slow.p50_s - right.p50_s < 2 * planted.NAP
    assert len(right.samples_s) > len(slow.samples_s) >= model.LEAST_ROUNDS
    assert results.speedup([right, slow]) == pytest.approx(slow.p50_s / right.p50_s)


def test_a_wrong_answer_shows_and_wins_nothing(rows):
    wrong = rows["late", 1]
    assert wrong.correct is False
    assert wrong.error_before <= wrong.error_limit < wrong.error_after, "it was right before it was timed"
    assert not wrong.good
    assert results.best([rows["slow", 1], wrong], ours=False).alternative == "slow"
    mine = dataclasses.replace(wrong, ours=True)
    assert results.speedup([rows["slow", 1], mine, rows["right", 1]]) is None, "no speed-up on a red check"


def test_a_failure_says_why_in_one_line(rows):
    assert rows["broken", 1].failure == "ValueError: no such thing"
    assert rows["crash", 1].failure == "its process ended with code 7: about to crash"
    assert rows["crash", 2].failure == rows["crash", 1].failure, "it gets another process for another batch size"
    assert rows["broken", 1].samples_s == []


def test_cold_and_warm_starts(rows):
    row = rows["counts_starts", 1]
    assert row.first_call_cold_s > 0.5 > row.first_call_warm_s
    assert rows["right", 1].first_call_warm_s is None, "nothing was kept that a second start could find"


def test_peak_memory(rows):
    if rows["right", 1].peak_bytes is None:
        pytest.skip("this system does not tell")
    more = rows["late", 1].peak_bytes - rows["right", 1].peak_bytes
    assert 0.9 * planted.MEMORY < more < 1.5 * planted.MEMORY


def test_each_row_says_where_it_was_measured(rows):
    where = rows["right", 1].environment
    assert where["torch"] == torch.__version__
    assert where["device_kind"] == "cpu"
    assert where["device"] != "unknown"


@pytest.mark.slow
def test_what_hangs_is_ended_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED_PID", str(tmp_path / "pid"))
    chosen = [planted.alternative(planted.forks), planted.alternative(planted.hang, cold=True)]
    with model.Race(SPEC, chosen) as race:
        folder = race.folder
        assert all(row.good for row in race.measure(1, 0, time.monotonic() + 200))
        start = time.monotonic()
        forks, hang = race.measure(2, 0, start + 12)
        assert time.monotonic() - start < 60
        assert forks.good, "one that was ready in time is timed all the same"
        assert hang.failure.startswith("took more than")
    assert gone(int((tmp_path / "pid").read_text()))
    assert not folder.exists()


def test_workers_do_not_outlive_a_conductor_that_was_killed(tmp_path):
    script = """
        import sys, time
        from pathlib import Path
        import torch
        sys.path.insert(0, sys.argv[1])
        import planted_alternatives as planted
        from resnet_triton.bench import model
        from resnet_triton.bench.worker import Spec
        if __name__ == "__main__":
            folder, hang = Path(sys.argv[2]), planted.alternative(planted.hang)
            process = model.Process(Spec(image=32, tiny=True), hang, folder)
            process.ask("hello", 60)
            torch.save({"images": torch.ones(2, 3, 32, 32), "expected": torch.ones(2, 16)}, folder / "data.pt")
            process.send("prepare", batch=2, file=str(folder / "data.pt"))
            time.sleep(2)
            print(process.process.pid, flush=True)
            time.sleep(600)
    """
    (tmp_path / "conduct.py").write_text(textwrap.dedent(script))
    here = Path(__file__).parents[1]
    command = [sys.executable, str(tmp_path / "conduct.py"), str(here), str(tmp_path / "worker")]
    environ = {**os.environ, "PYTHONPATH": str(here.parent)}
    conductor = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
    pid = int(conductor.stdout.readline())
    conductor.kill()
    conductor.wait()
    conductor.stdout.close()
    deadline = time.monotonic() + 20
    while gone(pid) is False and time.monotonic() < deadline:
        time.sleep(0.2)
    assert gone(pid)


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
    assert [name for name in cpu if name not in engines.installed()] == expected
    modes = [f"compile {mode}{freezing}" for mode in alternatives.COMPILE_MODES for freezing in ("", " freezing")]
    assert {*modes, "folded graph", "cudnn fused graph", "ours graph"} < set(gpu)
    assert [name for name, a in gpu.items() if a.ours] == ["ours", "ours graph"]
    with pytest.raises(ValueError, match="no alternative 'fast' on cpu, expected some of eager, eager channels_last"):
        alternatives.select(["eager", "fast"], torch.device("cpu"))


@pytest.mark.parametrize("name", ["eager", "eager channels_last", "folded", "ours"])
def test_alternatives_agree(small, name):
    base, images, expected = small
    (alternative,) = alternatives.select([name], torch.device("cpu"))
    images = alternative.images(images)
    assert images.is_contiguous(memory_format=torch.channels_last) is alternative.channels_last
    with torch.inference_mode():
        assert relative_error(alternative.build(base, images)(images), expected) < 1e-6


def test_cudnn_fused_computes_the_model(small, monkeypatch):
    base, images, expected = small

    def conv_relu(x, weight, bias, stride, padding, dilation, groups):
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    def conv_add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        return (torch.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", conv_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", conv_add_relu)
    with torch.inference_mode():
        assert relative_error(alternatives.cudnn_fused(base, images)(images), expected) < 1e-6


@pytest.mark.parametrize("name", ["onnxruntime", "jax"])
def test_other_engines_compute_the_model(small, name):
    if name not in engines.installed():
        pytest.skip(f"{name} is not installed")
    base, images, expected = small
    with torch.inference_mode():
        assert relative_error(engines.installed()[name](base, images)(images), expected) < 1e-5
