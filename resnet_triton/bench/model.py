"""The model suite: alternatives in processes of their own take turns, so that all meet the same state of the machine.

Each is checked against fp64 before it is timed and afterwards. What fails, hangs or answers wrongly costs itself alone
and stays in the results, as a row that says so.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from ..support.processes import undisturbed
from .alternatives import Alternative
from .results import Row
from .worker import Spec, serve

Report = Callable[[str], None]
"""Called with what is about to happen."""

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
LEAST_ROUNDS, MOST_ROUNDS = 5, 40
TURN = 0.1  # seconds
GRACE = 60  # seconds after which a call that was fast before is taken to hang


class Lost(Exception):
    """A worker died or took too long, and is no more."""


class Process:
    """A worker and the line to it."""

    def __init__(self, spec: Spec, alternative: Alternative | None, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        context = multiprocessing.get_context("spawn")
        self.line, far = context.Pipe()
        caches = {name: str(folder / name.lower()) for name in CACHES}
        self.process = context.Process(target=serve, args=(far, spec, alternative, str(self.log)), daemon=False)
        with undisturbed(), mock.patch.dict(os.environ, caches):  # a child finds it before it imports anything
            self.process.start()
        far.close()

    def send(self, request: str, **arguments: Any) -> None:
        with contextlib.suppress(OSError):  # `receive` will notice
            self.line.send((request, arguments))

    def receive(self, limit: float) -> Any:
        """The answer. Lost if there is none within `limit` seconds; RuntimeError if the request failed."""
        try:
            if not self.line.poll(max(limit, 0)):
                self.end()
                raise Lost(f"took more than {limit:.0f} s")
            answer = self.line.recv()
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            self.end()
            raise Lost(f"its process ended with code {code}: {self._last_words()}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ask(self, request: str, limit: float, **arguments: Any) -> Any:
        self.send(request, **arguments)
        return self.receive(limit)

    def end(self) -> None:
        """End the process and all it has started."""
        self.line.close()
        if self.process.pid is not None:
            for kill in (os.kill, os.killpg):  # it leads a group once it runs
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it said nothing")


@dataclass
class Contender:
    """An alternative during a run: its process while it lives, and what is known so far."""

    alternative: Alternative
    folder: Path
    process: Process | None = None
    samples: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None

    def ask(self, request: str, limit: float, **arguments: Any) -> Any:
        """The answer, or None and a failure."""
        if self.process is None or self.failure:
            return None
        try:
            return self.process.ask(request, limit, **arguments)
        except (Lost, RuntimeError) as error:
            self.failure = str(error)
            if isinstance(error, Lost):
                self.process = None
            return None


class Race:
    """The alternatives of one model, dtype and device, over several batch sizes. Use it as a context manager."""

    def __init__(self, spec: Spec, chosen: Sequence[Alternative], say: Report = lambda text: None) -> None:
        self.spec, self.say = spec, say
        self._temporary = tempfile.TemporaryDirectory(prefix="resnet-triton-bench-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        self.reference = Process(spec, None, self.folder / "reference")
        self.contenders = [Contender(a, self.folder / str(i)) for i, a in enumerate(chosen)]

    def __enter__(self) -> Race:
        return self

    def __exit__(self, *_: object) -> None:
        with undisturbed():  # a second Ctrl-C would leave processes that this one waits for at its end
            for process in [self.reference, *(c.process for c in self.contenders)]:
                if process is not None:
                    process.end()
            self._temporary.cleanup()

    def measure(self, batch: int, seconds: float, deadline: float) -> list[Row]:
        """Rows of every alternative at a batch size, after at most about `seconds` of timing.

        `deadline` (of time.monotonic()) bounds all of it, compilers included: ours and the quick ones start first, and
        what is not ready when a third of the time is left is a failure. Lost or RuntimeError if fp64 itself fails.
        """
        file = str(self.folder / f"batch-{batch}.pt")
        if self.reference.line.closed:  # it was lost at another batch size
            self.reference = Process(self.spec, None, self.folder / "reference")
        for c in self.contenders:
            c.samples, c.facts, c.failure = {}, {}, None
            c.process = c.process or Process(self.spec, c.alternative, c.folder)
        self.say(f"batch {batch}: fp64 reference")
        reference = self.reference.ask("hello", deadline - time.monotonic())
        limit = self.reference.ask("reference", deadline - time.monotonic(), batch=batch, file=file)
        for c in self.contenders:  # those still starting would disturb the first calls
            c.facts["environment"] = c.ask("hello", deadline - time.monotonic()) or reference
        timing = min(seconds, (deadline - time.monotonic()) / 3)
        for c in sorted(self.contenders, key=lambda c: c.alternative.cold and not c.alternative.ours):
            self.say(f"batch {batch}: first call of {c.alternative.name}")
            left = deadline - timing - time.monotonic()
            c.facts |= c.ask("prepare", left, batch=batch, file=file) or {}
        self.say(f"batch {batch}: taking turns")
        self._rounds(seconds=min(seconds, deadline - time.monotonic()))
        for c in self.contenders:
            c.facts["after"] = c.ask("error", GRACE)
        return [row for c in self.contenders for row in self._rows(c, batch, limit)]

    def _rounds(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        for i in range(MOST_ROUNDS):
            if i >= LEAST_ROUNDS and time.monotonic() > end:
                return
            for c in self.contenders:
                for key, samples in (c.ask("turn", GRACE, seconds=TURN) or {}).items():
                    c.samples.setdefault(key, []).extend(samples)

    def _rows(self, c: Contender, batch: int, limit: float) -> Iterator[Row]:
        row = Row(
            suite="model",
            model=self.spec.model,
            layer=None,
            alternative=c.alternative.name,
            ours=c.alternative.ours,
            batch=batch,
            image=self.spec.image,
            dtype=self.spec.dtype,
            clock="wall",
            l2="warm" if self.spec.device.startswith("cuda") else "uncontrolled",
            environment=c.facts["environment"],
            first_call_cold_s=c.facts.get("first_s"),
            peak_bytes=c.facts.get("peak_bytes"),
            failure=c.failure,
        )
        if c.failure:
            yield row
            return
        row = row.checked(c.facts["error"], c.facts["after"], limit)
        for (clock, l2), samples in c.samples.items():
            yield replace(row, clock=clock, l2=l2).timed(samples)

    def warm_start(self, batch: int, deadline: float) -> dict[str, float]:
        """Seconds of a first call in a second process that finds the first one's compiler caches, by alternative."""
        file, found = str(self.folder / f"batch-{batch}.pt"), {}
        for c in self.contenders:
            if not c.alternative.cold or c.failure or time.monotonic() > deadline:
                continue
            self.say(f"batch {batch}: second start of {c.alternative.name}")
            process = Process(self.spec, c.alternative, c.folder)
            try:
                process.ask("hello", deadline - time.monotonic())
                answer = process.ask("prepare", deadline - time.monotonic(), batch=batch, file=file)
                found[c.alternative.name] = answer["first_s"]
            except (Lost, RuntimeError):
                pass  # the first start's rows say what there is to say
            finally:
                process.end()
        return found


def with_warm_starts(rows: Sequence[Row], dtype: str, batch: int, found: dict[str, float]) -> list[Row]:
    """The rows, those of this dtype and batch size with the time of their second start."""
    return [
        replace(row, first_call_warm_s=found[row.alternative])
        if (row.suite, row.dtype, row.batch) == ("model", dtype, batch) and row.alternative in found
        else row
        for row in rows
    ]
