"""The kernels one by one: exact or not, how fast, and faster with another configuration; and the GPU's own ceilings."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import resnet_triton
from resnet_triton import config
from resnet_triton.bench.cases import Case, cases, distinct
from resnet_triton.bench.ceilings import copy, matmul
from resnet_triton.bench.environment import environment
from resnet_triton.bench.kernels import ALTERNATIVES, Problem, measure, ours
from resnet_triton.codegen import TARGETS
from resnet_triton.codegen.roofline import least
from resnet_triton.config import ConvConfig, ConvShape, device, table
from resnet_triton.config.heuristic import estimate
from resnet_triton.kernels.launch import has_several_sides
from resnet_triton.ops.stem import StemCall
from resnet_triton.ops.trace import Call, trace
from resnet_triton.support import timing
from resnet_triton.tools import tune as command
from resnet_triton.tuner import search, trial

from .gpu_model import network
from .gpu_steps import OutOfTime, Setting, Steps, read


def layers(setting: Setting, batch: int, dtype: str) -> dict[str, list[Call]]:
    """The model's distinct calls by the first layer that makes them, with those of the layers that repeat them."""
    model = resnet_triton.optimize(network(setting))
    calls = trace(model, (batch, 3, setting.image, setting.image), getattr(torch, dtype))
    return {f"{same[0].name or same[0].operator} {dtype} {batch}": same for same in distinct(calls).values()}


def bench(setting: Setting) -> search.Bench:
    """Where the tuner tries configurations; a rehearsal has nothing to compile."""
    if not setting.rehearse:
        return command.gpu_bench(os.cpu_count() or 1)
    search.COUNT, search.ROUNDS, search.REPLAYS, search.FINAL_REPLAYS = 2, 0, 2, 2
    facts = device.facts(setting.device)
    return search.Bench(setting.device, facts, "", 0, lambda: contextlib.nullcontext(_NoCompiler()), setting.meter)


class _NoCompiler:
    def submit(self, shape: ConvShape, chosen: ConvConfig) -> Future[list[str]]:
        done: Future[list[str]] = Future()
        done.set_result([])
        return done


# --- exact -----------------------------------------------------------------------------------------------------------

_STRIDED = ConvShape(32, 64, 56, 56, 128, 3, 3, (2, 2), (1, 1))
_SHORTCUT = ConvShape(32, 512, 7, 7, 512, 3, 3, padding=(1, 1),
                      shortcut_c=256, shortcut_h=14, shortcut_w=14, shortcut_stride=(2, 2))  # fmt: skip
_TILES: dict[str, tuple[ConvShape, list[tuple[Any, ...]]]] = {
    "strided": (_STRIDED, [
        (128, 128, 64, 4, 3, (1, 4, 32)), (128, 128, 64, 8, 4, (1, 4, 32)), (64, 128, 64, 4, 4, (1, 2, 32)),
        (256, 128, 64, 8, 3, (1, 8, 32)), (128, 128, 64, 8, 3, (1, 4, 32)), (128, 128, 64, 4, 4, (1, 4, 32)),
        (128, 128, 64, 8, 4, (1, 1, 128)),
    ]),
    "shortcut": (_SHORTCUT, [
        (64, 64, 64, 4, 5, (1, 2, 32), 2), (64, 128, 64, 4, 4, (1, 2, 32), 2), (64, 64, 64, 4, 4, (1, 2, 32), 2),
        (64, 64, 64, 4, 5, (1, 2, 32), 1),
    ]),
}  # fmt: skip
SIBLINGS = {
    f"sibling {name} {i}": (shape, ConvConfig(*tile, swap=has_several_sides(tile[5])))
    for name, (shape, tiles) in _TILES.items()
    for i, tile in enumerate(tiles)
}
"""The first tile of each shape was sometimes wrong on an H200 while its pixels were the rows of the product."""


def exact(setting: Setting) -> Steps:
    """Siblings, then every layer as looked up."""
    where = bench(setting)
    usual = {} if setting.rehearse else dict(SIBLINGS)
    others = {}
    for batch, dtype in product(setting.batches, setting.options["dtypes"]):
        for key, (call, *_) in layers(setting, batch, dtype).items():
            if call.operator != "conv_bn_relu":
                others[key] = call
                continue
            usual[key] = call.shape, config.lookup(call.shape, where.facts)
    with where.compilers() as compiler:
        jobs = {key: compiler.submit(*pair) for key, pair in usual.items()}
        for key, pair in usual.items():
            yield key, partial(_exact_convolution, *pair, jobs[key], setting)
        for key, call in others.items():
            yield key, partial(_exact_other, call, setting)


