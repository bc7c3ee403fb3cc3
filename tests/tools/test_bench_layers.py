"""Layers: what is measured, and that wrong, failing and slow alternatives show as such."""

import json
import os
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import planted_alternatives as planted
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from resnet_triton.bench import baselines, ceilings, data, layers, results
from resnet_triton.bench.cases import cases, grouped
from resnet_triton.bench.data import filled
from resnet_triton.bench.layers import Problem, applicable
from resnet_triton.bench.runner import OutOfTime, Run
from resnet_triton.kernels.launch import Launch
from resnet_triton.ops import OPERATORS, dispatch
from resnet_triton.support import timing

CPU = torch.device("cpu")


def small(*names, batch=1, dtype="float32", image=32):
    """Some layers of a ResNet-18 on small images."""
    found = cases(["resnet18"], [batch], [dtype], image=image)
    return [next(case for case in found if case.layer == name) for name in names] if names else found


def measure(case, device=CPU, alternatives=("ours", "eager"), kernels="auto", seconds=0.01):
    return layers.measure(case, device, {}, alternatives=alternatives, kernels=kernels, seconds=seconds)


def measured(name, **options):
    """The rows of a layer by alternative, timed for a moment."""
    return {row.alternative: row for row in measure(*small(name), **options)}


def plant(monkeypatch, operator, form):
    """Replace our model's CPU path of an operator by `form(right answer)`."""
    real = OPERATORS[operator].reference
    monkeypatch.setattr(OPERATORS[operator], "reference", lambda call: form(real(call)))


# --- cases -----------------------------------------------------------------------------------------------------------


def test_layers_of_resnet18():
    found = cases(["resnet18"], [2], ["float16"])
    assert [(c.layer, tuple(c.call.ours.x.shape[1:])) for c in found if c.call.operator != "conv_bn_relu"] == [
        ("conv1", (3, 224, 224)),
        ("fc", (512, 7, 7)),
        ("conv1 max_pool2d", (64, 112, 112)),
        *((f"layer{i}.0.conv2 add_relu", (32 << i, 112 >> i, 112 >> i)) for i in (1, 2, 3, 4)),
        ("fc global_avg_pool", (512, 7, 7)),
        ("fc linear", (512,)),
    ]
    assert sum(case.call.operator == "conv_bn_relu" for case in found) == 14
    assert {case.call.operator for case in found} == set(OPERATORS)
    assert {(case.batch, len(case.call.ours.x), case.call.ours.x.dtype) for case in found} == {(2, 2, torch.float16)}


def test_models_share_their_cases():
    found = {(case.model, case.layer): case for case in cases()}
    assert list(dict.fromkeys(model for model, _ in found)) == ["resnet18", "resnet50"], "34's are all among 18's"
    assert found["resnet50", "layer3.0.conv3"].call.shape.shortcut_c == 512
    assert ("resnet50", "layer3.1.conv2") not in found
    several = cases(["resnet18"], [1, 3], ["float32", "bfloat16"])
    assert len({(case.dtype, case.batch, case.layer) for case in several}) == 4 * len(cases(["resnet18"]))


def test_grouped_convolutions():
    found = grouped([1], ["float32"])
    assert found[7].cost.flops == 2 * 56 * 56 * 128 * 9 * 4
    assert found[1].call.ours.output().shape == (1, 96, 56, 56)
    assert all(row.good for row in measure(found[6]))


def test_data_as_in_a_trained_network():
    (case,) = small("layer2.0.conv2", batch=4)
    first, other = (filled(case.call.ours, CPU, seed=seed, kernels="auto") for seed in (0, 1))
    assert first.x.is_contiguous(memory_format=torch.channels_last)
    assert first.weight.std().item() == pytest.approx((128 * 9) ** -0.5, rel=0.02)
    assert first.batch_norm.running_var.min() > 0.4
    assert not torch.equal(first.x, other.x)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_every_row_is_valid_and_right():
    rows = [row for case in small() for row in measure(case, alternatives=["eager", "ours"])]
    for row in rows:
        assert (row.good, row.failure, row.ours) == (True, None, row.alternative == "ours"), row
        assert (row.suite, row.model, row.clock, row.l2) == ("kernel", "resnet18", "wall", "uncontrolled")
        assert len(row.samples_s) >= 5
        assert row.bytes > 0
        assert row.config is None, "PyTorch has no tiles"
    assert len(results.Results(rows).tasks()) == len(small()), "no two cases share a name"
    conv = next(row for row in rows if row.layer == "layer1.0.conv1")
    assert (conv.flops, conv.bytes) == (2 * 8 * 8 * 64 * 576, 4 * (2 * 8 * 8 * 64 + 64 * 576))


def test_half_precision_is_held_to_half_precision():
    (row,) = measure(*small("layer1.0.conv2", dtype="bfloat16"), alternatives=["ours"])
    assert row.good
    assert 2 * 2**-7 <= row.error_limit < 4 * 2**-7


