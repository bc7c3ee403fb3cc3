"""How fp32 is multiplied, "ieee" or "tf32", as PyTorch's own switches say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SWITCHES: tuple[Any, Any] = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]


def conv_precision(dtype: torch.dtype) -> str:
    """For convolutions: PyTorch's default allows TF32. Without cuDNN, PyTorch makes matrix products of them."""
    if dtype == torch.float32 and not torch.backends.cudnn.enabled:
        return matmul_precision(dtype)
    return "tf32" if dtype == torch.float32 and _SWITCHES[0].fp32_precision == "tf32" else "ieee"


def matmul_precision(dtype: torch.dtype) -> str:
    """For matrix products, which PyTorch keeps IEEE by default."""
    return "tf32" if dtype == torch.float32 and _SWITCHES[1].fp32_precision == "tf32" else "ieee"


@contextmanager
def fp32_precision(precision: str) -> Iterator[None]:
    """Both switches at `precision` for a while; PyTorch's operators and ours read them."""
    before = [switch.fp32_precision for switch in _SWITCHES]
    for switch in _SWITCHES:
        switch.fp32_precision = precision
    try:
        yield
    finally:
        for switch, value in zip(_SWITCHES, before, strict=True):
            switch.fp32_precision = value
