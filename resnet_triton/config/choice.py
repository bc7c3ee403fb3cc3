"""Which configuration a convolution gets: the table's, or the heuristic's."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from typing import NamedTuple

from ..kernels.values import ConvConfig
from . import table
from .candidates import adapt
from .conv import ConvShape, is_legal
from .device import DeviceFacts
from .heuristic import conv_heuristic

_forgotten = 0


class Chosen(NamedTuple):
    """A configuration, and whether it is this project's own choice."""

    config: ConvConfig
    trusted: bool


def state() -> int:
    """What a choice depends on besides its arguments: two equal states mean equal answers."""
    return _forgotten


def lookup(shape: ConvShape, device: DeviceFacts, *, descriptors: bool = True) -> ConvConfig:
    """The configuration for `shape` on `device`. `descriptors=False` asks for `conv_pointer` (unaligned tensors).

    The table's entry for the very shape, else its entry for the nearest batch size within a factor of two if that does
    well here by the cost model, else what that model would choose.
    """
    return choose(shape, device, descriptors=descriptors).config


def choose(shape: ConvShape, device: DeviceFacts, *, descriptors: bool = True) -> Chosen:
    """As `lookup`, and whether it is this project's own choice, which is the cost model's."""
    config = _tuned(shape, device, descriptors)
    if config is not None:
        return Chosen(config, trusted=False)
    return Chosen(conv_heuristic(shape, device, descriptors=descriptors), trusted=True)


def _tuned(shape: ConvShape, device: DeviceFacts, descriptors: bool) -> ConvConfig | None:
    """The table's for this shape, else for a near batch size."""
    known = _table(device.name)
    exact = known.entries.get(shape)
    if exact is not None and (descriptors or exact.config.box is None) and is_legal(exact.config, shape, device):
        return exact.config
    for tuned in _nearest(known, shape):
        config = adapt(known.entries[tuned].config, tuned, shape, device, descriptors=descriptors)
        if config is not None:
            return config
    return None


def timed(shape: ConvShape, device: DeviceFacts) -> bool:
    """Whether the very configuration that `lookup` gives was timed for this shape on this GPU."""
    known = _table(device.name).entries.get(shape)
    return known is not None and known.config == lookup(shape, device)


def untuned(device: DeviceFacts) -> str | None:
    """One line about a GPU on which no tile was ever timed; None if some were."""
    if _table(device.name).entries:
        return None
    return f"no tile was timed on {device.name}, a model of an H200 chooses them; resnet-triton tune times them there"


def forget() -> None:
    """Read the tables anew at the next lookup: one of them has been written."""
    global _forgotten
    _table.cache_clear()
    _forgotten += 1  # last: what another thread looks up meanwhile is kept under the state before


def _nearest(known: table.Table, shape: ConvShape) -> list[ConvShape]:
    """Entries that differ from `shape` in a batch size at most twice or half as large, nearest first."""
    same = [s for s in known.entries if s.n and s.n != shape.n and replace(s, n=shape.n) == shape]
    near = [s for s in same if s.n <= 2 * shape.n and shape.n <= 2 * s.n]
    return sorted(near, key=lambda s: max(s.n / shape.n, shape.n / s.n))


@functools.cache
def _table(gpu: str) -> table.Table:
    """The GPU's table, empty if there is none or it is not sound. Anything odd is said once."""
    path = table.path_of(gpu)
    known = table.sound(path) or table.Table(gpu)
    _warn_of_another_triton(path.name, known)
    return known


def _warn_of_another_triton(name: str, known: table.Table) -> None:
    import triton

    here = triton.__version__.split(".")[:2]
    tuned_with = {e.timing.triton for e in known.entries.values() if e.timing} or {known.triton}
    if others := sorted(v for v in tuned_with if v and v.split(".")[:2] != here):
        warnings.warn(
            f"{name} was tuned with Triton {', '.join(others)}, this is {triton.__version__}; other tiles may be "
            "faster now: resnet-triton tune",
            stacklevel=2,
        )
