"""Where the kernels of a test run run: on the GPU if there is one, else on the CPU in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined, so before any of ours is imported


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of the tensors that kernels work on in this run."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(scope="session", autouse=True)
def shadow_memory() -> Iterator[None]:
    """Every interpreted launch of every test runs under shadow memory: see `shadow.py`."""
    if HAS_GPU:
        yield
        return
    import interned
    import shadow

    interned.install()
    with shadow.everywhere():
        yield


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter computes TF32 as IEEE fp32, in larger tiles. That of Triton 3.9 would round what TMA loads."""
    if not HAS_GPU and importlib.util.find_spec("triton"):
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter, "_round_f32_to_tf32", lambda data: data, raising=False)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile knows nothing of other tests."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """CUDA graphs on CPU tensors: see `fake_cuda.py`."""
    from fake_cuda import FakeCuda

    from resnet_triton.graphs import function, replay, runner

    fake = FakeCuda()
    for module in (function, replay, runner):
        monkeypatch.setattr(module, "cuda", fake)
    return fake


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in place of the one with the shipped tables."""
    from resnet_triton.config import choice, table

    monkeypatch.setenv(table.VARIABLE, str(tmp_path))
    choice.forget()
    yield tmp_path
    choice.forget()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))
