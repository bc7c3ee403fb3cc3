"""How wide a kernel's accesses to global memory are, those through pointers: bytes that a thread moves at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_ACCESS = re.compile(
    r"\b(?P<what>ld|st)\.(?:[\w:]+\.)*?global\.(?:[\w:]+\.)*?(?:v(?P<count>\d)\.)?[bufs](?P<bits>\d+)\b"
    r"|\bcp\.async\.c[ag]\.\S+\s+\[[^]]*\],\s*\[[^]]*\],\s*(?P<bytes>\w+)"
)


def loads(lines: Iterable[str]) -> Iterator[int]:
    """Bytes of each load in lines of PTX; a copy to shared memory is one."""
    return (width for what, width in _read(lines) if what != "st")


def stores(lines: Iterable[str]) -> Iterator[int]:
    """Bytes of each store."""
    return (width for what, width in _read(lines) if what == "st")


def _read(lines: Iterable[str]) -> Iterator[tuple[str | None, int]]:
    for line in lines:
        if found := _ACCESS.search(line):
            copied, count, bits = found["bytes"], int(found["count"] or 1), found["bits"]
            yield found["what"], int(copied, 0) if copied else count * int(bits) // 8
