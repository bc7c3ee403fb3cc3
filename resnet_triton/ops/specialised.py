"""Whether the warp-specialised kernels may be chosen in this process, and the way out where one cannot run."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..config import device
from ..config.device import DeviceFacts
from ..kernels.launch import Launch
from . import interpreter

_refused = False


def facts(where: torch.device) -> DeviceFacts:
    """Facts of a device, for a choice among the kernels that can run here: Gluon has no interpreter."""
    found = device.facts(where)
    if _refused or interpreter.active():
        return _without(found)
    return found


@functools.lru_cache(maxsize=16)
def _without(found: DeviceFacts) -> DeviceFacts:
    return replace(found, specialised=False)


def refuse(launches: Sequence[Launch], error: Exception) -> bool:
    """Choose warp-specialised kernels no more, if one is among these, and say which a compiler or driver failed.

    False if there was none: then the error is another's.
    """
    global _refused
    names = [launch.kernel.__name__ for launch in launches if launch.specialised]
    if names and not _refused:
        _refused = True
        why = str(error).partition("\n")[0]
        warnings.warn(
            f"{names[0]} cannot run here ({type(error).__name__}: {why}); other kernels run in place of the "
            "warp-specialised ones, slower",
            stacklevel=2,
        )
    return bool(names)
