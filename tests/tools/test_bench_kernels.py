"""The kernel suite: what it measures, and that wrong, failing and slow alternatives show as such."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("jsonschema")

from resnet_triton.bench import baselines, ceilings, kernels, results
from resnet_triton.bench.cases import arguments, cases
from resnet_triton.bench.kernels import Problem, applicable, run
from resnet_triton.kernels.launch import Launch
from resnet_triton.ops import OPERATORS, dispatch
from resnet_triton.support import timing

CPU = torch.device("cpu")
TEXTS = "device clocks driver os python torch triton torchvision cudnn resnet_triton commit"
ENVIRONMENT = {
    **dict.fromkeys(TEXTS.split(" "), "unknown"),
    "device_kind": "cpu", "threads": 1, "date": "2026-01-01T00:00:00+00:00",
}  # fmt: skip


def small(*layers, batch=1, image=32):
    """Some layers of a ResNet-18 on small images."""
    found = cases(["resnet18"], [batch], image=image)
    return [next(case for case in found if case.layer == layer) for layer in layers] if layers else found


def measured(*layers, alternatives=("ours", "eager"), **options):
    """The rows of some layers by alternative, timed for a moment."""
    (rows,) = run(small(*layers), CPU, ENVIRONMENT, alternatives=alternatives, seconds=0.01, **options)
    return {row.alternative: row for row in rows}


def plant(monkeypatch, operator, form):
    """Replace our model's CPU path of an operator by `form(right answer)`."""
    real = OPERATORS[operator].torch_form
    monkeypatch.setitem(OPERATORS, operator, OPERATORS[operator]._replace(torch_form=lambda *args: form(real(*args))))


# --- cases -----------------------------------------------------------------------------------------------------------


def test_layers_of_resnet18():
    found = cases(["resnet18"], [2], ["float16"])
    convolutions = [case for case in found if case.call.operator == "conv_bn_relu"]
    assert [
        (c.layer, (s.c, s.h, s.k), (s.r, s.s), s.stride, s.residual, s.shortcut_c, c.times["resnet18"])
        for c in convolutions
        for s in [c.call.shape]
    ] == [
        ("layer1.0.conv1", (64, 56, 64), (3, 3), (1, 1), False, 0, 2),
        ("layer1.0.conv2", (64, 56, 64), (3, 3), (1, 1), True, 0, 2),
        ("layer2.0.conv1", (64, 56, 128), (3, 3), (2, 2), False, 0, 1),
        ("layer2.0.conv2", (128, 28, 128), (3, 3), (1, 1), False, 64, 1),
        ("layer2.1.conv1", (128, 28, 128), (3, 3), (1, 1), False, 0, 1),
        ("layer2.1.conv2", (128, 28, 128), (3, 3), (1, 1), True, 0, 1),
        ("layer3.0.conv1", (128, 28, 256), (3, 3), (2, 2), False, 0, 1),
        ("layer3.0.conv2", (256, 14, 256), (3, 3), (1, 1), False, 128, 1),
        ("layer3.1.conv1", (256, 14, 256), (3, 3), (1, 1), False, 0, 1),
        ("layer3.1.conv2", (256, 14, 256), (3, 3), (1, 1), True, 0, 1),
        ("layer4.0.conv1", (256, 14, 512), (3, 3), (2, 2), False, 0, 1),
        ("layer4.0.conv2", (512, 7, 512), (3, 3), (1, 1), False, 256, 1),
        ("layer4.1.conv1", (512, 7, 512), (3, 3), (1, 1), False, 0, 1),
        ("layer4.1.conv2", (512, 7, 512), (3, 3), (1, 1), True, 0, 1),
    ]
    others = [case for case in found if case.call.operator != "conv_bn_relu"]
    assert [(c.layer, c.call.operator, tuple(c.call.args[0].shape), c.times["resnet18"]) for c in others] == [
        ("conv1", "stem", (2, 3, 224, 224), 1),
        ("fc", "avg_pool_linear", (2, 512, 7, 7), 1),
        ("conv1 max_pool2d", "max_pool2d", (2, 64, 112, 112), 1),
        ("layer1.0.conv2 add_relu", "add_relu", (2, 64, 56, 56), 2),
        ("layer2.0.conv2 add_relu", "add_relu", (2, 128, 28, 28), 2),
        ("layer3.0.conv2 add_relu", "add_relu", (2, 256, 14, 14), 2),
        ("layer4.0.conv2 add_relu", "add_relu", (2, 512, 7, 7), 2),
        ("fc global_avg_pool", "global_avg_pool", (2, 512, 7, 7), 1),
        ("fc linear", "linear", (2, 512), 1),
    ]
    assert {case.call.operator for case in found} == set(OPERATORS)
    assert {(case.batch, case.image, case.dtype) for case in found} == {(2, 224, "float16")}
    assert {case.call.args[0].dtype for case in found} == {torch.float16}


