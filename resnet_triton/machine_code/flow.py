"""Where control may go in an assembly text: what lies on every path between two instructions, and what in a loop."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator

_LABEL = re.compile(r"\s*([\w$.]+):(?!:)")


def ptx(text: str) -> Flow:
    """The flow of NVIDIA's intermediate assembly. A switch (brx.idx) leads to every label of its table."""
    jump = r"(?P<maybe>@\S+\s+)?\b(?:bra(?:\.uni)?|brx\.idx(?:\.uni)?\s+%\w+,)\s+(?P<label>[\w$]+)"
    return Flow(
        text, comment="//", jump=jump, leave=r"^\s*(?:ret|exit)\b", table=r"\.branchtargets\b(?P<labels>[^;]*);"
    )


def sass(text: str) -> Flow:
    """The flow of NVIDIA's machine code, as nvdisasm writes it. A call may lead into the subroutine, and past it."""
    maybe = r"(?P<maybe>@\S+\s+BRA\b[^`]*|\bCALL\b[^`]*|\bBRA[\w.]*\s+[^`\s][^`]*)"
    jump = rf"(?:{maybe}|\bBRA[\w.]*\s+)`\((?P<label>[^)]+)\)"
    return Flow(text, comment="//", jump=jump, leave=r"\*/\s+(?:EXIT|RET)\b")


class Flow:
    """The lines of an assembly text, comments removed, and the jumps between them.

    `jump` matches a jump and names its groups: "label", and "maybe" where control may fall through instead. `leave`
    matches what ends the program, `table` what stands behind the label of a switch: its "labels".
    """

    def __init__(self, text: str, *, comment: str, jump: str, leave: str, table: str = r"(?!)") -> None:
        self.lines = [line.partition(comment)[0] for line in text.splitlines()]
        tables = re.finditer(rf"([\w$.]+):\s*{table}", "\n".join(self.lines))
        self.switches = {found[1]: re.findall(r"[\w$.]+", found["labels"]) for found in tables}
        """By the label of its table, the labels that a switch leads to."""
        places: dict[str, list[int]] = defaultdict(list)
        for i, line in enumerate(self.lines):
            if label := _LABEL.match(line):
                places[label[1]].append(i)
        self.next: list[tuple[int, ...]] = [(i + 1,) for i in range(len(self.lines))]
        """By line, the lines that may come after it; one past the last is the end of the text."""
        self._loops = []
        for i, line in enumerate(self.lines):
            if re.search(leave, line):
                self.next[i] = ()
            elif found := re.search(jump, line):
                targets = []
                for label in self.switches.get(found["label"], [found["label"]]):
                    # Inline PTX has labels of its own, the same at every use: the nearest above is meant, else below.
                    where = places[label]
                    if not where:
                        raise ValueError(f"a jump to {label}, which is not there")
                    targets.append(max((place for place in where if place <= i), default=where[0]))
                self.next[i] = (*targets, i + 1) if found["maybe"] else tuple(targets)
                self._loops += [range(to, i + 1) for to in targets if to <= i]

    def meets(self, start: str, end: str, guard: str, own: bool = False) -> bool:
        """Whether some path leads from a line that matches `start` to one that matches `end`, past no `guard`.

        A guard that only some threads execute ("@%p1 bar.sync") guards nothing, so let `guard` match no predicate.
        With `own`, an end from which the next start is always another one does not count.
        """
        starts, ends = self._matching(re.compile(start).search), self._matching(re.compile(end).search)
        guards = self._matching(re.compile(guard).match)
        if not own:
            return bool(self.after(starts, guards) & ends - guards)
        for i in starts:
            for met in self.after({i}, guards) & ends - guards:
                if i in (self.after({met}, starts) & starts or {i}):
                    return True
        return False

    def _matching(self, pattern: Callable[[str], object]) -> set[int]:
        return {i for i, line in enumerate(self.lines) if pattern(line)}

    def after(self, starts: set[int], stops: set[int]) -> set[int]:
        """The lines that may come after any of `starts`, with no stop in between."""
        waiting = [to for i in starts for to in self.next[i]]
        seen: set[int] = set()
        while waiting:
            i = waiting.pop()
            if i not in seen and i < len(self.lines):
                seen.add(i)
                if i not in stops:
                    waiting += self.next[i]
        return seen

    def looped(self) -> Iterator[str]:
        """The lines inside loops."""
        for i, line in enumerate(self.lines):
            if any(i in loop for loop in self._loops):
                yield line
