"""A process for work that may hang, crash or change what others would inherit."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from ..support.processes import undisturbed


class Child:
    """`work(*arguments)` in a process that leads a group of its own, writes to a log, and does not outlive this one."""

    def __init__(
        self, work: Callable[..., object], arguments: tuple[Any, ...], log: Path, environ: Mapping[str, str]
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log, self._begins = log, log.stat().st_size if log.exists() else 0
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=_begin, args=(str(log), work, arguments), daemon=False)
        with undisturbed(), mock.patch.dict(os.environ, environ):  # it finds them before it imports anything
            self.process.start()

    def end(self) -> None:
        """End the process and all it has started."""
        if self.process.pid is not None:
            self.process.kill()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)  # it leads a group once it runs
        self.process.join()

    def last_words(self) -> str:
        """The last line that it has written to the log."""
        said = self._log.read_bytes()[self._begins :] if self._log.exists() else b""
        lines = said.decode(errors="replace").splitlines()
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it said nothing")


def _begin(log: str, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    os.setpgrp()  # a group that its compilers are in, to be ended as one
    threading.Thread(target=_outlive_nobody, args=(os.getppid(),), daemon=True).start()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    faulthandler.enable()
    work(*arguments)


def _outlive_nobody(parent: int) -> None:
    """End this process and its compilers, whatever they are doing, when the one that started it is no more."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)
