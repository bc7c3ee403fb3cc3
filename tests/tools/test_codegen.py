"""Machine code of the kernels for GPUs that are not here, at the configurations the heuristics choose.

`make codegen` compiles float16 for every architecture and batch size; here are the other dtypes. Compilation
needs kernels that are not interpreted, so everything that compiles runs in subprocesses without TRITON_INTERPRET.
"""

import importlib.metadata
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from compiling import CODE, ROW, TRITON, run

from resnet_triton import resnet18
from resnet_triton.codegen import HELD, TARGETS, CompiledLaunch, budget, report
from resnet_triton.machine_code import read
from resnet_triton.machine_code.ordering import NO_BARRIER_BEFORE_ATOMIC, WEAK_ATOMIC
from resnet_triton.ops.trace import trace
from resnet_triton.tools import cli
from resnet_triton.tools.ask import NEEDS

BUDGET = Path(__file__).parents[2] / "benchmarks" / "results" / "codegen.json"


def layers() -> set[str]:
    with torch.device("meta"):
        model = resnet18().eval()
    return {call.name or call.operator for call in trace(model)}


FAULTS = """
import json, sys
from resnet_triton import codegen, resnet18
found = codegen.rows(resnet18().eval(), [90], [32], [sys.argv[1]], jobs=1)
print(json.dumps([fault for row in found for fault in row.faults()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "tf32", "float32"])
def test_other_dtypes_are_sound_on_hopper(dtype):
    known = ["spills 8 bytes"] if dtype == "float32" and TRITON >= (3, 9) else []  # of the stem
    assert json.loads(run(FAULTS, dtype)) == known


BOUND = """
import json
import torch
import resnet_triton
from resnet_triton import codegen, config
from resnet_triton.config.targets import KNOWN
from resnet_triton.config.conv import shared_memory
from resnet_triton.ops.trace import trace
model = resnet_triton.resnet18().eval()
found = []
for arch in (80, 90):
    facts = KNOWN[arch]
    for batch in (1, 32):
        for call in trace(model, (batch, 3, 224, 224), torch.float16)[::3]:
            if call.operator == "conv_bn_relu":
                code = codegen.compile_for(codegen.specialise(call.launches(facts)[-1]), arch)
                found.append((code.shared_memory, shared_memory(config.lookup(call.shape, facts), call.shape)))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_shared_memory_bound_holds_and_is_not_wild():
    found = json.loads(run(BOUND))
    assert len(found) >= 20
    for used, bound in found:
        assert used <= bound <= 3 * used + 8192


GROUPED = """
import json
import re
import torch
from resnet_triton import codegen
from resnet_triton.config.targets import KNOWN
from resnet_triton.ops import Activation, BatchNorm, ConvBnRelu, Geometry
found = []
for arch, dtype, size, c, width in (
    *((arch, torch.float16, size, 64, 1) for arch in (80, 90) for size in (3, 5, 7)),
    (80, torch.float32, 3, 20, 1), (90, torch.float32, 7, 64, 1),
    *((arch, torch.float16, 3, 6 * width, width) for arch in (80, 90, 120) for width in (4, 24, 232)),
    (100, torch.float16, 3, 24, 4), (90, torch.float32, 3, 24, 4),
):
    with torch.device("meta"):
        x = torch.empty(256, 28, 28, c, dtype=dtype).permute(0, 3, 1, 2)
        w = torch.empty(c, size, size, width, dtype=dtype).permute(0, 3, 1, 2)
        v, geometry = torch.ones(c), Geometry(padding=(size // 2, size // 2), groups=c // width)
        call = ConvBnRelu(x, w, BatchNorm(v, v, v, v, 1e-5), geometry, x, None, Activation("hardswish"))
        (launch,) = call.launches(call.output(), KNOWN[arch])
    assert width > 1 or launch.arguments["ROWS"] == 7
    compiled = codegen.triton_compile(codegen.specialise(launch), arch)
    code = codegen.vital_signs(compiled)
    copies = re.findall(r"cp\\.async\\.c[ag]\\..*, (0x\\w+),", compiled.asm["ptx"])
    wrong = [code.spill_bytes, code.dropped_nans, code.approximations, len(code.hazards), len(code.disorder)]
    found.append([*wrong, code.widest_access, *sorted(set(copies))])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_grouped_convolutions_are_sound():
    """No spills, the arithmetic that was written, pixels 16 bytes at a time, and filters as far as a group goes."""
    sound = [0, 0, 0, 0, 0, 16]
    narrow, wide = [*sound, "0x10", "0x8"], [*sound, "0x10"]
    assert json.loads(run(GROUPED)) == [sound] * 8 + [narrow, wide, wide] * 3 + [narrow, wide]


ROUNDED = """
import json
import torch
from resnet_triton import codegen, resnet18
from resnet_triton.config.targets import KNOWN
from resnet_triton.kernels.stem import pack, packed_shape
from resnet_triton.ops.trace import trace

