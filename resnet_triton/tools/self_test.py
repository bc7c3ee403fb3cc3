"""Each kernel on small whole numbers, on which every rounding is exact, against PyTorch in fp64."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..config import ConvConfig
from ..ops import BatchNorm, Geometry, Operation, gluon, operation
from ..ops.dispatch import Modes

Json = dict[str, Any]
_KERNELS = Modes(kernels="triton")


class Case(NamedTuple):
    """A call on tensors in fp64, which kernels it asks for ("" for the only ones), and a tile if it is given.

    Those of a path by which they load, "descriptor" or "pointer", or the one of a name. A GPU may have others run.
    """

    call: str
    path: str
    make: Callable[[], Operation]
    tile: ConvConfig | None = None


def self_test(device: str) -> list[Json]:
    """What `attempt` says of each case."""
    return [attempt(case, torch.device(device)) for case in CASES]


def attempt(case: Case, where: torch.device) -> Json:
    """Run a case in fp16 and compare. "kernels" are those that ran; "ok" is None where what it asks for cannot run."""
    result: Json = {"call": case.call, "kernels": [], "ok": None, "detail": ""}
    facts = gluon.facts(where)
    if case.path.startswith("hopper") and not facts.has_gluon:
        return {**result, "detail": f"{case.path} needs compute capability 9.0 and a compiler: none interprets it"}
    if case.path == "descriptor" and not facts.has_descriptors:
        return {**result, "detail": f"descriptors need compute capability 9.0, this GPU has {facts.arch / 10}"}
    # A device below 9.0 has no descriptors, so there every convolution takes `conv_pointer`.
    if case.path in ("descriptor", "pointer"):
        facts = replace(facts, gluon=False, arch=80 if case.path == "pointer" else facts.arch)
    torch.manual_seed(0)
    try:
        with torch.inference_mode():
            call = case.make()
            half = _in_fp16(call, where)
            if case.tile is not None:
                half = replace(half, tile=case.tile)  # type: ignore[type-var]
            with operation.on(where):
                got, launches, reason = half.prepare(half.choose()[0], facts)
                if got is None:
                    raise NotImplementedError(reason)
                for launch in launches:
                    launch.run()
            wrong = int((got.double().cpu() != call.reference().half().double()).sum())
    except Exception as error:  # whatever a compiler or driver raises belongs into the report
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        return {**result, "ok": False, "detail": f"{case.path}: {said}" if case.path else said}
    result["kernels"] = [launch.kernel.__name__ for launch in launches]
    return {**result, "ok": wrong == 0, "detail": f"{wrong} of {got.numel()} values differ" if wrong else ""}


def _in_fp16(call: Operation, where: torch.device) -> Operation:
    moved: Operation = call.schema.with_tensors(call, lambda _, t: t.to(where, torch.float16))
    return moved


def _integers(*shape: int) -> Tensor:
    """From -3 to 3."""
    return torch.randint(-3, 4, shape).double()


def _norm(k: int) -> BatchNorm:
    return BatchNorm(_integers(k), torch.ones(k).double(), _integers(k), _integers(k), 0.0)


def _conv(images: int, edge: int, stride: int = 1, residual: bool = True, c: int = 16, groups: int = 1) -> Operation:
    """A 3x3 convolution of `c` channels."""
    geometry = Geometry((stride, stride), (1, 1), groups=groups)
    added = _integers(images, c, edge // stride, edge // stride) if residual else None
    x, weight = _integers(images, c, edge, edge), _integers(c, c // groups, 3, 3)
    return ops.ConvBnRelu(x, weight, _norm(c), geometry, added, modes=_KERNELS)


def _stem(filters: int = 16) -> Operation:
    return ops.Stem(_integers(2, 3, 14, 18), _integers(filters, 3, 7, 7), _norm(filters), modes=_KERNELS)


def _linear(c: int) -> tuple[Tensor, Tensor]:
    return _integers(10, c), _integers(10)


_RESIDUAL = "conv_bn_relu, 3x3 + residual"
_of_many = functools.partial(_conv, 32, 8)  # from 32 images on, whatever can be loaded through descriptors is
_on_hopper = functools.partial(_of_many, c=64)
CASES = [
    Case("stem", "hopper_stem", functools.partial(_stem, 64)),
    Case("stem", "descriptor", _stem),
    Case("stem", "pointer", _stem),
    *(
        Case(call, tile.kernel, _on_hopper, tile)
        for call, tile in (
            (_RESIDUAL, ConvConfig(128, 64, 64, 4, 6, (1, 4, 32), kernel="hopper_conv")),
            (f"{_RESIDUAL}, ping-pong", ConvConfig(128, 64, 64, 4, 6, (1, 4, 32), kernel="hopper_pingpong")),
            (_RESIDUAL, ConvConfig(64, 64, 64, 4, 11, (2, 1, 32), kernel="hopper_conv64")),
            (_RESIDUAL, ConvConfig(32, 64, 64, 4, 1, (4, 8, 1), kernel="hopper_few")),
        )
    ),
    Case(_RESIDUAL, "descriptor", _of_many),
    Case("conv_bn_relu, 3x3/2", "descriptor", functools.partial(_of_many, stride=2, residual=False)),
    Case(_RESIDUAL, "pointer", lambda: _conv(2, 8)),
    Case(f"{_RESIDUAL}, 4 groups", "", lambda: _conv(2, 8, groups=4)),
    Case(f"{_RESIDUAL}, depthwise", "", lambda: _conv(2, 8, groups=16)),
    Case("max_pool2d", "", lambda: ops.MaxPool2d(_integers(2, 16, 11, 11), (3, 3), (2, 2), (1, 1), modes=_KERNELS)),
    Case("global_avg_pool", "", lambda: ops.GlobalAvgPool(_integers(2, 16, 8, 8), _KERNELS)),
    Case("avg_pool_linear", "", lambda: ops.AvgPoolLinear(_integers(2, 16, 8, 8), *_linear(16), _KERNELS)),
    Case("add_relu", "", lambda: ops.AddRelu(_integers(2, 16, 7, 7), _integers(2, 16, 7, 7), _KERNELS)),
    Case("linear", "", lambda: ops.Linear(_integers(5, 48), *_linear(48), _KERNELS)),
]


def in_interpreter(module: str, payload: bytes = b"") -> Any:
    """`module.interpreted(payload)`, run in a new process with TRITON_INTERPRET=1, which Triton reads at import.

    The result travels as JSON. RuntimeError if the process fails.
    """
    script = (
        f"import sys; sys.path[:] = {sys.path!r}\n"  # find this package the way this process did
        f"import json; from {module} import interpreted\n"
        "print(json.dumps(interpreted(sys.stdin.buffer.read())))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], input=payload, capture_output=True, env=environment)
    if done.returncode or not done.stdout:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"the process with Triton's interpreter failed: {' '.join(last) or done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])  # an import may print


def interpreted(payload: bytes) -> list[Json]:
    """What `in_interpreter` calls."""
    return self_test("cpu")
