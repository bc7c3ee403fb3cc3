"""The kernel in Gluon, which no interpreter runs: its answers by a stand-in (`gluon.py`) and on a GPU (`test_gpu.py`),
its machine code here."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any
from unittest import mock

import gluon
import pytest
import torch
import torch.nn.functional as F
from compiling import run as run_compiled
from exact import assert_exact, conv_call, conv_reference, dtype_id, generator, rounded
from test_beyond_int32 import conv, filled, filters, pixels

from resnet_triton import config, ops
from resnet_triton.config import ConvConfig, ConvShape, conv_heuristic, is_legal
from resnet_triton.config.candidates import candidates
from resnet_triton.config.device import KNOWN
from resnet_triton.kernels import conv_halo
from resnet_triton.kernels.launch import Launch

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
        assert not re.search(r"\b(div\.(full|approx)|sqrt\.approx|rsqrt|rcp\.approx)", ptx)
        assert len(re.findall(r"wgmma\.mma_async", ptx)) == 36, "nine taps of four steps"
        assert len(re.findall(r"wgmma\.wait_group", ptx)) == 1
        copies = r"cp\.async\.bulk\.tensor[.\w]*?\.(?:shared|global)\S*"
        ordered = re.findall(rf"wgmma\.mma_async|bar\.sync|{copies}", ptx)
        turn = ordered[ordered.index("wgmma.mma_async") :]
        products = [i for i, what in enumerate(turn) if what.startswith("wgmma.mma")]
        loads = [i for i, what in enumerate(turn) if ".shared::" in what and "mbarrier" in what]
        assert len(loads) == 3
        assert any(what == "bar.sync" for what in turn[products[-1] : loads[0]]), "no warp may still read the slot"


HALVES = [torch.float16, torch.bfloat16]


def planned(call: ops.ConvCall, out: torch.Tensor, strip: int, block_m: int = 32) -> Launch:
    chosen = replace(WALK, block_m=block_m, box=(1, 1, block_m), num_warps=4, strip=strip)
    with mock.patch.object(config, "lookup", return_value=chosen):
        (launch,) = ops.OPERATORS["conv_bn_relu"].plan(out, *call)
    assert launch.kernel is conv_halo.conv_halo_kernel
    return launch


def walk(shape: ConvShape, strip: int, stages: int = 2, **options: Any) -> None:
    """Exact on exact data, as Gluon's stand-in runs it; what surrounds the output stays as it is."""
    call = conv_call(generator(torch.device("cpu"), strip), shape, **options)
    like = ops.OPERATORS["conv_bn_relu"].output(*call)
    buffer = torch.full((like.numel() + 2**18,), float("nan"), dtype=like.dtype)
    out = buffer.as_strided(like.shape, like.stride(), 2**17)
    launch = planned(call, out, strip)
    gluon.run(replace(launch, arguments=launch.arguments | {"STAGES": stages}))
    assert_exact(out, rounded(conv_reference(call), out.dtype))
    assert buffer[: 2**17].isnan().all()
    assert buffer[-(2**17) :].isnan().all()


# The GPU's kernel has 64 channels in and out. Here they differ, so that one cannot pass for the other.
@pytest.mark.parametrize("strip", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_a_stand_in_gives_the_right_answer(strip, dtype):
    walk(ConvShape(35, 64, 5, 3, 128, 3, 3, padding=(1, 1), residual=True, dtype=dtype_id(dtype)), strip)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_stand_in_without_residual_or_relu(stages):
    shape = ConvShape(34, 128, 4, 5, 64, 3, 3, padding=(1, 1))
    walk(shape, 3, stages, relu=False)
    walk(shape, 4, stages, affine=False)


def test_a_stand_in_normalises_in_fp32():
    """Statistics in bfloat16, whose own roots and quotients would be wrong in the third digit."""
    shape = ConvShape(2, 64, 3, 3, 128, 3, 3, padding=(1, 1))
    call = conv_call(generator(torch.device("cpu"), 0), shape, bn_dtype=torch.bfloat16)._replace(eps=1e-3)
    for t, scale in ((call.mean, 1 / 3), (call.var, 3.0), (call.gamma, 1 / 3), (call.beta, 1 / 3)):
        t.mul_(scale)
    call.x[0, 5, 1, 1] = float("nan")
    out = ops.OPERATORS["conv_bn_relu"].output(*call)
    gluon.run(planned(call, out, 3))
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1], conv_reference(call)[1].half(), rtol=2**-10, atol=1e-6)


def test_a_stand_in_keeps_the_sign_of_zero():
    call = conv_call(generator(torch.device("cpu"), 0), ConvShape(2, 64, 3, 3, 128, 3, 3, padding=(1, 1)))
    minus = torch.full_like(call.mean, -0.0)
    call = call._replace(x=call.x * 0, mean=minus, var=minus + 1, gamma=minus - 1, beta=minus)
    out = ops.OPERATORS["conv_bn_relu"].output(*call)
    gluon.run(planned(call, out, 3))
    assert out.eq(0).all()
    assert out.signbit().all()


def test_a_stand_in_counts_beyond_int32():
    n = 2**22
    x, out, weight = pixels(n, 128, 3, 3), pixels(n, 64, 3, 3), filters(64, 128, 3)
    end, residual = filled(x[-32:]), pixels(n, 64, 3, 3)
    expected = F.conv2d(end.double(), weight.double(), padding=1) + filled(residual[-32:]).double()
    launch = conv(out, x, weight, residual=residual, box=(1, 1, 32), block_m=32, strip=3)
    gluon.run(launch, [launch.grid[0] - 1])
    assert_exact(out[-32:, :, :, -1], expected[..., -1].half())


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
    for change in (few, {"num_warps": 4}, {"box": (1, 2, 64)}, {"split_k": 3}, {"strip": -1}):
        assert not is_legal(replace(WALK, **change), LAYER1, KNOWN[90]), change


def test_the_tuner_may_choose_it_and_the_heuristic_never_does():
    assert any(config.strip for config in candidates(LAYER1, KNOWN[90], 16))
    assert all(not conv_heuristic(replace(LAYER1, n=n), KNOWN[90]).strip for n in (1, 8, 128, 256))
