"""Mutants that no test of values can notice, with the reason of each: `equivalent.toml`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from .faults import Mutant

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

KINDS = ("equivalent", "speed")
"""The same answer whatever the input; the same answer, sooner or later."""
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Entry:
    """`function` is FILE:NAME; `before` and `after` are a mutant's lines."""

    function: str
    before: str
    after: str
    kind: str
    reason: str


def read(path: Path) -> list[Entry]:
    """The entries of a ledger; ValueError if one of them is not complete."""
    tables = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    entries = []
    for table in tables:
        if set(table) != {"function", "before", "after", "kind", "reason"} or table["kind"] not in KINDS:
            raise ValueError(f"{path.name}: {table}; expected function, before, after, reason and kind, one of {KINDS}")
        afters = table.pop("after")
        entries += [Entry(**table, after=after) for after in ([afters] if isinstance(afters, str) else afters)]
    return entries


def key(mutant: Mutant) -> Key:
    return mutant.where, mutant.before, mutant.after


def by_key(entries: list[Entry]) -> dict[Key, Entry]:
    return {(entry.function, entry.before, entry.after): entry for entry in entries}


def stale(entries: list[Entry], mutants: list[Mutant]) -> list[Entry]:
    """Entries of functions that are there, but no longer with this mutant. `mutants` are all there are."""
    existing = {key(mutant) for mutant in mutants}
    return [entry for known, entry in by_key(entries).items() if known not in existing]
