"""Everything a short lease of a GPU should do, most wanted first: `python -m benchmarks.gpu --budget 540 --out DIR`.

Each phase runs in a process of its own with a time limit. What it finds is in DIR/results.json as soon as it is found;
a step that crashes or hangs costs itself alone. Call it again with the same DIR to go on: what is done is not repeated.
All of DIR goes into DIR/results.tar.gz after each phase. `--rehearse` needs no GPU and measures nothing worth knowing.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from resnet_triton.bench import ceilings, output, report
from resnet_triton.bench.results import Results, resume
from resnet_triton.bench.runner import Phase, run_apart
from resnet_triton.support import files
from resnet_triton.tools import cli
from resnet_triton.tools.arguments import positive
from resnet_triton.tools.ask import ask

from . import callers
from . import gpu_phases as gpu

ARCHIVE = "results.tar.gz"
REHEARSAL = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def _models(name: str, *names: str, limit: float = 120, environ: dict[str, str] | None = None, **more: Any) -> Phase:
    steps = partial(gpu.models, names=names, **more)
    return Phase(name, steps, limit, limit, environ=environ or {})  # a race keeps its own time


def _tests(name: str, file: str, select: str, *, few: str, processes: int, limit: float) -> Phase:
    """A rehearsal runs only the `few`."""
    return Phase(name, partial(gpu.tests, file=file, select=select, few=few, processes=processes), limit, limit)


_LAYERS = "test_resnet18_layer and not float32"
_FEW = "test_conv_epilogue and plain and float16"
_PYTORCH = ("cudnn fused graph", "compile reduce-overhead")
_FAST = ("folded graph", "cudnn fused graph", "compile reduce-overhead", "ours graph")
_TUNED: dict[str, Any] = {"tuned": True, "label": ", tuned"}
PHASES = (
    # 300 runs of each convolution, on top of compiling them and computing their answers.
    Phase("exact", partial(gpu.exact, dtypes=["float16", "bfloat16"]), 200, 60),
    Phase("callers", callers.steps, 60, 20),
    Phase("layers", partial(gpu.layer_times, alternatives=["ours", "eager", "cudnn fused"]), 90, 30),
    _models("models", *_PYTORCH, "ours", "ours graph", limit=180),  # predicted: four cores compile for 90 s
    _models("max-autotune", "compile max-autotune", "ours graph", limit=240),
    Phase("ceilings", partial(ceilings.steps, ["float16", "bfloat16"]), 40, 20),
    _tests("test-exact", "tests/kernels/test_exact.py", _LAYERS, few=_FEW, processes=12, limit=120),
    Phase("tune", gpu.tune, 400, 400, spare=45),
    _models("tuned", *_FAST, **_TUNED),
    _tests("test-gpu", "tests/model/test_gpu.py", "not every_run", few="test", processes=4, limit=120),
    _tests("test-contract", "tests/kernels/test_contract.py", "test", few="variance", processes=8, limit=120),
    _models("batches", *_FAST, sizes=(2, 8, 64, 128, 129), limit=150, **_TUNED),
    _tests("test-exact-rest", "tests/kernels/test_exact.py", f"not ({_LAYERS})", few=_FEW, processes=14, limit=300),
    _models("bfloat16", *_FAST, dtype="bfloat16", **_TUNED),
    Phase("layers-compile", partial(gpu.layer_times, alternatives=["ours", "compile"]), 200, 60),
    _tests("test-invariant", "tests/kernels/test_invariant.py", "test", few="alike and linear", processes=8, limit=90),
    _models("invariant", "ours graph", "ours invariant graph", sizes=(1, 8, 32, 128, 256), **_TUNED),
    _models("default", "compile default", "compile reduce-overhead freezing", "ours graph"),
    _models("no-cudagraphs", "compile max-autotune-no-cudagraphs", "ours graph", sizes=(1, 256), limit=240),
)


def run(
    phases: Sequence[Phase], folder: Path, budget: float, *, rehearse: bool = False, again: Sequence[str] = ()
) -> None:
    """Run what is not complete yet or asked for `again`, in order, for about `budget` seconds."""
    end, device = time.monotonic() + budget, torch.device("cpu" if rehearse else "cuda")
    for phase in phases:
        start = time.monotonic()
        environ = REHEARSAL if rehearse else {}
        how = run_apart(phase, device, folder, end, environ, again=phase.name in again)
        steps = [step for step in resume(folder).steps if step.phase == phase.name]
        bad = sum(step.failure is not None for step in steps)
        print(f"{phase.name}: {how}, {len(steps)} steps, {bad} failed, {time.monotonic() - start:.0f} s", flush=True)
        _try(archive, folder)


def _try(write: Callable[..., object], *arguments: Any) -> None:
    """What cannot be written, on a full disk, ends nothing: `results.json` has what was measured."""
    try:
        write(*arguments)
    except OSError as error:
        print(f"cannot write {error.filename}: {error.strerror}", flush=True)


def archive(folder: Path) -> None:
    """Everything in the folder as one file."""
    temporary = folder / f".{ARCHIVE}.tmp"
    try:
        with files.named(folder / ARCHIVE), tarfile.open(temporary, "w:gz") as tar:
            for path in sorted(folder.iterdir()):
                if path.is_file() and path.name != ARCHIVE and path.suffix != ".tmp":
                    tar.add(path, path.name)
        temporary.replace(folder / ARCHIVE)
    finally:
        temporary.unlink(missing_ok=True)


def summary(results: Results) -> list[str]:
    """The results so far in fewer than 60 lines."""
    where = next((step.environment for step in results.steps if step.environment), {})
    lines = [", ".join(str(where.get(key)) for key in ("device", "driver", "torch", "triton", "commit"))]
    if where.get("device_kind") == "cpu":
        lines = [f"REHEARSAL, no measurement: {lines[0]}"]
    failed = [step for step in results.steps if step.failure]
    lines += [f"FAILED {step.phase}, {step.name}: {str(step.failure)[:200]}" for step in failed[:25]]
    lines += [f"and {len(failed) - 25} more failures"] * (len(failed) > 25)
    for c in results.ceilings:
        rate, unit = (c.bytes_per_s, "TB/s") if c.bytes_per_s else (c.flops_per_s, "TFLOP/s")
        lines.append(f"{c.name} {c.dtype or ''}: {(rate or 0) / 1e12:.2f} {unit}")
    return [*lines, *report.headlines(results)][:59]


def main(argv: list[str] | None = None) -> int:
    """Run the phases and print a summary. Returns 0, 1 (nothing was measured), or what every command of ours does."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, kept between calls")
    parser.add_argument("--budget", type=positive, default=540, help="seconds in all")
    parser.add_argument("--phases", help=f"of {','.join(p.name for p in PHASES)}; default: all")
    parser.add_argument("--again", default="", help="phases whose steps to repeat")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small; leaves out what has to be compiled")
    a = parser.parse_args(argv)
    names = [phase.name for phase in PHASES]
    chosen = a.phases.split(",") if a.phases else names
    again = a.again.split(",") if a.again else []
    if unknown := [name for name in chosen + again if name not in names]:
        parser.error(f"no phase {unknown[0]!r}, expected some of {', '.join(names)}")
    kept = [phase for phase in PHASES if phase.name in chosen and not (a.rehearse and phase.name == "tune")]
    return cli.guarded(lambda: _measure(kept, again, a))


