"""Processes that work for this one: they leave Ctrl-C to it, and do not outlive it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import parent_process, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any

_STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def undisturbed() -> Iterator[None]:
    """No Ctrl-C, SIGTERM or SIGHUP in this block; one that comes is delivered at its end. Processes started in it never
    get a Ctrl-C.

    A terminal sends it to all processes of a command, but what it means is for one of them to decide. Ignoring it in
    the others comes too late: a process imports torch for seconds before it gets to that. A mask is inherited at once,
    but holds for one thread only, hence the handlers: signals that other threads receive are the main thread's.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which would end the block, if the first process were started in it
    came: list[int] = []
    handlers = {}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        if threading.current_thread() is threading.main_thread():
            for number in _STOPS:
                if callable(signal.getsignal(number)):
                    handlers[number] = signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def cores() -> int:
    """How many cores this process may use: of a machine that is shared, fewer than it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool(ProcessPoolExecutor):
    """Worker processes. Leaving the block waits for what has begun, which takes seconds, and drops the rest."""

    def __init__(
        self,
        jobs: int,
        context: BaseContext | None = None,
        initialise: Callable[..., None] | None = None,
        arguments: tuple[Any, ...] = (),
    ) -> None:
        super().__init__(jobs, context, _settle, (initialise, arguments))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Start `fn(*args, **kwargs)` in a worker."""
        with undisturbed():  # workers are started here
            return super().submit(fn, *args, **kwargs)

    def __exit__(self, *_: object) -> None:
        self.shutdown(cancel_futures=True)


def _settle(initialise: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    for number in _STOPS:
        if callable(signal.getsignal(number)):  # a forked worker starts with its parent's handlers
            signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initialise is not None:
        initialise(*arguments)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()  # a parent that was killed could not say goodbye
        os._exit(1)
