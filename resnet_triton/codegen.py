"""Compile the kernels for GPUs that are not here, and read the machine code's vital signs.

Every call of a traced model is planned exactly as it would be launched on the target and compiled by Triton and ptxas,
both of which run on a CPU. A row then says whether the tensor cores and the bulk copy engine are used, whether
registers spill, whether shared memory fits, and whether ptxas serialised the asynchronous matrix instructions.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .device import KNOWN
from .kernels.launch import Launch
from .precision import fp32_precision
from .trace import trace

DTYPES = {
    "float16": (torch.float16, "ieee"),
    "bfloat16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float32": (torch.float32, "ieee"),
}
_POINTER = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
_TENSOR_CORE = {"wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma"}


class Specialisation(NamedTuple):
    """What the compiler sees of a launch: hashable, so that equal launches are compiled once, and picklable."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Code:
    """Vital signs of one compiled kernel. Sizes in bytes, `spill_bytes` per thread, stores and loads together."""

    registers: int
    spill_bytes: int
    shared_memory: int
    tensor_core: str  # "wgmma", "tcgen05", "mma" or "none"
    tma: bool
    serialized: bool


@dataclass(frozen=True)
class Row:
    """One layer of a model at one batch size and dtype, compiled for one architecture."""

    arch: str
    layer: str
    operator: str
    batch: int
    dtype: str
    path: str
    tile: str
    split_k: int
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared_memory: int
    tensor_core: str
    tma: bool
    serialized: bool

    def faults(self) -> list[str]:
        """What a shipped configuration must not show."""
        found = []
        if self.spill_bytes and self.arch not in ("sm_100", "sm_120"):  # reported there, not yet held to zero
            found.append(f"spills {self.spill_bytes} bytes")
        if self.serialized:
            found.append("ptxas serialised wgmma")
        if self.shared_memory > KNOWN[int(self.arch.removeprefix("sm_"))].shared_memory:
            found.append(f"needs {self.shared_memory} bytes of shared memory")
        if self.operator in ("conv_bn_relu", "linear") and self.dtype != "float32" and self.tensor_core == "none":
            found.append("no tensor-core instruction")
        return found


