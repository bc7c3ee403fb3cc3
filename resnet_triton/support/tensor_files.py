"""Reading tensors from a file of unknown origin: no code in it runs, and a file of another kind is called by its name.

What a file is, its content says; its suffix is not looked at.
"""

from __future__ import annotations

import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import torch

from . import locks

_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # near the start of what torch wrote before 1.6
_KINDS = (  # how a file begins, what it is then, what to do about it
    (rb"version https://git-lfs", "a Git LFS pointer", "git lfs pull fetches the file itself"),
    (rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?<(!doctype html|html|head)", "an HTML page", "download the file it leads to"),
    (rb"(\xef\xbb\xbf)?\s*<\?xml", "XML, perhaps the answer to a failed download", "download the file again"),
    (rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|BM.{4}\0{4}|II\*\0|MM\0\*", "a picture", ""),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!|.{257}ustar", "compressed or an archive", "unpack it"),
    (rb"\x89HDF", "an HDF5 file, such as Keras writes", ""),
    (rb"\x93NUMPY", "a NumPy array", ""),
    (rb"GGUF", "a GGUF file", ""),
    (rb"\x08[\x03-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]", "an ONNX model", "use what it was exported from"),
    (rb"\x80[\x02-\x05]", "a pickle of another program", "save the state_dict with torch.save"),
    (rb"\0{64}", "a file of zeros, such as a broken download leaves", "download it again"),
)
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


def _stand_in(module: str, name: str) -> tuple[Callable[..., Any], str]:
    """What torch is to call for a foreign class, and the class's name."""
    if (module, name) == ("collections", "defaultdict"):
        return lambda *_: {}, "collections.defaultdict"
    return type(name, (Foreign,), {"__module__": module}), f"{module}.{name}"


def read(file: BinaryIO) -> Any:
    """What torch.save or safetensors wrote, on the CPU, with a `Foreign` in place of every foreign object.

    ValueError, in one line that does not name the file, if it is anything else or damaged; ModuleNotFoundError if it
    needs safetensors and that is not installed.
    """
    try:
        file.seek(0)
    except (AttributeError, OSError):
        raise ValueError("cannot seek, expected a file that can, as io.BytesIO(file.read())") from None
    head = file.read(512)
    file.seek(0)
    if not head:
        raise ValueError("the file is empty")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 28:
        return _read_safetensors(file)
    if head.startswith(b"PK"):
        _check_archive(file)
    elif _MAGIC not in head[:32]:
        raise ValueError(_other_kind(head))
    try:
        stand_ins: list[Any] = [_stand_in(module, name) for module, name in _classes(file)]
        with _reading, warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a file of unknown origin can fail in any way, with pages of explanation
        if "persistent_load of storage" in str(error):  # the source code of a module, which torch kept before 1.6
            raise pickled_module("module") from None
        raise ValueError(f"cannot be read safely ({_reason(error)}); save a plain state_dict") from None


def pickled_module(what: object) -> ValueError:
    return ValueError(
        f"holds a pickled model ({what}), which is code; where it was made, save model.state_dict() instead"
    )


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


def _check_archive(file: BinaryIO) -> None:
    """ValueError if a zip archive is not one that torch.save wrote."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except Exception:
        raise ValueError("a damaged archive, the end may be missing; copy or download it again") from None
    within = {name.partition("/")[2] for name in names}
    if "constants.pkl" in within:
        raise ValueError("this is a TorchScript archive; save torch.jit.load(...).state_dict() instead")
    if "archive_format" in within:
        raise ValueError("this is a program of torch.export; save torch.export.load(...).state_dict instead")
    if "data.pkl" not in within:
        raise ValueError(f"this is a zip archive without a checkpoint (it holds {', '.join(names[:3]) or 'nothing'})")


def _classes(file: BinaryIO) -> set[tuple[str, str]]:
    """Module and name of all classes and functions that torch.load would ask for."""
    file.seek(0)
    if file.read(2) == b"PK":
        with zipfile.ZipFile(file) as archive:
            (pickled,) = (name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
            with archive.open(pickled) as stream:
                return set(_globals(stream))
    file.seek(0)
    return {name for _ in range(4) for name in _globals(file)}  # three pickles about the file, then the object


def _globals(pickled: Any) -> Iterator[tuple[str, str]]:
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "PROTO" and argument != 2:
            raise ValueError(f"pickle protocol {argument}, expected 2, which torch.save uses by itself")
        if opcode.name == "GLOBAL":
            module, name = str(argument).split(" ")
            yield module, name
            yield NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # Python 2's names


def _other_kind(head: bytes) -> str:
    """What a file is that begins so, and what to do."""
    expected = "expected a file of torch.save or safetensors"
    for pattern, kind, remedy in _KINDS:
        if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
            return f"this is {kind}, {expected}{'; ' * bool(remedy)}{remedy}"
    text = head.decode("utf-8", "ignore").strip("\ufeff \t\r\n")
    if len(text.encode()) > len(head) // 2 and all(c.isprintable() or c.isspace() for c in text):
        kind = "JSON" if text[0] in "{[" else "text"
        return f"this is {kind} that begins {text.splitlines()[0][:40]!r}, {expected}"
    return f"this is of no known format, {expected}"


def _reason(error: Exception) -> str:
    """One sentence: torch explains some of its errors on pages."""
    found = re.search(r"WeightsUnpickler error:\s*(.+)|(Trying to load unsupported GLOBAL .+)", str(error))
    text = next(filter(None, found.groups())) if found else str(error).strip()
    return text.partition("\n")[0].partition(". ")[0].rstrip(".") or type(error).__name__
