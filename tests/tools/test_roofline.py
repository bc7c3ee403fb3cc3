"""Predictions against arithmetic done by hand."""

import json
from dataclasses import replace

import pytest
import torch
from compiling import CODE
from compiling import run as run_compiled

pytest.importorskip("triton")

from resnet_triton import resnet18
from resnet_triton.codegen import TARGETS
from resnet_triton.codegen.roofline import floor_us, programs_per_sm, split_k_tail_us, wave_loss, waves
from resnet_triton.codegen.traffic import loaded_bytes
from resnet_triton.kernels.cost import Cost
from resnet_triton.kernels.launch import Launch
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
        ("gfx942", 126, 0, 4, 4),  # LLVM prints an occupancy of 4 waves a SIMD
        ("gfx942", 132, 0, 4, 3),  # and here of 3
        ("gfx942", 32, 32 * 1024, 4, 2),
    ],
)
def test_programs_a_multiprocessor_holds(arch, registers, shared_memory, num_warps, programs):
    assert programs_per_sm(code(registers, shared_memory), num_warps, TARGETS[arch].sm) == programs


def test_waves_and_what_they_lose():
    launch = Launch(None, (264, 3), {}, num_warps=4)
    assert waves(launch, code(168, 0), TARGETS[90]) == 264 * 3 / (3 * 132) == 2.0
    assert wave_loss(2.0) == 0.0
    assert wave_loss(0.25) == 0.75
    assert wave_loss(2.2) == pytest.approx(0.8 / 3)
    assert wave_loss(0.0) == 0.0


def test_split_k_tail():
    workspace = torch.empty(8 * 4 * 64 * 64, dtype=torch.float32, device="meta")  # 8 tiles, 4 shares of 16 KB
    launch = Launch(None, (8, 4), {"partials_ptr": workspace})
    assert split_k_tail_us(launch, 4, 132e9, 132) == pytest.approx(1.5 + 5 * 16384 / 1e9 * 1e6)
    assert split_k_tail_us(launch, 1, None, 132) == 0.0
    assert split_k_tail_us(launch, 4, None, 132) is None


def test_floor():
    assert floor_us(Cost(2_000_000, 10), 1e12, 1e9) == pytest.approx(2.0)
    assert floor_us(Cost(0, 3000), None, 1e9) == pytest.approx(3.0)
    assert floor_us(Cost(1, 3000), None, 1e9) is None
    assert floor_us(Cost(1, 3000), 1e12, None) is None


def test_every_operator_has_a_cost_and_the_model_its_floor():
    assert all("cost" in vars(operator) for operator in OPERATORS.values())
    with torch.device("meta"):
        model = resnet18().eval()
    calls = trace(model, (128, 3, 224, 224), torch.float16)
    total = sum(floor_us(call.ours.cost(), 790e12, 4.3e12) for call in calls)
    assert 550 < total < 690, "the model's floor at batch 128 on an H200, in microseconds"


TTIR = """
module {
  tt.func public @kernel(%x_ptr: !tt.ptr<f16>, %PIXELS: i32) attributes {noinline = false} {
    %c0_i32 = arith.constant 0 : i32
    %c1_i32 = arith.constant 1 : i32
    %c64_i32 = arith.constant 64 : i32
    %pid = tt.get_program_id x : i32
    %grid = tt.get_num_programs x : i32
    %last = arith.cmpi eq, %pid, %c0_i32 : i32
    %mean = tt.load %a, %m, %z : tensor<128x!tt.ptr<f32>>
    %tiles = arith.muli %PIXELS, %c64_i32 : i32
    scf.for %tile = %pid to %tiles step %grid  : i32 {
      %acc = scf.for %start = %c0_i32 to %PIXELS step %c64_i32 iter_args(%b = %z) -> (tensor<64x64xf32>)  : i32 {
        %b2 = tt.descriptor_load %x_desc[%c0_i32] : !tt.tensordesc<tensor<1x2x8x64xbf16>> -> tensor<1x2x8x64xbf16>
      } {tt.num_stages = 1 : i32}
    }
    %1 = scf.if %last -> (tensor<64x64xf32>) {
      %c = tt.load %p cacheModifier = cg : tensor<64x64x!tt.ptr<f32>>
    } else {
      %d = tt.load %q : !tt.ptr<i32>
    }
    tt.return
  } loc(#loc)
} loc(#loc)
"""


def test_loads_are_counted_as_often_as_their_loops_run():
    mean, inner, branch, scalar = 128 * 4, 2 * 8 * 64 * 2, 64 * 64 * 4, 4
    tiles, steps = 100 * 64, 2  # 100 pixels by 64 at a time
    expected = 10 * mean + tiles * steps * inner + 10 * (branch + scalar)
    assert loaded_bytes(TTIR, {"PIXELS": 100}, (10,)) == expected
    assert loaded_bytes(TTIR, {}, (10,)) is None, "a loop of unknown length"
    split = 10 * mean + tiles * steps * inner + 10 * (branch + scalar) / 2
    assert loaded_bytes(TTIR, {"PIXELS": 100}, (10,), split=2) == split


TRAFFIC = """
import json
import torch
import resnet_triton
from resnet_triton import codegen, config
from resnet_triton.config import device
from resnet_triton.codegen.traffic import loaded_bytes
from resnet_triton.ops.trace import trace
found = []
for arch in (80, 90):
    calls = trace(resnet_triton.resnet18().eval(), (32, 3, 224, 224), torch.float16)
    call = next(c for c in calls if c.name == "layer2.1.conv1")
    config.lookup = lambda *a, **k: config.ConvConfig(64, 128, 64, 4, 3, (1, 2, 32) if arch == 90 else None, swap=True)
    launch = call.launches(device.KNOWN[arch])[-1]
    ttir = codegen.triton_compile(codegen.specialise(launch), arch).asm["ttir"]
    found.append(loaded_bytes(ttir, {n: v for n, v in launch.arguments.items() if isinstance(v, int)}, launch.grid))
print(json.dumps(found))
"""


def test_traffic_of_a_convolution():
    steps, programs = 9 * 2, 32 * 28 * 28 // 64  # 128 channels, all of which a tile has
    per_program = steps * (64 + 128) * 64 * 2 + 4 * 128 * 2  # and batch norm's four vectors
    assert json.loads(run_compiled(TRAFFIC)) == [programs * per_program] * 2
