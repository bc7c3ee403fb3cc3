"""The table of rooms in CONTRIBUTING.md is the one list of who may import whom; every import is held to it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "resnet_triton"


class Room(NamedTuple):
    """A row of the table: `places` are folders (ending in a slash) and files, `may_import` is rooms and libraries."""

    name: str
    places: list[str]
    may_import: set[str]


def rooms() -> list[Room]:
    """The rows, their names as the last column spells them."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("| room |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table]
    return [
        Room(name, re.findall(r"`([^`]+)`", places), {part.strip() for part in below.split(",")} - {""})
        for name, places, _, below in cells
    ]


ROOMS = rooms()


def files() -> list[Path]:
    folders = [ROOT / folder for folder in ("kernels", PACKAGE, "benchmarks")]
    found = [path for folder in folders for path in folder.rglob("*.py")]
    return sorted(path for path in found if not path.is_relative_to(ROOT / PACKAGE / "kernels"))


def room_of(path: str) -> str | None:
    """The room with the longest place that this file or module is in, `a/b.py`."""
    places = {place: room.name for room in ROOMS for place in room.places}
    inside = [place for place in places if path == place or (place.endswith("/") and path.startswith(place))]
    return places[max(inside, key=len)] if inside else None


def modules_named(node: ast.AST, path: str) -> Iterator[str]:
    """What an import statement in the file `path` names, as paths without `.py`: modules, or contents of one."""
    if isinstance(node, ast.Import):
        yield from (alias.name.replace(".", "/") for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        folder = path.split("/")[: -node.level] if node.level else []
        module = [*folder, *(node.module.split(".") if node.module else [])]
        yield from ("/".join([*module, alias.name]) for alias in node.names)


def imported(source: str, path: str) -> Iterator[tuple[int, str]]:
    """Line and room (or library) of each import in the file `path`, those inside functions too."""
    for node in ast.walk(ast.parse(source)):
        for name in modules_named(node, path):
            name = name.replace(f"{PACKAGE}/kernels", "kernels", 1)
            if not name.startswith((f"{PACKAGE}/", "kernels/", "benchmarks/")) and name != PACKAGE:
                yield node.lineno, name.partition("/")[0]
                continue
            while not ((ROOT / f"{name}.py").is_file() or (ROOT / name).is_dir()):
                name = name.rpartition("/")[0]  # a name inside a module
            yield (
                node.lineno,
                room_of(f"{name}.py" if (ROOT / f"{name}.py").is_file() else f"{name}/__init__.py") or name,
            )


def forbidden(source: str, path: str) -> list[str]:
    own = room_of(path)
    (room,) = (room for room in ROOMS if room.name == own)
    named = {room.name for room in ROOMS}
    libraries = {part for part in room.may_import if part not in named}
    allowed = {own, *room.may_import, *sys.stdlib_module_names}
    return [
        f"{path}:{line} imports {what}, which {own} may not"
        for line, what in imported(source, path)
        if what not in allowed and (what in named or (libraries and "any library" not in libraries))
    ]


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_room_imports_what_the_table_says(file: Path) -> None:
    path = str(file.relative_to(ROOT))
    assert room_of(path) is not None, f"{path} is in no room of CONTRIBUTING.md's table"
    assert forbidden(file.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("kernels/linear.py", "import numpy"),
        ("kernels/linear.py", "from resnet_triton import config"),
        ("resnet_triton/config/conv.py", "from ..ops import conv"),
        ("resnet_triton/config/conv.py", "def f():\n    from resnet_triton.ops import conv"),
        ("resnet_triton/ops/conv.py", "from ..models import ResNet"),
        ("resnet_triton/ops/conv.py", "from ..graphs import runner"),
        ("resnet_triton/ops/reference.py", "from . import conv"),
        ("resnet_triton/models.py", "from .tools import cli"),
        ("resnet_triton/ops/reference.py", "import numpy"),
        ("resnet_triton/bench/results.py", "from benchmarks import conftest"),
    ],
)
def test_a_planted_import_is_found(path: str, line: str) -> None:
    (found,) = forbidden(line, path)
    assert found.startswith(f"{path}:")


def test_the_table_holds_no_room_that_is_not_there() -> None:
    assert [place for room in ROOMS for place in room.places if not (ROOT / place).exists()] == []


def floors() -> dict[str, int]:
    """How many rooms stand below each one another, RecursionError if in a circle."""
    below = {room.name: [name for name in room.may_import if name in {r.name for r in ROOMS}] for room in ROOMS}

    def floor(name: str) -> int:
        return 1 + max(map(floor, below[name]), default=0)

    return {name: floor(name) for name in below}


def test_rooms_stand_on_few_floors_without_a_circle() -> None:
    assert max(floors().values()) <= 10
    assert len(ROOMS) <= 18
