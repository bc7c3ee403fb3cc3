"""ResNet inference on hand-written Triton kernels, with torchvision's names, weights and answers."""

from . import entry_point, functional
from .checkpoints import load_checkpoint
from .convert import disabled, optimize, refresh, revert
from .coverage import Report, precompile, report
from .models import (
    BasicBlock,
    Bottleneck,
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)

__version__ = "0.1.0"

entry_point.offer()

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "Report",
    "ResNet",
    "disabled",
    "functional",
    "load_checkpoint",
    "optimize",
    "precompile",
    "refresh",
    "report",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "revert",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
