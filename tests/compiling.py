"""Scripts that compile kernels: in processes of their own, for what is interpreted here cannot be compiled.

They are forks of one process, which has imported what nearly all of them need: that takes three seconds.
"""

from __future__ import annotations

import atexit
import base64
import functools
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from resnet_triton.codegen import CompiledLaunch, specialise
from resnet_triton.kernels.launch import Launch
from resnet_triton.machine_code import Code

TRITON = tuple(map(int, version("triton").split(".")[:2])) if find_spec("triton") else (0, 0)
"""The version that compiles."""

SERVER = """
import json, os, sys
import torch._dynamo
import resnet_triton.codegen
for line in sys.stdin:
    script, sys.argv[1:], environ, outputs = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for number, path in enumerate(outputs, start=1):
    os.dup2(os.open(path, os.O_WRONLY), number)
os.environ.clear()
os.environ.update(environ)
exec(script)
"""


@functools.cache
def server(folder: str, path: str | None) -> subprocess.Popen[str]:
    """Both say which package and which Triton it imports: those of `folder` come before those of `path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=folder, env=environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    atexit.register(process.communicate)  # it ends at the end of its input
    return process


def run(script: str, *arguments: str) -> str:
    """What a script prints, without TRITON_INTERPRET."""
    process = server(os.getcwd(), os.environ.get("PYTHONPATH"))
    assert process.stdin
    assert process.stdout
    with TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("out", "err")]
        for path in outputs:
            path.touch()
        code = ""
        try:
            print(json.dumps([script, arguments, environ(), [*map(str, outputs)]]), file=process.stdin, flush=True)
            code = process.stdout.readline()
        finally:
            if not code:  # it has ended, or the wait was interrupted: its next answer would be about this script
                server.cache_clear()
                os.killpg(process.pid, signal.SIGKILL)
        out, err = (path.read_text() for path in outputs)
    assert code == "0\n", f"exit code {code.strip() or 'unknown'}: {out[-2000:]}{err[-2000:]}"
    return out


PTX = """
import base64, json, pickle, sys
from resnet_triton import codegen
sys.path[:0] = sys.argv[3:]
sources = pickle.loads(base64.b64decode(sys.argv[2]))
print(json.dumps([codegen.triton_compile(source, int(sys.argv[1])).asm["ptx"] for source in sources]))
"""


def seen_by_compilers(launch: Launch) -> Launch:
    """The launch of a kernel as a compiler sees it, also where it is interpreted."""
    from triton.runtime.jit import JITFunction

    kernel = launch.kernel
    return launch if hasattr(kernel, "params") else replace(launch, kernel=JITFunction(kernel.fn))


def ptx(launches: Sequence[Launch], arch: int, *folders: str) -> list[str]:
    """What launches that compilers have seen compile to. Their kernels may be in modules of these folders."""
    sources = pickle.dumps([specialise(launch) for launch in launches])
    return json.loads(run(PTX, str(arch), base64.b64encode(sources).decode(), *folders))


def environ() -> dict[str, str]:
    """That of processes which compile."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


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
