"""What a fingerprint looks at, in Python and in C. Both see every change, and C none without the line for it."""

from __future__ import annotations

import sys
import sysconfig
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnet_triton.graphs import look
from resnet_triton.graphs.fingerprint import Fingerprint

SOURCE = Path(look.__file__).with_suffix(".c").read_text(encoding="utf-8")


class Looked:
    """At an empty dict, a module and a parameter, each behind another."""

    def __init__(self) -> None:
        self.hooks: Any = OrderedDict()
        self.module = nn.ReLU()
        memory = torch.zeros(48)
        self.tensor: Tensor = nn.Parameter(memory[:24].view(2, 3, 4))
        self.at = [{}, self.hooks], [nn.Identity(), self.module], (memory[24:], self.tensor)

    def set_data(self, change: Callable[[Tensor], Tensor]) -> None:
        self.tensor.data = change(self.tensor.data)


CHANGES: dict[str, tuple[Callable[[Looked], object], str]] = {
    "dict": (
        lambda looked: looked.hooks.update(hook=print),
        "if (PyDict_Size(PyList_GET_ITEM(dicts, i))) return 0;",
    ),
    "class": (
        lambda looked: setattr(looked.module, "__class__", nn.Tanh),
        "if (note(notes, &cls, sizeof cls)) return -1;",
    ),
    "attributes": (
        lambda looked: setattr(looked.module, "__dict__", vars(looked.module).copy()),
        "if (note(notes, &own, sizeof own)) return -1;",
    ),
    "moved": (lambda looked: looked.set_data(Tensor.clone), "note_address(notes, &t) || "),
    "swapped": (
        lambda looked: torch.utils.swap_tensors(looked.tensor, nn.Parameter(looked.tensor.detach().clone())),
        "note_address(notes, &t) || ",
    ),
    "dtype": (
        lambda looked: looked.set_data(lambda t: t.view(torch.bfloat16).as_strided(t.shape, t.stride())),
        "if (note(notes, &t->dtype, sizeof t->dtype)) return -1;",
    ),
    "sizes": (lambda looked: looked.set_data(lambda t: t[:1]), "if (note(notes, t->shape, size)) return -1;"),
    "strides": (
        lambda looked: looked.set_data(lambda t: t.as_strided((2, 3, 4), (12, 1, 3))),
        "if (note(notes, t->strides, size)) return -1;",
    ),
}  # fmt: skip
"""What may change, and the line of C that sees it."""


def compiled() -> Any:
    found = look._compiled()
    assert found is not None, "look.c was not compiled"
    return found


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("language", ["C", "Python"])
def test_what_changes_is_seen(language: str, change: str) -> None:
    looks, looked = compiled().look if language == "C" else look.look, Looked()
    before = looks(*looked.at)
    assert before is not None
    assert looks(*looked.at) == before
    CHANGES[change][0](looked)
    after = looks(*looked.at)
    assert after != before
    assert (after is None) == (change == "dict")


@pytest.mark.parametrize("change", CHANGES)
def test_each_line_sees_its_change_alone(change: str) -> None:
    edit, line = CHANGES[change]
    assert SOURCE.count(line) == 1
    blind, looked = look.build(SOURCE.replace(line, "")), Looked()
    before = blind.look(*looked.at)
    edit(looked)
    assert blind.look(*looked.at) == before


@pytest.mark.parametrize("change", ["moved", "swapped"])
@pytest.mark.parametrize("language", ["C", "Python"])
def test_addresses(monkeypatch: Any, language: str, change: str) -> None:
    if language == "Python":
        monkeypatch.setattr(look, "_compiled", lambda: None)
    looked = Looked()
    values = 1, looked.module, *looked.at[2]
    before = look.addresses(values, (2, 3))
    assert isinstance(before, bytes if language == "C" else tuple)
    assert look.addresses(list(values), (2, 3)) == before
    assert look.addresses(values, (3, 2)) != before
    CHANGES[change][0](looked)
    assert look.addresses(values, (2, 3)) != before


def test_a_tensor_that_c_cannot_be_told_of() -> None:
    """DLPack has no meta device. Python looks at such a tensor, and one that becomes one has changed."""
    layer = nn.Linear(2, 2)
    check = Fingerprint(layer)
    assert check._look is compiled().look
    assert check.holds()
    layer.to("meta")
    assert not check.holds()
    there = tuple(layer.parameters())
    assert Fingerprint(layer)._look is look.look
    assert look.addresses(list(there), (0, 1)) == (0, 0)


def nowhere(*arguments: Any, **options: Any) -> None:
    raise RuntimeError("Failed to find C compiler.")


@pytest.mark.parametrize("missing", ["compiler", "Python.h", "triton"])
def test_without_a_compiler_python_looks(monkeypatch: Any, missing: str, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if missing == "compiler":
        monkeypatch.setattr("triton.runtime.build._build", nowhere)
    elif missing == "Python.h":
        monkeypatch.setattr(sysconfig, "get_path", lambda *names: str(tmp_path))
    else:
        monkeypatch.setitem(sys.modules, "triton.runtime.build", None)
    look._compiled.cache_clear()
    layer = nn.ReLU()
    try:
        check = Fingerprint(layer)
    finally:
        look._compiled.cache_clear()
    assert check._look is look.look
    assert check.holds()


def test_c_takes_lists_and_a_tuple_only() -> None:
    for wrong in [((), [], ()), ([], (), ()), ([], [], [])]:
        with pytest.raises(TypeError, match=r"must be (list|tuple), not"):
            compiled().look(*wrong)
    assert compiled().look([], [], (1,)) is None
    for places in [(2,), (-1,), ("a",), (1,)]:
        assert compiled().addresses([torch.zeros(1), 1], places) is None


def test_looking_leaves_nothing_behind() -> None:
    looked = Looked()
    tracemalloc.start()
    try:
        for turn in range(1001):
            if turn == 1:
                before = tracemalloc.get_traced_memory()[0]
            compiled().look(*looked.at), compiled().look([], [], (1,)), look.addresses(list(looked.at[2]), (0, 1))
        assert tracemalloc.get_traced_memory()[0] - before < 10_000  # a note is 170 bytes
    finally:
        tracemalloc.stop()
