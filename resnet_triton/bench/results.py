"""Results of a run as data, kept in one JSON file.

A row carries everything that is needed to judge it: where it ran, on what, in which state, every sample, and whether
the answer was right. The file is also the run's journal: it names the steps that are done and the one under way. Files
are checked when they are read; whatever is wrong with one is said in one line.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..support import files, timing

FORMAT, VERSION = "resnet-triton-benchmark", 3
FILE = "results.json"
MAX_BYTES = 64 << 20
SKIPPED = "skipped: the budget was used up"
"""How a failure begins that is nobody's fault."""


@dataclass(frozen=True)
class Measurement:
    """One alternative, doing one thing, timed in one way. Times are seconds, what was not measured is None.

    `suite` is "model" or "kernel", which has a `layer`; `image` the height and width of the model's input; `clock`
    "wall" or, between events on the device, "gpu"; `l2` whether a GPU's L2 cache was flushed: "cold", "warm" or
    "uncontrolled". Errors are relative to fp64, before and after the timing; `correct` says that both are within the
    limit. The first call of a race's first batch size is in a new process, with the compiler's caches empty; those of
    later ones go on with both. `peak_bytes` are a GPU's, above parameters and images; `flops` are the operation's,
    however computed, and `bytes` the least traffic of any
    implementation; `config` are a kernel's tiles; `failure` is why there are no samples.
    """

    suite: str
    model: str
    layer: str | None
    alternative: str
    ours: bool
    batch: int
    image: int
    dtype: str
    clock: str
    l2: str
    environment: dict[str, Any]
    samples_s: list[float] = field(default_factory=list)
    p20_s: float | None = None
    p50_s: float | None = None
    p80_s: float | None = None
    correct: bool | None = None
    error_before: float | None = None
    error_after: float | None = None
    error_limit: float | None = None
    first_call_s: float | None = None
    peak_bytes: int | None = None
    flops: int | None = None
    bytes: int | None = None
    config: dict[str, Any] | None = None
    failure: str | None = None

    @property
    def task(self) -> tuple[Any, ...]:
        """What was to be done, and how it was timed: rows with the same task are alternatives to each other."""
        return (self.suite, self.model, self.layer, self.batch, self.image, self.dtype, self.clock, self.l2)

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes this row the same measurement as one in another file."""
        return (*self.task, self.alternative)

    @property
    def good(self) -> bool:
        """Timed, and right before and after."""
        return self.p50_s is not None and self.correct is True

    def timed(self, samples: Sequence[float]) -> Measurement:
        """The row with these samples and their percentiles."""
        p50, p20, p80 = timing.spread(samples)
        return replace(self, samples_s=[float(f"{s:.6g}") for s in samples], p20_s=p20, p50_s=p50, p80_s=p80)

    def checked(self, before: float, after: float, limit: float) -> Measurement:
        """The row with its errors judged; an error that is no number cannot be written and is wrong."""
        kept = [error if error < float("inf") else None for error in (before, after, limit)]
        good = kept[2] is not None and before <= limit and after <= limit
        return replace(self, error_before=kept[0], error_after=kept[1], error_limit=kept[2], correct=good)


@dataclass(frozen=True)
class Ceiling:
    """What plain code reached on the same device in the same run."""

    name: str
    dtype: str | None = None
    bytes_per_s: float | None = None
    flops_per_s: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes this the same as one in another file."""
        return self.name, self.dtype


@dataclass(frozen=True)
class Step:
    """A step that ran: what it found beside rows and ceilings, why it failed, and where; None if its process ended."""

    phase: str
    name: str
    seconds: float
    failure: str | None
    found: dict[str, Any]
    environment: dict[str, Any] | None

    @property
    def key(self) -> tuple[str, str]:
        """What a later run of the same step replaces."""
        return self.phase, self.name


