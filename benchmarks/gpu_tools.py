"""NVIDIA's own tools, where a machine has them: compute-sanitizer on tests, hardware counters of the slowest layers.

`python -m benchmarks.gpu_tools LAYER DTYPE BATCH DEVICE IMAGE` runs one layer a few times, for a profiler to look at.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch

from resnet_triton.bench.cases import cases
from resnet_triton.bench.kernels import Problem

from .gpu_steps import Setting, Steps, read

SELECTIONS = (
    "test_conv_epilogue and float16", "test_columns and early", "test_max_pool and float16",
    "test_global_avg_pool and float16", "test_add_relu and float16", "test_linear and float16",
    "test_avg_pool_linear and float16",
)  # fmt: skip
METRICS = (
    "gpu__time_duration.sum", "dram__bytes.sum", "lts__t_bytes.sum", "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active", "sm__inst_executed_pipe_tensor.sum",
)  # fmt: skip
RUNS = 5


def sanitizer(setting: Setting) -> Steps:
    """The tests on small shapes under memcheck; a rehearsal runs the first of them without."""
    for select in SELECTIONS[:1] if setting.rehearse else SELECTIONS:
        yield select, partial(_sanitize, select, setting)


def _sanitize(select: str, setting: Setting) -> dict[str, Any]:
    tool = [] if setting.rehearse else [_find("compute-sanitizer"), "--tool", "memcheck", "--target-processes", "all"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    tests = [*pytest, "tests/kernels/test_exact.py", "-k", select]
    done = _run([*tool, *tests], setting, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    found = re.findall(r"ERROR SUMMARY: (\d+) error", done.stdout)
    errors = max(map(int, found), default=None)
    good = done.returncode == 0 and (setting.rehearse or errors == 0)
    return {"clean": good, "errors": errors, "tail": "" if good else done.stdout[-1500:]}


def counters(setting: Setting) -> Steps:
    """Hardware counters of the layers that cost most; a rehearsal runs one of them without a profiler."""
    timed = {key: row for key, row in read(setting.out / "layers.json").get("rows", {}).items() if "shape" in row}
    slowest = sorted(timed, key=lambda key: timed[key]["us"] * timed[key]["times"], reverse=True)
    for key in slowest[: 1 if setting.rehearse else 3]:
        yield key, partial(_count, key, setting)


def _count(key: str, setting: Setting) -> dict[str, Any]:
    options = ["--clock-control", "none", "--csv", "--metrics", ",".join(METRICS)]
    options += ["--kernel-name", "regex:conv|stem|pack|sum", "--launch-skip", "2", "--launch-count", "2"]
    profiler = [] if setting.rehearse else [_find("ncu"), *options]
    work = [sys.executable, "-m", "benchmarks.gpu_tools", *key.split(), setting.device.type, str(setting.image)]
    done = _run([*profiler, *work], setting)
    if done.returncode:
        raise RuntimeError(f"rc {done.returncode}: {done.stdout[-500:]}")
    lines = done.stdout.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = list(csv.DictReader(lines[start:]))
    return {"metrics": [[r["Kernel Name"], r["Metric Name"], r["Metric Value"], r["Metric Unit"]] for r in rows]}


def _find(tool: str) -> str:
    found = shutil.which(tool) or shutil.which(tool, path="/usr/local/cuda/bin")
    if found is None:
        raise RuntimeError(f"no {tool} here, expected one on the PATH or in /usr/local/cuda/bin")
    return found


def _run(command: list[str], setting: Setting, **environ: str) -> subprocess.CompletedProcess[str]:
    left = max(setting.deadline - time.monotonic() - 3, 1)
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, env={**os.environ, **environ}, timeout=left, **output)


def main(layer: str, dtype: str, batch: str, where: str, image: str) -> None:
    """Run a layer of ResNet-18 a few times."""
    found = cases(("resnet18",), [int(batch)], [dtype], int(image))
    call = next(case.call for case in found if case.layer == layer)
    with torch.inference_mode():
        (launch, *_) = Problem(call, torch.device(where), kernels="triton").build("ours")
        for _ in range(1 if where == "cpu" else RUNS):
            launch()
    if where == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
