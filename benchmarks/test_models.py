"""Whole models on pytest-benchmark: `pytest benchmarks/test_models.py --benchmark-group-by=group`.

Wall-clock time of single calls in this one process. `resnet-triton bench` gives each alternative a process of its own
and lets them take turns, which is what published figures come from.
"""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch

from resnet_triton.bench import layers
from resnet_triton.bench.alternatives import Alternative, alternatives, select
from resnet_triton.bench.check import allowed, relative_error
from resnet_triton.bench.worker import Spec, network

from .conftest import DEVICE, listed

Task = tuple[str, str, int, int]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    model, image = listed(config, "--models")[0], config.getoption("--image")
    settings = product(listed(config, "--dtypes"), listed(config, "--batches"))
    tasks = [(model, dtype, int(batch), image) for dtype, batch in settings]
    chosen = select(listed(config, "--alternatives") or list(alternatives(DEVICE)), DEVICE)
    metafunc.parametrize("task", tasks, ids=lambda task: "-".join(map(str, task)), scope="module")
    metafunc.parametrize("alternative", chosen, ids=lambda a: a.name.replace(" ", "_"))


@pytest.fixture(scope="module")
def problem(task: Task) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor, float]:
    """The model, images, their logits in fp64, and the error that is allowed."""
    model, dtype, batch, image = task
    spec = Spec(model, dtype, str(DEVICE), image)
    images = torch.randn(batch, 3, image, image, device=DEVICE, dtype=getattr(torch, dtype))
    with torch.inference_mode():
        expected = network(spec).double()(images.double())
        eager = relative_error(network(spec)(images), expected)
    return network(spec), images, expected, allowed(eager, images.dtype)


def test_model(race: Any, task: Task, problem: Any, alternative: Alternative) -> None:
    model, images, expected, limit = problem
    with torch.inference_mode(), layers.cudnn_searches():
        images = alternative.images(images)
        call = alternative.build(copy.deepcopy(model), images)  # ours changes what it is given
        group = "{}, {}, batch {}, image {}".format(*task)
        race(group, lambda: call(images), lambda: relative_error(call(images), expected), limit)
