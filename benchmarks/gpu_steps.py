"""One phase of `benchmarks.gpu`, step by step in this process, with a journal that outlives it.

A step is a key and a function that returns a row. The journal is replaced after each step and names the one under way,
so the next process goes on behind the step that crashed or hung this one.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resnet_triton.bench import model as race
from resnet_triton.bench.environment import environment, nvidia_smi
from resnet_triton.bench.results import one_line
from resnet_triton.config import table
from resnet_triton.support import timing

Steps = Iterable[tuple[str, Callable[[], dict[str, Any]]]]


class OutOfTime(Exception):
    """A step found no time to finish: nothing is written, the next process tries it again."""


@dataclass(frozen=True)
class Setting:
    """What the steps of a phase may know. A rehearsal is on the CPU: interpreted kernels, small images and batches."""

    journal: Path
    options: dict[str, Any]
    rehearse: bool
    deadline: float  # of time.monotonic()

    @property
    def out(self) -> Path:
        return self.journal.parent

    @property
    def batches(self) -> list[int]:
        return [1, 2][: len(self.options["batches"])] if self.rehearse else self.options["batches"]

    @property
    def image(self) -> int:
        return 32 if self.rehearse else 224

    @functools.cached_property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")

    @functools.cached_property
    def l2_bytes(self) -> int:
        return 0 if self.rehearse else torch.cuda.get_device_properties(self.device).L2_cache_size

    def meter(self, work: Callable[[], object], replays: int) -> list[float]:
        """`timing.Meter`: a CUDA graph and events, or in a rehearsal one run by the wall clock."""
        if not self.rehearse:
            return timing.replay(work, replays)
        start = time.perf_counter()
        work()
        return [time.perf_counter() - start] * replays

    def synchronize(self) -> None:
        if not self.rehearse:
            torch.cuda.synchronize()


def read(path: Path) -> dict[str, Any]:
    """A journal, or nothing."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def write(path: Path, data: dict[str, Any]) -> None:
    """Replace the file in one step."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1))
    temporary.replace(path)


def state(device: torch.device) -> dict[str, Any]:
    """Where and with what a phase ran, and how warm the GPU was."""
    fields = "temperature.gpu,power.draw,clocks_throttle_reasons.active"
    return {**environment(device), "heat": nvidia_smi(fields, device) if device.type == "cuda" else "unknown"}


def run(steps: Steps, setting: Setting, step_limit: float) -> None:
    """Run what the journal has no row of, until the deadline. Errors become rows; a broken CUDA context raises."""
    journal = setting.journal
    old = read(journal)
    rows = old.get("rows", {})
    if old.get("running") is not None:
        rows[old["running"]] = {"error": f"ended the process or took more than {step_limit:.0f} s"}
    data = {"environment": state(setting.device), "rehearsal": setting.rehearse, "options": setting.options,
            "complete": False, "running": None, "rows": rows}  # fmt: skip
    write(journal, data)
    for key, step in steps:
        if key in rows:
            continue
        if time.monotonic() > setting.deadline:
            return
        write(journal, {**data, "running": key})
        faulthandler.dump_traceback_later(step_limit, exit=True)
        try:
            rows[key] = step()
            setting.synchronize()
        except OutOfTime:
            return
        except Exception as error:  # of a compiler, a kernel, a check: the other steps are worth a try
            rows[key] = {"error": one_line(error)}
            setting.synchronize()  # raises if the error spoilt the context
        finally:
            faulthandler.cancel_dump_traceback_later()
            write(journal, data)
    write(journal, {**data, "complete": True, "environment_after": state(setting.device)})


def main(journal: str, target: str, options: dict[str, Any], limit: float, step_limit: float, rehearse: bool) -> None:
    """What `benchmarks.gpu` starts for a phase. `target`: "module:function", from a Setting to steps."""
    setting = Setting(Path(journal), options, rehearse, time.monotonic() + limit)
    if rehearse:
        timing._LAUNCHES = race.LEAST_ROUNDS = 1  # interpreted launches are long enough for any clock
    if options.get("tuned"):
        table.FOLDER = setting.out
    module, _, function = target.partition(":")
    run(getattr(importlib.import_module(module), function)(setting), setting, step_limit)


if __name__ == "__main__":
    os.setpgrp()  # a group that its compilers are in, to be ended as one
    main(**json.loads(sys.argv[1]))
