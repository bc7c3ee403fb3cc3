"""Registers of asynchronous products: real machine code that was wrong, faults planted in such that is right.

`machine_code/` holds main loops as nvdisasm wrote them for sm_90, with the exits that they jump to. The wrong ones gave
wrong answers on an H200; the right one is the same kernel by a later Triton.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from compiling import CODE as COMPILED
from compiling import ROW, TRITON, run

from resnet_triton.machine_code.products import follow

pytest.importorskip("triton")

CODE = {path.stem: path.read_text() for path in Path(__file__).with_name("machine_code").glob("*.sass")}
RIGHT = CODE["right_triton_3.9.0"]
LATE = "which is not waited for"


def hazards(text: str) -> tuple[str, ...]:
    """What is said of the right loop after a change, which has to be one."""
    assert text != RIGHT
    return follow(text, expected=True).hazards


def changed(old: str, new: str, count: int = 1) -> str:
    assert RIGHT.count(old) >= count, f"{old!r} stands {RIGHT.count(old)} times in the loop"
    return RIGHT.replace(old, new, count)


def test_what_was_wrong_on_a_gpu_is_found():
    """A load of the next turn's pixels into registers of a product, and the parity of a barrier."""
    assert follow(RIGHT, expected=True) == (8, ())
    products, found = follow(CODE["wrong_triton_3.7.1"], expected=True)
    assert products == 8
    assert f"LDSM.16.M88.4 at 1bc0 overwrites R180 of HGMMA.64x128x16.F32 at 1ed0, {LATE}" in found
    assert len(found) == 4
    products, found = follow(CODE["wrong_triton_3.6.0"], expected=True)
    assert products == 4
    assert f"IMAD.U32 at 1e80 overwrites R56 of HGMMA.64x64x16.F32 at 2380, {LATE}" in found
    assert f"LDSM.16.M88.4 at 1f90 overwrites R56 of HGMMA.64x64x16.F32 at 2380, {LATE}" in found
    assert len(found) == 5


def test_a_renamed_target():
    load = "LDSM.16.M88.4 R180, [R245+UR6+0xc000]"
    assert hazards(changed(load, load.replace("R180", "R164"))) == (
        f"LDSM.16.M88.4 at 1aa0 overwrites R164 of HGMMA.64x128x16.F32 at 1e80, {LATE}",
    )
    (found,) = {line.partition(" of ")[0] for line in hazards(changed(load, load.replace("R180", "R96")))}
    assert found == "LDSM.16.M88.4 at 1aa0 touches the sums"


def test_a_deleted_or_weakened_wait():
    wait = r"\n.*WARPGROUP.DEPBAR.LE gsb0, 0x1 ;"
    first, last = re.finditer(wait, RIGHT)
    deleted = RIGHT[: last.start()] + RIGHT[last.end() :]
    assert any("overwrites" in line for line in hazards(deleted))
    for place in (first, last):
        for weaker in ("WARPGROUP.DEPBAR.LE gsb0, 0x2", "@P0 WARPGROUP.DEPBAR.LE gsb0, 0x1"):
            new = place[0].replace("WARPGROUP.DEPBAR.LE gsb0, 0x1", weaker)
            found = hazards(RIGHT[: place.start()] + new + RIGHT[place.end() :])
            assert any("overwrites" in line for line in found), (place, weaker)
    end = "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
    use = "\n        /*2318*/                   FMUL R5, R24, R6 ;"
    assert hazards(changed(end, end + use)) == ()
    assert any("FMUL at 2318 touches the sums" in line for line in hazards(changed(end, "NOP ;" + use)))


def test_only_the_groups_own_end_counts():
    """A group that is never closed is covered by no wait; a later one closes it, too."""
    first, last = (match.start() for match in re.finditer(r", gsb0 ;", RIGHT))
    opened = RIGHT[:last] + " ;" + RIGHT[last + len(", gsb0 ;") :]
    assert any("at 1e80" in line for line in hazards(opened))
    joined = RIGHT[:first] + " ;" + RIGHT[first + len(", gsb0 ;") :]
    assert any("overwrites R180 of" in line for line in hazards(joined)), "the wait leaves the whole turn running"


