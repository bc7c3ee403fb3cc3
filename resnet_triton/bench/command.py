"""`resnet-triton bench`: the suites one after another within a budget, results written after each step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..models import resnet18
from ..support import files
from . import cases, ceilings, kernels, predictions, report
from .alternatives import Alternative, alternatives, select
from .environment import environment
from .model import Lost, Race, with_warm_starts
from .results import FILE, Results, Row, save
from .worker import Spec

Say = Callable[[str], None]

DTYPES = ("float16", "bfloat16", "float32")
PREDICTED = ("float16",)


@dataclass(frozen=True)
class Plan:
    """What to run. `models` of the kernel suite give its layer shapes; the model suite times the first alone."""

    device: torch.device
    suites: tuple[str, ...]
    models: tuple[str, ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    alternatives: tuple[Alternative, ...]
    budget: float
    out: Path
    image: int = 224


def plan(
    *,
    device: str = "auto",
    suites: Sequence[str] = ("model", "kernel"),
    models: Sequence[str] = ("resnet18",),
    batches: Sequence[int] = (),
    dtypes: Sequence[str] = (),
    baselines: Sequence[str] = (),
    budget: float | None = None,
    out: Path,
    image: int = 224,
) -> Plan:
    """A plan with defaults for the device: empty stands for all. ValueError names what is unknown."""
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    cuda = where.type == "cuda"
    for what, given, known in (("model", models, cases.MODELS), ("dtype", dtypes, DTYPES)):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"no {what} {unknown[0]!r}, expected some of {', '.join(known)}")
    ours = [a.name for a in alternatives(where).values() if a.ours]
    return Plan(
        device=where,
        suites=tuple(suites),
        models=tuple(models),
        batches=tuple(batches) or ((1, 2, 4, 8, 16, 32, 64, 128, 256) if cuda else (1, 4, 16)),
        dtypes=tuple(dtypes) or (("float16",) if cuda else ("float32",)),
        alternatives=tuple(select([*(baselines or alternatives(where)), *ours], where)),
        budget=budget or (1800 if cuda else 480),
        out=out,
        image=image,
    )


def run(plan: Plan, say: Say, unwritten: Callable[[OSError], object]) -> Results:
    """Do what the plan says until its budget is spent; an interrupted run leaves what it has.

    A folder that cannot be written to is an OSError at the start; at the end `unwritten` is told, and the caller still
    gets the results.
    """
    results = Results()
    end = time.monotonic() + plan.budget
    files.prepare(plan.out)
    try:
        say("memory bandwidth and matrix products")
        results.ceilings.extend(ceilings.measure(plan.device, plan.dtypes))
        if plan.device.type == "cpu":
            end -= 0.1 * plan.budget  # for what comes last
        if "model" in plan.suites:
            share = 0.6 if "kernel" in plan.suites else 1.0
            _models(plan, results, time.monotonic() + share * (end - time.monotonic()), say)
        if "kernel" in plan.suites:
            _kernels(plan, results, end, say)
        if plan.device.type == "cpu":
            say("compiling for a GPU that is not here")
            model, jobs = resnet18().eval(), os.cpu_count() or 1
            results.predictions.extend(predictions.predictions(model, plan.batches, PREDICTED, jobs=jobs))
    finally:
        say("writing")
        try:
            report.write(results, plan.out)
        except OSError as error:
            say(f"cannot write {error.filename}: {error.strerror}")
            unwritten(error)
    return results


def _models(plan: Plan, results: Results, end: float, say: Say) -> None:
    """Each dtype and batch size gets its share of the time that is left."""
    for i, dtype in enumerate(plan.dtypes):
        spec = Spec(plan.models[0], dtype, str(plan.device), plan.image)
        deadline = time.monotonic() + (end - time.monotonic()) / (len(plan.dtypes) - i)
        with Race(spec, plan.alternatives, partial(_prefixed, say, dtype)) as race:
            for j, batch in enumerate(plan.batches):
                # Half a share is for the second starts; the first batch size, whose compilers start cold, gets two.
                left, mine = (len(plan.batches) - j + 0.5, 1) if j else (len(plan.batches) + 1.5, 2)
                until = time.monotonic() + (deadline - time.monotonic()) * mine / left
                try:
                    rows = race.measure(batch, until - time.monotonic(), until)
                except (Lost, RuntimeError) as error:  # nothing to check against
                    say(f"batch {batch}: left out, {error}")
                    continue
                results.rows.extend(rows)
                _keep(results, plan.out, say)
            found = race.warm_start(plan.batches[0], deadline)
        results.rows[:] = with_warm_starts(results.rows, dtype, plan.batches[0], found)


def _prefixed(say: Say, prefix: str, text: str) -> None:
    say(f"{prefix}, {text}")


def _kernels(plan: Plan, results: Results, end: float, say: Say) -> None:
    where = environment(plan.device)
    todo = cases.cases(plan.models, plan.batches, plan.dtypes, plan.image)
    left = len(todo)
    for rows in kernels.run(todo, plan.device, where, deadline=end):
        results.rows.extend(rows)
        say(f"{rows[0].model} {rows[0].layer}, batch {rows[0].batch}")
        left -= 1
        _keep(results, plan.out, say)
    if left:
        say(f"no time left for {left} of {len(todo)} layers; --budget gives more")


def _keep(results: Results, folder: Path, say: Say) -> None:
    """Write what there is, for the case that this process is killed."""
    try:
        save(results, folder / FILE)
    except OSError as error:  # there may be room again when all is done
        say(f"cannot write {error.filename} yet: {error.strerror}")


def faults(results: Results) -> list[tuple[Row, str]]:
    """Rows of ours that are wrong or failed, and how."""
    return [
        (row, f"failed: {row.failure}" if row.failure else "gives a wrong answer")
        for row in results.rows
        if row.ours and (row.failure or row.correct is False)
    ]
