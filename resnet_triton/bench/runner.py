"""The one runner: phases of steps, each of which is written to the folder of the results as soon as it has found
something, and not repeated by a run that goes on there.

`run_phase` works in this process, as `resnet-triton bench` does. `run_apart` gives a phase a process and a time limit
of its own, as a GPU that is lent for minutes needs it: a step that crashes or hangs costs itself alone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .child import Child
from .environment import environment
from .results import FILE, Ceiling, Measurement, Results, Step, one_line, resume, save

Say = Callable[[str], None]
Found = Sequence[Measurement | Ceiling] | dict[str, Any]
"""Something for the results, or a part of what the step itself has found."""
Action = Callable[[], Iterable[Found]]
Steps = Generator[tuple[str, Action], None, None]
LEAST = 10  # seconds under which no process is worth starting
ATTEMPTS = 20  # of a phase whose steps crash


class OutOfTime(Exception):
    """A step, or what follows it, found no time: a later run tries it again."""


@dataclass(frozen=True)
class Run:
    """What a phase may know and use: its device, its time, and what was found before it.

    `cut` says that the budget ends it sooner than the phase's own limit: what is late then may be in time next time.
    `replaces` says that the folder may hold what another run has found, which stays until this one has timed something.
    """

    device: torch.device
    folder: Path
    results: Results
    deadline: float  # of time.monotonic(), which all processes share
    say: Say
    cut: bool = False
    replaces: bool = False

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def keep(self) -> None:
        """Write what there is, for the case that this process is killed."""
        if self.replaces and not self.results.timed:
            return
        keep(self.results, self.folder, self.say)

    @functools.cached_property
    def environment(self) -> dict[str, Any]:
        """Where this process runs, looked up once: each look asks nvidia-smi and git."""
        return environment(self.device)


def keep(results: Results, folder: Path, say: Say) -> None:
    """Write the results, or say why not: there may be room again when all is done."""
    try:
        save(results, folder / FILE)
    except OSError as error:
        say(f"cannot write {error.filename} yet: {error.strerror}")


@dataclass(frozen=True)
class Phase:
    """Steps by name, within `limit` seconds in all. In a process of its own, `environ` is added to what it inherits, a
    step ends it after `step_limit` seconds, and it leaves `spare` seconds for later phases.
    """

    name: str
    steps: Callable[[Run], Steps]
    limit: float = math.inf
    step_limit: float | None = None
    spare: float = 0
    environ: Mapping[str, str] = field(default_factory=dict)


def run_phase(phase: Phase, run: Run, again: Sequence[Step] = ()) -> None:
    """Do the steps that the results do not know yet, until the deadline. A failure becomes part of the results.

    Steps of `again` are done once more; what they found before stays until then. A step that runs out of time is for
    another run, and those behind it may still have enough.
    """
    results = run.results
    done = {step.name for step in results.steps if step.phase == phase.name and step not in again}
    results.complete = [name for name in results.complete if name != phase.name]
    late = False
    try:
        with contextlib.closing(phase.steps(run)) as steps:  # whatever happens, what it has started is ended
            for name, action in steps:
                if name in done:
                    continue
                if run.left() < 0:
                    raise OutOfTime(f"no time left for {name} and what follows")
                results.running = [phase.name, name]
                run.keep()
                try:
                    _step(phase, name, action, run)
                except OutOfTime as error:
                    run.say(f"{phase.name}, {name}: {error}")
                    results.running, late = None, True
        results.complete += [] if late else [phase.name]
    except OutOfTime as error:
        run.say(f"{phase.name}: {error}")
    results.running = None
    run.keep()


def _step(phase: Phase, name: str, action: Action, run: Run) -> None:
    start, failure = time.monotonic(), None
    found: dict[str, Any] = {}
    if phase.step_limit is not None:
        faulthandler.dump_traceback_later(phase.step_limit, exit=True)
    try:
        for some in action():
            if isinstance(some, dict):
                found |= some
            else:
                run.results.add(some)
            run.keep()
    except OutOfTime:
        raise
    except Exception as error:  # of a compiler, a kernel, a check: the other steps are worth a try
        failure = one_line(error)
    finally:
        faulthandler.cancel_dump_traceback_later()
    seconds = round(time.monotonic() - start, 3)
    run.results.add([Step(phase.name, name, seconds, failure, found, run.environment)])
    run.results.running = None
    run.keep()
    if phase.step_limit is not None and run.device.type == "cuda":
        torch.cuda.synchronize(run.device)  # raises if the failure spoilt the context


def run_apart(
    phase: Phase, device: torch.device, folder: Path, end: float, environ: Mapping[str, str], *, again: bool = False
) -> str:
    """Run a phase in a process of its own, again behind a step that ended it; how that went, in words.

    `again` repeats the steps that the folder has already.
    """
    limit = time.monotonic() + phase.limit
    deadline = min(limit, end - phase.spare)
    known = resume(folder)
    if phase.name in known.complete and not again:
        return "complete already"
    stale = [step for step in known.steps if again and step.phase == phase.name]
    if deadline - time.monotonic() < LEAST:
        return "no time left"
    if known.running is not None:  # when an earlier run was killed, which says nothing about the step
        known.running = None
        keep(known, folder, print)
    for _ in range(ATTEMPTS):
        before = resume(folder).steps
        log, added = folder / f"{phase.name}.log", {**phase.environ, **environ}
        child = Child(_alone, (phase, stale, device, folder, deadline, deadline < limit), log, added)
        try:
            child.process.join(max(deadline + 2 - time.monotonic(), 0))
            code = child.process.exitcode
        finally:
            child.end()
        results = resume(folder)
        running, results.running = results.running, None
        if running is not None and code is not None:  # else its phase's time was up, not its own
            failure = f"ended the process or took more than {phase.step_limit} s: {child.last_words()}"
            results.add([Step(running[0], running[1], 0.0, failure, {}, None)])
            stale = [step for step in stale if step.name != running[1]]
        keep(results, folder, print)
        if code == 0:
            return "complete" if phase.name in results.complete else "out of time"
        if code is None or deadline - time.monotonic() < LEAST:
            return "out of time"
        if running is None and results.steps == before:
            return f"crashed before its first step: {child.last_words()}"
    return "crashed too often"


def _alone(phase: Phase, stale: Sequence[Step], device: torch.device, folder: Path, deadline: float, cut: bool) -> None:
    say = functools.partial(print, flush=True)
    run_phase(phase, Run(device, folder, resume(folder), deadline, say, cut), stale)
