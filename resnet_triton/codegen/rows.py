"""One row for each launch of a model on each target: what its machine code is like, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config.targets import Target, target
from ..kernels.launch import Launch, is_parameter
from ..machine_code import Code
from ..ops.precision import fp32_precision
from ..ops.trace import trace
from ..support.processes import Pool
from .compiler import Specialisation, compile_for, specialise
from .occupancy import programs_per_sm, waves

DTYPES = {
    "float16": (torch.float16, "ieee"),
    "bfloat16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float32": (torch.float32, "ieee"),
}
HELD = ("sm_80", "sm_90")
"""Where a fault is a failure; on other targets it is reported."""
ALIGNED = 16
"""Bytes: the most that Triton knows of a pointer, and the most that a thread loads at a time."""


class Expectation(NamedTuple):
    """What of a kernel's machine code is no fault, or would be one if it were missing."""

    filters_in_registers: bool = False
    """Products read filters from registers, which nothing writes to again, though the kernel is warp-specialised."""
    none_pending: bool = False
    """No product runs while the next is asked for, though the kernel is warp-specialised: the other group's does."""
    at_once: bool = False
    """All products run together."""
    early: bool = False
    """It asks for filters while the launch before still runs."""


EXPECTED = {
    "hopper_stem_kernel": Expectation(filters_in_registers=True, none_pending=True),
    "hopper_few_kernel": Expectation(at_once=True, early=True),
    "hopper_conv_kernel": Expectation(early=True),
    "hopper_conv64_kernel": Expectation(early=True),
}
"""Of the other kernels nothing of the kind is expected."""


@dataclass(frozen=True)
class CompiledLaunch:
    """One launch of a layer at one batch size and dtype, compiled for one architecture.

    `launch` counts from 0 within the layer; `filter` is "3x3" and the like, "" for kernels without one; `programs` the
    size of the grid, `channels` those of the input (0: the kernel does not know of any, or reads them by groups).
    `wide_input` and `wide_output` say whether through pointers it reads and writes what can be moved 16 bytes at a
    time. `early` are the arguments that it reads before it waits for the launch before.
    """

    arch: str
    layer: str
    operator: str
    launch: int
    kernel: str
    batch: int
    dtype: str
    path: str
    filter: str
    channels: int
    tile: str
    split_k: int
    num_warps: int
    num_stages: int
    programs: int
    programs_per_sm: int
    occupancy: float
    waves: float
    code: Code
    wide_input: bool = False
    wide_output: bool = False
    early: tuple[str, ...] = ()

    def faults(self) -> list[str]:
        """What a shipped configuration must not show."""
        code, ieee = self.code, self.dtype == "float32"
        found = []
        if code.spill_bytes:
            found.append(f"spills {code.spill_bytes} bytes")
        if code.serialized:
            found.append("ptxas serialised wgmma")
        if code.shared_memory > target(self.arch).facts.shared_memory:
            found.append(f"needs {code.shared_memory} bytes of shared memory")
        if code.dots and not ieee and code.tensor_core == "none":
            found.append("no tensor-core instruction")
        if ieee and code.tensor_core != "none":
            found.append(f"IEEE fp32 on tensor cores ({code.tensor_core})")
        large = self.arch == "sm_90" and self.batch >= 32 and self.filter in ("1x1", "3x3") and not ieee
        if code.dots and (large or code.specialised):
            found += [f"no {name}" for name, used in (("wgmma", code.wgmma), ("TMA", code.tma)) if not used]
        if code.float_atomics:
            found.append(f"{code.float_atomics} floating-point atomics")
        found += [*code.hazards, *code.disorder]
        if code.dropped_nans:
            found.append(f"{code.dropped_nans} maxima or minima that drop NaN")
        if code.approximations:
            found.append(f"{code.approximations} approximate or flushing operations")
        whole = self.channels * DTYPES[self.dtype][0].itemsize % ALIGNED == 0
        if self.channels and whole and not code.specialised and 0 < code.narrowest_load < ALIGNED:
            found.append(f"loads {code.narrowest_load} bytes at a time in a loop, expected {ALIGNED}")
        for what, wide, widest in (
            ("loads", self.wide_input, code.widest_load), ("stores", self.wide_output, code.widest_store)
        ):  # fmt: skip
            if wide and widest < ALIGNED:
                found.append(f"{what} at most {widest} bytes at a time, expected {ALIGNED}")
        if code.widest_access > ALIGNED:
            found.append(f"accesses {code.widest_access} bytes at a time, pointers are aligned to {ALIGNED}")
        found += [
            f"reads {name} before it waits for the launch before" for name in self.early if not is_parameter(name)
        ]
        expected = EXPECTED.get(self.kernel, Expectation())
        if expected.early and "w_desc" not in self.early:
            found.append("waits for the launch before, then asks for filters")
        if expected.at_once:
            found += self._at_once_faults()
        return found + (self._specialised_faults(expected) if code.specialised else [])

    def _at_once_faults(self) -> list[str]:
        code, found = self.code, [message for message in self.code.messages if "(C75" in message]
        if code.wgmma_waits != 1 or code.wgmma_registers:
            found.append(f"{code.wgmma_waits} waits and {code.wgmma_registers} operands in registers, expected 1 and 0")
        return found

    def _specialised_faults(self, expected: Expectation) -> list[str]:
        """What a kernel must not show whose warps have different parts."""
        code, found = self.code, []
        if not code.setmaxnreg:
            found.append("no setmaxnreg: its groups of warps have equal numbers of registers")
        if code.wgmma_registers and not expected.filters_in_registers:
            found.append(f"{code.wgmma_registers} wgmma read their first operand from registers")
        if code.wgmma and not any(code.pendings) and not expected.none_pending:
            found.append("every wait for wgmma leaves none running")
        return found + [message for message in code.messages if "(C75" in message and not code.serialized]

    def record(self) -> dict[str, Any]:
        """The launch as plain data, its code's vital signs beside the rest."""
        about = {name: value for name, value in vars(self).items() if name != "code"}
        derived = {"wgmma_per_wait": self.code.wgmma_per_wait, "serialized": self.code.serialized}
        return {**about, **asdict(self.code), **derived, "faults": self.faults()}


