"""What commands take by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import torch


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU if there is one. ValueError for a name or a GPU that is not there.

    torch itself takes more names, and of an index only as many bits as it has room for: its "cuda:256" is "cuda:0".
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = re.fullmatch(r"cpu|cuda(?::(0|[1-9][0-9]*))?", name)
    if found is None:
        raise ValueError(f"unknown device {name!r}, expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if name != "cpu" else 0
    if name != "cpu" and int(found[1] or 0) >= count:
        raise ValueError(f"no device {name!r} here, torch sees {count} GPUs; use --device cpu")
    return torch.device(name)


def use_device(name: str) -> torch.device:
    """`find_device`; a GPU with a number becomes PyTorch's current one, which events, streams and waiting are about."""
    device = find_device(name)
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def check_known(what: str, names: Iterable[str], known: Collection[str]) -> None:
    """ValueError for the first of `names` that is unknown."""
    for name in names:
        if name not in known:
            raise ValueError(f"no {what} {name!r}, expected some of {', '.join(known)}")
