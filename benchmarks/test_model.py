"""The model suite on pytest-benchmark: `pytest benchmarks/test_model.py --benchmark-group-by=group`.

Wall-clock time of single calls in this one process. `resnet-triton bench` gives each alternative a process of its own
and lets them take turns, which is what published figures come from.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resnet_triton.bench.alternatives import Alternative, alternatives, select
from resnet_triton.bench.check import allowed, relative_error
from resnet_triton.bench.environment import environment
from resnet_triton.bench.worker import Spec, network

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    dtypes = (option("--dtypes") or ("float16" if CUDA else "float32")).split(",")
    names = option("--alternatives").split(",") if option("--alternatives") else list(alternatives(DEVICE))
    tasks = [
        (option("--models").split(",")[0], dtype, int(batch), option("--image"))
        for dtype in dtypes
        for batch in option("--batches").split(",")
    ]
    metafunc.parametrize("task", tasks, ids=lambda task: "-".join(map(str, task)), scope="module")
    metafunc.parametrize("alternative", select(names, DEVICE), ids=lambda a: a.name.replace(" ", "_"))


@pytest.fixture(scope="module")
def problem(task: tuple[str, str, int, int]) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor, float]:
    """The model, images, their logits in fp64, and the error that is allowed."""
    model, dtype, batch, image = task
    spec = Spec(model, dtype, str(DEVICE), image)
    images = torch.randn(batch, 3, image, image, device=DEVICE, dtype=getattr(torch, dtype))
    with torch.inference_mode():
        expected = network(spec).double()(images.double())
        eager = relative_error(network(spec)(images), expected)
    return network(spec), images, expected, allowed(eager, images.dtype)


def test_model(benchmark: Any, task: Any, problem: Any, alternative: Alternative) -> None:
    """An alternative is right, then timed, then still right."""
    model, images, expected, limit = problem
    with torch.inference_mode():
        images = alternative.images(images)
        call = alternative.build(model, images)

        def work() -> torch.Tensor:
            y = call(images)
            if CUDA:
                torch.cuda.synchronize()
            return y

        error = relative_error(work(), expected)
        assert error <= limit, "wrong before it was timed"
        benchmark.group = "{}, {}, batch {}, image {}".format(*task)
        benchmark.extra_info |= {"error": error, "limit": limit, **environment(DEVICE)}
        benchmark(work)
        assert relative_error(work(), expected) <= limit, "wrong after it was timed"
