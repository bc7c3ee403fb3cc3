"""torchvision's ResNets with one block a stage, and what tests ask of them."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from resnet_triton import report
from resnet_triton.support import vision

torchvision = vision.torchvision()
tv = importlib.import_module("torchvision.models.resnet")


def randomised(model: nn.Module) -> nn.Module:
    """In eval mode, with batch norm statistics that are not 0 and 1."""
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.2, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
    return model.eval()


def small(block: str = "BasicBlock", **kwargs: Any) -> nn.Module:
    """A torchvision ResNet with one block a stage."""
    torch.manual_seed(0)
    return randomised(tv.ResNet(getattr(tv, block), [1, 1, 1, 1], num_classes=10, **kwargs))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5 * float(expected.abs().max()))


def image() -> Tensor:
    return torch.randn(2, 3, 40, 36, generator=torch.Generator().manual_seed(0))


def reasons(model: nn.Module, shape: tuple[int, ...] = (2, 3, 64, 64)) -> dict[str, str]:
    return {c.name: c.reason for c in report(model, shape).calls}