def test_a_product_beside_a_running_one():
    second = "HGMMA.64x128x16.F32 R88, R168, gdesc[UR4], R88"
    alike = "HGMMA.64x128x16.F32 R92, R168, gdesc[UR4], R92"
    assert any("adds to registers of" in line for line in hazards(changed(second, alike)))
    over = "HGMMA.64x128x16.F32 R164, R232, gdesc[UR4], R164"
    assert any("adds to registers of HGMMA.64x128x16.F32 at 1e80" in line for line in hazards(changed(second, over)))
    sums = "HGMMA.64x128x16.F32 R24, R88, gdesc[UR4], R24"
    assert any("reads the sums of" in line for line in hazards(changed(second, sums)))


def test_what_is_not_known_fails_by_name():
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;"
    new = "\n        /*1d28*/                   {} ;\n        /*1d30*/                   "
    for unknown in ("FROB R2, R3", "BRX R2", "RET.REL.NODEC R2 `(kernel)"):
        name = unknown.split()[0]
        found = hazards(changed(wait, new.format(unknown) + wait))
        assert any(line.startswith(f"{name} at 1d28 is unknown, and HGMMA") for line in found), unknown
    assert hazards(changed(wait, new.format("UFROB UR2, UR3") + wait)) == (), "registers of a warp are no product's"
    odd_ones = {
        "{ MOV R56, R2": "an instruction of another form",
        "BRA 0x9000": "a jump to an unknown place",
        "BRA.U UP0, 0x9000": "a jump to an unknown place",
    }
    for odd, name in odd_ones.items():
        found = hazards(changed(wait, new.replace("{}", odd) + wait))
        assert any(line.startswith(f"{name} at 1d28 is unknown, and HGMMA") for line in found), odd
    product = "HGMMA.64x128x16.F32 R88, R180, gdesc[UR16], R88"
    assert hazards(changed(product, product.replace("R88", "RZ").replace("RZ,", "R88,", 1))) == (), "sums from zero"
    added = product.replace("gdesc[UR16], R88", "gdesc[UR16], R24")
    for form in (
        added,
        product.replace("F32", "F16"),
        product.replace("GMMA", "GMMA.SP"),
        product.replace("R180", "R182"),
    ):
        assert any("is a product of an unknown form" in line for line in hazards(changed(product, form))), form


def test_every_path_is_followed():
    """Past the wait by a jump, conditional or not, and through what looks like a subroutine."""
    wait = "        /*21e0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;\n"
    skipped = ".L_skip:\n        /*21f0*/"
    for jump in ("@P0 BRA `(.L_skip)", "BRA `(.L_skip)", "BRA !UP0, `(.L_skip)", "BRA.U UP1, `(.L_skip)"):
        text = changed(wait, f"        /*21d8*/                   {jump} ;\n{wait}").replace(
            "        /*21f0*/", skipped
        )
        assert any("overwrites" in line for line in follow(text, expected=True).hazards), jump
    called = changed(wait, "        /*21d8*/                   CALL.REL.NOINC `(.L_late) ;\n" + wait)
    late = ".L_late:\n        /*5000*/                   MOV R164, R2 ;\n"
    assert any("MOV at 5000 overwrites R164" in line for line in follow(called + late, expected=True).hazards)
    with pytest.raises(ValueError, match=r"a jump to \.L_nowhere, which is not there"):
        follow(changed("`(.L_x_5)", "`(.L_nowhere)"), expected=True)


WAIT = "        /*21e0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;\n"


def before_the_wait(*lines: str, behind: str = "") -> tuple[str, ...]:
    """Hazards of the right loop with instructions between products and a wait, and others behind its end."""
    assert RIGHT.count(WAIT) == 1, "the address of the loop's first wait"
    code = "".join(
        line if line.startswith(".L") else f"        /*{0x9000 + 16 * i:x}*/                   {line} ;\n"
        for i, line in enumerate(lines)
    )
    return follow(RIGHT.replace(WAIT, code + WAIT) + behind, expected=True).hazards


def names(hazards: tuple[str, ...]) -> set[str]:
    assert all("is unknown, and HGMMA" in line for line in hazards)
    return {line.split()[0] for line in hazards}


CALL = "CALL.REL.NOINC `($root)"
ROOT = """$root:
        /*a000*/                   MOV R5, R4 ;
        /*a010*/                   RET.REL.NODEC R2 `(kernel) ;
"""


