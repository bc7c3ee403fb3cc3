"""Tensors in memory of a special kind: between unreadable pages, or larger than the machine.

Both can end a process, so tests run their own file as a program.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_NORESERVE = 0x4000  # Linux; Python names it only from 3.13
PAGE = mmap.PAGESIZE


def _map(size: int, protection: int) -> int:
    """Anonymous memory, which is never given back; a page costs nothing until it is stored into."""
    address = _libc.mmap(None, size, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE, -1, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"cannot map {size} bytes")
    return int(address)


def _tensor(address: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)


def guarded(tensor: Tensor, *, end: bool) -> Tensor:
    """A copy that ends at an unreadable page, or begins behind one; strides are kept, gaps are not guarded."""
    if tensor.numel() == 0:
        return tensor
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    size = span * tensor.element_size()
    inner = -(-size // PAGE) * PAGE
    address = _map(inner + 2 * PAGE, 0) + PAGE
    if _libc.mprotect(address, inner, mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), "cannot make memory readable")
    flat = _tensor(address + (inner - size if end else 0), size, tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def huge(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros of which only those pages take memory that are stored into."""
    size = math.prod(shape) * dtype.itemsize
    return _tensor(_map(size, mmap.PROT_READ | mmap.PROT_WRITE), size, dtype).view(*shape)


def run_file(file: str) -> str:
    """What a test file prints when it is run as a program, with interpreted kernels."""
    folder = Path(file).resolve().parent
    path = os.pathsep.join([str(folder.parent), str(folder), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{file} ends with {done.returncode}: {done.stderr}"
    return done.stdout