@dataclass
class Results:
    """What a run has found so far, the phases that are through, and the phase and step under way."""

    rows: list[Measurement] = field(default_factory=list)
    ceilings: list[Ceiling] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    complete: list[str] = field(default_factory=list)
    running: list[str] | None = None

    @property
    def timed(self) -> bool:
        """Whether there is a row with a time."""
        return any(row.p50_s is not None for row in self.rows)

    def add(self, items: Sequence[Measurement | Ceiling | Step]) -> None:
        """Keep these; one that was there before is replaced."""
        lists: dict[type, list[Any]] = {Measurement: self.rows, Ceiling: self.ceilings, Step: self.steps}
        for item in items:
            kept = lists[type(item)]
            place = next((i for i, other in enumerate(kept) if other.key == item.key), len(kept))
            kept[place : place + 1] = [item]

    def tasks(self) -> dict[tuple[Any, ...], list[Measurement]]:
        """Rows by what was to be done, in the order they came."""
        found: dict[tuple[Any, ...], list[Measurement]] = {}
        for row in self.rows:
            found.setdefault(row.task, []).append(row)
        return found


def best(rows: Sequence[Measurement], *, ours: bool) -> Measurement | None:
    """The fastest right one of ours, or of the others; None if there is none."""
    return min((r for r in rows if r.ours is ours and r.good), key=lambda r: r.p50_s or 0.0, default=None)


def speedup(rows: Sequence[Measurement]) -> float | None:
    """Time of the best alternative over that of ours. None if a row of ours is wrong: then nothing is claimed."""
    mine, other = best(rows, ours=True), best(rows, ours=False)
    wrong = any(row.ours and row.correct is False for row in rows)
    if wrong or mine is None or other is None or not mine.p50_s or not other.p50_s:
        return None
    return other.p50_s / mine.p50_s


def geometric_mean(values: Sequence[float]) -> float | None:
    """The mean of ratios; None of nothing."""
    return statistics.geometric_mean(values) if values else None


def one_line(error: BaseException) -> str:
    """An error as a row holds it: compilers write pages, and say what is wrong at either end."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) < 600 else f"{text[:300]} ... {text[-300:]}"


# --- files -----------------------------------------------------------------------------------------------------------


def as_text(results: Results) -> str:
    """The content of a file: JSON, one row a line."""
    return files.by_line({"format": FORMAT, "version": VERSION, **asdict(results)})


def save(results: Results, path: Path) -> None:
    """Write the file; an interrupted run leaves the old results or the new ones."""
    files.replace(path, as_text(results))


def load(path: Path) -> Results:
    """Read a file, or the one in a folder. ValueError says in one line what is wrong with it."""
    path = path / FILE if path.is_dir() else path
    data = files.read_json(path, MAX_BYTES)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f'{path}: no results of bench, expected an object with "format": "{FORMAT}"')
    if data.get("version") != VERSION:
        raise ValueError(f"{path}: is of version {data.get('version')!r}, expected {VERSION}; run the benchmark again")
    try:
        found = Results(
            [Measurement(**row) for row in data["rows"]], [Ceiling(**c) for c in data["ceilings"]],
            [Step(**step) for step in data["steps"]], list(data["complete"]), data["running"],
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged, {one_line(error)}") from None
    for item in [*found.rows, *found.ceilings, *found.steps]:
        _check_types(item, path)
    for row in found.rows:
        if missing := {"device", "device_kind", "threads"} - set(row.environment):
            raise ValueError(f"{path}: an environment has no {min(missing)!r}")
        for seconds in (row.p20_s, row.p50_s, row.p80_s):
            if seconds is not None and not 0 < seconds < float("inf"):
                raise ValueError(f"{path}: a time of {seconds!r:.40}, expected seconds above 0")
    if len({row.key for row in found.rows}) < len(found.rows):
        raise ValueError(f"{path}: a row is there twice, expected each once")
    return found


def _check_types(item: Any, path: Path) -> None:
    for f in fields(item):
        kinds = [kind.partition("[")[0] for kind in str(f.type).split(" | ")]
        value = getattr(item, f.name)
        kind = type(value).__name__
        if not (kind in kinds or (value is None and "None" in kinds) or (kind == "int" and "float" in kinds)):
            raise ValueError(f"{path}: {type(item).__name__}.{f.name} is {value!r:.40}, expected {f.type}")


def resume(folder: Path) -> Results:
    """What an earlier run of ours left in a folder; ValueError if the file there is none of ours."""
    try:
        return load(folder / FILE)
    except (FileNotFoundError, NotADirectoryError):
        return Results()
    except ValueError as error:
        raise ValueError(f"{error}; move it away, or choose another folder with --out") from None
