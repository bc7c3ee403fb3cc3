"""When, where and with what something was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import __version__

UNKNOWN = "unknown"


def environment(device: torch.device) -> dict[str, Any]:
    """The `environment` of a row, as it is now: clocks change."""
    cuda = device.type == "cuda"
    cudnn = torch.backends.cudnn.version() if cuda else None
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu(),
        "device_kind": device.type,
        "threads": torch.get_num_threads(),
        "clocks": nvidia_smi("clocks.sm,clocks.mem,clocks.max.sm", device) if cuda else _cpu_clock(),
        "driver": nvidia_smi("driver_version", device) if cuda else "none",
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "torchvision": _version("torchvision"),
        "cudnn": str(cudnn or "none"),
        "resnet_triton": __version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def nvidia_smi(fields: str, device: torch.device) -> str:
    """What nvidia-smi says of a GPU. It reads, and never sets."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)  # CUDA may number GPUs in another order
    which = index if uuid is None else f"GPU-{uuid}"
    return _output("nvidia-smi", f"--id={which}", f"--query-gpu={fields}", "--format=csv,noheader")


def commit() -> str:
    """The checkout's commit, with "+" if files differ from it; RESNET_TRITON_COMMIT says it where git cannot."""
    if given := os.environ.get("RESNET_TRITON_COMMIT"):
        return given
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # an installed package may lie within another project's checkout
        return UNKNOWN
    found = _output("git", "-C", str(root), "rev-parse", "HEAD")
    dirty = found != UNKNOWN and _output("git", "-C", str(root), "status", "--porcelain", empty="") not in ("", UNKNOWN)
    return found + "+" * dirty


def _output(*command: str, empty: str = UNKNOWN) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    return done.stdout.strip() or empty


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _cpu() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine() or UNKNOWN


def _cpu_clock() -> str:
    clock = _cpuinfo("cpu MHz")
    return f"{float(clock):.0f} MHz" if clock else UNKNOWN


def _cpuinfo(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)
