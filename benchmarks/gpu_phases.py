"""What a lent GPU checks beside the suites: runs that have to be exact, the tests, a tuned table."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import resnet_triton
from resnet_triton import config
from resnet_triton.bench import layers, race
from resnet_triton.bench.alternatives import Alternative, Model, alternatives
from resnet_triton.bench.cases import Case, cases, grouped
from resnet_triton.bench.layers import Problem
from resnet_triton.bench.runner import Found, OutOfTime, Run, Steps
from resnet_triton.bench.worker import Spec
from resnet_triton.config import ConvConfig, ConvShape, device, table
from resnet_triton.kernels.values import has_several_sides
from resnet_triton.ops import gluon
from resnet_triton.support.processes import cores
from resnet_triton.support.terminal import bar
from resnet_triton.tools import tune as tuner
from resnet_triton.tuner.precompile import Compilers
from resnet_triton.tuner.trial import Trial

from .wrong_runs import wrong_runs

ROOT = Path(__file__).parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:benchmark"]
"""pytest-benchmark before 5.3 warns under xdist that it disables itself, and warnings are errors here."""


def rehearsed(run: Run) -> bool:
    """A rehearsal is on a CPU."""
    return run.device.type == "cpu"


def batches(run: Run, *sizes: int) -> list[int]:
    """A rehearsal has but one image."""
    return [1] if rehearsed(run) else list(sizes)


def image(run: Run) -> int:
    """Height and width of images."""
    return 32 if rehearsed(run) else 224


# --- exact, again and again ------------------------------------------------------------------------------------------

_STRIDED = ConvShape(32, 64, 56, 56, 128, 3, 3, (2, 2), (1, 1))
_SHORTCUT = ConvShape(32, 512, 7, 7, 512, 3, 3, padding=(1, 1),
                      shortcut_c=256, shortcut_h=14, shortcut_w=14, shortcut_stride=(2, 2))  # fmt: skip
_TILES: dict[str, tuple[ConvShape, list[tuple[Any, ...]]]] = {
    "strided": (_STRIDED, [
        (128, 128, 64, 4, 3, (1, 4, 32)), (128, 128, 64, 8, 4, (1, 4, 32)), (64, 128, 64, 4, 4, (1, 2, 32)),
        (256, 128, 64, 8, 3, (1, 8, 32)), (128, 128, 64, 8, 3, (1, 4, 32)), (128, 128, 64, 4, 4, (1, 4, 32)),
        (128, 128, 64, 8, 4, (1, 1, 128)),
    ]),
    "shortcut": (_SHORTCUT, [
        (64, 64, 64, 4, 5, (1, 2, 32), 2), (64, 128, 64, 4, 4, (1, 2, 32), 2), (64, 64, 64, 4, 4, (1, 2, 32), 2),
        (64, 64, 64, 4, 5, (1, 2, 32), 1),
    ]),
}  # fmt: skip
SIBLINGS = {
    f"sibling {name} {i}": (shape, ConvConfig(*tile, swap=has_several_sides(tile[5])))
    for name, (shape, tiles) in _TILES.items()
    for i, tile in enumerate(tiles)
}
"""The first tile of each shape was sometimes wrong on an H200 while its pixels were the rows of the product."""


def exact(run: Run, *, dtypes: Sequence[str]) -> Steps:
    """Every convolution of ResNet-18 as looked up, 300 times each; its other operators; siblings that were wrong."""
    facts, sizes = gluon.facts(run.device), batches(run, 1, 8, 32, 128, 256)
    found = cases(["resnet18"], sizes, dtypes, image(run))
    if rehearsed(run):
        found = [case for case in found if case.layer in ("conv1", "layer1.0.conv2", "fc")]
    pairs, others = {}, {}
    for case in found:
        name = f"{case.layer} {case.dtype} {case.batch}"
        if case.call.tiled:
            pairs[name] = case.call.shape, config.lookup(case.call.shape, facts)
        else:
            others[name] = case
    more = grouped(sizes[-1:], dtypes)[-1 if rehearsed(run) else 0 :]
    others |= {f"{case.layer} {case.dtype} {case.batch}": case for case in more}
    with contextlib.nullcontext() if rehearsed(run) else Compilers(facts, cores()) as compilers:
        siblings = {} if rehearsed(run) else SIBLINGS
        jobs = {name: compilers.submit(*pair) for name, pair in (pairs | siblings).items()} if compilers else {}
        for name, pair in pairs.items():
            yield name, partial(_exact, *pair, jobs.get(name), run)
        for name, case in others.items():
            yield name, partial(_repeatable, case, run)
        for name, pair in siblings.items():
            yield name, partial(_exact, *pair, jobs.get(name), run)


def _exact(shape: ConvShape, chosen: ConvConfig, job: Future[list[str]] | None, run: Run) -> Iterator[Found]:
    runs = 1 if rehearsed(run) else 100
    yield {"config": asdict(chosen), "faults": job.result() if job else []}
    wrong = wrong_runs(Trial(shape, run.device, 0), chosen, runs)
    yield {"runs": runs * len(wrong), "wrong": wrong}
    if any(wrong.values()):
        raise AssertionError(f"wrong in {wrong} of {runs} runs each")


def _repeatable(case: Case, run: Run) -> Iterator[Found]:
    """Right once and then the same bits: integers that are exact are for the tests."""
    problem = Problem(case.call.ours, run.device, kernels="triton")
    with torch.inference_mode():
        call = problem.build("ours")[0]
        error, expected = problem.error(call), call().clone()
        others = sum(not torch.equal(call(), expected) for _ in range(1 if rehearsed(run) else 300))
    yield {"error": f"{error:.3g}", "limit": f"{problem.limit:.3g}", "not repeated": others}  # JSON has no NaN
    if others or not error <= problem.limit:
        raise AssertionError(f"error {error}, limit {problem.limit}; {others} runs gave other bits")


# --- the suites ------------------------------------------------------------------------------------------------------


def models(
    run: Run, *, names: Sequence[str], sizes: Sequence[int] = (1, 32, 256), dtype: str = "float16",
    tuned: bool = False, label: str = "",
) -> Steps:  # fmt: skip
    """Whole models in turns, all compiled before; ours with this folder's tables if `tuned`; the rest is in `label`."""
    known, chosen = alternatives(run.device), []
    if rehearsed(run):  # what a CPU has, and waits for
        names = ["eager", *[name for name in names if name.startswith("ours")][-1:]]
    for name in names:
        if name.startswith("ours"):
            tables = str(run.folder) if tuned else None
            build = partial(ours, tables, "graph" in name and not rehearsed(run), "invariant" in name)
            chosen.append(Alternative(name + label, build, ours=True, cold=True))
        else:
            chosen.append(known[name])
    spec = Spec(dtype=dtype, device=str(run.device), image=image(run), tiny=rehearsed(run))
    rounds = (1, 1) if rehearsed(run) else race.ROUNDS
    return race.together(spec, chosen, batches(run, *sizes), run, seconds=12, rounds=rounds)