def test_calls_are_followed_if_they_return_to_where_they_stand():
    call = ("MOV R2, 0x9020", CALL, "NOP")
    assert before_the_wait(*call, behind=ROOT) == ()
    written = before_the_wait(*call, behind=ROOT.replace("R5, R4", "R164, R4"))
    assert any("MOV at a000 overwrites R164 of HGMMA" in line for line in written), "in the subroutine"
    written = before_the_wait(*call[:2], "MOV R164, R4", behind=ROOT)
    assert any("MOV at 9020 overwrites R164 of HGMMA" in line for line in written), "behind it"
    for wrong in (
        ("MOV R2, 0x9030", CALL, "NOP"),
        ("@P0 MOV R2, 0x9020", CALL, "NOP"),
        ("IMAD R2, R2, R2, R2", CALL, "NOP"),
        ("MOV R2, 0x9030", ".L_other:\n", CALL, "NOP"),
        ("MOV R2, 0x9020", CALL.replace("CALL.REL.NOINC", "CALL.ABS"), "NOP"),
    ):
        assert "CALL" in {name[:4] for name in names(before_the_wait(*wrong, behind=ROOT))}, wrong
    assert names(before_the_wait("RET.REL.NODEC R2 `(kernel)")) == {"RET.REL.NODEC"}, "nobody called"


def test_threads_that_part_are_followed_if_they_meet_at_the_next_instruction():
    part, meet, there = "BSSY B0, `(.L_there)", "BSYNC B0", ".L_there:\n"
    assert before_the_wait(part, "MOV R2, R3", meet, there) == ()
    for wrong in (
        (meet,),
        (part, meet, "NOP", there),
        (part.replace("B0", "B1"), meet, there),
        (part, "@P0 BRA `(.L_past)", part.replace("there", "past"), ".L_past:\n", meet, there),
    ):
        assert names(before_the_wait(*wrong)) == {"BSYNC"}, wrong


def test_a_product_beside_what_a_batch_norm_does():
    """Conversions write registers; setmaxnreg gives them away."""
    assert before_the_wait("I2F.RP R5, R4", "F2I.U32 R5, R4", "FCHK P0, R5, R4", "FMNMX R5, R4, R3, PT") == ()
    for name in ("I2F.RP", "F2I.U32", "FMNMX", "LDL"):
        assert any(f"{name} at 9000 overwrites R164" in line for line in before_the_wait(f"{name} R164, R4")), name
    assert names(before_the_wait("USETMAXREG.DEALLOC.CTAPOOL 0x28")) == {"USETMAXREG.DEALLOC.CTAPOOL"}


def test_hazards_are_faults():
    assert replace(ROW, code=replace(COMPILED, hazards=("one", "another"))).faults() == ["one", "another"]
    lost = ("no product to follow in the machine code, expected those of the PTX",)
    assert follow("", expected=True) == (0, lost)
    assert follow("", expected=False) == (0, ())


REGISTERS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from resnet_triton import codegen

SIZES = {"STEPS": 9, "BLOCK": 128}
signature = {"x_desc": "tensordesc<fp16[1,4,32,64]>", "w_desc": "tensordesc<fp16[1,128,64]>", "y_ptr": "*fp16"}
found = {}
for kernel in ("pixels_first", "filters_first"):
    names = (*signature.items(), *((name, "constexpr") for name in SIZES))
    code = codegen.compile_for(codegen.Specialisation("boxes", kernel, names, tuple(SIZES.items()), 4, 3), 90)
    found[kernel] = code.wgmma, code.hazards
print(json.dumps(found))
"""
BOXES = """
import triton
import triton.language as tl

@triton.jit
def pixels_first(x_desc, w_desc, y_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i in range(STEPS):
        x = x_desc.load([i, i, 0, 0]).reshape(BLOCK, 64)
        acc = tl.dot(x, w_desc.load([i, 0, 0]).reshape(BLOCK, 64).T, acc)
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs[:, None] * BLOCK + offs[None, :], acc.to(tl.float16))

@triton.jit
def filters_first(x_desc, w_desc, y_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i in range(STEPS):
        x = x_desc.load([i, i, 0, 0]).reshape(BLOCK, 64)
        acc = tl.dot(w_desc.load([i, 0, 0]).reshape(BLOCK, 64), x.T, acc)
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs[:, None] * BLOCK + offs[None, :], acc.to(tl.float16))
"""


def test_pixels_in_registers_are_overwritten_and_pixels_in_shared_memory_are_not(tmp_path):
    """Why boxes with several sides multiply filters by pixels. Red where a Triton mends or breaks this: see `swap`."""
    (tmp_path / "boxes.py").write_text(BOXES)
    found = json.loads(run(REGISTERS, str(tmp_path)))
    assert all(products for products, _ in found.values())
    assert found["filters_first"][1] == []
    assert bool(found["pixels_first"][1]) == (TRITON < (3, 9)), found["pixels_first"]