def test_models_share_their_cases():
    found = {(case.model, case.layer): case for case in cases()}
    assert list(dict.fromkeys(model for model, _ in found)) == ["resnet18", "resnet50"], "34's are all among 18's"
    assert found["resnet18", "layer3.1.conv1"].times == {"resnet18": 1, "resnet34": 5, "resnet50": 5}
    assert found["resnet50", "layer3.0.conv3"].call.shape.shortcut_c == 512
    assert ("resnet50", "layer3.1.conv2") not in found
    several = cases(["resnet18"], [1, 3], ["float32", "bfloat16"])
    kinds = [("float32", 1), ("bfloat16", 1), ("float32", 3), ("bfloat16", 3)]
    assert list(dict.fromkeys((case.dtype, case.batch) for case in several)) == kinds
    assert len(several) == 4 * len(cases(["resnet18"]))


def test_what_is_unknown_is_refused():
    with pytest.raises(ValueError, match="no model 'vgg', expected some of resnet18, resnet34, resnet50"):
        cases(["resnet18", "vgg"])
    with pytest.raises(ValueError, match="no alternative 'theirs', expected some of ours, eager, cudnn fused, compile"):
        measured("fc", alternatives=["ours", "theirs"])


def test_data_as_in_a_trained_network():
    (case,) = small("layer2.0.conv2", batch=4)
    args = arguments(case.call, CPU, seed=0, kernels="auto")
    x, weight, _, var = args[:4]
    assert args[-1] == "auto"
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.std().item() == pytest.approx((128 * 9) ** -0.5, rel=0.02)
    assert var.min() > 0.4
    again, other = (arguments(case.call, CPU, seed=seed, kernels="auto") for seed in (0, 1))
    assert torch.equal(x, again[0])
    assert not torch.equal(x, other[0])


# --- rows ------------------------------------------------------------------------------------------------------------


def test_every_row_is_valid_and_right(tmp_path):
    rows = [row for group in run(small(), CPU, ENVIRONMENT, alternatives=["eager", "ours"], seconds=0.01)
            for row in group]  # fmt: skip
    assert [row.layer for row in rows[::2]] == [case.layer for case in small()]
    assert {row.alternative for row in rows} == {"ours", "eager"}
    results.save(results.Results(rows), tmp_path / "results.json")
    assert results.load(tmp_path / "results.json").rows == rows
    for row in rows:
        assert (row.good, row.failure, row.ours) == (True, None, row.alternative == "ours"), row
        assert (row.suite, row.model, row.clock, row.l2) == ("kernel", "resnet18", "wall", "uncontrolled")
        assert len(row.samples_s) >= 5
        assert row.bytes > 0
        assert row.config is None, "PyTorch has no tiles"
    tasks = results.Results(rows).tasks()
    assert len(tasks) == len(small()), "no two cases share a name"
    assert all(results.speedup(group) for group in tasks.values())
    conv = next(row for row in rows if row.layer == "layer1.0.conv1")
    assert (conv.flops, conv.bytes) == (2 * 8 * 8 * 64 * 576, 4 * (2 * 8 * 8 * 64 + 64 * 576))


def test_half_precision_is_held_to_half_precision():
    case = next(case for case in cases(["resnet18"], [1], ["bfloat16"], 32) if case.layer == "layer1.0.conv2")
    (rows,) = run([case], CPU, ENVIRONMENT, alternatives=["ours"], seconds=0.01)
    assert rows[0].good
    assert 2 * 2**-7 <= rows[0].error_limit < 4 * 2**-7


def test_torch_compile():
    rows = measured("layer2.0.conv2", alternatives=["compile", "eager"])
    assert rows["compile"].good, rows["compile"]


@pytest.mark.parametrize("wrong", [lambda y: y * 1.001, lambda y: y * float("nan"), lambda y: y.zero_()])
def test_a_wrong_answer_is_red_and_gains_nothing(monkeypatch, wrong):
    plant(monkeypatch, "conv_bn_relu", wrong)
    rows = measured("layer1.0.conv1")
    assert rows["ours"].correct is False
    assert rows["eager"].correct is True
    assert results.speedup(list(rows.values())) is None
    document = {"format": results.FORMAT, "version": results.VERSION, "ceilings": [], "predictions": []}
    assert results.check({**document, "rows": [vars(row) for row in rows.values()]}) is None


