"""What counts as a right answer, and as a comparison: both suites judge by this, before they time and afterwards."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from ..ops import dispatch


def relative_error(y: Tensor, exact: Tensor) -> float:
    """Distance from an fp64 answer, relative to it; NaN and infinities stay."""
    return (torch.linalg.vector_norm(y.double() - exact) / torch.linalg.vector_norm(exact)).item()


def allowed(eager: float, dtype: torch.dtype) -> float:
    """The error that is allowed where eager PyTorch's is `eager`: three times that, or at least three times eps."""
    return 3 * max(eager, torch.finfo(dtype).eps)


def right_code(ours: bool, where: torch.device, before: Counter[tuple[str, str]]) -> None:
    """RuntimeError if since `before`, a copy of `dispatch.calls`, ours ran no kernel on a GPU, or another ran ours."""
    made = Counter(dispatch.calls) - before
    if ours and where.type == "cuda" and not any(backend == "triton" for _, backend in made):
        raise RuntimeError("no kernel of ours ran, expected them in each layer; resnet-triton doctor says why")
    if made and not ours:
        raise RuntimeError("operators of ours ran, expected PyTorch alone: this would compare ours with ours")