model, found = resnet18().eval(), {}
for arch, batch, layers in ((80, 1, None), (90, 32, None), (100, 1, 1)):  # the last for its stem
    for call in trace(model, (batch, 3, 224, 224), torch.float16)[:layers]:
        for launch in call.launches(KNOWN[arch]):
            name = f"{arch} {launch.kernel.__name__}"
            if name not in found and "linear_kernel" != launch.kernel.__name__:
                found[name] = codegen.triton_compile(codegen.specialise(launch), arch).asm["ptx"]
with torch.device("meta"):
    x, out = torch.empty(1, 3, 8, 8).half(), torch.empty(packed_shape(1, 8, 8)).half()
    marks = torch.empty(out.shape[:2], dtype=torch.int32)
launch = pack(out=out, marks=marks, x=x, mean=[0.5] * 3, std=[0.5] * 3, block=128, num_warps=4)
found["90 normalising"] = codegen.triton_compile(codegen.specialise(launch), 90).asm["ptx"]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_divisions_and_square_roots_are_correctly_rounded():
    """The interpreter knows no other kind. Approximate ones flush denormal variances to zero."""
    found = json.loads(run(ROUNDED))
    kernels = {name.split()[1] for name in found}
    expected = {"conv_pointer", "stem", "hopper_stem", "global_avg_pool", "avg_pool_linear"}
    assert {f"{name}_kernel" for name in expected} <= kernels
    for name, ptx in found.items():
        assert re.findall(r"\b(?:div\.(?:full|approx)|sqrt\.approx|rsqrt|rcp\.approx)\S*", ptx) == [], name
        if "conv" in name or "stem" in name:
            assert "sqrt.rn.f32" in ptx, name
        if "avg_pool" in name or "normalising" in name:
            assert "div.rn.f32" in ptx, name


def faults(row: CompiledLaunch = ROW, **code: object) -> list[str]:
    return replace(row, code=replace(CODE, **code)).faults()


FAULTY = {
    "spills 8 bytes": {"spill_bytes": 8},
    "ptxas serialised wgmma": {"messages": ("(C7513) ... wgmma.mma_async instructions are serialized",)},
    "needs 232449 bytes of shared memory": {"shared_memory": 232449},
    "2 floating-point atomics": {"float_atomics": 2},
    "no release": {"disorder": ("no release",)},
    "3 maxima or minima that drop NaN": {"dropped_nans": 3},
    "1 approximate or flushing operations": {"approximations": 1},
    "loads 8 bytes at a time in a loop, expected 16": {"narrowest_load": 8},
    "accesses 32 bytes at a time, pointers are aligned to 16": {"widest_store": 32},
    "no TMA": {"tma": False},
    "no wgmma": {"wgmma": 0},
}


def test_each_fault_is_named():
    assert faults() == []
    for fault, code in FAULTY.items():
        assert faults(**code) == [fault]
    assert faults(replace(ROW, channels=3), narrowest_load=2) == []
    wide = replace(ROW, wide_input=True, wide_output=True)
    assert faults(wide, widest_load=16, widest_store=16) == []
    assert faults(wide, widest_load=8, widest_store=16) == ["loads at most 8 bytes at a time, expected 16"]
    assert faults(wide, widest_load=16, widest_store=2) == ["stores at most 2 bytes at a time, expected 16"]
    stem = replace(ROW, filter="7x7")
    assert faults(stem, wgmma=0, tma=False) == []
    assert faults(stem, tensor_core="none") == ["no tensor-core instruction"]
    assert faults(stem, tensor_core="none", dots=0) == [], "a pool needs none"
    assert faults(replace(ROW, batch=8), wgmma=0, tma=False, tensor_core="mma") == []
    assert faults(replace(ROW, dtype="float32")) == ["IEEE fp32 on tensor cores (wgmma)"]
    assert faults(replace(ROW, dtype="float32"), tensor_core="none", wgmma=0, tma=False) == []


