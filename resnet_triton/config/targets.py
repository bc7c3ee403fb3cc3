"""GPUs that need not be here: those of this package's tables that hold facts, read when this is imported."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .device import DeviceFacts
from .table import FOLDER, Facts, sound


class Target(NamedTuple):
    """One GPU: what shapes its kernels, and all that is known of it."""

    facts: DeviceFacts
    known: Facts

    @property
    def name(self) -> str:
        """As compilers call the architecture: "sm_90"."""
        return f"sm_{self.facts.arch}"


def read(folder: Path) -> dict[int, Target]:
    """The GPUs of a folder by compute capability: 90 for sm_90. Of several of one, the first by file name."""
    found = {}
    for path in sorted(folder.glob("*.json"), reverse=True):
        table = sound(path)
        if table is not None and (known := table.facts) is not None:
            facts = DeviceFacts(table.gpu, known.arch, known.sm_count, known.shared_memory)
            found[known.arch] = Target(facts, known)
    return dict(sorted(found.items()))


TARGETS = read(FOLDER)
KNOWN = {arch: target.facts for arch, target in TARGETS.items()}
"""What shapes their kernels, for the interpreter and for plans that are not launched."""


def target(arch: int | str) -> Target:
    """The target of an architecture: 90, "90" or "sm_90". ValueError for one we have no facts of."""
    digits = str(arch).removeprefix("sm_")
    if not digits.isdecimal() or int(digits) not in TARGETS:
        raise ValueError(f"cannot compile for {arch!r}, expected one of {', '.join(t.name for t in TARGETS.values())}")
    return TARGETS[int(digits)]
