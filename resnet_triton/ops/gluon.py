"""Whether the kernels in Gluon may be chosen in this process, and the way out where one cannot run."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import torch

from ..config import device
from ..config.device import DeviceFacts
from ..kernels.launch import Launch
from . import interpreter

_refused = False
_trying_others: ContextVar[bool] = ContextVar("trying_others", default=False)


def is_passing(error: Exception) -> bool:
    """Whether memory has run out, or CUDA loads no kernel during a capture: another time the same kernel may run."""
    words = "out of memory", "stream is capturing", "error during capture"  # of the driver, as Triton hands them on
    return isinstance(error, torch.OutOfMemoryError) or any(said in str(error) for said in words)


def facts(where: torch.device) -> DeviceFacts:
    """Facts of a device, for a choice among the kernels that can run here: Gluon has no interpreter."""
    found = device.facts(where)
    if _refused or _trying_others.get() or interpreter.active():
        return _without(found)
    return found


@functools.lru_cache(maxsize=16)
def _without(found: DeviceFacts) -> DeviceFacts:
    return replace(found, gluon=False)


@contextmanager
def in_place_of(launches: Sequence[Launch], error: Exception) -> Iterator[None]:
    """Within, other kernels are chosen than those that raised `error`; if they run, in this process from then on.

    If they do not run either, or there was no kernel in Gluon, or `error` is passing, it is raised: it is not the
    kernel's fault, as an earlier one's error that a launch reports.
    """
    global _refused
    names = [launch.kernel.__name__ for launch in launches if launch.is_gluon]
    if not names or is_passing(error):
        raise error
    token = _trying_others.set(True)
    try:
        yield
    except Exception:
        raise error from None
    finally:
        _trying_others.reset(token)
    before, _refused = _refused, True
    if not before:
        why = str(error).partition("\n")[0]
        warnings.warn(
            f"{names[0]} cannot run here ({type(error).__name__}: {why}); other kernels run in place of those "
            "in Gluon, slower",
            stacklevel=4,
        )
