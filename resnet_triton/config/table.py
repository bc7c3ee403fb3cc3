"""Tuned tables: one JSON file per GPU, read as data and checked before use.

A file holds `{"schema": 1, "gpu": ..., "triton": ..., "entries": [{"shape": {...}, "config": {...}}, ...]}`. A table is
never trusted: unknown keys, wrong types, illegal tiles and oversized files make the lookup warn once and use the
heuristic instead.
"""

from __future__ import annotations

import functools
import json
import re
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..device import DeviceFacts
from .conv import ConvConfig, ConvShape, is_legal
from .heuristic import conv_heuristic

FOLDER = Path(__file__).parent
MAX_BYTES = 4 << 20
SCHEMA = 1


def lookup(shape: ConvShape, device: DeviceFacts, *, descriptors: bool = True) -> ConvConfig:
    """The configuration for a convolution: the table's exact entry if there is a legal one, else the heuristic."""
    config = _table(FOLDER / f"{slug(device.name)}.json").get(shape)
    if config is not None and (descriptors or config.box is None) and is_legal(config, shape, device):
        return config
    return conv_heuristic(shape, device, descriptors=descriptors)


def slug(gpu: str) -> str:
    """A GPU's name as a file name: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def load(path: Path) -> dict[ConvShape, ConvConfig]:
    """Read and check a table. ValueError, in one line, names the first thing that is wrong."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.name}: {path.stat().st_size} bytes, expected at most {MAX_BYTES}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or an absurd number
        raise ValueError(f"{path.name}: not JSON ({error})") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if type(schema) is not int or schema != SCHEMA or not isinstance(data.get("entries"), list):
        raise ValueError(f'{path.name}: expected an object with "schema": 1 and a list "entries"')
    table = {}
    for i, entry in enumerate(data["entries"]):
        if not isinstance(entry, dict) or set(entry) - {"shape", "config", "timing"}:
            raise ValueError(f'{path.name}: entry {i} must have "shape", "config" and at most "timing"')
        where = f"{path.name}: entry {i}"
        table[_build(ConvShape, entry.get("shape"), where)] = _build(ConvConfig, entry.get("config"), where)
    return table


@functools.cache
def _table(path: Path) -> dict[ConvShape, ConvConfig]:
    if not path.exists():
        return {}
    try:
        return load(path)
    except (ValueError, OSError) as error:
        warnings.warn(f"ignoring tuned table, using heuristics: {error}", stacklevel=2)
        return {}


def _build(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{where}: {cls.__name__} must be an object, got {type(data).__name__}")
    known = {f.name: str(f.type) for f in fields(cls)}
    if unknown := sorted(set(data) - set(known)):
        raise ValueError(f"{where}: unknown key {unknown[0]!r} in {cls.__name__}")
    values = {}
    for name, value in data.items():
        kind = known[name]
        if kind.startswith("tuple"):
            length = kind.count("int")
            ok = value is None if value is None and "None" in kind else _ints(value, length)
            value = None if value is None else tuple(value) if ok else value
        else:
            ok = type(value).__name__ == kind and (kind != "int" or 0 <= value < 2**31)
        if not ok:
            raise ValueError(f"{where}: {cls.__name__}.{name} must be {kind}, got {value!r}")
        values[name] = value
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def _ints(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(type(v) is int and 0 <= v < 2**31 for v in value)
