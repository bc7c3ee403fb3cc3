"""Where control may go in an assembly text: what lies on every path between two instructions, and what in a loop."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

_LABEL = re.compile(r"\s*([\w$.]+):(?!:)")


def ptx(text: str) -> Flow:
    """That of NVIDIA's intermediate assembly."""
    jump = r"(?P<maybe>@\S+\s+)?\bbra(?:\.uni)?\s+(?P<label>[\w$]+)"
    return Flow(text, comment="//", jump=jump, leave=r"^\s*(?:ret|exit)\b")


def amd(text: str) -> Flow:
    """That of AMD's assembly."""
    return Flow(text, comment=";", jump=r"\bs_(?P<maybe>c)?branch\w*\s+(?P<label>\S+)", leave=r"^\s*s_endpgm\b")


def sass(text: str) -> Flow:
    """That of NVIDIA's machine code, as nvdisasm writes it. A call may lead into the subroutine, and past it."""
    maybe = r"(?P<maybe>@\S+\s+BRA\b[^`]*|\bCALL\b[^`]*|\bBRA[\w.]*\s+[^`\s][^`]*)"
    jump = rf"(?:{maybe}|\bBRA[\w.]*\s+)`\((?P<label>[^)]+)\)"
    return Flow(text, comment="//", jump=jump, leave=r"\*/\s+(?:EXIT|RET)\b")


class Flow:
    """The lines of an assembly text, comments removed, and the jumps between them.

    `jump` matches a jump and names its groups: "label", and "maybe" where control may fall through instead. `leave`
    matches what ends the program.
    """

    def __init__(self, text: str, *, comment: str, jump: str, leave: str) -> None:
        self.lines = [line.partition(comment)[0] for line in text.splitlines()]
        places = defaultdict(list)
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
                # Inline PTX has labels of its own, the same at every use: a jump means the nearest above, else below.
                where = places[found["label"]]
                if not where:
                    raise ValueError(f"a jump to {found['label']}, which is not there")
                to = max((place for place in where if place <= i), default=where[0])
                self.next[i] = (to, i + 1) if found["maybe"] else (to,)
                if to <= i:
                    self._loops.append(range(to, i + 1))

    def meets(self, start: str, end: str, guard: str) -> bool:
        """Whether some path leads from a line that matches `start` to one that matches `end`, past no `guard`.

        A guard that only some threads execute ("@%p1 bar.sync") guards nothing, so let `guard` match no predicate.
        """
        ends, guards = re.compile(end), re.compile(guard)
        waiting = [to for i, line in enumerate(self.lines) if re.search(start, line) for to in self.next[i]]
        seen = set()
        while waiting:
            i = waiting.pop()
            if i in seen or i == len(self.lines) or guards.match(self.lines[i]):
                continue
            if ends.search(self.lines[i]):
                return True
            seen.add(i)
            waiting += self.next[i]
        return False

    def looped(self) -> Iterator[str]:
        """The lines inside loops."""
        for i, line in enumerate(self.lines):
            if any(i in loop for loop in self._loops):
                yield line
