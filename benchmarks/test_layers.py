"""Layers on pytest-benchmark: `pytest benchmarks --benchmark-group-by=group`.

Wall-clock time of single calls on the same data, with the launch, caches warm. `resnet_triton.bench.layers` itself
times a GPU by the GPU's clock and with its L2 cache cold.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resnet_triton.bench import cases, layers
from resnet_triton.bench.layers import Problem

from .conftest import DEVICE, listed


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    batches, dtypes = [int(batch) for batch in listed(config, "--batches")], listed(config, "--dtypes")
    found = cases.cases(listed(config, "--models"), batches, dtypes, config.getoption("--image"))
    found += cases.grouped(batches, dtypes)
    asked = listed(config, "--alternatives") or layers.ALTERNATIVES
    pairs = [(case, name) for case in found for name in layers.applicable(case.call, DEVICE, asked)]
    ids = [f"{case.model}-{case.layer}-{case.dtype}-{case.batch}-{name}".replace(" ", "_") for case, name in pairs]
    metafunc.parametrize(("case", "alternative"), pairs, ids=ids)


_problems: dict[int, Problem] = {}


def _problem(case: cases.Case) -> Problem:
    """The same data for every alternative of a case; the last case's is let go."""
    if id(case) not in _problems:
        _problems.clear()
        _problems[id(case)] = Problem(case.call.ours, DEVICE)
    return _problems[id(case)]


def test_layer(race: Any, case: cases.Case, alternative: str) -> None:
    with torch.inference_mode(), layers.cudnn_searches():
        problem = _problem(case)
        call = problem.build(alternative)[0]
        group = f"{case.model} {case.layer}, {case.dtype}, batch {case.batch}"
        work = {} if case.cost is None else case.cost._asdict()
        race(group, call, lambda: problem.error(call), problem.limit, dtype=case.dtype, batch=case.batch, **work)
