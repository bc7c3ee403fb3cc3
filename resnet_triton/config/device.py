"""Facts of a GPU that decide how kernels are shaped. Nothing here runs at import."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class DeviceFacts:
    """What heuristics and legality checks may know of a device.

    `arch` is the compute capability as one number (9.0 -> 90), `shared_memory` the bytes one program may use. With
    `gluon=False` no kernel in Gluon is chosen: Triton's interpreter has none, and a driver or compiler may have
    refused one.
    """

    name: str
    arch: int
    sm_count: int
    shared_memory: int
    gluon: bool = True

    @property
    def has_gluon(self) -> bool:
        """Whether the kernels in Gluon run here: they are written for wgmma."""
        return self.gluon and self.arch == 90

    @property
    def has_descriptors(self) -> bool:
        """Whether tensor descriptors become hardware bulk copies (TMA), and so are worth using."""
        return self.arch >= 90


def facts(device: torch.device) -> DeviceFacts:
    """Facts of `device`. A CPU tensor only gets here through Triton's interpreter, which plays an H200."""
    if device.type == "cuda":
        return _cuda_facts(torch.cuda.current_device() if device.index is None else device.index)
    from .targets import KNOWN  # reads files

    return KNOWN[90]


@functools.cache
def _cuda_facts(index: int) -> DeviceFacts:
    p: Any = torch.cuda.get_device_properties(index)
    return DeviceFacts(p.name, p.major * 10 + p.minor, p.multi_processor_count, p.shared_memory_per_block_optin)
