"""The kernel in Gluon, which no interpreter runs: its machine code here, its answers on a GPU (`test_gpu.py`)."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from test_codegen import run as run_compiled

from resnet_triton.config import ConvConfig, ConvShape, conv_heuristic, is_legal
from resnet_triton.config.candidates import candidates
from resnet_triton.device import KNOWN

LAYER1 = ConvShape(128, 64, 56, 56, 64, 3, 3, padding=(1, 1), residual=True)
WALK = ConvConfig(128, 64, 64, 8, 2, (1, 1, 128), strip=14)

COMPILE = """
import json
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from resnet_triton.codegen import vital_signs
from resnet_triton.config import ConvConfig, ConvShape
from resnet_triton.tuner import trial

def kind(value):
    if isinstance(value, torch.Tensor):
        return {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[value.dtype]
    if isinstance(value, (int, float)):
        return "i32" if isinstance(value, int) else "fp32"
    sizes = ",".join(map(str, value.block_shape))
    return f"tensordesc<{kind(value.base)[1:]}[{sizes}],{value.layout!r}>"

found = []
for dtype, rows, residual in (("float16", 128, True), ("bfloat16", 128, False), ("float16", 64, True)):
    shape = ConvShape(200, 64, 20, 20, 64, 3, 3, padding=(1, 1), dtype=dtype, residual=residual)
    call = trial.abstract_call(shape)
    out = torch.empty_like(call.x)
    chosen = ConvConfig(rows, 64, 64, rows // 16, 2, (1, 1, rows), strip=7)
    (launch,) = trial.plan(call, out, chosen, "ieee")
    assert launch.grid == (3 * 20 * -(-200 // rows),) and not launch.dependent
    signature, constants = {}, {}
    for i, p in enumerate(launch.kernel.params):
        value = launch.arguments[p.name]
        fixed = p.is_constexpr or value is None
        signature[p.name] = "constexpr" if fixed else kind(value)
        if fixed:
            constants[(i,)] = value
    source = GluonASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs={})
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": launch.num_warps})
    code = vital_signs(compiled)
    faults = [*code.disorder, code.spill_bytes, code.serialized, code.dropped_nans, code.approximations]
    found.append([any(faults) and faults, code.registers, code.shared_memory, compiled.asm["ptx"]])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_machine_code():
    for faults, registers, shared, ptx in json.loads(run_compiled(COMPILE)):
        assert not faults
        assert registers <= 255
        assert shared <= KNOWN[90].shared_memory
        assert len(re.findall(r"wgmma\.mma_async", ptx)) == 36, "nine taps of four steps"
        assert len(re.findall(r"wgmma\.wait_group", ptx)) == 1
        copies = r"cp\.async\.bulk\.tensor[.\w]*?\.(?:shared|global)\S*"
        ordered = re.findall(rf"wgmma\.mma_async|bar\.sync|{copies}", ptx)
        turn = ordered[ordered.index("wgmma.mma_async") :]
        products = [i for i, what in enumerate(turn) if what.startswith("wgmma.mma")]
        loads = [i for i, what in enumerate(turn) if ".shared::" in what and "mbarrier" in what]
        assert len(loads) == 3
        assert any(what == "bar.sync" for what in turn[products[-1] : loads[0]]), "no warp may still read the slot"


def test_only_what_it_is_written_for_is_legal():
    assert is_legal(WALK, LAYER1, KNOWN[90])
    for shape in (
        replace(LAYER1, c=32), replace(LAYER1, k=128), replace(LAYER1, r=1, s=1, padding=(0, 0)),
        replace(LAYER1, dtype="float32", precision="tf32"), replace(LAYER1, shortcut_c=64, residual=False),
    ):  # fmt: skip
        assert not is_legal(WALK, shape, KNOWN[90]), shape
    for arch in (80, 100, 120):
        assert not is_legal(WALK, LAYER1, KNOWN[arch])
    assert is_legal(replace(WALK, block_m=64, box=(1, 1, 64), num_warps=4), LAYER1, KNOWN[90])
    few = {"block_m": 32, "box": (1, 1, 32), "num_warps": 2}  # a warpgroup has four warps
    for change in (few, {"num_warps": 4}, {"box": (1, 2, 64)}, {"columns": 2}, {"split_k": 3}, {"strip": -1}):
        assert not is_legal(replace(WALK, **change), LAYER1, KNOWN[90]), change


def test_the_tuner_may_choose_it_and_the_heuristic_never_does():
    assert any(config.strip for config in candidates(LAYER1, KNOWN[90], 16))
    assert all(not conv_heuristic(replace(LAYER1, n=n), KNOWN[90]).strip for n in (1, 8, 128, 256))