class _Planned(NamedTuple):
    """A launch waiting for its compiler."""

    layer: str
    operator: str
    batch: int
    dtype: str
    place: int  # among the layer's launches
    launch: Launch
    target: Target
    source: Specialisation


def rows(
    model: nn.Module,
    archs: Sequence[int],
    batches: Sequence[int],
    dtypes: Sequence[str],
    *,
    jobs: int = 2,
    image: int = 224,
) -> Iterator[CompiledLaunch]:
    """Compile every layer of `model` for every combination, each distinct kernel once, in `jobs` processes."""
    planned = [
        launch
        for arch in archs
        for dtype in dtypes
        for batch in batches
        for launch in _plan(model, target(arch), batch, dtype, image)
    ]
    with Pool(jobs) as pool:
        distinct = dict.fromkeys((p.source, p.target.facts.arch) for p in planned)
        compiled = {key: pool.submit(compile_for, *key) for key in distinct}
        for p in planned:
            yield _compiled(p, compiled[p.source, p.target.facts.arch].result())


def _plan(model: nn.Module, where: Target, batch: int, dtype: str, image: int) -> Iterator[_Planned]:
    torch_dtype, precision = DTYPES[dtype]
    with fp32_precision(precision):
        for call in trace(model, (batch, 3, image, image), torch_dtype):
            if call.operation is None:
                continue  # PyTorch's own
            layer = call.name or call.operator
            for i, launch in enumerate(call.launches(where.facts)):
                yield _Planned(layer, call.operator, batch, dtype, i, launch, where, specialise(launch))


def _compiled(p: _Planned, code: Code) -> CompiledLaunch:
    launch, arguments, known = p.launch, p.launch.arguments, p.target.known
    num_warps = code.warps or launch.num_warps
    resident = programs_per_sm(code, num_warps, known)
    descriptors = any(name.endswith("_desc") and value is not None for name, value in arguments.items())
    sizes = [name for name in launch.kernel.arg_names if name.startswith(("BOX", "BLOCK"))]
    return CompiledLaunch(
        arch=p.target.name,
        layer=p.layer,
        operator=p.operator,
        launch=p.place,
        kernel=launch.kernel.fn.__name__,
        batch=p.batch,
        dtype=p.dtype,
        path="gluon" if launch.is_gluon else "descriptor" if descriptors else "pointer",
        filter=f"{arguments['R']}x{arguments['S']}" if {"R", "S"} <= set(arguments) else "",
        channels=0 if arguments.get("GROUPS", 1) > 1 else arguments.get("C", 0),
        tile="x".join(str(arguments[name]) for name in sizes),
        split_k=arguments.get("SPLIT_K", 1),
        num_warps=num_warps,
        num_stages=arguments.get("STAGES", launch.num_stages),
        programs=prod(launch.grid),
        programs_per_sm=resident,
        occupancy=round(resident * num_warps / known.sm_warps, 3),
        waves=round(waves(prod(launch.grid), resident, p.target), 3),
        code=code,
        wide_input=any(_wide(arguments.get(name), launch) for name in ("x_ptr", "w_ptr")),
        wide_output=_wide(arguments.get("y_ptr"), launch),
        early=_early(p.source, code),
    )


def _wide(tensor: Tensor | None, launch: Launch) -> bool:
    """Whether rows are multiples of 16 bytes and each thread has as many: tiles are powers of two, none half empty."""
    if tensor is None:
        return False
    threads = prod(launch.grid) * launch.num_warps * 32
    itemsize = tensor.element_size()
    return tensor.shape[1] * itemsize % ALIGNED == 0 and tensor.numel() * itemsize > ALIGNED // 2 * threads


def _early(source: Specialisation, code: Code) -> tuple[str, ...]:
    """Names of pointers and descriptors among the parameters that are read early. A descriptor is many parameters."""
    names = []
    for name, kind in source.signature:
        sides = kind.partition("[")[2].partition("]")[0].count(",") + 1
        if kind != "constexpr":
            names += [name, *[""] * (2 * sides if kind.startswith("tensordesc") else 0)]
    return tuple(names[i] for i in code.early if names[i].endswith(("_ptr", "_desc")))