def test_each_fault_of_a_kernel_that_starts_before_the_last_has_ended_is_named():
    early = ("w_desc", "mean_ptr", "short_w_desc", "short_bn_bias_ptr")
    row = replace(ROW, kernel="hopper_few_kernel", early=early)
    assert faults(row, wgmma_waits=1) == []
    assert faults(replace(ROW, early=("x_desc", *early, "short_x_desc"))) == [
        "reads x_desc before it waits for the launch before", "reads short_x_desc before it waits for the launch before"
    ]  # fmt: skip
    assert faults(row) == ["2 waits and 0 operands in registers, expected 1 and 0"]
    assert faults(row, wgmma_waits=1, wgmma_registers=8) == ["1 waits and 8 operands in registers, expected 1 and 0"]
    assert faults(row, wgmma_waits=1, messages=("(C7520) Potential",)) == ["(C7520) Potential"]
    assert faults(replace(row, early=()), wgmma_waits=1) == ["waits for the launch before, then asks for filters"]
    assert faults(replace(ROW, kernel="hopper_conv_kernel")) == ["waits for the launch before, then asks for filters"]


def test_each_fault_of_a_kernel_whose_warps_have_different_parts_is_named():
    own = {"specialised": True, "setmaxnreg": True, "warps": 12, "narrowest_load": 4}
    assert faults(**own) == []
    assert faults(**{**own, "setmaxnreg": False}) == [
        "no setmaxnreg: its groups of warps have equal numbers of registers"
    ]
    assert faults(**own, wgmma_registers=8) == ["8 wgmma read their first operand from registers"]
    assert faults(replace(ROW, kernel="hopper_stem_kernel"), **own, wgmma_registers=8) == []
    assert faults(**own, pendings=(0, 0)) == ["every wait for wgmma leaves none running"]
    assert faults(replace(ROW, kernel="hopper_stem_kernel"), **own, pendings=(0, 0)) == []
    assert faults(**own, messages=("(C7506) ... setmaxnreg ignored",)) == ["(C7506) ... setmaxnreg ignored"]
    assert faults(**own, messages=("(C7513) ... are serialized",)) == ["ptxas serialised wgmma"]
    assert faults(replace(ROW, batch=1), **own, wgmma=0, tma=False) == ["no wgmma", "no TMA"]


MEMORY_BOUND = """
import json
import torch
from resnet_triton import ops
from resnet_triton.codegen import compile_for, specialise, target
from resnet_triton.codegen.rows import _compiled, _Planned
from resnet_triton.config.targets import KNOWN

def images(*size):
    return torch.empty(size, dtype=torch.float16).to(memory_format=torch.channels_last)

def launch(call):
    return call.launches(call.output(), KNOWN[90])[0]

def add(*size):
    return launch(ops.AddRelu(images(*size), images(*size)))

launches = {
    "add": add(1, 64, 56, 56), "add, odd": add(1, 63, 57, 57), "add, narrow": add(1, 64, 56, 56),
    "max": launch(ops.MaxPool2d(images(1, 64, 56, 56), (3, 3), (2, 2), (1, 1))),
    "mean": launch(ops.GlobalAvgPool(images(1, 64, 56, 56))),
}
launches["add, narrow"].arguments["VECTOR"] = 1
rows = {}
for name, launch in launches.items():
    planned = _Planned(name, name, 1, "float16", 0, launch, target(90), specialise(launch))
    row = _compiled(planned, compile_for(planned.source, 90))
    rows[name] = [row.wide_input, row.wide_output, row.faults()]
print(json.dumps(rows))
"""