def specialise(launch: Launch) -> Specialisation:
    """The compiler's view of a launch, by the rules Triton applies at a real one (pointers are 16-byte aligned)."""
    kernel = launch.kernel
    signature, constants = [], []
    for parameter in kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            constants.append((parameter.name, value))
            signature.append((parameter.name, "constexpr"))
        else:
            signature.append((parameter.name, _type(value)))
    where = (kernel.fn.__module__, kernel.fn.__name__)
    return Specialisation(*where, tuple(signature), tuple(constants), launch.num_warps, launch.num_stages)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return _POINTER[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if value < 2**31 else "i64"
    block = ",".join(map(str, value.block_shape))
    return f"tensordesc<{_POINTER[value.base.dtype][1:]}[{block}]>"


def compile_for(source: Specialisation, arch: int) -> Code:
    """Compile for compute capability `arch` (90 for 9.0) and read the vital signs. Raises what Triton raises."""
    return vital_signs(triton_compile(source, arch), arch)


def vital_signs(compiled: Any, arch: int) -> Code:
    """The vital signs of Triton's compiled kernel."""
    ptx = compiled.asm["ptx"]
    log = _assemble(ptx, arch)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise RuntimeError(f"ptxas printed no resource usage for {compiled.name} on sm_{arch}: {log[:200]!r}")
    return Code(
        registers=int(registers[1]),
        spill_bytes=sum(map(int, spills)),
        shared_memory=compiled.metadata.shared,
        tensor_core=next((name for text, name in _TENSOR_CORE.items() if text in ptx), "none"),
        tma="cp.async.bulk.tensor" in ptx,
        serialized="serializ" in log,
    )


def triton_compile(source: Specialisation, arch: int) -> Any:
    """Triton's compiled kernel; its `asm` holds every stage as text, "ttgir" and "ptx" among them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(source.module), source.kernel)
    signature = dict(source.signature)
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=dict(source.constants), attrs=aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": source.num_warps, "num_stages": source.num_stages, "enable_fp_fusion": True},
    )


def _assemble(ptx: str, arch: int) -> str:
    """ptxas's report on a PTX text: Triton keeps it to itself when all went well."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    if target is None:
        raise RuntimeError(f"no .target in the PTX for sm_{arch}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        options = ["-v", f"--gpu-name={target[1]}", "-o", str(path.with_suffix(".cubin"))]
        ptxas = subprocess.run([get_ptxas(arch).path, *options, str(path)], capture_output=True, text=True, check=True)
        return ptxas.stderr


def rows(
    model: nn.Module, archs: list[int], batches: list[int], dtypes: list[str], *, jobs: int = 2, image: int = 224
) -> Iterator[Row]:
    """Compile every layer of `model` for every combination, each distinct kernel once, in `jobs` processes."""
    planned: list[tuple[dict[str, Any], int, Specialisation]] = []
    for dtype in dtypes:
        torch_dtype, precision = DTYPES[dtype]
        for batch in batches:
            with fp32_precision(precision):
                calls = trace(model, (batch, 3, image, image), torch_dtype)
                for arch in archs:
                    for call in calls:
                        for launch in call.launches(KNOWN[arch]):
                            path = "descriptor" if "x_desc" in launch.arguments else "pointer"
                            about: dict[str, Any] = {
                                "arch": f"sm_{arch}", "layer": call.name or call.operator, "operator": call.operator,
                                "batch": batch, "dtype": dtype, "path": path, "tile": _tile(launch.arguments),
                                "split_k": launch.arguments.get("SPLIT_K", 1),
                                "num_warps": launch.num_warps, "num_stages": launch.num_stages,
                            }  # fmt: skip
                            planned.append((about, arch, specialise(launch)))
    distinct = list(dict.fromkeys((source, arch) for _, arch, source in planned))
    with ProcessPoolExecutor(jobs) as pool:
        compiled = {key: pool.submit(compile_for, *key) for key in distinct}
        for about, arch, source in planned:
            yield Row(**about, **asdict(compiled[source, arch].result()))


def _tile(arguments: dict[str, Any]) -> str:
    names = ("BOX_H", "BOX_W", "BOX_N", "BLOCK", "BLOCK_M", "BLOCK_P", "BLOCK_K", "BLOCK_C")
    return "x".join(str(arguments[name]) for name in names if name in arguments)


def command(archs: list[int], batches: list[int], dtypes: list[str], jobs: int, as_json: bool) -> int:
    """`resnet-triton codegen`: print the table; 1 if any row shows a fault."""
    from . import models

    if unknown := [a for a in archs if a not in KNOWN] + [d for d in dtypes if d not in DTYPES]:
        known = f"architectures {', '.join(map(str, KNOWN))} and dtypes {', '.join(DTYPES)}"
        raise ValueError(f"cannot compile for {unknown[0]!r}, expected {known}")
    import triton

    faulty = 0
    table = []
    for row in rows(models.resnet18().eval(), archs, batches, dtypes, jobs=jobs):
        faults = row.faults()
        faulty += bool(faults)
        if as_json:
            table.append(asdict(row))
            continue
        if not table:
            print(f"Triton {triton.__version__}\n{_HEADER}")
            table.append({})
        print(_line(row, faults), flush=True)
    if as_json:
        json.dump({"triton": triton.__version__, "rows": table}, sys.stdout, indent=1)
        print()
    else:
        print(
            f"{faulty} rows with faults"
            if faulty
            else "no faults: nothing spills, no wgmma is serialised, shared memory fits"
        )
    return 1 if faulty else 0


_HEADER = (
    f"{'arch':7}{'batch':>5}  {'dtype':9}{'layer':20}{'path':11}{'tile':16}{'split':>5}{'warps':>6}{'stages':>7}"
    f"{'regs':>6}{'spill':>6}{'shared':>8}  {'matrix':8}{'copy':5}"
)


def _line(row: Row, faults: list[str]) -> str:
    return (
        f"{row.arch:7}{row.batch:5}  {row.dtype:9}{row.layer:20}{row.path:11}{row.tile:16}{row.split_k:5}"
        f"{row.num_warps:6}{row.num_stages:7}{row.registers:6}{row.spill_bytes:6}{row.shared_memory:8}  "
        f"{row.tensor_core:8}{'tma' if row.tma else '-':5}{'; '.join(faults)}"
    ).rstrip()
