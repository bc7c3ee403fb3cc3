"""Everything a short lease of a GPU should do, most wanted first: `python -m benchmarks.gpu --budget 540 --out DIR`.

Each phase runs in a process of its own (`gpu_steps.py`) with a time limit and keeps DIR/<phase>.json; a phase that
crashes or hangs costs its own time only. Call it again with the same DIR to go on: what is complete is not repeated.
All of DIR goes into DIR/results.tar.gz after each phase. `--rehearse` needs no GPU and measures nothing worth knowing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resnet_triton.bench import report
from resnet_triton.bench.results import Results, Row, best, speedup

from .gpu_steps import read, write

ARCHIVE = "results.tar.gz"
LEAST = 10  # seconds under which no phase is worth starting


@dataclass(frozen=True)
class Phase:
    """Steps to run, within `limit` seconds in all and `step_limit` for each, leaving `spare` for later phases."""

    name: str
    target: str
    options: dict[str, Any] = field(default_factory=dict)
    limit: float = 80
    step_limit: float = 60
    spare: float = 0
    environ: dict[str, str] = field(default_factory=dict)


def _model(name: str, *alternatives: str, batches: tuple[int, ...] = (1, 32, 256), **rest: Any) -> Phase:
    options = {"alternatives": [*alternatives], "batches": [*batches], "dtype": rest.pop("dtype", "float16")}
    options.update({key: rest.pop(key) for key in ("tuned", "label") if key in rest})
    limit = rest.pop("limit", 80)
    return Phase(name, "benchmarks.gpu_model:steps", options, limit, limit, **rest)  # a race keeps its own time


def _tests(name: str, file: str, select: str, *, processes: int, limit: float) -> Phase:
    options = {"file": file, "select": select, "processes": processes}
    return Phase(name, "benchmarks.gpu_kernels:tests", options, limit, limit)


_KERNELS = "benchmarks.gpu_kernels:"
_LAYERS = "test_resnet18_layer and not float32"
_PYTORCH = ("eager graph", "folded graph", "cudnn fused graph")
_HALVES = ["float16", "bfloat16"]
_TUNED: dict[str, Any] = {"tuned": True, "label": ", tuned"}
_MORE: dict[str, Any] = {"batches": (2, 8, 64, 128, 129), "limit": 150, **_TUNED}
PHASES = (
    # 300 runs of each of 311 convolutions, on top of compiling them and computing their answers.
    Phase("exact", _KERNELS + "exact", {"batches": [1, 8, 32, 128, 256], "dtypes": _HALVES}, 200, 60),
    Phase("ceilings", _KERNELS + "ceilings", limit=40, step_limit=20),
    _model("model", *_PYTORCH, "ours", "ours graph", limit=120),
    _model("reduce-overhead", "compile reduce-overhead", "ours graph"),
    Phase("layers", _KERNELS + "layer_times", {"batches": [1, 32, 256], "dtype": "float16"}, 60, 30),
    _tests("test-exact", "tests/kernels/test_exact.py", _LAYERS, processes=12, limit=120),
    _model("max-autotune", "compile max-autotune", "ours graph", limit=150),
    Phase("tune", _KERNELS + "tune", {"count": 10}, 400, 90, spare=45),
    _model("model-tuned", *_PYTORCH, "compile reduce-overhead", "ours graph", **_TUNED),
    _tests("test-gpu", "tests/model/test_gpu.py", "test", processes=4, limit=120),
    _tests("test-contract", "tests/kernels/test_contract.py", "test", processes=8, limit=120),
    _model("batches", "folded graph", "cudnn fused graph", "compile reduce-overhead", "ours graph", **_MORE),
    _tests("test-exact-rest", "tests/kernels/test_exact.py", f"not ({_LAYERS})", processes=14, limit=300),
    _model("bfloat16", "folded graph", "compile reduce-overhead", "ours graph", dtype="bfloat16", **_TUNED),
    Phase("sanitizer", "benchmarks.gpu_tools:sanitizer", limit=200, step_limit=60),
    Phase("counters", "benchmarks.gpu_tools:counters", limit=100, step_limit=40),
    Phase("kernels", _KERNELS + "suite", {"batches": [1, 32, 256], "dtype": "float16"}, 200, 60),
    _tests("test-invariant", "tests/kernels/test_invariant.py", "test", processes=8, limit=90),
    _model("invariant", "ours graph", "ours invariant graph", batches=(1, 8, 32, 128, 256), **_TUNED),
    _model("dependent", "ours graph", environ={"RESNET_TRITON_PDL": "1"}, tuned=True, label=", dependent launches"),
    _model("default", "compile default", "compile reduce-overhead freezing", "ours graph", limit=120),
    _model("no-cudagraphs", "compile max-autotune-no-cudagraphs", "ours graph", limit=150),
)


def run(phases: tuple[Phase, ...], out: Path, budget: float, *, rehearse: bool = False) -> None:
    """Run what is not complete yet, in order, for about `budget` seconds."""
    end = time.monotonic() + budget
    for phase in phases:
        path = out / f"{phase.name}.json"
        left = end - time.monotonic() - phase.spare
        if read(path).get("complete"):
            print(f"{phase.name}: complete already", flush=True)
        elif left < LEAST:
            print(f"{phase.name}: no time left", flush=True)
        else:
            start = time.monotonic()
            how = _run(phase, path, min(phase.limit, left), rehearse)
            rows = read(path).get("rows", {})
            bad = sum("error" in row for row in rows.values())
            print(f"{phase.name}: {how}, {len(rows)} steps, {bad} failed, {time.monotonic() - start:.0f} s", flush=True)
            archive(out)


def _run(phase: Phase, path: Path, limit: float, rehearse: bool) -> str:
    """Run a phase, again behind the step that ended its process, until it is through or out of time."""
    end = time.monotonic() + limit
    environ = {**os.environ, **phase.environ}
    if rehearse:
        environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for attempt in range(20):
        left = end - time.monotonic()
        if left < LEAST and attempt:
            return "out of time"
        before = read(path)
        arguments = {"journal": str(path), "target": phase.target, "options": phase.options, "limit": left - 2,
                     "step_limit": phase.step_limit, "rehearse": rehearse}  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.gpu_steps", json.dumps(arguments)]
        with path.with_suffix(".log").open("a") as log:
            worker = subprocess.Popen(command, stdout=log, stderr=log, env=environ, cwd=Path(__file__).parents[1])
            try:
                code = worker.wait(left)
            except subprocess.TimeoutExpired:
                _unmark(path)  # the phase's limit, not the step's: the next call may try it again
                return "out of time"
            finally:
                _kill(worker)
        after = read(path)
        if code == 0:
            return "complete" if after.get("complete") else "out of time"
        if (after.get("running"), len(after.get("rows", {}))) == (before.get("running"), len(before.get("rows", {}))):
            return f"crashed ({path.stem}.log)"  # before its first step
    return "crashed too often"


def _unmark(path: Path) -> None:
    if journal := read(path):
        write(path, {**journal, "running": None})


def _kill(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def archive(out: Path) -> None:
    """Everything in the folder as one file."""
    temporary = out / (ARCHIVE + ".tmp")
    with tarfile.open(temporary, "w:gz") as tar:
        for path in sorted(out.iterdir()):
            if path.is_file() and not path.name.startswith(ARCHIVE) and path.suffix != ".tmp":
                tar.add(path, path.name)
    temporary.replace(out / ARCHIVE)


# --- what to print ---------------------------------------------------------------------------------------------------


def read_all(out: Path) -> dict[str, dict[str, Any]]:
    """The journals of a folder by phase, in the order of the phases."""
    found = {phase.name: read(out / f"{phase.name}.json") for phase in PHASES}
    return {name: journal for name, journal in found.items() if journal}


def summary(out: Path) -> list[str]:
    """The results so far in fewer than 60 lines."""
    journals = read_all(out)
    rows = {name: journal["rows"] for name, journal in journals.items()}
    first = next(iter(journals.values()), {"environment": {}})
    where = ", ".join(str(first["environment"].get(k)) for k in ("device", "driver", "torch", "triton", "commit"))
    lines = [("REHEARSAL, no measurement: " if first.get("rehearsal") else "") + where]
    exact = rows.get("exact", {})
    wrong = [key for key, row in exact.items() if not row.get("exact")]
    if exact:
        lines += [f"exact: {len(exact) - len(wrong)} of {len(exact)}", *(f"  not: {key}" for key in wrong[:8])]
    for name in ("test-exact", "test-exact-rest", "test-gpu"):
        for row in rows.get(name, {}).values():
            lines.append(f"{name}: {', '.join(f'{k} {v}' for k, v in row.items() if k != 'failures')}")
            lines += [f"  {failure[:140]}" for failure in row.get("failures", [])[:2]]
    lines += [f"{key}: {row['us']:.2f} us" + _rate(row) for key, row in rows.get("ceilings", {}).items() if "us" in row]
    lines += _models(collect(journals).rows)
    slow = sorted((r["us"] * r["times"], k, r) for k, r in rows.get("layers", {}).items() if "us" in r)[-8:]
    lines += [f"{k}: {r['us']:.1f} us, floor {r['floor_us']:.1f}, estimate {r.get('estimate_us', 0):.1f}"
              for _, k, r in reversed(slow)]  # fmt: skip
    tuned = [(k, r) for k, r in rows.get("tune", {}).items() if "us" in r]
    lines += [f"{k}: {r['heuristic_us']:.1f} -> {r['us']:.1f} us tuned" for k, r in tuned[:6]]
    lines += [
        f"sanitizer, {k}: {'clean' if r.get('clean') else 'NOT CLEAN'}" for k, r in rows.get("sanitizer", {}).items()
    ]
    lines += [f"{k}: {', '.join(' '.join(m[1:]) for m in r.get('metrics', []))}"[:200]
              for k, r in rows.get("counters", {}).items()]  # fmt: skip
    return lines[:59]


def _rate(row: dict[str, Any]) -> str:
    units = {"bytes_per_s": "TB/s", "flops_per_s": "TFLOP/s"}
    return "".join(f", {row[key] / 1e12:.2f} {unit}" for key, unit in units.items() if key in row)


def collect(journals: dict[str, dict[str, Any]]) -> Results:
    """What the journals hold of the suites, in the suites' form."""
    steps = [step for journal in journals.values() for step in journal["rows"].values()]
    rows: dict[Any, Row] = {}
    for row in (Row(**data) for step in steps for data in step.get("rows", [])):
        rows.setdefault(row.key, row)  # some phases repeat what an earlier one measured, to compare with it
    return Results([*rows.values()], [step["ceiling"] for step in steps if "ceiling" in step])