def test_kernels_bound_by_memory_move_16_bytes_at_a_time():
    """Where rows are multiples of that; the results of a mean are too few."""
    narrow = [f"{what} at most 2 bytes at a time, expected 16" for what in ("loads", "stores")]
    assert json.loads(run(MEMORY_BOUND)) == {
        "add": [True, True, []], "add, odd": [False, False, []], "add, narrow": [True, True, narrow],
        "max": [True, True, []], "mean": [True, False, []],
    }  # fmt: skip


LOG = """ptxas info    : 0 bytes gmem
ptxas info    : (C7513) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...
ptxas info    : (C7513) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...
    0 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0020*/              @!P1 HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ;
        /*0030*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ;
        /*0040*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   EXIT ;
        /*0070*/                   NOP;
"""
PTX = """
    st.global.v4.b32 [%rd1], {%r1, %r2, %r3, %r4};
    @%p1 atom.global.gpu.acq_rel.add.u32 %r5, [%rd2], 1;
    red.global.add.f32 [%rd1], %f1;
    atom.global.add.noftz.f16x2 %r1, [%rd1], %r2;
    redux.sync.add.s32 %r1, %r2, 0xffffffff;
    sqrt.approx.ftz.f32 %f1, %f2;
    max.f32 %f1, %f2, %f3;
    min.bf16x2 %r1, %r2, %r3;
    max.NaN.f16x2 %r1, %r2, %r3;
    max.s32 %r1, %r2, %r3;
"""


def test_machine_code_is_read():
    code = read(ttir="%a = tt.dot %b, %c", ttgir="", ptx=PTX, sass=SASS, log=LOG, shared_memory=0)
    assert (code.registers, code.spill_bytes, code.instructions) == (255, 32, 7)
    assert (code.wgmma, code.wgmma_waits, code.wgmma_per_wait) == (3, 2, 1.5)
    assert (code.float_atomics, code.disorder) == (2, (WEAK_ATOMIC, NO_BARRIER_BEFORE_ATOMIC))
    assert (code.dropped_nans, code.approximations, code.widest_load, code.widest_store) == (2, 1, 0, 16)
    assert len(code.messages) == 1
    assert code.messages[0].startswith("(C7513) Potential Performance Loss")
    assert code.serialized
    with pytest.raises(ValueError, match="no 'Used N registers' in ptxas's report"):
        read(ttir="", ttgir="", ptx="", sass="", log="ptxas fatal", shared_memory=0)


def test_what_gluon_leaves_behind_is_read():
    ttgir = """
    ttg.warp_specialize(%a, %b) attributes {requestedRegisters = array<i32: 232, 40>}
    %c = ttng.warp_group_dot %a, %b, %c {isAsync = true}
    %d = ttng.warp_group_dot_wait %c {pendings = 1 : i32}
    """
    ptx = f".reqntid 384\n{PTX}    setmaxnreg.dec.sync.aligned.u32 40;\n"
    sass = SASS.replace("R24, gdesc[UR8], R24", "R24, R64, gdesc[UR8], R24", 1)
    code = read(ttir="", ttgir=ttgir, ptx=ptx, sass=sass, log=LOG, shared_memory=0)
    assert (code.dots, code.pendings, code.warps, code.wgmma, code.wgmma_registers) == (1, (1,), 12, 3, 1)
    assert (code.specialised, code.setmaxnreg) == (True, True)
    plain = read(ttir="%a = tt.dot", ttgir="", ptx=PTX, sass=SASS, log=LOG, shared_memory=0)
    assert not any((plain.warps, plain.wgmma_registers, plain.specialised, plain.setmaxnreg))


RESULT = {"triton": "3.7.1", "ptxas": {"sm_90": "12.8"}, "rows": [ROW.record()]}


