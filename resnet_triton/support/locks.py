"""Locks that are free in a forked process: whoever held one when it was forked is not in it."""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager


def lock() -> AbstractContextManager[object]:
    """One that lasts as long as the process, for it is never forgotten. Who holds it may take it again."""
    made = threading.RLock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=made._at_fork_reinit)  # type: ignore[attr-defined]  # as Python's own
    return made
