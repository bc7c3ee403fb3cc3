"""Options of `pytest benchmarks`: what to measure."""

from __future__ import annotations

import os

import pytest
import torch

from resnet_triton.bench.cases import MODELS


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("what to benchmark (lists are comma-separated)")
    group.addoption("--batches", default="1,16", help="batch sizes")
    group.addoption("--dtypes", help="float16, bfloat16, float32; default: float16 on a GPU, float32 on a CPU")
    group.addoption("--models", default=",".join(MODELS), help="of %(default)s")
    group.addoption("--alternatives", help="default: all")
    group.addoption("--image", type=int, default=224, help="height and width of the images")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise pytest.UsageError("TRITON_INTERPRET is set, expected kernels that are compiled; unset it to benchmark")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
