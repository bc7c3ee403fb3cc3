"""`resnet-triton tune`: find the fastest configuration of each convolution of a model on the GPU that is here.

Layers of one shape are tuned once. The table is written after each shape, so a run that is interrupted or out of time
leaves the table of all shapes that were done, and the next run goes on with the others.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from .. import models
from ..codegen import DTYPES
from ..config import ConvShape, choice, conv_heuristic, device, table
from ..config.estimate import estimate
from ..ops import gluon
from ..ops.precision import fp32_precision
from ..ops.trace import trace
from ..support.names import check_known
from ..support.terminal import Bar
from ..support.terminal import table as print_table
from ..tuner.search import Bench, Found, OutOfTime, Search, today

MODELS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


def run(
    *, budget: float, batches: list[int], dtypes: list[str], families: list[str], out: Path | None, again: bool,
    jobs: int, bar: Bar, image: int = 224, bench: Bench | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Tune for at most about `budget` seconds and keep the table at `out`, by default the one that lookups read."""
    bench = bench or gpu_bench(jobs)
    layers = workload(families, batches, dtypes, image)
    path = out or table.path_of(bench.facts.name)
    known = _open(path, bench)
    done = set() if again else {s for s, e in known.entries.items() if e.timing and e.timing.triton == known.triton}
    todo = _by_weight({shape: names for shape, names in layers.items() if shape not in done}, bench.facts)
    deadline = bench.clock() + budget
    rows: list[dict[str, Any]] = []
    with bench.compilers() as compiler, bar(f"tuning {len(todo)} shapes for {bench.facts.name}", len(todo)) as step:
        try:
            for shape, following in zip_longest(todo, todo[1:]):
                try:
                    found = Search(shape, bench, compiler, deadline).run(following)
                except torch.OutOfMemoryError:
                    _warn(f"the GPU has too little free memory for {shape}; it is left for another time")
                    step()
                    continue
                for config in found.wrong:
                    _warn(f"{config} gives a wrong answer for {shape}; it was not used")
                if found.config is not None:
                    entry = table.Entry(found.config, found.timing)
                    known = table.add(replace(known, date=today()), shape, entry, path)
                rows.append(_row(layers[shape], shape, found))
                step()
        except OutOfTime:
            pass
        except KeyboardInterrupt:
            print(f"interrupted: {len(rows)} shapes tuned, {len(todo) - len(rows)} left: {path}", file=sys.stderr)
            raise
        finally:
            choice.forget()
    return {
        "path": str(path), "gpu": known.gpu, "driver": known.driver, "triton": known.triton, "torch": known.torch,
        "rows": rows, "known_before": len(layers) - len(todo), "left": len(todo) - len(rows),
    }  # fmt: skip


def workload(families: list[str], batches: list[int], dtypes: list[str], image: int) -> dict[ConvShape, list[str]]:
    """The distinct convolutions of some models, and the layers that make them."""
    check_known("model", families, MODELS)
    check_known("dtype", dtypes, DTYPES)
    layers: dict[ConvShape, list[str]] = {}
    for family in families:
        with torch.device("meta"):
            model = getattr(models, family)().eval()
        for dtype in dtypes:
            torch_dtype, precision = DTYPES[dtype]
            for batch in batches:
                with fp32_precision(precision):
                    for call in trace(model, (batch, 3, image, image), torch_dtype):
                        if call.tiled:
                            layers.setdefault(call.shape, []).append(call.name)
    return layers


def gpu_bench(jobs: int) -> Bench:
    """The current CUDA device, on which our kernels have to run."""
    from ..tuner.precompile import Compilers

    where = torch.device("cuda")
    facts = gluon.facts(where)
    l2_bytes = torch.cuda.get_device_properties(where).L2_cache_size
    return Bench(where, facts, _driver(), l2_bytes, lambda: Compilers(facts, jobs))


def show(result: dict[str, Any]) -> None:
    """Print what `run` returned."""
    columns = ("layer", ">times", ">batch", "dtype", ">heuristic us", ">tuned us", ">gain", "configuration")
    cells = []
    for row in result["rows"]:
        if timing := row["timing"]:
            cells.append((
                row["layer"], row["times"], row["shape"]["n"], row["shape"]["dtype"], f"{timing['heuristic_us']:.1f}",
                f"{timing['us']:.1f}", f"{timing['heuristic_us'] / timing['us']:.2f}x", _brief(row["config"]),
            ))  # fmt: skip
    if cells:
        print_table(f"Convolutions on {result['gpu']}, L2-cold", columns, cells)
    print(f"{len(cells)} shapes tuned, {result['known_before']} known before, {result['left']} left: {result['path']}")
    if (read := table.path_of(result["gpu"])).absolute() != Path(result["path"]).absolute():
        print(f"models read {read}: copy it there, or name a folder of tables in {table.VARIABLE}")


def faults(result: dict[str, Any]) -> list[str]:
    """Wrong answers, and that nothing was timed although something was left to tune."""
    wrong = [f"{row['layer']}: a configuration gives a wrong answer" for row in result["rows"] if row["wrong"]]
    if (result["rows"] or result["left"]) and not any(row["timing"] for row in result["rows"]):
        wrong.append(f"no shape was tuned, and {result['path']} is as it was; a larger --budget gives more")
    return wrong


def _open(path: Path, bench: Bench) -> table.Table:
    """The table to go on with, under this run's versions. ValueError if the file is another's or cannot be replaced."""
    import triton

    try:
        old = table.load(path) if path.exists() else table.Table(bench.facts.name)
    except ValueError as error:
        raise ValueError(f"{error}; move it away, or choose another file with --out") from None
    if old.gpu != bench.facts.name:
        raise ValueError(f"{path} was tuned for {old.gpu!r}, expected {bench.facts.name!r}; choose another --out")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        said = f"cannot write to {path.parent}, expected a writable folder"
        raise ValueError(f"{said}; name one in {table.VARIABLE}, here and where models run")
    return replace(old, driver=bench.driver, triton=triton.__version__, torch=torch.__version__)


def _by_weight(layers: dict[ConvShape, list[str]], facts: device.DeviceFacts) -> list[ConvShape]:
    """Most expected time first: occurrences times the cost model's figure for the heuristic's choice."""

    def weight(shape: ConvShape) -> float:
        return len(layers[shape]) * estimate(conv_heuristic(shape, facts), shape, facts)

    return sorted(layers, key=weight, reverse=True)


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    version = re.search(r"\d+\.\d+(\.\d+)?", text)
    return version[0] if version else ""


def _row(names: list[str], shape: ConvShape, found: Found) -> dict[str, Any]:
    return {
        "layer": names[0], "times": len(names), "shape": asdict(shape),
        "config": found.config and asdict(found.config), "timing": found.timing and asdict(found.timing),
        "wrong": [asdict(config) for config in found.wrong],
    }  # fmt: skip


def _brief(c: dict[str, Any]) -> str:
    pixels = "x".join(map(str, c["box"] or [c["block_m"]]))
    sizes = f"{pixels} by {c['block_k']} by {c['block_c']}"
    swap = ", filters first" if c["swap"] else ""
    return f"{sizes}{swap}, {c['num_warps']} warps, {c['num_stages']} stages, split {c['split_k']}"


def _warn(message: str) -> None:
    print(f"resnet-triton: warning: {message}", file=sys.stderr)