def _exact_convolution(
    shape: ConvShape, chosen: ConvConfig, job: Future[list[str]], setting: Setting
) -> dict[str, Any]:
    faults, runs = job.result(), 1 if setting.rehearse else 100
    wrong = trial.Trial(shape, setting.device, 0).wrong_runs(chosen, runs)
    return {"exact": not any(wrong.values()), "runs": runs * len(wrong), "wrong": wrong, "config": asdict(chosen),
            "faults": faults}  # fmt: skip


def _exact_other(call: Call, setting: Setting) -> dict[str, Any]:
    args, expected = _exact_stem(call, setting) if call.operator == "stem" else _exact_head(call, setting)
    answer = ours(call.operator, args)
    answer().fill_(float("nan"))
    return {"exact": torch.equal(answer(), expected)}


def _exact_stem(call: Call, setting: Setting) -> tuple[tuple[Any, ...], Tensor]:
    meta = StemCall(*call.args)
    convolution = trial.exact_call(meta.convolution(meta.x).shape, setting.device, 0)
    args = StemCall(*convolution[:7], None, None, False, "triton")
    return args, F.max_pool2d(trial.exact_answer(convolution), 3, 2, 1)


def _exact_head(call: Call, setting: Setting) -> tuple[tuple[Any, ...], Tensor]:
    """Every pixel of a channel the same: then means are whole, and so are the products."""
    x, weight, bias = (torch.randint(-2, 3, t.shape, device=setting.device).to(t.dtype) for t in call.args[:3])
    x = x[:, :, :1, :1].expand(x.shape).contiguous(memory_format=torch.channels_last)
    return (x, weight, bias, False, "triton"), F.linear(x[:, :, 0, 0].double(), weight.double(), bias.double()).to(
        x.dtype
    )


def tests(setting: Setting) -> Steps:
    """A file of the test suite, counted as far as it got."""
    yield setting.options["file"], partial(_pytest, setting.options["file"], setting)