def _measure(phases: Sequence[Phase], again: Sequence[str], a: argparse.Namespace) -> int:
    ask("benchmarks.gpu --rehearse" if a.rehearse else "benchmarks.gpu", a)
    before = resume(a.out)
    kind = "cpu" if a.rehearse else "cuda"
    if {step.environment.get("device_kind") for step in before.steps if step.environment} - {kind}:
        what = ("a GPU", "a rehearsal") if a.rehearse else ("a rehearsal", "a GPU")
        raise ValueError(f"{a.out} holds results of {what[0]}, which {what[1]} cannot go on with; choose another --out")
    files.prepare(a.out)
    try:
        run(phases, a.out.resolve(), a.budget, rehearse=a.rehearse, again=again)
    finally:
        results = resume(a.out)
        if results != before:
            _try(output.write, results, a.out)
        _try(archive, a.out)
    print("\n".join(summary(results)))
    if any(step.failure is None for step in results.steps if step not in before.steps):
        return 0
    if any(row.p50_s is not None for row in results.rows if row not in before.rows):  # of a step that found no end
        return 0
    if all(phase.name in results.complete for phase in phases) and results.steps == before.steps:
        return 0  # it was all there
    return cli.fail([f"nothing was measured; {a.out} has what it had, and logs"])


if __name__ == "__main__":
    sys.exit(main())
