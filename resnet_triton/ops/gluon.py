"""Whether the kernels in Gluon may be chosen in this process, and the way out where one cannot run."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from ..config import device
from ..config.device import DeviceFacts
from ..kernels.launch import Launch
from . import interpreter

Done = TypeVar("Done")
VARIABLE = "RESNET_TRITON_GLUON"
"""An environment variable: if it is 0, no kernel in Gluon is chosen, for a GPU on which one fails or never ends."""
_refused = os.environ.get(VARIABLE) == "0"


class NotCompiled(Exception):
    """One of `launches` cannot be judged before it runs, because it does not compile; its error is the cause."""

    def __init__(self, launches: Sequence[Launch], error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.launches, self.error = launches, error


def is_passing(error: Exception) -> bool:
    """Whether memory has run out, or CUDA loads no kernel during a capture: another time the same kernel may run."""
    words = "out of memory", "stream is capturing", "error during capture"  # of the driver, as Triton hands them on
    return isinstance(error, torch.OutOfMemoryError) or any(said in str(error) for said in words)


def facts(where: torch.device) -> DeviceFacts:
    """Facts of a device, for a choice among the kernels that can run here: Gluon has no interpreter."""
    found = device.facts(where)
    return without(found) if _refused or interpreter.active() else found


@functools.lru_cache(maxsize=16)
def without(found: DeviceFacts) -> DeviceFacts:
    """The same facts, by which no kernel in Gluon is chosen."""
    return replace(found, gluon=False)


def in_place_of(launches: Sequence[Launch], error: Exception, others: Callable[[], Done]) -> Done:
    """What `others` returns, which runs other kernels than these. If it does, none in Gluon is chosen from then on.

    If it raises, too, or there was no kernel in Gluon, or `error` is passing, `error` is raised: it is not the kernel's
    fault, as an earlier one's error that a launch reports.
    """
    global _refused
    if isinstance(error, NotCompiled):
        launches, error = error.launches, error.error
    names = [launch.kernel.__name__ for launch in launches if launch.is_gluon]
    if not names or is_passing(error):
        raise error
    try:
        done = others()
    except Exception:
        raise error from None
    before, _refused = _refused, True
    if not before:
        why = str(error).partition("\n")[0]
        warnings.warn(
            f"{names[0]} cannot run here ({type(error).__name__}: {why}); other kernels run in place of those "
            "in Gluon, slower",
            stacklevel=3,
        )
    return done
