"""The entry point by which torch.compile finds `backend="resnet_triton"`, in a checkout that is not installed.

torch.compile looks for backends among the entry points of installed packages. Registering ours with Dynamo instead
would import Dynamo, which takes two seconds, whenever this package is imported.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

GROUP = "torch_dynamo_backends"
BACKEND = "resnet_triton"
_NAME = "resnet-triton-checkout"


def offer() -> None:
    """Make the entry point known if no installed package has it."""
    if BACKEND not in importlib.metadata.entry_points(group=GROUP).names:
        sys.meta_path.append(_Finder())


class _Checkout(importlib.metadata.Distribution):
    """This checkout as a distribution that has nothing but the entry point, under a name that no other one hides."""

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: {_NAME}\n"
        return (
            f"[{GROUP}]\n{BACKEND} = resnet_triton.backend:resnet_triton\n" if filename == "entry_points.txt" else None
        )

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parents[1] / path


class _Finder(importlib.metadata.DistributionFinder):
    def find_spec(self, *_: Any) -> None:
        """Find no module."""

    def find_distributions(self, context: Any = None) -> Iterable[Any]:
        return [_Checkout()] if context is None or context.name in (None, _NAME) else []
