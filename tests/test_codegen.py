"""Machine code of the kernels for GPUs that are not here, at the configurations the heuristics choose.

`make codegen` compiles every combination of architecture and batch size; here are as many as ten minutes allow.
Compilation needs kernels that are not interpreted, so everything here runs in subprocesses without TRITON_INTERPRET.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

RESNET18 = 2 + 16  # launches of a forward: the stem's two, 16 fused convolutions (3 with their shortcut), then the head


def run(script: str, *arguments: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


ROWS = """
import json, sys
from dataclasses import asdict
import resnet_triton
from resnet_triton import codegen
arch, batches, dtypes = json.loads(sys.argv[1])
found = codegen.rows(resnet_triton.resnet18().eval(), [arch], batches, dtypes, jobs=1)
print(json.dumps([{**asdict(row), "faults": row.faults()} for row in found]))
"""


def rows(arch: int, batches: list[int], *dtypes: str) -> list[dict]:
    return json.loads(run(ROWS, json.dumps([arch, batches, dtypes])))


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "batches"), [(80, [1, 32]), (90, [1, 8, 32, 128]), (100, [8, 128])])
def test_float16_is_sound(arch, batches):
    from resnet_triton.ops.linear import FEW_IMAGES

    found = rows(arch, batches, "float16")
    assert len(found) == sum(RESNET18 + (1 if batch <= FEW_IMAGES else 2) for batch in batches)
    assert [r for r in found if r["faults"]] == []
    convolutions = [r for r in found if r["operator"] == "conv_bn_relu"]
    matrix = {80: {"mma"}, 90: {"wgmma"}, 100: {"tcgen05"}}[arch]
    assert {r["tensor_core"] for r in found if r["operator"] == "stem"} == matrix | {"none"}  # packing, pooling: none
    many = [r for r in convolutions if r["batch"] >= 32]  # fewer images may do better through pointers, in small tiles
    assert {r["tensor_core"] for r in many} == matrix
    assert {(r["path"], r["tma"]) for r in many} == {("pointer", False) if arch == 80 else ("descriptor", True)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "tf32", "float32"])
def test_other_dtypes_are_sound_on_hopper(dtype):
    found = rows(90, [32], dtype)
    assert [r for r in found if r["faults"]] == []
    products = {r["tensor_core"] for r in found if r["operator"] in ("conv_bn_relu", "linear")}
    assert products <= ({"none"} if dtype == "float32" else {"wgmma", "mma"}), "IEEE fp32 must not touch tensor cores"


BOUND = """
import json
import torch
import resnet_triton
from resnet_triton import codegen, config, device
from resnet_triton.config.conv import shared_memory
from resnet_triton.trace import trace
model = resnet_triton.resnet18().eval()
found = []
for arch in (80, 90):
    facts = device.KNOWN[arch]
    for batch in (1, 32):
        for call in trace(model, (batch, 3, 224, 224), torch.float16)[::3]:
            if call.operator == "conv_bn_relu":
                code = codegen.compile_for(codegen.specialise(call.launches(facts)[-1]), arch)
                found.append((code.shared_memory, shared_memory(config.lookup(call.shape, facts), call.shape)))
print(json.dumps(found))
"""


def test_shared_memory_bound_holds_and_is_not_wild():
    found = json.loads(run(BOUND))
    assert len(found) >= 20
    for used, bound in found:
        assert used <= bound <= 3 * used + 8192


FAULTS = """
import torch
import resnet_triton
from resnet_triton import codegen, config, device
from resnet_triton.config import ConvConfig
from resnet_triton.trace import trace

calls = trace(resnet_triton.resnet18().eval(), (128, 3, 224, 224), torch.float16)
call = next(c for c in calls if c.name == "layer4.0.conv2")
config.lookup = lambda *a, **k: ConvConfig(256, 128, 64, 8, 3, (1, 2, 128))  # two accumulators that cannot fit
code = codegen.compile_for(codegen.specialise(call.launches(device.KNOWN[90])[-1]), 90)
print(code.spill_bytes)
"""


def test_a_tile_that_spills_is_seen_to_spill():
    assert int(run(FAULTS)) > 0


def test_each_fault_is_named():
    from resnet_triton.codegen import Row

    sound = {
        "arch": "sm_90", "layer": "conv1", "operator": "conv_bn_relu", "batch": 1, "dtype": "float16",
        "path": "descriptor", "tile": "", "split_k": 1,
        "num_warps": 4, "num_stages": 3, "registers": 99, "spill_bytes": 0,
        "shared_memory": 232448, "tensor_core": "wgmma", "tma": True, "serialized": False,
    }  # fmt: skip
    assert Row(**sound).faults() == []
    planted = {
        "spill_bytes": (8, "spills 8 bytes"),
        "serialized": (True, "ptxas serialised wgmma"),
        "shared_memory": (232449, "needs 232449 bytes of shared memory"),
        "tensor_core": ("none", "no tensor-core instruction"),
    }
    for field, (value, fault) in planted.items():
        assert Row(**{**sound, field: value}).faults() == [fault]


def test_unknown_targets_are_named():
    from resnet_triton import codegen

    with pytest.raises(ValueError, match=r"cannot compile for 70, expected architectures 80, 86"):
        codegen.command([70], [1], ["float16"], 1, False)
    with pytest.raises(ValueError, match="cannot compile for 'int8'"):
        codegen.command([90], [1], ["int8"], 1, False)
