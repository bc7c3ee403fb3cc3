"""Which stores of other programs a program may see: happens-before, as barriers and arrival atomics make it.

An epoch is a stretch of one program between two barriers or atomics. A program's own threads agree on its stores after
a barrier; other programs see them once it has released them by an atomic behind that barrier, and they have acquired
them by an atomic at the same address.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import numpy as np

NOBODY, EARLIER, SEVERAL = 0, 1, 2
"""Instead of an epoch: nobody; an earlier launch, or the owner of an input; several programs that know nothing of each
other, none of whose epochs is ever seen."""

Array = np.ndarray[Any, Any]


class Order:
    """What the running program of a launch has seen."""

    def __init__(self) -> None:
        self.programs = ["nobody", "an earlier launch", "several programs"]  # of each epoch
        self.released: dict[int, set[int]] = {}
        self.atomics: set[int] = set()
        self.begin(())

    def begin(self, program: tuple[int, ...]) -> None:
        """Another program runs, and knows of nothing."""
        self.program = program
        self.own: set[int] = set()
        self.seen: set[int] = set()
        self._advance()

    def _advance(self) -> None:
        self.epoch = len(self.programs)
        self.programs.append(f"program {self.program}")
        self.own.add(self.epoch)

    def barrier(self) -> None:
        self.seen |= self.own
        self._advance()

    def arrive(self, addresses: list[int], *, acquire: bool, release: bool) -> int:
        """An atomic at these addresses; returns its epoch."""
        self._advance()
        arrival = self.epoch
        self.atomics.add(arrival)
        for address in addresses:
            released = self.released.setdefault(address, set())
            if acquire:
                self.seen |= released
            if release:
                released |= self.seen | {arrival}
        self._advance()
        return arrival

    def stranger(self, epochs: Array, verb: str) -> int | None:
        """One of these epochs that a load, store or atomic update here must not come after, if there is one."""
        last = int(epochs.max(initial=EARLIER))
        if last <= EARLIER:
            return None
        allowed = self.allowed(verb)
        if last in allowed and epochs.min() == last:  # the usual case: a tile that one program has stored
            return None
        return next((e for e in np.unique(epochs).tolist() if e > EARLIER and e not in allowed), None)

    def allowed(self, verb: str) -> Set[int]:
        """Loads need a barrier even behind the program's own stores; updates may meet others at a counter."""
        if verb == "loads":
            return self.seen
        return self.own | self.seen | (self.atomics if verb == "updates" else set())

    def load(self, epochs: Array) -> Array:
        """Who has loaded elements last, now that this program does, given who had before."""
        concurrent = (epochs > EARLIER) & ~np.isin(epochs, list(self.allowed("stores")))
        return np.where(concurrent, SEVERAL, self.epoch)
