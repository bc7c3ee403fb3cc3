"""The kernel suite on pytest-benchmark: `pytest benchmarks --benchmark-group-by=group`.

Wall-clock time of single calls on the same data, with the launch, caches warm. `resnet_triton.bench.kernels` itself
times a GPU by the GPU's clock and with its L2 cache cold.
"""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import pytest
import torch

from resnet_triton.bench import cases, kernels
from resnet_triton.bench.kernels import Problem
from resnet_triton.codegen.roofline import least

CUDA = torch.cuda.is_available()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    models, dtypes = option("--models").split(","), option("--dtypes") or ("float16" if CUDA else "float32")
    batches = [int(batch) for batch in option("--batches").split(",")]
    asked = (option("--alternatives") or ",".join(kernels.ALTERNATIVES)).split(",")
    where = torch.device("cuda" if CUDA else "cpu")
    found = cases.cases(models, batches, dtypes.split(","), option("--image"))
    pairs = [(case, name) for case in found for name in kernels.applicable(case.call, where, asked)]
    ids = [f"{case.model}-{case.layer}-{case.dtype}-{case.batch}-{name}".replace(" ", "_") for case, name in pairs]
    metafunc.parametrize(("case", "alternative"), pairs, ids=ids)


@pytest.fixture(scope="session")
def versions() -> dict[str, str]:
    names = ("torch", "triton", "resnet-triton")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


_problems: dict[int, Problem] = {}


def _problem(case: cases.Case, device: torch.device) -> Problem:
    """The same data for every alternative of a case; the last case's is let go."""
    if id(case) not in _problems:
        _problems.clear()
        _problems[id(case)] = Problem(case.call, device)
    return _problems[id(case)]


def test_kernel(
    benchmark: Any, case: cases.Case, alternative: str, device: torch.device, versions: dict[str, str]
) -> None:
    """An alternative is right, then timed, then still right."""
    with torch.inference_mode(), kernels.cudnn_searches():
        problem = _problem(case, device)
        call = problem.build(alternative)[0]
        error = problem.error(call)
        assert error <= problem.limit, "wrong before it was timed"

        def work() -> None:
            call()
            if CUDA:
                torch.cuda.synchronize()

        benchmark.group = f"{case.model} {case.layer}, {case.dtype}, batch {case.batch}"
        cost = least(case.call)
        benchmark.extra_info |= {
            "dtype": case.dtype, "batch": case.batch, "error": error, "limit": problem.limit, "flops": cost.flops,
            "bytes": cost.bytes, "device": torch.cuda.get_device_name() if CUDA else platform.machine(), **versions,
        }  # fmt: skip
        benchmark(work)
        assert problem.error(call) <= problem.limit, "wrong after it was timed"
