"""Mutants that no test of values can notice, with the reason of each: `equivalent.toml`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .places import Mutant, change

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

LEDGER = Path(__file__).with_name("equivalent.toml")
KINDS = ("equivalent", "speed")
"""The same answer whatever the input; the same answer, sooner or later."""
Key = tuple[str, str]


@dataclass(frozen=True)
class Entry:
    """Of a function (FILE:NAME), the mutant that has `after` for `before`: see `places.change`."""

    where: str
    before: str
    after: str
    nth: int
    kind: str
    reason: str

    def mutant(self) -> Mutant:
        file, _, function = self.where.partition(":")
        return change(file, function, self.before, self.after, self.nth)

    def __str__(self) -> str:
        return f"{LEDGER.name}: {self.where}: {self.before!r} -> {self.after!r}"


def read(path: Path = LEDGER) -> list[Entry]:
    """The entries of a ledger; ValueError if one of them is not complete."""
    entries = []
    for kind, groups in tomllib.loads(path.read_text(encoding="utf-8")).items():
        for group in groups:
            if kind not in KINDS or set(group) != {"reason", "mutants"}:
                raise ValueError(f"{path.name}: [[{kind}]] {group}; expected reason and mutants in one of {KINDS}")
            for where, before, after, *nth in group["mutants"]:
                entries.append(Entry(where, before, after, nth[0] if nth else 0, kind, group["reason"]))
    return entries


def key(mutant: Mutant) -> Key:
    return mutant.where, mutant.source


def match(entries: list[Entry], everything: Iterable[Mutant]) -> tuple[dict[Key, Entry], list[str]]:
    """The entries by their mutants, and what is wrong with those that have none. `everything` is all mutants."""
    existing, known, stale = {key(mutant) for mutant in everything}, {}, []
    for entry in entries:
        try:
            mutant = entry.mutant()
        except ValueError as error:
            stale.append(f"{entry}: {error}: delete the entry, or mend it")
            continue
        if key(mutant) not in existing:
            stale.append(f"{entry}: there is no such mutant: delete the entry")
        known[key(mutant)] = entry
    return known, stale