def _models(rows: Sequence[Row]) -> list[str]:
    """For each dtype and batch size, ours against the best of the others, by the GPU's clock with L2 warm."""
    lines = []
    models = Results([row for row in rows if row.suite == "model"])
    for task, some in sorted(models.tasks().items(), key=lambda item: (item[1][0].dtype, item[1][0].batch)):
        if task[-1] == "cold" or (some[0].clock == "wall" and some[0].environment["device_kind"] == "cuda"):
            continue
        red = [row.alternative for row in some if row.failure or not row.correct]
        cells = sorted((row.p50_s * 1e6, row.alternative) for row in some if row.good)
        lines.append(f"{some[0].dtype} {some[0].batch}: " + ", ".join(f"{name} {us:.0f}" for us, name in cells) + " us"
                     + f"; WRONG OR FAILED: {', '.join(red)}" * bool(red))  # fmt: skip
        faster, other = speedup(some), best(some, ours=False)
        if faster and other:
            lines.append(f"  {faster:.2f}x {other.alternative}: {best(some, ours=True).alternative}")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run the phases and print a summary."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, kept between calls")
    parser.add_argument("--budget", type=float, default=540, help="seconds in all")
    parser.add_argument("--phases", help=f"of {','.join(p.name for p in PHASES)}; default: all")
    parser.add_argument("--again", default="", help="phases whose results to forget first")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small")
    a = parser.parse_args(argv)
    names = [phase.name for phase in PHASES]
    chosen = a.phases.split(",") if a.phases else names
    again = a.again.split(",") if a.again else []
    if unknown := [name for name in chosen + again if name not in names]:
        parser.error(f"no phase {unknown[0]!r}, expected some of {', '.join(names)}")
    a.out.mkdir(parents=True, exist_ok=True)
    for name in again:
        (a.out / f"{name}.json").unlink(missing_ok=True)
    run(tuple(phase for phase in PHASES if phase.name in chosen), a.out.resolve(), a.budget, rehearse=a.rehearse)
    with contextlib.suppress(ImportError):  # of a plotting library; the archive has the data
        report.write(collect(read_all(a.out)), a.out)
    archive(a.out)
    print("\n".join(summary(a.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
