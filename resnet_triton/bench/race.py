"""Whole models: alternatives in processes of their own take turns, so that all meet the same state of the machine.

Each is checked against fp64 before it is timed and after every turn, so whatever has been measured can be kept when
time is up. What fails, hangs or answers wrongly costs itself alone and stays in the results, as a row that says so.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..support.processes import undisturbed
from .alternatives import Alternative
from .check import allowed, relative_error
from .child import Child
from .environment import environment
from .results import SKIPPED, Measurement
from .runner import Found, OutOfTime, Run, Steps
from .worker import Spec, network, serve

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
ROUNDS = (5, 40)  # least and most
TURN = 0.1  # seconds
GRACE = 60  # seconds after which a call that was fast before is taken to hang
FP64_CHUNK = 16  # images
_LATE = "took more than"


def steps(
    spec: Spec, chosen: Sequence[Alternative], batches: Sequence[int], run: Run, *, rounds: tuple[int, int] = ROUNDS
) -> Steps:
    """A step for each batch size, with an equal share of the time."""
    with Race(spec, chosen, partial(_prefixed, run.say, spec.dtype)) as race:

        def measure(i: int, batch: int) -> Iterator[list[Measurement]]:
            race.line_up(batch, time.monotonic() + run.left() / 2)
            mine = 1 if i else 2  # shares: the first batch size's compilers start cold
            left = run.left() * mine / (len(batches) - i - 1 + mine)
            yield from race.measure(batch, left, time.monotonic() + left, rounds)

        for i, batch in enumerate(batches):
            yield f"{spec.dtype} {batch}", partial(measure, i, batch)


def together(
    spec: Spec, chosen: Sequence[Alternative], batches: Sequence[int], run: Run, *,
    seconds: float, rounds: tuple[int, int] = ROUNDS,
) -> Steps:  # fmt: skip
    """A step for each batch size, with at most about `seconds` of timing each, where time is short.

    Every alternative has a process for each batch size. All of them start, and compile, side by side; then those that
    do not compile prepare one by one. Nothing is timed before all are ready: compilers have half of the time, others a
    sixth more. So no first call is reported: it was not alone. Nor was what a compiler times to choose by, as
    "max-autotune" does, so `steps` is what is fair to it. What another phase has measured stays, if it fails here.
    """
    say, measured = partial(_prefixed, run.say, spec.dtype), {row.key for row in run.results.rows if row.good}

    def news(rows: list[Measurement]) -> Iterator[Found]:
        old = [row for row in rows if row.failure and row.key in measured]
        yield [row for row in rows if row not in old]
        if old:
            yield {f"{row.alternative} failed": row.failure for row in old}

    with contextlib.ExitStack() as stack:
        races: dict[int, Race] = {}
        errors: dict[int, Exception] = {}

        def prepare(some: Sequence[int]) -> Iterator[Found]:
            races.update({batch: stack.enter_context(Race(spec, chosen, say)) for batch in some})
            for race in races.values():
                race.start()
            started = time.monotonic() + run.left() / 2
            for batch, race in races.items():
                try:
                    race.line_up(batch, started)
                    race.send(batch)
                except Exception as error:  # of the reference: other batch sizes may have one
                    errors[batch] = error.with_traceback(None)  # which would keep its tensors
                    _free_memory(spec)
            left, now = run.left(), time.monotonic()
            for cold, ready in ((True, now + left / 2), (False, now + left * 2 / 3)):
                for batch, race in races.items():
                    if batch not in errors:
                        for rows in race.receive(batch, ready, cold):
                            yield from news(rows)

        def measure(i: int) -> Iterator[Found]:
            if not races:  # an earlier run may have done the first steps
                yield from prepare(batches[i:])
            batch = batches[i]
            if batch in errors:
                raise errors[batch]
            late = [c.alternative.name for c in races[batch].contenders if c.late]
            end = time.monotonic() + min(seconds, run.left() / (len(batches) - i))
            for rows in races[batch].take_turns(batch, end, rounds):
                yield from news(rows)
            if late and run.cut:
                raise OutOfTime(f"no time for {', '.join(late)}")

        for i, batch in enumerate(batches):
            yield f"{spec.dtype} {batch}", partial(measure, i)


def _prefixed(say: Callable[[str], None], prefix: str, text: str) -> None:
    say(f"{prefix}, {text}")


def _free_memory(spec: Spec) -> None:
    """Leave the GPU what this process no longer needs."""
    if spec.device.startswith("cuda"):
        torch.cuda.empty_cache()


def connect(spec: Spec, alternative: Alternative, folder: Path) -> tuple[Child, Connection]:
    """A process for an alternative, and the line to it."""
    line, far = multiprocessing.get_context("spawn").Pipe()
    caches = {name: str(folder / name.lower()) for name in CACHES}
    child = Child(serve, (far, spec, alternative), folder / "log.txt", caches)
    far.close()
    return child, line


@dataclass
class Contender:
    """An alternative during a run: its process while it lives, and what is known so far of a batch size."""

    spec: Spec
    alternative: Alternative
    folder: Path
    process: tuple[Child, Connection] | None = None
    samples: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None

    @property
    def late(self) -> bool:
        """Whether it failed because its time was up."""
        return self.failure is not None and self.failure.startswith(_LATE)

    def start(self) -> None:
        """Start the process if there is none, and forget the batch size before."""
        self.samples, self.facts, self.failure = {}, {}, None
        self.process = self.process or connect(self.spec, self.alternative, self.folder)

    def end(self) -> None:
        """End the process if there is one."""
        if self.process is not None:
            (child, line), self.process = self.process, None
            line.close()
            child.end()

    def send(self, request: str, **arguments: Any) -> None:
        """Ask for something, unless something has failed."""
        if self.process is not None and not self.failure:
            with contextlib.suppress(OSError):  # `receive` will notice
                self.process[1].send((request, arguments))

    def receive(self, limit: float) -> Any:
        """The answer to what was sent; or None and a failure, within `limit` seconds or because there is none."""
        if self.process is None or self.failure:
            return None
        child, line = self.process
        try:
            if line.poll(max(limit, 0)):
                answer = line.recv()
                if not isinstance(answer, Exception):
                    return answer
                self.failure = str(answer)
                return None
            self.failure = f"{_LATE} {max(limit, 0):.0f} s"
        except (EOFError, OSError):
            child.process.join(5)
            self.failure = f"its process ended with code {child.process.exitcode}: {child.last_words()}"
        self.end()
        return None

    def ask(self, request: str, limit: float, **arguments: Any) -> Any:
        """Send and receive."""
        self.send(request, **arguments)
        return self.receive(limit)

    def turn(self) -> None:
        """Time it for a moment and check its answer once more."""
        samples, error = self.ask("turn", GRACE, seconds=TURN) or ({}, 0.0)
        for key, some in samples.items():
            self.samples.setdefault(key, []).extend(some)
        if not error <= self.facts.get("after", 0.0):  # NaN, too
            self.facts["after"] = error


class Race:
    """The alternatives of one model, dtype and device, over several batch sizes. Use it as a context manager."""

    def __init__(self, spec: Spec, chosen: Sequence[Alternative], say: Callable[[str], None]) -> None:
        self.spec, self.say = spec, say
        self._temporary = tempfile.TemporaryDirectory(prefix="resnet-triton-bench-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        self._limit = 0.0
        self.contenders = [Contender(spec, a, self.folder / str(i)) for i, a in enumerate(chosen)]

    def __enter__(self) -> Race:
        return self

    def __exit__(self, *_: object) -> None:
        with undisturbed():  # a second Ctrl-C would leave processes that this one waits for at its end
            for c in self.contenders:
                c.end()
            self._temporary.cleanup()

    def start(self) -> None:
        """Start the processes that do not run, and forget the batch size before."""
        for c in self.contenders:
            c.start()

    def line_up(self, batch: int, started: float) -> None:
        """Start the processes that do not run, and compute what is right. RuntimeError if fp64 fails.

        What has not started when `started` (of time.monotonic()) is over is ended.
        """
        self.start()
        self.say(f"batch {batch}: fp64 reference")  # while the processes start
        self._limit, here = self._reference(batch), environment(torch.device(self.spec.device))
        _free_memory(self.spec)
        for c in self.contenders:
            c.send("hello")
        for c in self.contenders:  # those still starting would disturb the first calls
            c.facts["environment"] = c.receive(started - time.monotonic()) or here
            if c.late:
                c.failure = f"{c.failure} to start"

    def measure(
        self, batch: int, seconds: float, deadline: float, rounds: tuple[int, int] = ROUNDS
    ) -> Iterator[list[Measurement]]:
        """Rows of alternatives that are lined up, as soon as they are known; later ones replace earlier ones.

        At most about `seconds` go into taking turns. `deadline` bounds all of it, compilers included: ours and the
        quick ones start first, and what is not ready when a third of the time is left is skipped.
        """
        timing = min(seconds, (deadline - time.monotonic()) / 3)
        for c in sorted(self.contenders, key=lambda c: c.alternative.cold and not c.alternative.ours):
            left = deadline - timing - time.monotonic()
            if left > 0:
                self.say(f"batch {batch}: first call of {c.alternative.name}")
                started = not c.failure
                c.facts |= c.ask("prepare", left, file=self._file(batch)) or {}
                if c.late and started:
                    c.failure = f"{SKIPPED}, {left:.0f} s into its first call"
                c.turn()
            else:
                c.failure = c.failure or SKIPPED
            yield self._rows(c, batch)
        yield from self.take_turns(batch, time.monotonic() + min(seconds, deadline - time.monotonic()), rounds)

    def send(self, batch: int) -> None:
        """Let the alternatives that are lined up and compile prepare, all at once."""
        for c in self.contenders:
            if c.alternative.cold:
                c.send("prepare", file=self._file(batch))

    def receive(self, batch: int, deadline: float, cold: bool) -> Iterator[list[Measurement]]:
        """Wait until those that compile are ready, or prepare the others; who is late fails. Rows without a time."""
        self.say(f"batch {batch}: {'compiling' if cold else 'preparing the others'}")
        for c in (c for c in self.contenders if c.alternative.cold is cold):
            if not cold:
                c.send("prepare", file=self._file(batch))
            c.facts |= c.receive(deadline - time.monotonic()) or {}
            c.facts.pop("first_s", None)
            yield self._rows(c, batch)

    def take_turns(self, batch: int, end: float, rounds: tuple[int, int]) -> Iterator[list[Measurement]]:
        """Rows of what is ready, after each round: `rounds[0]` at least, then until `end`."""
        self.say(f"batch {batch}: taking turns")
        least, most = rounds
        for i in range(most):
            if i >= least and time.monotonic() > end:
                return
            for c in self.contenders:
                c.turn()
            yield [row for c in self.contenders for row in self._rows(c, batch)]

    def _file(self, batch: int) -> str:
        return str(self.folder / f"batch-{batch}.pt")

    @torch.inference_mode()
    def _reference(self, batch: int) -> float:
        """Write images and their fp64 logits to a file. Returns the error that is allowed."""
        spec, dtype = self.spec, getattr(torch, self.spec.dtype)
        fresh = torch.Generator().manual_seed(time.time_ns())
        images = torch.randn(batch, 3, spec.image, spec.image, generator=fresh).to(spec.device, dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        base = network(spec)
        eager, exact = base(images), copy.deepcopy(base).double()
        expected = torch.cat([exact(some.double()) for some in images.split(FP64_CHUNK)])
        torch.save({"images": images, "expected": expected}, self._file(batch))
        return allowed(relative_error(eager, expected), dtype)

    def _rows(self, c: Contender, batch: int) -> list[Measurement]:
        spec, cuda = self.spec, self.spec.device.startswith("cuda")
        row = Measurement(
            suite="model", model=spec.model, layer=None, alternative=c.alternative.name, ours=c.alternative.ours,
            batch=batch, image=spec.image, dtype=spec.dtype, clock="wall", l2="warm" if cuda else "uncontrolled",
            environment=c.facts["environment"], first_call_s=c.facts.get("first_s"),
            peak_bytes=c.facts.get("peak_bytes"), failure=c.failure,
        )  # fmt: skip
        if c.failure:
            return [replace(row, clock=clock, l2=l2) for clock, l2 in c.samples or [(row.clock, row.l2)]]
        row = row.checked(c.facts["error"], c.facts.get("after", 0.0), self._limit)
        return [replace(row, clock=clock, l2=l2).timed(samples) for (clock, l2), samples in c.samples.items()]