def test_a_summary_has_each_target_and_the_budget_of_those_that_are_held(tmp_path):
    launch = ROW.record()
    spills = {"arch": "sm_100", "spill_bytes": 8, "faults": ["spills 8 bytes"]}
    rows = [launch, {**launch, "batch": 1}, {**launch, "num_warps": 8, "batch": 8}, {**launch, **spills}]
    report.write({**RESULT, "rows": rows}, tmp_path / "new")
    text = Path(tmp_path, "new", "codegen.json").read_text()
    found = budget.load(Path(tmp_path, "new", "codegen.json"), "3.7.1")
    hopper = {"arch": "sm_90", "launches": 3, "faulty": 0, "configurations": 2, "spill": 0, "faults": {}}
    counts = {"launches": 1, "faulty": 1, "configurations": 1, "spill": 1}
    assert found["targets"] == [hopper, {"arch": "sm_100", **counts, "faults": {"spills 8 bytes": 1}}]
    assert [(row["arch"], row["batch"]) for row in found["rows"]] == [("sm_90", 32), ("sm_90", 1), ("sm_90", 8)]
    assert sum(line.startswith('{"arch"') for line in text.splitlines()) == 5, "one row a line"
    assert list(budget.regressions(RESULT, found)) == []


def test_a_budget_that_is_none_is_refused_before_the_work(tmp_path):
    path = tmp_path / "budget.json"
    for text, fault in {
        "[]": "expected an object",
        '{"triton": "3.7.1", "rows": [{"arch": "sm_90"}]}': "expected rows with arch, batch",
        '{"triton": "4", "rows": []}': "was made with Triton 4, expected 3.7.1",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=f"budget.json:? {fault}"):
            budget.load(path, "3.7.1")


def test_the_committed_budget_holds_what_make_codegen_compiles():
    allowed = budget.load(BUDGET, json.loads(BUDGET.read_text())["triton"])
    assert {(row["arch"], row["batch"]) for row in allowed["rows"]} == set(
        itertools.product(HELD, (1, 8, 32, 128, 256))
    )
    assert {row["layer"] for row in allowed["rows"]} == layers()
    assert {entry["arch"] for entry in allowed["targets"]} == {where.name for where in TARGETS.values()}
    assert not any(entry["faulty"] for entry in allowed["targets"] if entry["arch"] in HELD)


def test_the_budget_catches_what_got_worse():
    def worse(**changes: object) -> list[str]:
        return list(budget.regressions({**RESULT, "rows": [{**ROW.record(), **changes}]}, RESULT))

    where = "sm_90 batch 32 float16 layer1.0.conv1 launch 0 (k)"
    assert worse() == worse(registers=107, instructions=1050, occupancy=0.75, wgmma_per_wait=5.0) == []
    assert worse(registers=108) == [f"{where}: 108 registers, expected at most 107"]
    assert worse(instructions=1051) == [f"{where}: 1051 instructions, expected at most 1050"]
    assert worse(occupancy=0.25) == [f"{where}: occupancy 0.25, expected at least 0.5"]
    assert worse(wgmma_per_wait=None) == [f"{where}: wgmma_per_wait None, expected at least 4.0"]
    assert worse(layer="layer9") == ["sm_90 batch 32 float16 layer9 launch 0 (k): not in the budget"]
    rows = [ROW.record(), {**ROW.record(), "batch": 64}, {**ROW.record(), "arch": "sm_100", "registers": 255}]
    assert list(budget.regressions({**RESULT, "rows": rows}, RESULT)) == [], "not held"


def test_the_command_fails_on_a_fault_and_on_a_broken_budget(monkeypatch, tmp_path, capsys):
    found = {**RESULT, "triton": importlib.metadata.version("triton")}
    monkeypatch.setattr(report, "compile_all", lambda *_: found)
    monkeypatch.setitem(NEEDS, "codegen", ())  # here kernels are interpreted
    assert cli.main(["codegen", "--out", str(tmp_path)]) == 0
    committed = str(tmp_path / "codegen.json")
    assert cli.main(["codegen", "--json", "--budget", committed]) == 0
    found["rows"] = [{**ROW.record(), "registers": 200, "faults": ["spills 8 bytes"]}]
    capsys.readouterr()
    assert cli.main(["codegen", "--budget", committed]) == 1
    errors = capsys.readouterr().err
    assert "spills 8 bytes" in errors
    assert "200 registers, expected at most 107" in errors
    found["rows"] = [{**found["rows"][0], "arch": "sm_100"}]
    assert cli.main(["codegen"]) == 0, "reported only"
