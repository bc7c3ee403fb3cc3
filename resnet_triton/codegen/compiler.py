"""Compile a launch for a GPU that is not here: Triton, then ptxas and nvdisasm, all on a CPU."""

from __future__ import annotations

import importlib
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.launch import Launch
from ..machine_code import Code, read
from ..machine_code.verdict import disassemble

_POINTER = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip


class Specialisation(NamedTuple):
    """What the compiler sees of a launch: hashable, so that equal launches are compiled once, and picklable."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    aligned: bool = True  # pointers to 16 bytes; else to their elements alone


def specialise(launch: Launch) -> Specialisation:
    """The compiler's view of a launch, by the rules Triton applies at a real one whose pointers are 16-byte aligned."""
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
    layout = f",{value.layout!r}" if hasattr(value, "layout") else ""  # Gluon's
    return f"tensordesc<{_POINTER[value.base.dtype][1:]}[{block}]{layout}>"


def compile_for(source: Specialisation, arch: int) -> Code:
    """Compile for a compute capability (90 for sm_90) and read the vital signs. Raises what Triton raises."""
    return vital_signs(triton_compile(source, arch))


def vital_signs(compiled: Any) -> Code:
    """The vital signs of Triton's compiled kernel."""
    texts, shared_memory = compiled.asm, compiled.metadata.shared
    ptx = texts["ptx"]
    log, sass = _assemble(ptx, compiled.metadata.target.arch)
    return read(
        ttir=texts.get("ttir", ""), ttgir=texts["ttgir"], ptx=ptx, sass=sass, log=log, shared_memory=shared_memory
    )


def triton_compile(source: Specialisation, arch: int) -> Any:
    """Triton's compiled kernel; its `asm` holds every stage as text, "ttgir" and "ptx" among them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = getattr(importlib.import_module(source.module), source.kernel)
    language = GluonASTSource if kernel.is_gluon() else ASTSource
    signature = dict(source.signature)
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*") and source.aligned]
    attrs = {(i,): [["tt.divisibility", 16]] for i in pointers}
    return triton.compile(
        language(fn=kernel, signature=signature, constexprs=dict(source.constants), attrs=attrs),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": source.num_warps, "num_stages": source.num_stages, "enable_fp_fusion": True},
    )


def _assemble(ptx: str, arch: int) -> tuple[str, str]:
    """ptxas's report on a PTX text, which Triton keeps to itself when all went well, and the machine code as text."""
    from triton.backends.nvidia.compiler import get_ptxas

    name = next((line.split()[1] for line in ptx.splitlines() if line.startswith(".target")), None)
    if name is None:
        raise ValueError(f"no .target in the PTX for sm_{arch}")
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = get_ptxas(arch).path, "-v", f"--gpu-name={name.rstrip(',')}", "-o", binary, source
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return report, disassemble(binary.read_bytes())
