"""`resnet-triton bench`: one phase after another within a budget, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..support import files
from ..support.names import check_known, use_device
from . import cases, ceilings, compare, layers, output, race
from .alternatives import Alternative, alternatives, select
from .report import remark
from .results import Results, resume
from .runner import Phase, Run, Say, run_phase
from .worker import Spec

SUITES = ("model", "kernel")
DTYPES = ("float16", "bfloat16", "float32")


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
    suites: Sequence[str] = SUITES,
    models: Sequence[str] = ("resnet18",),
    batches: Sequence[int] = (),
    dtypes: Sequence[str] = (),
    baselines: Sequence[str] = (),
    budget: float | None = None,
    out: Path,
    image: int = 224,
) -> Plan:
    """A plan with defaults for the device: empty stands for all. ValueError names what is unknown."""
    where = use_device(device)
    cuda = where.type == "cuda"
    check_known("suite", suites, SUITES)
    check_known("model", models, cases.MODELS)
    check_known("dtype", dtypes, DTYPES)
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

    Earlier results in the folder stay until something has been timed. A file of somebody else's there is a ValueError
    at the start, a folder that cannot be written to an OSError; at the end `unwritten` is told, and the caller still
    gets the results.
    """
    results, end = Results(), time.monotonic() + plan.budget
    resume(plan.out)
    files.prepare(plan.out)
    try:
        for phase in phases(plan):
            deadline = min(time.monotonic() + phase.limit, end)
            run_phase(phase, Run(plan.device, plan.out, results, deadline, say, replaces=True))
    except KeyboardInterrupt:
        say("stopped" if results.timed else "stopped; nothing was timed, and nothing written")
        raise
    finally:
        if results.timed:
            try:
                say(output.write(results, plan.out))
            except OSError as error:
                say(f"cannot write {error.filename}: {error.strerror}")
                unwritten(error)
    return results


def phases(plan: Plan) -> Iterator[Phase]:
    """Ceilings, a race for each dtype, then the layers in the time that is left."""
    yield Phase("ceilings", partial(ceilings.steps, plan.dtypes))
    share = (0.6 if "kernel" in plan.suites else 1.0) * plan.budget / len(plan.dtypes)
    for dtype in plan.dtypes if "model" in plan.suites else ():
        spec = Spec(plan.models[0], dtype, str(plan.device), plan.image)
        steps = partial(race.steps, spec, plan.alternatives, plan.batches)
        yield Phase(f"model {dtype}", steps, limit=share)
    if "kernel" in plan.suites:
        todo = cases.cases(plan.models, plan.batches, plan.dtypes, plan.image)
        yield Phase("layers", partial(layers.steps, todo))


def faults(results: Results) -> list[str]:
    """That nothing was timed, rows of ours that are wrong or failed, and steps that failed."""
    nothing = [] if results.timed else ["nothing was timed, and nothing written; a larger --budget gives more"]
    rows = [
        f"{compare.title(row)}: " + (remark(row) if row.failure else "gives a wrong answer")
        for row in results.rows
        if row.ours and (row.failure or row.correct is False)
    ]
    return nothing + rows + [f"{step.phase}, {step.name}: {step.failure}" for step in results.steps if step.failure]
