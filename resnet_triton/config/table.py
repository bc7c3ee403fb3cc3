"""Tables: one JSON file per GPU, read as data, checked before use and replaced as a whole.

    {"schema": 1,
    "gpu": ..., "driver": ..., "triton": ..., "torch": ..., "date": ..., "facts": {...},
    "entries": [
    {"shape": {...}, "config": {...}, "timing": {...}},
    ...
    ]}

Facts may be missing; only where the GPU is not here are they needed (`targets.py`). Driver, versions and date are those
of the tuner's run that wrote the file last; an entry's timing says when and with which Triton it was measured. A table
is never trusted: unknown or repeated keys, wrong types and oversized files make it a ValueError. Whether an entry is
legal on the GPU is asked at each use.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
import warnings
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..kernels.values import ConvConfig
from ..support import files
from .conv import ConvShape

FOLDER = Path(__file__).parent / "gpus"
VARIABLE = "RESNET_TRITON_TABLES"
MAX_BYTES = 4 << 20
SCHEMA = 1


@dataclass(frozen=True)
class Facts:
    """What a GPU has and, from `sm_` on, what one of its multiprocessors holds. Memory is in bytes.

    `shared_memory` is what one program may use. From the CUDA programming guide, "Technical Specifications per Compute
    Capability", and the products' data sheets.
    """

    arch: int
    sm_count: int
    shared_memory: int
    sm_warps: int
    sm_programs: int
    sm_shared_memory: int


@dataclass(frozen=True)
class Timing:
    """How an entry was found: L2-cold microseconds, those of the heuristic's choice, and how many were tried."""

    us: float
    p20_us: float
    p80_us: float
    heuristic_us: float
    tried: int
    triton: str
    date: str


class Entry(NamedTuple):
    """One tuned convolution. A table written by hand may have no timing."""

    config: ConvConfig
    timing: Timing | None = None


@dataclass(frozen=True)
class Table:
    """What is known of one GPU: facts, the tuned convolutions, and what they were tuned with."""

    gpu: str
    driver: str = ""
    triton: str = ""
    torch: str = ""
    date: str = ""
    facts: Facts | None = None
    entries: dict[ConvShape, Entry] = field(default_factory=dict)


def slug(gpu: str) -> str:
    """A GPU's name as a file name: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def path_of(gpu: str) -> Path:
    """Where a GPU's table is looked for: in the folder that RESNET_TRITON_TABLES names, or this package's."""
    return Path(os.environ.get(VARIABLE) or FOLDER) / f"{slug(gpu)}.json"


def save(table: Table, path: Path) -> None:
    """Write the table; a failure of whatever kind leaves the old one."""
    header = {name: value for name, value in asdict(replace(table, entries={})).items() if value is not None}
    entries = []
    for shape in sorted(table.entries, key=astuple):
        config, timing = table.entries[shape]
        entry = {"shape": asdict(shape), "config": asdict(config)}
        entries.append(entry if timing is None else {**entry, "timing": asdict(timing)})
    files.replace(path, files.by_line({"schema": SCHEMA, **header, "entries": entries}))


def add(table: Table, shape: ConvShape, entry: Entry, path: Path) -> Table:
    """Write the table with one entry more, beside those that other processes have written there since it was read."""
    with files.locked(path.parent):
        there = load(path).entries if path.exists() else {}
        table = replace(table, entries={**table.entries, **there, shape: entry})
        save(table, path)
    return table


def sound(path: Path) -> Table | None:
    """The table in a file; None if there is none, or, with a warning, if anything about it is odd."""
    try:
        table = load(path)
        if slug(table.gpu) != path.stem:
            raise ValueError(f"{path}: about {table.gpu!r}, expected {slug(table.gpu)}.json as its name")
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        said = f"ignoring a tuned table, using heuristics: {error}; delete it, or mend what it says"
        warnings.warn(said, stacklevel=2)
        return None
    return table


def load(path: Path) -> Table:
    """Read and check a table. ValueError, in one line, names the first thing that is wrong."""
    if path.exists() and not path.is_file():  # a pipe would keep us waiting, a device may never end
        raise ValueError(f"{path}: not a regular file")
    data = files.read_json(path, MAX_BYTES)
    schema = data.pop("schema", None) if isinstance(data, dict) else None
    if schema != SCHEMA or not isinstance(data.get("entries"), list):
        raise ValueError(f'{path}: expected an object with "schema": 1 and a list "entries"')
    entries: dict[ConvShape, Entry] = {}
    for i, item in enumerate(data.pop("entries")):
        where = f"{path}: entry {i}"
        if not isinstance(item, dict) or set(item) - {"shape", "config", "timing"}:
            raise ValueError(f'{where} must have "shape", "config" and at most "timing"')
        timing = _build(Timing, item["timing"], where) if "timing" in item else None
        entry = Entry(_build(ConvConfig, item.get("config"), where), timing)
        entries[_build(ConvShape, item.get("shape"), where)] = entry
    facts = _build(Facts, data.pop("facts"), str(path)) if "facts" in data else None
    return _build(Table, data, str(path), facts=facts, entries=entries)


def _build(cls: type, data: Any, where: str, **given: Any) -> Any:
    """`cls` of an object's values and `given`. Types are checked; what a tile may be is left to `is_legal`."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: {cls.__name__} must be an object, got {type(data).__name__}")
    known = {f.name: str(f.type) for f in fields(cls) if f.name not in given}
    if unknown := sorted(set(data) - set(known)):
        raise ValueError(f"{where}: unknown key {reprlib.repr(unknown[0])} in {cls.__name__}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    for name, value in values.items():
        kinds = known[name].replace("float", "float | int").split(" | ")
        if _kind(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{where}: {cls.__name__}.{name} must be {known[name]}, got {reprlib.repr(value)}")
    try:
        return cls(**values, **given)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def _kind(value: Any) -> str:
    """The type of a value, as annotations spell it."""
    if isinstance(value, tuple):
        return f"tuple[{', '.join(map(_kind, value))}]"
    return "None" if value is None else type(value).__name__