def test_an_answer_that_goes_wrong_later_is_red(monkeypatch):
    calls = []
    plant(monkeypatch, "add_relu", lambda y: y + 1 if calls.append(0) or len(calls) > 9 else y)
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
    assert len(eager.samples_s) >= 5
    assert len(calls) == good_calls + 1, "a failure is final"


def test_kernels_that_cannot_run_are_a_failure(monkeypatch):
    monkeypatch.setattr("resnet_triton.ops.interpreter.active", lambda: False)
    rows = measured("layer1.0.conv1", kernels="triton")
    assert 'NotImplementedError: kernels="triton" cannot run this call: CPU tensors' in rows["ours"].failure
    assert rows["eager"].good


def test_without_a_reference_all_rows_say_so(monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK", 0)
    rows = measured("fc")
    assert [row.failure[:26] for row in rows.values()] == ["no reference: ValueError: "] * 2


def test_a_slowdown_shows_in_full(monkeypatch):
    def sleeping(seconds: float, y: Tensor) -> Tensor:
        time.sleep(seconds)
        return y

    eager = baselines.EAGER["linear"]
    monkeypatch.setitem(baselines.EAGER, "linear", lambda *args: sleeping(0.02, eager(*args)))
    plant(monkeypatch, "linear", lambda y: sleeping(0.06, y))
    rows = measured("fc linear")
    assert rows["ours"].p50_s / rows["eager"].p50_s == pytest.approx(3, rel=0.5)
    assert results.speedup(list(rows.values())) == pytest.approx(1 / 3, rel=0.5)


def test_the_deadline_is_kept(monkeypatch):
    now, lasts = [100.0], iter([3.0, 7.0, 2.0, 7.0, 7.0])
    monkeypatch.setattr(kernels.time, "monotonic", lambda: now[0])

    def measure(case, *rest, **options):
        now[0] += next(lasts)
        return [case.layer]

    monkeypatch.setattr(kernels, "measure", measure)
    layers = [case.layer for case in small()]

    def until(deadline):
        now[0] = 100.0
        return [layer for rows in run(small(), CPU, {}, deadline=deadline) for layer in rows]

    assert until(100.5) == [], "a second is too long"
    assert until(118.9) == layers[:3], "3, 7 and 2 seconds; another 7 might take until 119"


# --- our kernels, and cuDNN's ----------------------------------------------------------------------------------------


def test_ours_are_the_kernels(device, monkeypatch):
    launched = []
    real = Launch.run
    monkeypatch.setattr(timing, "interleaved_for", lambda seconds, calls: timing.interleaved(calls, rounds=2, warmup=0))
    monkeypatch.setattr(Launch, "run", lambda self: launched.append(self.kernel.__name__) or real(self))
    chosen = small("layer1.0.conv2", "conv1 max_pool2d", "layer4.0.conv2 add_relu", "fc global_avg_pool")
    groups = list(run(chosen, device, ENVIRONMENT, alternatives=["ours"], kernels="triton", seconds=0.01))
    assert all(row.good for (row,) in groups), groups
    convolution, *others = dict.fromkeys(launched)
    assert convolution.startswith("conv_")
    assert others == [f"{name}_kernel" for name in ("max_pool", "add_relu", "global_avg_pool")]
    assert groups[0][0].config["block_k"] >= 16
    assert [row.config for (row,) in groups[1:]] == [None] * 3


def test_tiles_are_plain_data():
    (case,) = small("layer1.0.conv1", batch=32)
    tiles = Problem(case.call, CPU, kernels="triton").config
    assert isinstance(tiles["box"], list)
    assert json.loads(json.dumps(tiles)) == tiles


def test_launches_are_planned_beforehand(device):
    (case,) = small("fc global_avg_pool")
    problem = Problem(case.call, device, kernels="triton")
    before = dict(dispatch.calls)
    assert problem.error(problem.build("ours")[0]) <= problem.limit
    assert dict(dispatch.calls) == before, "the operator, which plans each time, was not called"


def test_a_kernel_that_writes_nothing_is_red(device, monkeypatch):
    (case,) = small("fc global_avg_pool")
    problem = Problem(case.call, device, kernels="triton")
    call = problem.build("ours")[0]
    assert problem.error(call) <= problem.limit
    monkeypatch.setattr(Launch, "run", lambda self: None)
    monkeypatch.setattr("shadow.Watch.finish", lambda self: None, raising=False)
    assert not problem.error(call) <= problem.limit


@pytest.mark.parametrize("layer", ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv2"])
def test_batch_norm_is_folded_for_cudnn(monkeypatch, layer):
    def relu(x, w, b, *geometry):
        return F.relu(F.conv2d(x, w, b, *geometry))

    def add_relu(x, w, z, alpha, b, *geometry):
        return F.relu(F.conv2d(x, w, b, *geometry) + alpha * z)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    (case,) = small(layer, batch=2)
    problem = Problem(case.call, CPU)
    (call,) = problem.build("cudnn fused")
    assert problem.error(call) < 1e-6


def test_which_alternatives_apply():
    conv, head = small("layer1.0.conv1", "fc")
    assert applicable(conv.call, CPU) == ["ours", "eager", "compile"]
    assert applicable(conv.call, torch.device("cuda")) == ["ours", "eager", "cudnn fused", "compile"]
    assert applicable(head.call, torch.device("cuda"), ["cudnn fused", "eager"]) == ["eager"]


def test_more_images_than_fp64_takes_at_a_time(monkeypatch):
    (case,) = small("layer2.0.conv2", batch=5)
    whole = Problem(case.call, CPU).exact
    monkeypatch.setattr(kernels, "_CHUNK", 2)
    torch.testing.assert_close(Problem(case.call, CPU).exact, whole, rtol=1e-12, atol=1e-12)


def test_on_a_gpu_buffers_take_turns(monkeypatch):
    """The GPU's part on CPU tensors, with another clock."""
    places = []
    eager = baselines.EAGER["conv_bn_relu"]

    def noted(*args):
        y = eager(*args)
        places.append((args[0].data_ptr(), y.data_ptr()))
        return y

    def replay(work, replays):
        places.clear()
        work()
        return [2.0 * sets] * replays

    fill = kernels.arguments
    monkeypatch.setitem(baselines.EAGER, "conv_bn_relu", noted)
    monkeypatch.setattr(kernels, "arguments", lambda call, where, **options: fill(call, CPU, **options))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda where: SimpleNamespace(L2_cache_size=1 << 20))
    monkeypatch.setattr(timing, "replay", replay)
    each = 4 * (2 * 8 * 8 * 64 + 64 * 576 + 4 * 64)
    sets = 1 + (2 << 20) // each
    (case,) = small("layer1.0.conv1")
    ((eager_row, cudnn),) = run([case], torch.device("cuda"), ENVIRONMENT, alternatives=["eager", "cudnn fused"])
    assert (eager_row.clock, eager_row.l2, eager_row.good) == ("gpu", "cold", True)
    assert set(eager_row.samples_s) == {2.0}
    assert "cudnn_convolution_relu" in cudnn.failure, "CPU tensors are not for cuDNN"
    turn = places[:sets]
    assert len(turn) == sets
    assert len({x for x, _ in turn}) == sets, "every call has inputs of its own"
    assert len({y for _, y in turn}) == sets, "and an output of its own"


@pytest.mark.gpu
def test_on_a_gpu():
    gpu = torch.device("cuda")
    chosen = [case for case in cases(["resnet18"], [2], ["float16"]) if case.layer in ("conv1", "layer2.0.conv2", "fc")]
    for rows in run(chosen, gpu, ENVIRONMENT):
        assert all(row.good for row in rows), rows
        assert {(row.clock, row.l2) for row in rows} == {("gpu", "cold")}
        assert next(row for row in rows if row.ours).p50_s < 1e-3
    problem = Problem(chosen[1].call, gpu)
    held = sum(t.numel() * t.element_size() for args in problem.sets for t in args if isinstance(t, Tensor))
    assert held > torch.cuda.get_device_properties(gpu).L2_cache_size
    assert len({args[0].data_ptr() for args in problem.sets}) == len(problem.sets)


# --- ceilings and predictions ----------------------------------------------------------------------------------------


def test_ceilings(monkeypatch):
    monkeypatch.setitem(ceilings._COPY, "cpu", 16 << 20)
    found = ceilings.measure(CPU, ["float32"])
    assert [(record["name"], record["dtype"]) for record in found] == [("copy", None), ("matmul", "float32")]
    assert 5e8 < found[0]["bytes_per_s"] < 1e12
    assert 1e9 < found[1]["flops_per_s"] < 1e13
    document = {"format": results.FORMAT, "version": results.VERSION, "rows": [], "predictions": []}
    assert results.check({**document, "ceilings": found}) is None


def test_a_slow_dtype_gets_small_matrices(monkeypatch):
    sides = {}
    for seconds in (1e-3, 1e-2):
        monkeypatch.setattr(ceilings, "matmul", lambda *args, s=seconds: timing.Spread(s, s, s))
        sides[seconds] = ceilings._side(CPU, torch.float16)
    assert sides == {1e-3: 1024, 1e-2: 256}


PREDICTIONS = """
import json
from resnet_triton.bench.predictions import predictions
from resnet_triton.models import BasicBlock, ResNet
model = ResNet(BasicBlock, [1, 0, 0, 0], num_classes=16).eval()
model.layer2 = model.layer3 = model.layer4 = type(model.layer4)()
model.fc = type(model.fc)(64, 16)
print(json.dumps(list(predictions(model, [1], ["float16"], jobs=1))))
"""


def test_predictions():
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PREDICTIONS], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    document = {"format": results.FORMAT, "version": results.VERSION, "rows": [], "ceilings": []}
    assert results.check({**document, "predictions": found}) is None
    kernel = {record["kernel"]: record for record in found}
    assert list(kernel)[:3] == ["pack_kernel", "stem_kernel", "conv_pointer_kernel"]
    assert {record["device"] for record in found} == {"NVIDIA H200"}
    conv = next(record for record in found if record["layer"] == "layer1.0.conv1")
    flops, moved = 2 * 56 * 56 * 64 * 576, 2 * (2 * 56 * 56 * 64 + 64 * 576)
    assert (conv["flops"], conv["bytes"]) == (flops, moved)
    assert conv["floor_s"] == pytest.approx(max(flops / 790e12, moved / 4.3e12))
    assert conv["registers"] > 16
    assert conv["spill_bytes"] == 0
    assert kernel["pack_kernel"]["flops"] == 2 * 112 * 112 * 64 * 3 * 49
    assert [kernel["stem_kernel"][key] for key in ("flops", "bytes", "floor_s")] == [0, 0, 0]


