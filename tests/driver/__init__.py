"""A stand-in for NVIDIA's driver library: what a launch hands to the driver, without a GPU.

Triton's own launcher runs, compiled as it is for a GPU; only the library below it is another (`libcuda.c`). It refuses
what the driver's documentation refuses (`cuda.h`, beside `cuTensorMapEncodeTiled`), and tells what arrives. It lets
strides come in any order, though: the documentation's formula has them grow, those of boxes of images do not, and an
H200's driver took these. A process that has it has it for good, and must not interpret kernels.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import threading
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver

STREAM = 0x5712
MAPS = 0xC0FFEE00
"""What the encoded map begins with, number by number; the rest of its 128 bytes is zero."""
_DTYPES = {6: ("float16", 2), 7: ("float32", 4), 9: ("bfloat16", 2), 11: ("tf32", 4)}
_SWIZZLES = (0, 32, 64, 128)  # bytes
_OPTIONS = ("-shared", "-fPIC", "-Wl,-soname,libcuda.so.1")
_DONE, _REFUSED = 0, 1  # CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE


class TensorMap(NamedTuple):
    """A tensor and the box that is moved at once, outermost dimension first; strides in bytes."""

    dtype: str
    address: int
    sizes: list[int]
    strides: list[int]
    box: list[int]
    swizzle: int

    def faults(self, size: int) -> list[str]:
        """Which rules it breaks, with elements of `size` bytes."""
        width = self.box[-1] * size
        rules = {
            "an address that is no multiple of 16": self.address % 16 == 0,
            "sizes beyond 2^32": all(0 < n <= 2**32 for n in self.sizes),
            "strides that are no multiples of 16, or 2^40 and more": all(
                n % 16 == 0 and n < 2**40 for n in self.strides
            ),
            "a box of more than 256": all(0 < n <= 256 for n in self.box),
            "rows that are no multiple of 16 bytes": width % 16 == 0,
            "rows wider than the swizzle": width <= self.swizzle or not self.swizzle,
            "more than five dimensions": 1 <= len(self.sizes) <= 5,
        }
        return [f"{rule}: {self}" for rule, kept in rules.items() if not kept]


class Launched(NamedTuple):
    """What cuLaunchKernelEx was told; `parameters` are the bytes of each."""

    kernel: str
    grid: tuple[int, ...]
    threads: tuple[int, ...]
    shared_memory: int
    stream: int
    dependent: bool
    other_attributes: int
    parameters: list[bytes]


class Library:
    """The stand-in, built in `folder` and loaded, which tells `launched` of each launch: see `_LAUNCH`."""

    def __init__(self, folder: Path, launched: Callable[..., None]) -> None:
        library = folder / "libcuda.so.1"
        include = Path(nvidia.__file__).with_name("include")
        source = Path(__file__).with_name("libcuda.c")
        subprocess.run(["gcc", *_OPTIONS, "-I", include, "-o", library, source], check=True)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        stand_in = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self.maps: list[TensorMap] = []
        self.faults: list[str] = []
        self._counting = threading.Lock()
        self._told = (_ENCODE(self._encode), _LAUNCH(launched))  # kept, for C does not
        stand_in.tell(*self._told)

    def _encode(
        self, place: Any, dtype: int, rank: int, address: int, sizes: Any, strides: Any, box: Any, steps: Any,
        interleave: int, swizzle: int, fill: int,
    ) -> int:  # fmt: skip
        name, size = _DTYPES[dtype]
        outer = strides[: rank - 1][::-1]
        found = TensorMap(name, address or 0, sizes[:rank][::-1], outer, box[:rank][::-1], _SWIZZLES[swizzle])
        faults = found.faults(size)
        if place % 64 or steps[:rank] != [1] * rank or interleave or fill:
            faults.append(f"a map at {place:#x} with steps {steps[:rank]}, interleave {interleave}, fill {fill}")
        self.faults += faults
        with self._counting:
            number = len(self.maps)
            self.maps.append(found)
        ctypes.memset(place, 0, 128)
        ctypes.memmove(place, (MAPS + number).to_bytes(8, "little"), 8)
        return _REFUSED if faults else _DONE


class Driver(nvidia.CudaDriver):
    """Triton's driver of a GPU of compute capability 9.0, on the stand-in, which is built in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._library = library = Library(folder, self._launch)
        self.maps, self.faults = library.maps, library.faults
        self.launched: list[Launched] = []
        self.sizes: list[int] = []  # bytes of each parameter of the kernel that is launched next
        super().__init__()
        self.get_device_capability = lambda device: (9, 0)
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device: STREAM
        driver.set_active(self)

    def _launch(
        self, handle: int, name: bytes, sides: Any, stream: int, dependent: int, others: int, parameters: Any
    ) -> None:
        values = [
            ctypes.string_at(place, size) for place, size in zip(parameters[: len(self.sizes)], self.sizes, strict=True)
        ]
        grid, threads = tuple(sides[:3]), tuple(sides[3:6])
        told = name.decode(), grid, threads, sides[6], stream or 0, bool(dependent), others, values
        self.launched.append(Launched(*told))


_ENCODE = ctypes.CFUNCTYPE(
    c_int, c_uint64, c_int, c_uint32, c_void_p, POINTER(c_uint64), POINTER(c_uint64), POINTER(c_uint32),
    POINTER(c_uint32), c_int, c_int, c_int,
)  # fmt: skip
_LAUNCH = ctypes.CFUNCTYPE(None, c_void_p, c_char_p, POINTER(c_uint32), c_void_p, c_uint32, c_uint32, POINTER(c_void_p))


def parameter_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of the one kernel in a PTX text."""
    [text] = re.findall(r"\.entry\s+[$\w]+\s*\(([^)]*)\)", ptx)
    found = re.findall(r"\.param\s(?:\s*\.align\s+\d+)?\s*\.[a-z](\d+)[^,]*?(?:\[(\d+)\])?\s*(?:,|$)", text)
    return [int(bits) // 8 * int(count or 1) for bits, count in found]