def ours(tables: str | None, graph: bool, invariant: bool, model: nn.Module, images: Tensor) -> Model:
    """Our model on our kernels; in a rehearsal they are interpreted."""
    if tables is not None:
        os.environ[table.VARIABLE] = tables
    return resnet_triton.optimize(model, kernels="triton", cuda_graph=graph, batch_invariant=invariant)


def layer_times(run: Run, *, alternatives: Sequence[str], dtype: str = "float16") -> Steps:
    """Each layer, ours against PyTorch's ways to compute it."""
    todo = cases(["resnet18"], batches(run, 1, 32, 256), [dtype], image(run))
    todo = todo[1:4] if rehearsed(run) else todo + grouped([256], [dtype])
    names = [name for name in alternatives if not (rehearsed(run) and name == "compile")]
    return layers.steps(todo, run, alternatives=names, kernels="triton", seconds=0.1)


def tune(run: Run) -> Steps:
    """A table for this GPU, kept in the folder of the results; it goes on where it stopped."""
    yield "resnet18", partial(_tune, run)


def _tune(run: Run) -> Iterator[Found]:
    path = run.folder / f"{table.slug(device.facts(run.device).name)}.json"
    found = tuner.run(
        budget=run.left() - 5, batches=[1, 32, 256], dtypes=["float16"], families=["resnet18"], out=path, again=False,
        jobs=cores(), bar=bar,
    )  # fmt: skip
    yield {"table": path.name, "rows": found["rows"]}
    if found["left"]:
        raise OutOfTime(f"{found['left']} shapes are left")


# --- other programs --------------------------------------------------------------------------------------------------


def tests(run: Run, *, file: str, select: str, few: str, processes: int) -> Steps:
    """A file of the test suite, counted as far as it got; in a rehearsal, a `few` of it in one process."""
    yield file, partial(_tests, file, few if rehearsed(run) else select, 1 if rehearsed(run) else processes, run)


def _tests(file: str, select: str, processes: int, run: Run) -> Iterator[Found]:
    command = [*PYTEST, "-v", file, "-k", select]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(processes, cores()))]
    code, output = _output(command, run)
    run.say(output)
    progress, _, summary = output.partition("short test summary")
    yield {name: len(re.findall(rf"\b{name}\b", progress)) for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    failures = re.findall(r"(?:FAILED|ERROR) (\S+::\S.*)", summary or progress)
    yield {"failures": failures[:100]}
    if code is None and run.cut:
        raise OutOfTime("the tests did not finish")
    if code != 0:
        how = "no time to finish" if code is None else f"exit code {code}"
        raise AssertionError("; ".join([how, *failures[:3]]) if failures else f"{how}: {output[-300:]}")


def _output(command: list[str], run: Run) -> tuple[int | None, str]:
    """Exit code and output of a program; code None if its time was up before."""
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    with subprocess.Popen(command, **how) as process:
        try:
            output, _ = process.communicate(timeout=max(run.left() - 3, 1))
        except subprocess.TimeoutExpired as late:  # its children may keep the pipe open: they end with this process
            process.kill()
            return None, (late.output or b"").decode(errors="replace")
    return process.returncode, output
