"""Occupancy and costs against arithmetic done by hand."""

from dataclasses import replace

import pytest
import torch
from compiling import CODE

pytest.importorskip("triton")

from resnet_triton import resnet18
from resnet_triton.codegen import TARGETS
from resnet_triton.codegen.occupancy import programs_per_sm, waves
from resnet_triton.machine_code import Code
from resnet_triton.ops import OPERATORS
from resnet_triton.ops.trace import trace


def code(registers: int, shared_memory: int) -> Code:
    return replace(CODE, registers=registers, shared_memory=shared_memory)


@pytest.mark.parametrize(
    ("arch", "registers", "shared_memory", "num_warps", "programs"),
    [
        (90, 168, 0, 4, 3),  # 168 * 32 = 5376 a warp: three in each quarter of 16384, so 12 warps
        (90, 168, 0, 8, 1),  # 12 warps hold one program of 8
        (90, 128, 0, 8, 2),
        (90, 168, 192 * 1024, 12, 1),  # what a warp-specialised kernel takes
        (90, 129, 0, 8, 1),  # rounded up to 136: 3 warps a quarter
        (90, 32, 0, 4, 16),  # 64 warps
        (90, 32, 0, 1, 32),  # 32 programs
        (90, 32, 75 * 1024, 4, 3),  # three times 75 + 1 KB are 228
        (90, 32, 76 * 1024, 4, 2),
        (90, 32, 227 * 1024, 4, 1),
        (86, 32, 0, 4, 12),  # 48 warps
        (86, 32, 0, 1, 16),
        (86, 32, 49 * 1024, 4, 2),
        (80, 255, 0, 4, 2),  # 8192 a warp: two a quarter
        (80, 32, 164 * 1024, 4, 0),
    ],
)
def test_programs_a_multiprocessor_holds(arch, registers, shared_memory, num_warps, programs):
    assert programs_per_sm(code(registers, shared_memory), num_warps, TARGETS[arch].known) == programs


def test_waves():
    assert waves(264 * 3, 3, TARGETS[90]) == 264 * 3 / (3 * 132) == 2.0


def test_every_operator_has_a_cost_and_the_model_its_floor():
    assert all("cost" in vars(operator) for operator in OPERATORS.values())
    with torch.device("meta"):
        model = resnet18().eval()
    calls = trace(model, (128, 3, 224, 224), torch.float16)
    total = sum(call.ours.cost().floor(790e12, 4.3e12) for call in calls) * 1e6
    assert 550 < total < 690, "the model's floor at batch 128 on an H200, in microseconds"
