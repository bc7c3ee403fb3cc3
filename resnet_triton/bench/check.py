"""What counts as a right answer: both suites judge by this, before they time anything and afterwards."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(y: Tensor, exact: Tensor) -> float:
    """Distance from an fp64 answer, relative to it; NaN and infinities stay."""
    return (torch.linalg.vector_norm(y.double() - exact) / torch.linalg.vector_norm(exact)).item()


def allowed(eager: float, dtype: torch.dtype) -> float:
    """The error that is allowed where eager PyTorch's is `eager`: three times that, or at least three times eps."""
    return 3 * max(eager, torch.finfo(dtype).eps)
