"""Alternatives and phases with known faults, for the benchmark's tests. Another process imports them by name."""

import os
import time

import torch

from resnet_triton import optimize
from resnet_triton.bench.alternatives import Alternative
from resnet_triton.bench.results import one_line
from resnet_triton.bench.worker import Contest

NAP = 0.03  # seconds


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
    """Right before the timing, wrong after it."""
    calls = []

    def call(x):
        calls.append(0)
        return model(x) + (len(calls) > 8)

    return call


def ours_in_disguise(model, images):
    """What it is compared with, optimized by mistake."""
    return optimize(model)


def crash(model, images):
    """With one image."""
    if len(images) == 1:
        print("about to crash", flush=True)
        os._exit(7)
    return model


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


def cudnn_on_a_cpu(monkeypatch):
    """What cuDNN's fused operators compute."""

    def conv_relu(x, weight, bias, stride, padding, dilation, groups):
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    def conv_add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        return (torch.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", conv_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", conv_add_relu)


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
    """The process of a contender and the line to it, in this process: nothing that could crash or hang."""

    def __init__(self, spec, alternative):
        self.contest, self.what = None, (spec, alternative)

    def send(self, message):
        self.request, self.arguments = message

    def poll(self, limit):
        return True

    def recv(self):
        try:
            self.contest = self.contest or Contest(*self.what)
            return getattr(self.contest, self.request)(**self.arguments)
        except Exception as error:
            return RuntimeError(one_line(error))

    def end(self):
        pass

    close = end


def inline(spec, alternative, folder):
    """In place of `race.connect`."""
    both = Inline(spec, alternative)
    return both, both