@pytest.mark.slow
def test_torch_compile():
    rows = measured("layer2.0.conv2", alternatives=["compile", "eager"])
    assert rows["compile"].good, rows["compile"]


@pytest.mark.parametrize("wrong", [lambda y: y * 1.001, lambda y: y * float("nan"), lambda y: y.zero_()])
def test_a_wrong_answer_is_red_and_gains_nothing(monkeypatch, wrong):
    plant(monkeypatch, "conv_bn_relu", wrong)
    rows = measured("layer1.0.conv1")
    assert (rows["ours"].correct, rows["eager"].correct) == (False, True)
    assert results.speedup(list(rows.values())) is None


def test_an_answer_that_goes_wrong_later_is_red(monkeypatch):
    calls = count()
    plant(monkeypatch, "add_relu", lambda y: y + (next(calls) > 8))
    row = measured("layer1.0.conv2 add_relu")["ours"]
    assert row.error_before <= row.error_limit < row.error_after
    assert row.correct is False


@pytest.mark.parametrize("good_calls", [0, 9])
def test_a_failure_is_one_row(monkeypatch, good_calls):
    calls = []

    def fail(y: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) > good_calls:
            raise RuntimeError("no\nsuch " + "thing " * 500)
        return y

    plant(monkeypatch, "linear", fail)
    rows = measured("fc linear")
    ours, eager = rows["ours"], rows["eager"]
    assert ours.failure.startswith("RuntimeError: no such thing thing")
    assert len(ours.failure) < 1000
    assert (ours.samples_s, ours.p50_s, ours.correct) == ([], None, None)
    assert eager.good
    assert len(calls) == good_calls + 1, "a failure is final"


def test_without_a_reference_all_rows_say_so(monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 0)
    rows = measured("fc")
    assert [row.failure[:26] for row in rows.values()] == ["no reference: ValueError: "] * 2


def test_a_slowdown_shows_in_full(monkeypatch):
    plant(monkeypatch, "linear", lambda y: time.sleep(0.06) or y)
    eager = baselines.EAGER["linear"]
    monkeypatch.setitem(baselines.EAGER, "linear", lambda *args: time.sleep(0.02) or eager(*args))
    assert results.speedup(list(measured("fc linear").values())) == pytest.approx(1 / 3, rel=0.5)


def test_the_deadline_is_kept(monkeypatch, tmp_path):
    """Three layers took 3, 7 and 2 seconds; another 7 might take until 119."""
    now, todo, lasts = [100.0], small(), iter([3.0, 7.0, 2.0])
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def each():
        for _ in layers.steps(todo, Run(CPU, tmp_path, results.Results(), 118.9, print)):
            now[0] += next(lasts)

    with pytest.raises(OutOfTime, match=f"no time left for {len(todo) - 3} of {len(todo)} layers"):
        each()


# --- our kernels, and cuDNN's ----------------------------------------------------------------------------------------


def test_ours_are_the_kernels(device, monkeypatch):
    launched = []
    real = Launch.run
    monkeypatch.setattr(timing, "interleaved_for", lambda seconds, calls: timing.interleaved(calls, rounds=2, warmup=0))
    monkeypatch.setattr(Launch, "run", lambda self: launched.append(self.kernel.__name__) or real(self))
    names = ["layer1.0.conv2", "conv1 max_pool2d", "layer4.0.conv2 add_relu", "fc global_avg_pool"]
    rows = [row for case in small(*names) for row in measure(case, device, ["ours"], "triton")]
    assert all(row.good for row in rows), rows
    convolution, *others = dict.fromkeys(launched)
    assert convolution.startswith("conv_")
    assert others == [f"{name}_kernel" for name in ("max_pool", "add_relu", "global_avg_pool")]
    assert rows[0].config["block_k"] >= 16
    assert [row.config for row in rows[1:]] == [None] * 3


def test_tiles_are_plain_data():
    (case,) = small("layer1.0.conv1", batch=32)
    tiles = baselines.tiles(filled(case.call.ours, CPU, seed=0, kernels="triton"))
    assert json.loads(json.dumps(tiles)) == tiles


def test_a_kernel_that_writes_nothing_is_red(device, monkeypatch):
    (case,) = small("fc global_avg_pool")
    problem = Problem(case.call.ours, device, kernels="triton")
    call, before = problem.build("ours")[0], dict(dispatch.calls)
    assert problem.error(call) <= problem.limit
    assert dict(dispatch.calls) == before, "the operator, which plans each time, was not called"
    monkeypatch.setattr(Launch, "run", lambda self: None)
    monkeypatch.setattr("shadow.Watch.finish", lambda self: None, raising=False)
    assert not problem.error(call) <= problem.limit


