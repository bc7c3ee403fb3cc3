"""Layers: every distinct operator call of the models, ours against PyTorch's ways to compute the same.

"ours" is what our model does on the device, "eager" the functions that torchvision's modules call, "cudnn fused" what
cuDNN's fused convolutions do, with batch norm folded into the filters beforehand, and "compile" what torch.compile
makes of "eager". All get the same random data in channels_last.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops import Operation
from ..ops.dispatch import Kernels
from ..ops.trace import Call
from ..support import timing
from ..support.names import check_known
from . import baselines, data
from .baselines import Answer
from .cases import Case
from .check import allowed, relative_error
from .results import Measurement, one_line
from .runner import OutOfTime, Run, Steps

ALTERNATIVES = ("ours", "eager", "cudnn fused", "compile")
_REPLAYS = 25


def steps(
    todo: Sequence[Case], run: Run, *, alternatives: Sequence[str] = ALTERNATIVES, kernels: Kernels = "auto",
    seconds: float = 1.0,
) -> Steps:  # fmt: skip
    """A step for each case. OutOfTime before one that would pass the deadline if it took as long as the longest so far.

    `seconds` are spent on timing a case on a CPU; `kernels="triton"` interprets our kernels there.
    """
    longest = seconds

    def measured(case: Case) -> Iterator[list[Measurement]]:
        yield measure(case, run.device, run.environment, alternatives=alternatives, kernels=kernels, seconds=seconds)

    for i, case in enumerate(todo):
        if longest > run.left():
            raise OutOfTime(f"no time left for {len(todo) - i} of {len(todo)} layers")
        start = time.monotonic()
        run.say(f"{case.model} {case.layer}, {case.dtype}, batch {case.batch}")
        yield f"{case.model} {case.layer} {case.dtype} {case.batch}", partial(measured, case)
        longest = max(longest, time.monotonic() - start)


@torch.inference_mode()
def measure(
    case: Case, device: torch.device, environment: dict[str, Any], *, alternatives: Sequence[str], kernels: Kernels,
    seconds: float,
) -> list[Measurement]:  # fmt: skip
    """Time and check the alternatives that can express a case; one that fails leaves the others to compare."""
    gpu = device.type == "cuda"
    work = case.cost
    rows = {
        name: Measurement(
            suite="kernel", model=case.model, layer=case.layer, alternative=name, ours=name == "ours", batch=case.batch,
            image=case.image, dtype=case.dtype, clock="gpu" if gpu else "wall", l2="cold" if gpu else "uncontrolled",
            environment=environment, flops=work and work.flops, bytes=work and work.bytes,
        )
        for name in applicable(case.call, device, alternatives)
    }  # fmt: skip

    def attempt(step: Callable[[str], Any], name: str) -> Any:
        try:
            return step(name) if rows[name].failure is None else None
        except Exception as error:  # of a compiler, of a kernel, for lack of memory
            rows[name] = replace(rows[name], failure=one_line(error))
            return None

    def everyone(step: Callable[[str], Any]) -> dict[str, Any]:
        return {name: attempt(step, name) for name in rows}

    try:
        problem = Problem(case.call.ours, device, kernels=kernels)
        limit = problem.limit
    except Exception as error:  # too large for this device
        return [replace(row, failure=f"no reference: {one_line(error)}") for row in rows.values()]
    with cudnn_searches():
        calls = everyone(problem.build)
        before = everyone(lambda name: problem.error(calls[name][0]))
        if gpu:
            samples = everyone(lambda name: _cold(calls[name]))
        else:
            works = {name: partial(attempt, lambda name: calls[name][0](), name) for name in rows}
            good = {name: work for name, work in works.items() if rows[name].failure is None}
            samples = timing.interleaved_for(seconds, good)
        after = everyone(lambda name: problem.error(calls[name][0]))
    if "ours" in rows and rows["ours"].failure is None:
        rows["ours"] = replace(rows["ours"], config=baselines.tiles(problem.sets[0]))
    return [
        row if row.failure else row.timed(samples[name]).checked(before[name], after[name], limit)
        for name, row in rows.items()
    ]


def _cold(calls: list[Answer]) -> list[float]:
    """Samples on a GPU. Every call keeps its answer, lest all answers of a graph share one piece of memory, in L2."""
    answers: list[Tensor | None] = [None] * len(calls)

    def keep(i: int) -> None:
        answers[i] = calls[i]()

    return timing.graph_samples([partial(keep, i) for i in range(len(calls))], replays=_REPLAYS)


@contextmanager
def cudnn_searches() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Problem:
    """A call on random data: the first set has an exact answer, all sets together exceed a GPU's L2 cache twice."""

    def __init__(self, call: Operation, device: torch.device, *, kernels: Kernels = "auto") -> None:
        self.operator = call.name
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        self.sets = data.sets(call, device, l2_bytes, kernels)

    def build(self, alternative: str) -> list[Answer]:
        """An alternative as one call for each set."""
        if alternative == "compile":
            torch.compiler.reset()  # each case compiles anew, and none meets the limit on recompilations
            compiled = torch.compile(baselines.EAGER[self.operator], dynamic=False)
            return [partial(compiled, call) for call in self.sets]
        known = {"ours": baselines.ours, "eager": baselines.eager, "cudnn fused": baselines.cudnn_layer}
        return [known[alternative](call) for call in self.sets]

    def error(self, call: Answer) -> float:
        """Relative error of an answer to the first set; NaN and infinities stay. What a call does not write is NaN."""
        call().fill_(float("nan"))
        return relative_error(call(), self.exact)

    @functools.cached_property
    def limit(self) -> float:
        """The error that is allowed."""
        return allowed(self.error(baselines.eager(self.sets[0])), self.sets[0].x.dtype)

    @functools.cached_property
    def exact(self) -> Tensor:
        """The answer to the first set in fp64."""
        return torch.cat([*data.answers(self.sets[0])])


def applicable(call: Call, device: torch.device, alternatives: Sequence[str] = ALTERNATIVES) -> list[str]:
    """The alternatives that can express a call on a device. ValueError for an unknown name."""
    check_known("alternative", alternatives, ALTERNATIVES)
    fused = device.type == "cuda" and call.operator in ("conv_bn_relu", "stem")
    return [name for name in alternatives if name != "cudnn fused" or fused]
