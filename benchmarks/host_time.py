"""Host time of a ResNet-18's calls: our own Python around the launches, here and at another commit.

    python -m benchmarks.host_time --against HEAD~1

Kernels are stubbed by one function, `Launch.run`, and CUDA's graphs by a module, so nothing is computed and no GPU is
needed. What is left is what an eager call costs before and between its launches, and what a captured call costs beside
its replay: with the check of the model, and frozen. A chain of as many layers shows what compiled models cost: by
torch.compile with a backend that returns a constant, with ours, and after `optimize`. Both commits are timed in turns,
each in a process of its own, in CPU time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Runs at either commit, so it uses what both have: the public model and the stubbed function.
_WORKER = """
import contextlib, gc, json, sys, time
from types import SimpleNamespace
import torch
from torch import nn
from resnet_triton import optimize, resnet18
from resnet_triton.backend import resnet_triton
from resnet_triton.graphs import runner
from resnet_triton.kernels.launch import Launch

launches, calls, depths = 0, 0, []

def count(frame, event, argument):
    global calls
    calls += event == "call" and "/resnet_triton/" in frame.f_code.co_filename

def look(self):
    global launches
    launches += 1
    frame, depth = sys._getframe(1), 0
    while frame is not None:
        depth += "/resnet_triton/" in frame.f_code.co_filename
        frame = frame.f_back
    depths.append(depth)

def nothing(*arguments):
    pass

def graph(entry, *arguments):
    takes = SimpleNamespace(copy_=nothing, clone=lambda: takes)
    own = isinstance(entry.buffer, torch.Tensor)
    output = takes if own else (logits.as_subclass(Logits),)  # a compiled function's is a tuple of tensors
    return SimpleNamespace(input=takes, output=output, fill=nothing, replay=nothing, replays=0)

def chain(compile=lambda model: model):
    layers = [(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(20)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8)
    model = compile(nn.Sequential(*(layer for three in layers for layer in three), *head).eval().half())
    call = lambda x: model(small)
    for _ in range(50):
        call(x)
    return call

def captured(frozen):
    model = optimize(resnet18().eval().half(), kernels="triton", cuda_graph=True, freeze=frozen, inplace=True)
    for _ in range(50):
        model(x)
    (only,) = model._triton_runner._graphs.values()
    assert only.replays > 40
    return model

torch.set_num_threads(1)
model = resnet18().eval().half()
for module in model.modules():
    module.kernels = "triton"
model.cuda_graph = False
class Logits(torch.Tensor):
    clone = lambda self: logits

small, logits = torch.randn(1, 8, 8, 8).half(), torch.zeros(1, 8).half()
x = torch.randn(1, 3, 224, 224).half().contiguous(memory_format=torch.channels_last)
with torch.inference_mode():
    Launch.run = look
    model(x)
    depth = max(depths)
    launches = 0
    Launch.run = lambda self: None
    for _ in range(50):
        model(x)
    sys.setprofile(count)
    model(x)
    sys.setprofile(None)
    Launch.run = look
    launches = 0
    model(x)
    Launch.run = lambda self: None
    print(json.dumps({"launches": launches, "calls": calls, "depth": depth}), flush=True)
    cuda = SimpleNamespace(
        takes=lambda x: True, capturing=lambda x: False, finish=nothing, capture=graph, current_stream=nothing,
        on=lambda device: contextlib.nullcontext(), event=lambda: SimpleNamespace(wait=nothing, record=nothing),
    )
    for module in ("replay", "runner", "function"):
        if (found := sys.modules.get("resnet_triton.graphs." + module)) is not None:
            found.cuda = cuda
    models = {
        "eager": model, "captured": captured(False), "frozen": captured(True),
        "constant": chain(lambda model: torch.compile(model, backend=lambda *graph: lambda *values: (logits,))),
        "compiled": chain(lambda model: torch.compile(model, backend=resnet_triton, mode="reduce-overhead")),
        "optimized": chain(lambda model: optimize(model, cuda_graph=True)),
    }
    gc.disable()
    for line in sys.stdin:  # the conductor asks for one figure after another
        name, times = line.strip(), []
        for _ in range(FORWARDS):
            start = time.thread_time()
            models[name](x)
            times.append(time.thread_time() - start)
        print(sorted(times)[len(times) // 2], flush=True)
"""
KINDS = ("eager", "captured", "frozen", "constant", "compiled", "optimized")


# The C library keeps what is freed, as CUDA's caching allocator does; else each output would be mapped and unmapped.
_KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


class _Worker:
    def __init__(self, root: Path, forwards: int) -> None:
        environ = {**os.environ, "PYTHONPATH": str(root), "TRITON_INTERPRET": "1", **_KEEPS_MEMORY}
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"FORWARDS = {forwards}\n{_WORKER}"],
            cwd=root,
            env=environ,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.facts = json.loads(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with {self.process.wait()}, its error is above")
        return line

    def median(self, kind: str) -> float:
        """Seconds of the median forward of one of `KINDS`."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{kind}\n")
        self.process.stdin.flush()
        return float(self._line())


def measure(roots: dict[str, Path], rounds: int, forwards: int) -> dict[str, dict[str, float]]:
    """For each checkout: launches, Python calls of ours, functions of ours above a launch, median microseconds."""
    times: dict[tuple[str, str], list[float]] = {}
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, root in roots.items():
            workers[name] = worker = _Worker(root, forwards)
            stack.enter_context(worker.process)  # whose end closes its pipes: it ends then, too
        for _ in range(rounds):
            for kind in KINDS:
                for name, worker in workers.items():
                    times.setdefault((name, kind), []).append(worker.median(kind))
    return {
        name: {**worker.facts, **{kind: statistics.median(times[name, kind]) * 1e6 for kind in KINDS}}
        for name, worker in workers.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--against", metavar="REV", help="a commit to compare with")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--forwards", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        roots = {"here": ROOT}
        if options.against:
            tree = Path(folder, "tree")
            subprocess.run(
                ["git", "worktree", "add", "--detach", tree, options.against],
                cwd=ROOT,
                check=True,
                stdout=subprocess.DEVNULL,
            )
            roots[options.against] = tree
        try:
            found = measure(roots, options.rounds, options.forwards)
        finally:
            if options.against:
                subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    for name, row in found.items():
        launches, calls, depth = (int(row[key]) for key in ("launches", "calls", "depth"))
        print(f"{name:>12}: {launches} launches, {calls} Python calls, depth {depth}")
        print("".join(f"{kind:>22} {row[kind]:6.1f} us\n" for kind in KINDS), end="")
    if options.against:
        for kind in KINDS:
            print(f"{kind:>12}: ratio {found['here'][kind] / found[options.against][kind]:.2f}")


if __name__ == "__main__":
    main()