def _pytest(file: str, setting: Setting) -> dict[str, Any]:
    select = "test_conv_epilogue and plain and float16" if setting.rehearse else setting.options["select"]
    # pytest-benchmark before 5.3 warns under xdist that it disables itself, and warnings are errors here.
    plugins = ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    pytest = [sys.executable, "-m", "pytest", "-v", *plugins, file, "-k", select]
    if not setting.rehearse and importlib.util.find_spec("xdist"):
        pytest += ["-n", str(setting.options["processes"])]
    log = setting.journal.with_suffix(".txt")
    finished = True
    with log.open("w") as output:
        try:
            left = max(setting.deadline - time.monotonic() - 3, 1)
            subprocess.run(pytest, stdout=output, stderr=output, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            finished = False
    progress, _, summary = log.read_text().partition("short test summary")
    counts = {name: len(re.findall(rf"\b{name}\b", progress)) for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    failures = re.findall(r"(?:FAILED|ERROR) (\S+::\S.*)", summary or progress)
    return {**counts, "finished": finished, "failures": failures[:100]}


# --- ceilings --------------------------------------------------------------------------------------------------------


def ceilings(setting: Setting) -> Steps:
    """What the GPU gives to plain code: random data, CUDA graphs."""
    big, side = (1 << 16, 64) if setting.rehearse else (2 << 30, 8192)
    yield "copy", partial(_copy, big, 1, setting)
    yield "launch", partial(_launch_gap, setting)
    for size in (8 << 20, 16 << 20):
        yield f"L2 copy of {size >> 20} MiB", partial(_copy, min(size, big), 20, setting)
    for dtype in ("float16", "bfloat16"):
        yield f"matmul {dtype}", partial(_matmul, side, getattr(torch, dtype), setting)


def _copy(size: int, times: int, setting: Setting) -> dict[str, Any]:
    seconds = copy(setting.device, size, times=times, meter=setting.meter).p50
    row = {"us": seconds * 1e6, "bytes_per_s": 2 * size / seconds, "of": "read and written"}
    if times == 1:  # from DRAM
        row["ceiling"] = {"name": "copy", "bytes_per_s": row["bytes_per_s"], "flops_per_s": None, "dtype": None}
    return row


def _launch_gap(setting: Setting) -> dict[str, Any]:
    x = torch.randn(1, 8, 1, 1, device=setting.device)
    launch = ours("add_relu", (x, x, "triton"))
    return {"us": timing.graph_seconds([launch] * 200, replays=10, meter=setting.meter).p50 * 1e6}


def _matmul(side: int, dtype: torch.dtype, setting: Setting) -> dict[str, Any]:
    seconds = matmul(setting.device, side, dtype, meter=setting.meter).p50
    rate, name = 2 * side**3 / seconds, str(dtype).removeprefix("torch.")
    ceiling = {"name": "matmul", "bytes_per_s": None, "flops_per_s": rate, "dtype": name}
    return {"us": seconds * 1e6, "flops_per_s": rate, "ceiling": ceiling}


# --- layers ----------------------------------------------------------------------------------------------------------


def layer_times(setting: Setting) -> Steps:
    """Each distinct layer, L2-cold, beside its floor at the measured ceilings and the heuristic's estimate."""
    rows = read(setting.out / "ceilings.json").get("rows", {})
    known = TARGETS[90].ceilings
    dram = rows.get("copy", {}).get("bytes_per_s", known.dram)
    dtype = setting.options["dtype"]
    flops = rows.get(f"matmul {dtype}", {}).get("flops_per_s", known.half)
    for batch in setting.batches:
        for key, same in layers(setting, batch, dtype).items():
            floor = least(same[0]).floor(flops, dram) * 1e6
            yield key, partial(_layer_time, same[0], len(same), floor, setting)


def _layer_time(call: Call, times: int, floor: float, setting: Setting) -> dict[str, Any]:
    problem = Problem(call, setting.device, kernels="triton")
    replays = 2 if setting.rehearse else 20
    spread = timing.graph_seconds(problem.build("ours"), replays=replays, meter=setting.meter)
    us, p20, p80 = (seconds * 1e6 for seconds in spread)
    row = {"us": us, "p20_us": p20, "p80_us": p80, "times": times, "floor_us": floor}
    if call.operator == "conv_bn_relu":
        facts = device.facts(setting.device)
        chosen = config.lookup(call.shape, facts)
        cost = estimate(chosen, call.shape, facts) / 1e3
        row |= {"estimate_us": cost, "config": asdict(chosen), "shape": asdict(call.shape)}
    return row


def suite(setting: Setting) -> Steps:
    """The kernel suite: each layer, ours against PyTorch's ways to compute it; a rehearsal has but a few."""
    where = environment(setting.device)
    todo = cases(("resnet18",), setting.batches, [setting.options["dtype"]], setting.image)
    names = ("ours", "eager") if setting.rehearse else ALTERNATIVES
    for case in todo[1:4] if setting.rehearse else todo:
        yield f"{case.layer} {case.dtype} {case.batch}", partial(_suite, case, where, names, setting)


def _suite(case: Case, where: dict[str, Any], names: Sequence[str], setting: Setting) -> dict[str, Any]:
    with torch.inference_mode():
        rows = measure(case, setting.device, where, alternatives=names, kernels="triton", seconds=0.1)
    return {"rows": [asdict(row) for row in rows]}


# --- tune ------------------------------------------------------------------------------------------------------------


def tune(setting: Setting) -> Steps:
    """Search for the layers that cost most, and keep the table in the folder of the results."""
    where = bench(setting)
    timed = {key: row for key, row in read(setting.out / "layers.json").get("rows", {}).items() if "shape" in row}
    slowest = sorted(timed, key=lambda key: timed[key]["us"] * timed[key]["times"], reverse=True)
    slowest = slowest[: 1 if setting.rehearse else setting.options["count"]]
    shapes = [ConvShape(**{k: tuple(v) if isinstance(v, list) else v for k, v in timed[key]["shape"].items()})
              for key in slowest]  # fmt: skip
    with where.compilers() as compiler:
        for key, shape, following in zip(slowest, shapes, [*shapes[1:], None], strict=True):
            yield key, partial(_tune, shape, following, where, compiler, setting)


def _tune(
    shape: ConvShape, following: ConvShape | None, where: search.Bench, compiler: Any, setting: Setting
) -> dict[str, Any]:
    import triton

    try:
        found = search.Search(shape, where, compiler, setting.deadline).run(following)
    except search.OutOfTime:
        raise OutOfTime from None
    wrong = [asdict(c) for c in found.wrong]
    if found.config is None or found.timing is None:
        return {"error": "no configuration was exact", "wrong": wrong}
    path, shipped = setting.out / f"{table.slug(where.facts.name)}.json", table.path_of(where.facts.name)
    known = next((table.load(p) for p in (path, shipped) if p.exists()), table.Table(where.facts.name))
    known.entries[shape] = table.Entry(found.config, found.timing)
    versions = {"driver": where.driver, "triton": triton.__version__, "torch": torch.__version__}
    table.save(replace(known, date=search.today(), **versions), path)
    return {**asdict(found.timing), "config": asdict(found.config), "wrong": wrong}
