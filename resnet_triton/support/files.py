"""Files that others rely on: one is replaced as a whole, or not at all, and JSON is read with care.

Whoever is interrupted, killed or out of disk space leaves the old file or the new one, and nothing half written.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def replace(path: Path, content: str | bytes) -> None:
    """Make `content` (text as UTF-8) the content of a file. An OSError names the file, which is then what it was."""
    path = Path(os.path.realpath(path))  # a symbolic link stays one
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with named(path), temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            if path.exists():
                os.chmod(temporary, path.stat().st_mode & 0o777)
        with named(path):
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_json(path: Path, most: int | None = None) -> Any:
    """What a file of JSON holds. ValueError, in one line, if it is none or longer than `most` bytes.

    Nor may it hold what Python's own reader takes: NaN and Infinity, which no limit would catch, or a key twice.
    """
    with path.open("rb") as file:
        content = file.read(-1 if most is None else most + 1)
    if most is not None and len(content) > most:
        raise ValueError(f"{path}: expected at most {most} bytes")

    try:
        return json.loads(content.decode(), parse_constant=_no_number, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or an absurd number
        raise ValueError(f"{path}: not JSON ({error}), perhaps truncated") from None


def _no_number(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("an object has the same key twice")
    return data


def by_line(data: dict[str, Any]) -> str:
    """`data` as JSON, an item of a list a line, so that a difference between two files reads well."""

    def text(value: Any) -> str:
        if not isinstance(value, list) or not value:
            return json.dumps(value, allow_nan=False)
        return "[\n" + ",\n".join(json.dumps(item, allow_nan=False) for item in value) + "\n]"

    return "{" + ",\n".join(f"{json.dumps(name)}: {text(value)}" for name, value in data.items()) + "}\n"


def prepare(folder: Path) -> None:
    """Make a folder and try to write there, which is better found out before long work than after it."""
    folder.mkdir(parents=True, exist_ok=True)
    probe(folder)


def probe(folder: Path, size: int = 1 << 12) -> None:
    """OSError, naming the folder, if a file of `size` bytes cannot be written there."""
    with named(folder), tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(size))
        file.flush()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time, for reading a file, changing it and writing it. No lock where the system has none."""
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """What the system says of a file descriptor or a temporary file is said of `path`."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
