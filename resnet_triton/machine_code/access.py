"""How wide a kernel's accesses to global memory are, those through pointers: bytes that a thread moves at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_NVIDIA = re.compile(
    r"\b(?P<what>ld|st)\.(?:[\w:]+\.)*?global\.(?:[\w:]+\.)*?(?:v(?P<count>\d)\.)?[bufs](?P<bits>\d+)\b"
    r"|\bcp\.async\.c[ag]\.\S+\s+\[[^]]*\],\s*\[[^]]*\],\s*(?P<bytes>\w+)"
)
_AMD = re.compile(r"\b(?:global|buffer|flat)_(?P<what>load|store)_[us]?(?P<size>dword(?:x[234])?|short|byte)")
_AMD_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def accesses(lines: Iterable[str]) -> Iterator[int]:
    """Bytes of each load, store and copy in lines of PTX or of AMD's assembly."""
    return (width for _, width in _read(lines))


def loads(lines: Iterable[str]) -> Iterator[int]:
    """Bytes of each load; a copy to shared memory is one."""
    return (width for what, width in _read(lines) if what not in ("st", "store"))


def _read(lines: Iterable[str]) -> Iterator[tuple[str | None, int]]:
    for line in lines:
        if found := _NVIDIA.search(line):
            copied, count, bits = found["bytes"], int(found["count"] or 1), found["bits"]
            yield found["what"], int(copied, 0) if copied else count * int(bits) // 8
        elif found := _AMD.search(line):
            yield found["what"], _AMD_BYTES[found["size"]]