@pytest.mark.parametrize("layer", ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv2"])
def test_batch_norm_is_folded_for_cudnn(monkeypatch, layer):
    planted.cudnn_on_a_cpu(monkeypatch)
    (case,) = small(layer, batch=2)
    problem = Problem(case.call.ours, CPU)
    (call,) = problem.build("cudnn fused")
    assert problem.error(call) < 1e-6


def test_which_alternatives_apply():
    conv, head = small("layer1.0.conv1", "fc")
    assert applicable(conv.call, CPU) == ["ours", "eager", "compile"]
    assert applicable(conv.call, torch.device("cuda")) == ["ours", "eager", "cudnn fused", "compile"]
    assert applicable(head.call, torch.device("cuda"), ["cudnn fused", "eager"]) == ["eager"]


def test_more_images_than_fp64_takes_at_a_time(monkeypatch):
    (case,) = small("layer2.0.conv2", batch=5)
    whole = Problem(case.call.ours, CPU).exact
    monkeypatch.setattr(data, "CHUNK", 2)
    torch.testing.assert_close(Problem(case.call.ours, CPU).exact, whole, rtol=1e-12, atol=1e-12)


def test_on_a_gpu_buffers_take_turns(monkeypatch):
    """The GPU's part on CPU tensors, with another clock."""
    places, eager, fill = [], baselines.EAGER["conv_bn_relu"], data.filled

    def noted(call):
        y = eager(call)
        places.append((call.x.data_ptr(), y.data_ptr()))
        return y

    def replay(work, replays):
        places.clear()
        work()
        return [2.0 * sets] * replays

    monkeypatch.setitem(baselines.EAGER, "conv_bn_relu", noted)
    monkeypatch.setattr(data, "filled", lambda call, device, **options: fill(call, CPU, **options))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda where: SimpleNamespace(L2_cache_size=1 << 20))
    monkeypatch.setattr(timing, "replay", replay)
    sets = 1 + (2 << 20) // (4 * (2 * 8 * 8 * 64 + 64 * 576 + 4 * 64))
    eager_row, cudnn = measure(*small("layer1.0.conv1"), torch.device("cuda"), ["eager", "cudnn fused"])
    assert (eager_row.clock, eager_row.l2, eager_row.good) == ("gpu", "cold", True)
    assert set(eager_row.samples_s) == {2.0}
    assert "cudnn_convolution_relu" in cudnn.failure, "CPU tensors are not for cuDNN"
    inputs, outputs = zip(*places[:sets], strict=True)
    assert len({*inputs}) == len({*outputs}) == sets, "every call has buffers of its own"


@pytest.mark.gpu
def test_on_a_gpu():
    gpu = torch.device("cuda")
    chosen = [case for case in cases(["resnet18"], [2], ["float16"]) if case.layer in ("conv1", "layer2.0.conv2", "fc")]
    for case in chosen:
        rows = measure(case, gpu, layers.ALTERNATIVES)
        assert all(row.good for row in rows), rows
        assert {(row.clock, row.l2) for row in rows} == {("gpu", "cold")}
        assert next(row for row in rows if row.ours).p50_s < 1e-3


# --- ceilings --------------------------------------------------------------------------------------------------------


def test_ceilings(monkeypatch, tmp_path):
    monkeypatch.setitem(ceilings._COPY, "cpu", 16 << 20)
    steps = ceilings.steps(["float32"], Run(CPU, tmp_path, results.Results(), 0, print))
    copy, matmul = [ceiling for _, action in steps for found in action() for ceiling in found]
    assert (copy.key, matmul.key) == (("copy", None), ("matmul", "float32"))
    assert 5e8 < copy.bytes_per_s < 1e12
    assert 1e9 < matmul.flops_per_s < 1e13


# --- pytest-benchmark ------------------------------------------------------------------------------------------------

PLANTED = """
from resnet_triton.ops import Linear
real = Linear.reference
Linear.reference = lambda call: real(call) + 1
"""


@pytest.mark.slow
def test_pytest_benchmark_compares_and_checks(tmp_path):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "planted.py").write_text(PLANTED)
    root, out = Path(__file__).parents[2], tmp_path / "out.json"
    command = [
        sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "planted",
        "--models=resnet18", "--batches=1", "--image=32", "--alternatives=ours,eager", "-k",
        "layer1.0.conv1 or fc_linear or test_model and eager", "--benchmark-max-time=0.01", f"--benchmark-json={out}",
    ]  # fmt: skip
    dropped = ("TRITON_INTERPRET", "PYTEST_")  # a worker of xdist says so there, and pytest-benchmark would not time
    environ = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    environ["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(root)])
    done = subprocess.run(command, env=environ, cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert "1 failed, 4 passed" in done.stdout
    assert "wrong before it was timed" in done.stdout
    assert "FAILED benchmarks/test_layers.py::test_layer[resnet18-fc_linear-" in done.stdout
    found = json.loads(out.read_text())["benchmarks"]
    assert [benchmark["group"].partition(",")[0] for benchmark in found][:2] == ["resnet18 layer1.0.conv1"] * 2
    assert found[0]["extra_info"]["flops"] == 2 * 8 * 8 * 64 * 576


def test_interpreted_kernels_are_not_benchmarked(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(pytest.UsageError, match="TRITON_INTERPRET is set, expected kernels that are compiled"):
        pytest.importorskip("benchmarks.conftest").pytest_configure(None)
