"""Each row of docs/models.md, and one model of each kind on the interpreted kernels."""

from __future__ import annotations

import pytest
import torch
import zoo

TABLE = zoo.PAGE.read_text(encoding="utf-8")


def needs(package: str) -> None:
    if not zoo.has(package):
        pytest.skip(f"no {package}: pip install {package}")


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.MODELS)
def test_row(name):
    needs(zoo.MODELS[name][0])
    assert zoo.line(name) in TABLE.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["ResNetForImageClassification, basic blocks", "a ResNet for CIFAR", "a ResNet as KernelBench writes it",
     "a U-Net on a ResNet encoder"],
)  # fmt: skip
def test_on_kernels(name, unrounded):
    package, make = zoo.MODELS[name]
    needs(package)
    torch.manual_seed(0)
    row = zoo.examine(zoo.randomised(make()), 32, kernels="auto" if name.startswith("a U-Net") else "triton")
    assert row.difference < 1e-5
