"""Alternatives and phases with known faults, for the benchmark's tests. Another process imports them by name."""

import os
import time

import torch

from resnet_triton import optimize
from resnet_triton.bench.alternatives import Alternative
from resnet_triton.bench.results import one_line
from resnet_triton.bench.worker import Contest

NAP = 0.03  # seconds
MEMORY = 64 << 20  # bytes


def right(model, images):
    return model


def slow(model, images):
    def call(x):
        time.sleep(NAP)
        return model(x)

    return call


def wrong(model, images):
    return lambda x: model(x) * 1.01


def late(model, images):
    """Right before the timing, wrong after it; and needs memory that it does not use."""
    calls = []

    def call(x):
        torch.ones(MEMORY, dtype=torch.uint8)
        calls.append(0)
        return model(x) + (len(calls) > 8)

    return call


def ours_in_disguise(model, images):
    """What it is compared with, optimized by mistake."""
    return optimize(model)


def crash(model, images):
    print("about to crash", flush=True)
    os._exit(7)


def hang(model, images):
    """With more than one image."""
    if len(images) > 1:
        time.sleep(600)
    return model


def broken(model, images):
    raise ValueError("no such\nthing")


def forks(model, images):
    """Leaves a process behind, whose number stands in a file."""
    import subprocess

    child = subprocess.Popen(["sleep", "600"])
    with open(os.environ["PLANTED_PID"], "w") as file:
        file.write(str(child.pid))
    return model


def alternative(build, **more):
    return Alternative(build.__name__, build, **more)


def steps(run):
    yield "good", lambda: [{"us": 1}]
    yield "crash", lambda: os._exit(3)
    yield "error", lambda: 1 / 0
    yield "hang", lambda: time.sleep(600)
    yield "last", lambda: [{"us": 2}]


def endless(run):
    yield "good", lambda: [{"us": 1}]
    yield "hang", lambda: time.sleep(600)


def broken_phase(run):
    raise ImportError("no such thing")
    yield


class Inline:
    """A worker of a race in this process: the same work, but nothing that could crash or hang."""

    def __init__(self, spec, alternative, folder):
        self.contest, self.what = None, (spec, alternative)

    def send(self, request, **arguments):
        self.request = request, arguments

    def receive(self, limit):
        request, arguments = self.request
        try:
            self.contest = self.contest or Contest(*self.what)
            return getattr(self.contest, request)(**arguments)
        except Exception as error:
            raise RuntimeError(one_line(error)) from None

    def end(self):
        pass