# --- pytest-benchmark ------------------------------------------------------------------------------------------------

PLANTED = """
from resnet_triton.ops import OPERATORS
real = OPERATORS["linear"]
OPERATORS["linear"] = real._replace(torch_form=lambda *args: real.torch_form(*args) + 1)
"""


def pytest_benchmarks(folder, *arguments, **environ):
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    dropped = ("TRITON_INTERPRET", "PYTEST_")  # a worker of xdist says so there, and pytest-benchmark would not time
    clean = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(folder), str(root)])
    return subprocess.run(
        command, env={**clean, "PYTHONPATH": path, **environ}, cwd=root, capture_output=True, text=True
    )


def test_pytest_benchmark_compares_and_checks(tmp_path):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "planted.py").write_text(PLANTED)
    out = tmp_path / "out.json"
    done = pytest_benchmarks(
        tmp_path, "-p", "planted", "--models=resnet18", "--batches=1", "--image=32", "--alternatives=ours,eager",
        "-k", "layer1.0.conv1 or fc_linear", "--benchmark-max-time=0.01", f"--benchmark-json={out}",
    )  # fmt: skip
    assert done.returncode == 1
    assert "1 failed, 3 passed" in done.stdout
    assert "wrong before it was timed" in done.stdout
    assert "FAILED benchmarks/test_kernels.py::test_kernel[resnet18-fc_linear-" in done.stdout
    found = json.loads(out.read_text())["benchmarks"]
    groups = [benchmark["group"].partition(",")[0] for benchmark in found]
    assert groups[:2] == ["resnet18 layer1.0.conv1"] * 2
    info = found[0]["extra_info"]
    assert info["flops"] == 2 * 8 * 8 * 64 * 576
    assert info["error"] <= info["limit"]
    assert {"dtype", "batch", "bytes", "device", "torch", "triton"} <= set(info)


def test_interpreted_kernels_are_not_benchmarked(tmp_path):
    pytest.importorskip("pytest_benchmark")
    done = pytest_benchmarks(tmp_path, "--collect-only", TRITON_INTERPRET="1")
    assert done.returncode == 4
    assert "TRITON_INTERPRET is set, expected kernels that are compiled" in done.stderr
