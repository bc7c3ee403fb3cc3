"""Two GPUs in software, for PyTorch's build for CUDA where there is none: a plugin of pytest, `-p software_gpu`.

PyTorch, Triton and its launcher are what they are on GPUs. Below them the runtime (`runtime.cpp`) and the driver
(`driver/libcuda.c`) are other libraries, and memory of the device is memory of the host:

* Streams, events, captures and graphs are kept in order as CUDA promises, and in no other: what has been launched waits
  until somebody waits for it, and then any that is ready comes next. So what lacks an event reads too early or too
  late. What captures forbid is an error, as on a GPU.
* Triton's kernels are executed from their PTX (`kernels.py`), PyTorch's operators are its own for the CPU
  (`operators.py`). New memory is full of NaN.

Not seen: time, races within a kernel (the simulator's own tests judge these), clusters, other kernels than Triton's.
They are H200s, or `SOFTWARE_GPU=sm_80` says what else. `SOFTWARE_GPU_SEED` is that of the order. It knows CUDA 13.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from ctypes import c_int, c_long, c_size_t, c_void_p
from itertools import count
from pathlib import Path

_RUNTIME = "libcudart.so.13"

_folder = tempfile.TemporaryDirectory(prefix="software-gpu-")  # removed at the end


def _build(folder: Path) -> Path:
    """The runtime, with all that PyTorch's libraries ask of it: what it does not know is an error when called."""
    site, own = Path(str(importlib.util.find_spec("torch").origin)).parents[1], Path(__file__).parent  # type: ignore
    headers = [*site.glob("nvidia/cu13/include"), site / "triton/backends/nvidia/include"]
    if len(headers) < 2:
        sys.exit("The GPU in software needs PyTorch's build for CUDA 13; the one here is another.")
    include = [part for folder in headers for part in ("-I", str(folder))]
    names = [subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
             for library in site.glob("torch/lib/*.so")]  # fmt: skip
    wanted = set(re.findall(r" U (cuda[A-Z]\w*)@", "".join(names)))
    known = set(re.findall(r"^API \w.*?(\w+)\(", (own / "runtime.cpp").read_text(), re.MULTILINE))
    unknown, versions, library = folder / "unknown.cpp", folder / "versions", folder / _RUNTIME
    unknown.write_text("\n".join(f'extern "C" int {name}() {{ return 801; }}' for name in sorted(wanted - known)))
    versions.write_text(f"{_RUNTIME} {{ global: *; }};")
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{_RUNTIME}", f"-Wl,--version-script,{versions}"]
    subprocess.run(["g++", *options, *include, "-o", library, own / "runtime.cpp", unknown, "-ldl"], check=True)
    return library


RUNTIME = ctypes.CDLL(str(_build(Path(_folder.name))), mode=ctypes.RTLD_GLOBAL)  # before PyTorch looks for one
RUNTIME.software_block.argtypes, RUNTIME.software_block.restype = [c_size_t], c_size_t
RUNTIME.software_device.argtypes = [c_int, c_int, c_int, c_size_t]
RUNTIME.software_launch.argtypes = [c_void_p, c_long]

_work: dict[int, Callable[[], object]] = {}  # for good: a graph may launch it again
_numbers = count()
failures: list[str] = []
"""Tracebacks of what went wrong on the GPU, which is lost from then on."""


def launch(stream: int, work: Callable[[], object]) -> int:
    """Have the GPU do something on a stream, or in a graph that is captured there; CUDA's error."""
    number = next(_numbers)
    _work[number] = work
    return int(RUNTIME.software_launch(stream, number))


@ctypes.CFUNCTYPE(c_int, c_long)
def _run(number: int) -> int:
    import torch

    try:
        with torch.inference_mode(False), torch.no_grad():
            _work[number]()
    except BaseException:
        failures.append(traceback.format_exc())
        print("on the GPU in software:", failures[-1], flush=True)
        return 1
    return 0


RUNTIME.software_start(_run)

from resnet_triton.config.targets import target  # noqa: E402

from . import kernels, operators  # noqa: E402

KNOWN = target(os.environ.get("SOFTWARE_GPU", "sm_90")).known
RUNTIME.software_device(KNOWN.arch, KNOWN.sm_count, KNOWN.sm_warps, KNOWN.shared_memory)
DRIVER = kernels.install(Path(_folder.name))
operators.install()
