"""A deep copy of a model with parameters and buffers of its own."""

from __future__ import annotations

import copy
from itertools import chain
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)
_WAY_OUT = "optimize(model, inplace=True) copies nothing"


def independent(model: Model) -> Model:
    """A deep copy, whatever mode the caller is in. TypeError if there can be none, or if it shares a tensor."""
    try:
        with torch.inference_mode(False):  # or the copy could never be trained
            copied = copy.deepcopy(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise TypeError(f"the model cannot be copied ({said}); {_WAY_OUT}") from error
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in copied.named_modules():
        module.training = modes.get(name, module.training)  # torchvision's feature extractors copy themselves without
    own = {id(part) for part in chain(model.parameters(), model.buffers())}
    for name, part in chain(copied.named_parameters(), copied.named_buffers()):
        if id(part) in own:
            raise TypeError(f"{name} is shared by a deep copy, expected one of its own; {_WAY_OUT}")
    return copied
