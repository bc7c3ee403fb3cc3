"""The kernel suite: every distinct operator call of the models, ours against PyTorch's ways to compute the same.

"ours" is what our model does on the device: launches planned beforehand on a GPU, the PyTorch path on a CPU. "eager" is
the functions that torchvision's modules call, "cudnn fused" cuDNN's fused convolutions with batch norm folded into the
filters beforehand, and "compile" what torch.compile makes of "eager". All get the same random data in channels_last.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import config
from ..codegen.roofline import least
from ..config import device
from ..ops import OPERATORS, ConvCall, interpreter, registry
from ..ops.trace import Call
from ..support import timing
from .baselines import EAGER, cudnn_fused
from .cases import Case, arguments, names
from .check import allowed, relative_error
from .results import Row, one_line

ALTERNATIVES = ("ours", "eager", "cudnn fused", "compile")
_REPLAYS = 25
_CHUNK = 32  # images at a time in fp64: a batch of stem outputs would not fit a smaller GPU
_IMAGES = ("x", "residual", "shortcut_x", "other")  # the arguments that have a slice for each image

Answer = Callable[[], Tensor]


def run(
    todo: Iterable[Case], where: torch.device, environment: dict[str, Any], *,
    alternatives: Sequence[str] = ALTERNATIVES, kernels: str = "auto", seconds: float = 1.0, deadline: float = math.inf,
) -> Iterator[list[Row]]:  # fmt: skip
    """The rows of each case. Ends before a case that would pass `deadline`, a time of `time.monotonic`, if it took as
    long as the longest so far.

    `seconds` are spent on timing a case on a CPU; `kernels="triton"` interprets our kernels there, for tests.
    """
    longest = seconds
    for case in todo:
        start = time.monotonic()
        if start + longest > deadline:
            return
        with torch.inference_mode():
            rows = measure(case, where, environment, alternatives=alternatives, kernels=kernels, seconds=seconds)
        longest = max(longest, time.monotonic() - start)
        yield rows


def measure(
    case: Case, where: torch.device, environment: dict[str, Any], *, alternatives: Sequence[str], kernels: str,
    seconds: float,
) -> list[Row]:  # fmt: skip
    """Time and check the alternatives that can express a case; one that fails leaves the others to compare."""
    gpu = where.type == "cuda"
    work = least(case.call)
    rows = {
        name: Row(
            suite="kernel", model=case.model, layer=case.layer, alternative=name, ours=name == "ours", batch=case.batch,
            image=case.image, dtype=case.dtype, clock="gpu" if gpu else "wall", l2="cold" if gpu else "uncontrolled",
            environment=environment, flops=work and work.flops, bytes=work and work.bytes,
        )
        for name in applicable(case.call, where, alternatives)
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
        problem = Problem(case.call, where, kernels=kernels)
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
        rows["ours"] = replace(rows["ours"], config=problem.config)
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

    def __init__(self, call: Call, where: torch.device, *, kernels: str = "auto") -> None:
        self.call = call
        first = arguments(call, where, seed=0, kernels=kernels)
        tensors = [t for t in (*first, OPERATORS[call.operator].output(*first)) if isinstance(t, Tensor)]
        l2_bytes = torch.cuda.get_device_properties(where).L2_cache_size if where.type == "cuda" else 0
        sets = 1 + 2 * l2_bytes // sum(t.numel() * t.element_size() for t in tensors)
        self.sets = [first, *(arguments(call, where, seed=seed, kernels=kernels) for seed in range(1, sets))]

    def build(self, alternative: str) -> list[Answer]:
        """An alternative as one call for each set."""
        if alternative in ("ours", "cudnn fused"):
            prepare = ours if alternative == "ours" else cudnn_fused
            return [prepare(self.call.operator, args) for args in self.sets]
        function = EAGER[self.call.operator]
        if alternative == "compile":
            torch.compiler.reset()  # each case compiles anew, and none meets the limit on recompilations
            function = torch.compile(function, dynamic=False)
        return [partial(function, *args) for args in self.sets]

    def error(self, call: Answer) -> float:
        """Relative error of an answer to the first set; NaN and infinities stay. What a call does not write is NaN."""
        call().fill_(float("nan"))
        return relative_error(call(), self.exact)

    @functools.cached_property
    def limit(self) -> float:
        """The error that is allowed."""
        first = self.sets[0]
        return allowed(self.error(partial(EAGER[self.call.operator], *first)), first[0].dtype)

    @functools.cached_property
    def exact(self) -> Tensor:
        """The answer to the first set in fp64."""
        sliced = [name in _IMAGES for name in names(self.call.operator)]

        def some(start: int) -> Iterator[Any]:
            for is_sliced, a in zip(sliced, self.sets[0], strict=True):
                part = a[start : start + _CHUNK] if is_sliced and a is not None else a
                yield part.double() if isinstance(part, Tensor) else part

        eager = EAGER[self.call.operator]
        return torch.cat([eager(*some(start)) for start in range(0, self.sets[0][0].shape[0], _CHUNK)])

    @property
    def config(self) -> dict[str, Any] | None:
        """The tiles of a convolution by our kernels."""
        args = self.sets[0]
        if self.call.operator != "conv_bn_relu" or OPERATORS["conv_bn_relu"].choose(*args).backend == "torch":
            return None
        chosen = asdict(config.lookup(ConvCall(*args).shape, device.facts(args[0].device)))
        return {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}


# --- alternatives ----------------------------------------------------------------------------------------------------


def applicable(call: Call, where: torch.device, alternatives: Sequence[str] = ALTERNATIVES) -> list[str]:
    """Those alternatives that can express a call on a device. ValueError for an unknown name."""
    if unknown := [name for name in alternatives if name not in ALTERNATIVES]:
        raise ValueError(f"no alternative {unknown[0]!r}, expected some of {', '.join(ALTERNATIVES)}")
    fused = where.type == "cuda" and call.operator in ("conv_bn_relu", "stem")
    return [name for name in alternatives if name != "cudnn fused" or fused]


def ours(operator: str, args: tuple[Any, ...]) -> Answer:
    """What our model does for an operator call: its launches, planned now, or its PyTorch path."""
    chosen = OPERATORS[operator]
    if chosen.choose(*args).backend == "torch":
        return partial(registry.call, operator, *args)
    out = chosen.output(*args)
    launches, reason = chosen.launches(out, *args)
    if reason is not None:
        return partial(registry.call, operator, *args)

    def answer() -> Tensor:
        with torch.cuda.device(out.device) if out.device.type == "cuda" else interpreter.ready():
            for launch in launches:
                launch.run()
        return out

    return answer
