"""Forms of a convolution that were timed on a GPU: which of them may be used, and the best of these.

`nvidia-h200.measured.json` says with which versions, when, at which commit, and for each shape what was timed: L2-cold,
warm for one image. A form is safe unless the code it was timed with has since been replaced: boxes with several sides,
whose products then read registers that were being overwritten. Other boxes load their filters through a descriptor with
its dimensions in another order now; nothing else of them has changed.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from ..kernels.values import ConvConfig
from .conv import ConvShape, is_legal
from .device import DeviceFacts
from .table import slug

FOLDER = Path(__file__).parent


class Form(NamedTuple):
    """One timed form: microseconds, whether its answer was exact, and bytes that it spills."""

    us: float
    exact: bool
    safe: bool
    spill_bytes: int
    config: ConvConfig


def best_measured(shape: ConvShape, device: DeviceFacts, *, descriptors: bool = True) -> Form | None:
    """The fastest form that was timed for this very shape on this GPU and may be used; None if there is none."""
    usable = [
        form
        for form in measured(device.name).get(shape, ())
        if form.exact and form.safe and not form.spill_bytes and is_legal(form.config, shape, device)
        if descriptors or form.config.box is None
    ]
    return min(usable, key=lambda form: form.us, default=None)


@functools.cache
def measured(gpu: str) -> dict[ConvShape, list[Form]]:
    """All that was timed on a GPU."""
    path = FOLDER / f"{slug(gpu)}.measured.json"
    if not path.exists():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    found = {}
    for layer in data["layers"]:
        shape: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in layer["shape"].items()}
        found[ConvShape(**shape)] = [_form(dict(zip(data["columns"], row, strict=True))) for row in layer["forms"]]
    return found


def _form(row: dict[str, Any]) -> Form:
    us, exact, safe, spill_bytes = (row.pop(name) for name in ("us", "exact", "safe", "spill_bytes"))
    box = row.pop("box")
    return Form(us, exact, safe, spill_bytes, ConvConfig(**row, box=box and tuple(box)))
