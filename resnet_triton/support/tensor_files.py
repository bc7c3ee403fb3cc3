"""Reading tensors from a file of unknown origin: no code in it runs, and a file that cannot be read is one line.

What a file is, its content says; its suffix is not looked at.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from . import locks

_BEFORE_1_6 = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # near the start of what torch wrote then
_reading = locks.lock()
"""torch keeps one list of the classes that it may load, for all threads, and Python one of warnings to ignore."""


class Foreign:
    """In place of an object that is neither a tensor nor of Python's plain types: its class's name, and no more."""

    is_module = False

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.is_module = isinstance(state, dict) and "_modules" in state

    def __repr__(self) -> str:
        return f"{type(self).__module__}.{type(self).__qualname__}"


def _stand_in(name: str) -> tuple[Callable[..., Any], str]:
    """What torch is to call for a foreign class, and the class's name."""
    if name == "collections.defaultdict":
        return lambda *_: {}, name
    module, _, within = name.rpartition(".")
    return type(within, (Foreign,), {"__module__": module}), name


def read(file: BinaryIO) -> Any:
    """What torch.save or safetensors wrote, on the CPU, with a `Foreign` in place of every foreign object.

    ValueError, in one line that does not name the file, if it is anything else or damaged, or written before torch 1.6
    with foreign objects; TypeError if it is open as text; ModuleNotFoundError if it needs safetensors and that is not
    installed.
    """
    try:
        file.seek(0)
    except (AttributeError, OSError):
        raise ValueError("cannot seek, expected a file that can, as io.BytesIO(file.read())") from None
    try:
        head: object = file.read(32)
    except UnicodeDecodeError:
        head = None
    if not isinstance(head, bytes):
        raise TypeError(f"file is a {type(file).__name__}, expected a path or a binary file")
    file.seek(0)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 28:
        return _read_safetensors(file)
    if not head.startswith(b"PK") and _BEFORE_1_6 not in head:
        raise ValueError(f"expected a file of torch.save or safetensors, it begins {head[:24]!r}")
    try:
        with _reading, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _read_torch(file, foreign_objects=head.startswith(b"PK"))
    except MemoryError:
        raise
    except Exception as error:  # a file of unknown origin can fail in any way
        said = f"cannot be read safely ({_reason(error)}); if it is complete, save model.state_dict() where it was made"
        raise ValueError(said) from None


def pickled_module(what: object) -> ValueError:
    return ValueError(
        f"holds a pickled model ({what}), which is code; where it was made, save model.state_dict() instead"
    )


def _read_torch(file: BinaryIO, foreign_objects: bool) -> Any:
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file) if foreign_objects else []
    file.seek(0)
    with torch.serialization.safe_globals([_stand_in(name) for name in names]):
        return torch.load(file, map_location="cpu", weights_only=True)


def _read_safetensors(file: BinaryIO) -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "this is a safetensors file, and safetensors is not installed; pip install safetensors",
            name="safetensors",
        ) from None
    try:
        return safetensors.torch.load(file.read())
    except Exception as error:
        raise ValueError(f"a damaged safetensors file ({_reason(error)}); copy or download it again") from None


def _reason(error: Exception) -> str:
    """One sentence: torch explains some of its errors on pages."""
    found = re.search(r"WeightsUnpickler error:\s*(.+)|(Trying to load unsupported GLOBAL .+)", str(error))
    text = next(filter(None, found.groups())) if found else str(error).strip()
    return text.partition("\n")[0].partition(". ")[0].rstrip(".") or type(error).__name__
