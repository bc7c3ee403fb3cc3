"""Scripts that compile kernels: in processes of their own, for what is interpreted here cannot be compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_triton.codegen import CompiledLaunch
from resnet_triton.machine_code import Code


def run(script: str, *arguments: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def oldest() -> Path:
    """The folder of the oldest supported Triton; the test is skipped where there is none."""
    folder = Path(sys.prefix, "triton-3.6.0")
    if not (folder / ".installed").exists():
        pytest.skip("no Triton 3.6.0: `make codegen-oldest` installs it")
    return folder


CODE = Code(
    registers=99, spill_bytes=0, shared_memory=232448, instructions=1000, tensor_core="wgmma", tma=True, dots=1,
    wgmma=8, wgmma_waits=2, pendings=(1, 0),
)  # fmt: skip
ROW = CompiledLaunch(
    arch="sm_90", layer="layer1.0.conv1", operator="conv_bn_relu", launch=0, kernel="k", batch=32, dtype="float16",
    path="descriptor", filter="3x3", channels=64, tile="1x1x128", split_k=1, num_warps=4, num_stages=3, programs=100,
    programs_per_sm=1, occupancy=0.5, waves=0.758, code=CODE,
)  # fmt: skip
