"""One forked process for each task: what it does to modules, to memory or to itself ends with it."""

from __future__ import annotations

import gc
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection, get_context
from typing import Any, NamedTuple

FORK = get_context("fork")
ROOM = 4 << 30  # bytes that a task may allocate beyond what the parent holds


class Ending(NamedTuple):
    """What a task returned, or None and how it ended instead: "time limit" or "crash"."""

    value: Any
    how: str
    seconds: float


def forked(work: Callable[[Any], Any], tasks: Iterable[Any], jobs: int) -> Iterator[tuple[Any, Ending]]:
    """`work(task)`, each in its own process, `jobs` at a time; in the order in which they end."""
    waiting, running = iter(tasks), {}
    gc.freeze()  # else every child copies what its collector looks at
    while True:
        while len(running) < jobs and (task := next(waiting, None)) is not None:
            receiver, sender = FORK.Pipe(duplex=False)
            process = FORK.Process(target=_child, args=(work, task, sender))
            process.start()
            sender.close()
            running[process.sentinel] = (process, receiver, task, time.perf_counter())
        if not running:
            return
        for sentinel in connection.wait(list(running)):
            process, receiver, task, start = running.pop(sentinel)
            process.join()
            how = {0: "", -signal.SIGPROF: "time limit", -signal.SIGALRM: "time limit"}.get(process.exitcode, "crash")
            value = receiver.recv() if not how and receiver.poll() else None
            receiver.close()
            yield task, Ending(value, how, time.perf_counter() - start)


def allow(seconds: float) -> None:
    """Give this process so much of a processor from now on, or ten times that by the clock; then it is ended."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)


def _child(work: Callable[[Any], Any], task: Any, sender: Any) -> None:
    for each in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(each, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    with open("/proc/self/statm") as sizes:
        held = int(sizes.read().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (held + ROOM, held + ROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    value = work(task)
    allow(0)
    sender.send(value)
