"""The one place that imports torchvision, which is optional: weights enums and image preprocessing."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

_stubs: list[torch.library.Library] = []  # a Library undefines its operators when it is collected


def torchvision() -> Any:
    """Import torchvision, also where its wheel from PyPI meets a CPU-only torch.

    That wheel's compiled operators need CUDA libraries; without them the import fails on two operators that are only
    named, never called, for classification. Declaring those two is enough.
    """
    try:
        import torchvision
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise ModuleNotFoundError("torchvision is not installed; pip install torchvision", name=error.name) from None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error) or _stubs:
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _stubs.append(library)
        for half_imported in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[half_imported]
        return importlib.import_module("torchvision")
    return torchvision


def obstacle() -> str | None:
    """What it means that `torchvision` has had to declare operators; None if it has not."""
    if not _stubs:
        return None
    said = "a plain `import torchvision` fails here: it was built for another torch, with or without CUDA"
    return f"{said}; install both from one index"


def find_weights(architecture: str, weights: Any) -> Any:
    """A member of torchvision's weights enum for `architecture`, from the member itself or its name."""
    models = torchvision().models
    enum = models.get_model_weights(architecture)
    if isinstance(weights, enum):
        return weights
    prefix, _, name = str(weights).rpartition(".")
    if prefix not in ("", enum.__name__) or name not in enum.__members__:
        known = ", ".join(enum.__members__)
        hint = "a file is for resnet_triton.load_checkpoint"
        raise ValueError(f"unknown weights {weights!r} for {architecture}, expected one of {known}; {hint}")
    return enum[name]
