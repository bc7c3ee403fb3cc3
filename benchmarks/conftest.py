"""Options of `pytest benchmarks`: what to measure. And how: an alternative is right, then timed, then still right."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from resnet_triton.bench.cases import MODELS
from resnet_triton.bench.environment import environment

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("what to benchmark (lists are comma-separated)")
    group.addoption("--batches", default="1,16", help="batch sizes")
    dtype = "float16" if DEVICE.type == "cuda" else "float32"
    group.addoption(
        "--dtypes", default=dtype, help="float16, bfloat16, float32; default: float16 on a GPU, else float32"
    )
    group.addoption("--models", default=",".join(MODELS), help="of %(default)s")
    group.addoption("--alternatives", default="", help="default: all")
    group.addoption("--image", type=int, default=224, help="height and width of the images")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise pytest.UsageError("TRITON_INTERPRET is set, expected kernels that are compiled; unset it to benchmark")


def listed(config: pytest.Config, option: str) -> list[str]:
    """The parts of an option."""
    return [part for part in config.getoption(option).split(",") if part]


@pytest.fixture
def race(benchmark: Any) -> Callable[..., None]:
    """Times a call on pytest-benchmark, if its errors are within the limit."""

    def race(group: str, call: Callable[[], object], error: Callable[[], float], limit: float, **info: Any) -> None:
        def work() -> None:
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        before = error()
        assert before <= limit, "wrong before it was timed"
        benchmark.group = group
        benchmark.extra_info |= {"error": before, "limit": limit, **info, **environment(DEVICE)}
        benchmark(work)
        assert error() <= limit, "wrong after it was timed"

    return race
