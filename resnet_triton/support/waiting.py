"""Waiting for a GPU where a user has made that an error."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_switching = threading.Lock()
_found: list[int] = []
"""The mode that there was, once for each who waits: it is one for all threads, and the last puts it back."""


@contextlib.contextmanager
def may_wait() -> Iterator[None]:
    """Within, `torch.cuda.set_sync_debug_mode` is off.

    torch 2.13 waits for a stream when a capture has begun. If that is made an error, the capture never ends, and from
    then on CUDA refuses whatever waits.
    """
    with _switching:
        _found.append(_found[0] if _found else torch.cuda.get_sync_debug_mode())
        if _found[0]:
            torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        with _switching:
            mode = _found.pop()
            if mode and not _found:
                torch.cuda.set_sync_debug_mode(mode)
