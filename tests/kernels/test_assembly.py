"""What Triton's interpreter cannot see, seen in machine code: each fault is planted, compiled and found.

All compiles run in one subprocess, without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from compiling import ROW, TRITON, run

from resnet_triton import resnet18
from resnet_triton.config.targets import KNOWN
from resnet_triton.machine_code import Code, dependent, flow, groups, ordering
from resnet_triton.machine_code.access import loads, stores
from resnet_triton.ops import OPERATORS
from resnet_triton.ops.precision import conv_precision, fp32_precision
from resnet_triton.ops.trace import trace

PLANTED = """
import triton
import triton.language as tl

@triton.jit
def arrive(x_ptr, semaphores_ptr, BEFORE: tl.constexpr, AFTER: tl.constexpr, SEM: tl.constexpr, SCOPE: tl.constexpr):
    offs = tl.arange(0, 128)
    tl.store(x_ptr + offs, 1.0)
    if BEFORE == "always" or (BEFORE == "sometimes" and tl.program_id(0) == 0):
        tl.debug_barrier()
    tl.atomic_add(semaphores_ptr, 1, sem=SEM, scope=SCOPE)
    if AFTER:
        tl.debug_barrier()
    tl.store(x_ptr + 128 + offs, tl.load(x_ptr + 256 + offs))

@triton.jit
def float_atomic(x_ptr):
    tl.atomic_add(x_ptr, 1.0)

@triton.jit
def arithmetic(x_ptr, HOW: tl.constexpr):
    offs = tl.arange(0, 128)
    x = tl.load(x_ptr + offs)
    if HOW == "maximum":
        y = tl.maximum(x, 0.0)
    elif HOW == "propagating maximum":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif HOW == "where":
        y = tl.where(x < 0, 0.0, x)
    elif HOW == "sqrt":
        y = tl.sqrt(x)
    elif HOW == "rsqrt":
        y = tl.rsqrt(x)
    elif HOW == "divide":
        y = 1.0 / x
    elif HOW == "exact":
        y = tl.div_rn(1.0, tl.sqrt_rn(x))
    tl.store(x_ptr + offs, y)

@triton.jit
def product(x_ptr, PRECISION: tl.constexpr):
    offs = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(x_ptr + offs)
    tl.store(x_ptr + offs, tl.dot(x, x, input_precision=PRECISION))

@triton.jit
def total(x_ptr, n, STEP: tl.constexpr, CLAIM: tl.constexpr):
    offs = tl.arange(0, 1024)
    acc = tl.zeros((1024,), tl.float32)
    for i in range(n):
        x = x_ptr + i * 1024 * STEP
        if CLAIM:
            x = tl.multiple_of(x, 16)
        acc += tl.load(x + offs * STEP)
    tl.store(x_ptr + offs, acc.to(tl.float16))
"""
COMPILE = """
import json, sys
import torch
from dataclasses import asdict, replace
from resnet_triton import codegen, ops, resnet18
from resnet_triton.config.targets import KNOWN
from resnet_triton.kernels.hopper_conv import hopper_conv
from resnet_triton.kernels.values import RELU, BatchNorm, ConvConfig, Convolution, Geometry
from resnet_triton.ops.trace import trace

folder, planted = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, folder)
found = {}
assemble = codegen.compiler._assemble
codegen.compiler._assemble = lambda ptx, arch: ("Used 1 registers", "")  # what is planted shows in the texts before
for name, (kernel, types, constants, aligned) in planted.items():
    signature = (*types.items(), *((constant, "constexpr") for constant in constants))
    source = codegen.Specialisation("planted", kernel, signature, tuple(constants.items()), 4, 2, aligned)
    found[name] = asdict(codegen.compile_for(source, 80))

widths = {}
for batch in (1, 32):
    for call in trace(resnet18().eval(), (batch, 3, 224, 224), torch.float16):
        for launch in call.launches(KNOWN[80]):
            source = codegen.specialise(launch)
            if source.kernel not in widths and launch.arguments["C"] % 8 == 0:
                widths[source.kernel] = codegen.compile_for(source._replace(aligned=False), 80).widest_access
(launch,) = ops.AddRelu(*torch.empty(2, 1, 64, 56, 56)).launches(torch.empty(1, 64, 56, 56), KNOWN[80])
widths["add_relu_kernel"] = codegen.compile_for(codegen.specialise(launch)._replace(aligned=False), 80).widest_access

codegen.compiler._assemble = assemble
calls = trace(resnet18().eval(), (2, 3, 224, 224), torch.float16)
plain = replace(KNOWN[90], gluon=False)
(launch,) = next(call for call in calls if call.name == "layer4.1.conv1").launches(plain)
(older,) = next(call for call in calls if call.name == "layer4.1.conv1").launches(KNOWN[80])

def images(channels, size=7, **options):
    x = torch.empty(32, channels, size, size, dtype=torch.float16, **options)
    return x.to(memory_format=torch.channels_last)

v, tile = torch.ones(128), ConvConfig(128, 128, 64, 4, 4, (1, 4, 32), 2)
specialised = hopper_conv(Convolution(
    images(128), images(128), images(128, 3)[:1].expand(128, -1, -1, -1).contiguous(memory_format=torch.channels_last),
    BatchNorm(v, v, v, v, 1e-5), Geometry((1, 1), (1, 1)), residual=images(128), shortcut=None, activation=RELU,
    precision="ieee", config=tile, programs=132,
    partials=torch.empty(1), semaphores=torch.empty(1, dtype=torch.int32),
))
places = ((launch, 90), (older, 80), (specialised, 90))
texts = [codegen.triton_compile(codegen.specialise(launch), arch).asm["ptx"] for launch, arch in places]
calls = trace(resnet18().eval(), (1, 3, 224, 224), torch.float16)
(few,) = next(call for call in calls if call.name == "layer3.1.conv2").launches(KNOWN[90])
ptx = codegen.triton_compile(codegen.specialise(few), 90).asm["ptx"]
print(json.dumps([found, widths, [ptx, assemble(ptx, 90)[1]], *texts]))
"""
ADDS_BARRIERS = TRITON >= (3, 9)
"""Whether this Triton puts a barrier before and after an atomic that orders, as 3.9.0 was the first seen to do."""
X, ARRIVALS = {"x_ptr": "*fp32"}, {"x_ptr": "*fp32", "semaphores_ptr": "*i32"}


def arrive(before: str = "always", after: bool = True, sem: str = "acq_rel", scope: str = "gpu") -> tuple[Any, ...]:
    return "arrive", ARRIVALS, {"BEFORE": before, "AFTER": after, "SEM": sem, "SCOPE": scope}


SOURCES = {
    "sound": arrive(),
    "no barrier": arrive(before="never"),
    "barrier on one path": arrive(before="sometimes"),
    "no barrier after": arrive(after=False),
    "relaxed": arrive(sem="relaxed"),
    "cta": arrive(scope="cta"),
    "float atomic": ("float_atomic", X, {}),
    **{
        how: ("arithmetic", X, {"HOW": how})
        for how in ("maximum", "propagating maximum", "where", "sqrt", "rsqrt", "divide", "exact")
    },
    "ieee": ("product", X, {"PRECISION": "ieee"}),
    "tf32": ("product", X, {"PRECISION": "tf32"}),
    "dense": ("total", {"x_ptr": "*fp16", "n": "i32"}, {"STEP": 1, "CLAIM": False}),
    "strided": ("total", {"x_ptr": "*fp16", "n": "i32"}, {"STEP": 2, "CLAIM": False}),
    "unaligned": ("total", {"x_ptr": "*fp16", "n": "i32"}, {"STEP": 1, "CLAIM": False}),
    "claimed": ("total", {"x_ptr": "*fp16", "n": "i32"}, {"STEP": 1, "CLAIM": True}),
}


UNALIGNED = ("unaligned", "claimed")


@cache
def compiled() -> Any:
    """Vital signs of all that is planted; the widest access of each of our kernels when it knows of no alignment; PTX
    and machine code of one that may be launched while the kernel before still runs; the PTX of a convolution that
    shares its tiles and loads and stores them in bulk, of one that copies its operands, and of one whose warps have
    different parts.
    """
    wanted = {name: (*source, name not in UNALIGNED) for name, source in SOURCES.items()}
    with TemporaryDirectory() as folder:
        Path(folder, "planted.py").write_text(PLANTED)
        return json.loads(run(COMPILE, folder, json.dumps(wanted)))


def signs(name: str) -> Code:
    planted, *_ = compiled()
    return Code(**planted[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("sound", None),
        ("no barrier", ordering.NO_BARRIER_BEFORE_ATOMIC),
        ("barrier on one path", ordering.NO_BARRIER_BEFORE_ATOMIC),
        ("no barrier after", ordering.NO_BARRIER_AFTER_ATOMIC),
        ("relaxed", ordering.WEAK_ATOMIC),
        ("cta", ordering.WEAK_ATOMIC),
    ],
)
def test_an_arrival_that_orders_nothing(name, broken):
    mended = ADDS_BARRIERS and broken != ordering.WEAK_ATOMIC
    assert signs(name).disorder == ([] if broken is None or mended else [broken])


def test_a_floating_point_atomic():
    assert [signs(name).float_atomics for name in ("float atomic", "sound")] == [1, 0]


def without(text: str, guard: str, near: str, *, after: bool = False, count: int = 1) -> str:
    """The text less its last `count` lines with `guard` before the last line with `near`, or its first ones after."""
    lines = text.splitlines()
    at = max(i for i, line in enumerate(lines) if near in line)
    guards = [i for i, line in enumerate(lines) if line.strip().startswith(guard)]
    gone = [i for i in guards if i > at][:count] if after else [i for i in guards if i < at][-count:]
    return "\n".join(line for i, line in enumerate(lines) if i not in gone)


def after(text: str, near: str, new: str) -> str:
    """The text with a new line after the last one with `near`."""
    head, found, tail = text.rpartition(near)
    rest, newline, tail = tail.partition("\n")
    return head + found + rest + newline + new + newline + tail


def test_every_rule_guards_a_real_kernel():
    _, _, _, sound, *_ = compiled()

    def broken(text: str) -> tuple[str, ...]:
        assert text != sound
        return ordering.broken(groups.ptx(text))

    store, wait, fence = "bulk_group [", "cp.async.bulk.wait_group", "fence.proxy.async"
    arrival, write = "atom.global.gpu.acq_rel.add.u32 %r1, [%rd1], 1;", "st.shared.b32 [%r1], %r2;"
    assert ordering.broken(groups.ptx(sound)) == ()
    barriers = 1 + ADDS_BARRIERS  # ours, and the compiler's
    assert broken(without(sound, "bar.sync", "atom.", count=barriers)) == (ordering.NO_BARRIER_BEFORE_ATOMIC,)
    unguarded = without(sound, "bar.sync", "atom.", after=True, count=barriers)
    assert broken(unguarded) == (ordering.NO_BARRIER_AFTER_ATOMIC,)
    assert broken(sound.replace("acq_rel", "release")) == (ordering.WEAK_ATOMIC,)
    assert broken(without(sound, fence, store)) == (ordering.UNFENCED_BULK_STORE,)
    assert broken(without(sound, "bar.sync", store)) == (ordering.NO_BARRIER_BEFORE_BULK_STORE,)
    assert broken(without(sound, wait, store, after=True)) == (ordering.UNREAD_BULK_STORE,)
    assert broken(re.sub(rf"{wait}(?:\.read)?\s+0", f"{wait}.read 1", sound)) == (ordering.UNREAD_BULK_STORE,)
    assert broken(after(sound, store, write)) == (ordering.UNREAD_BULK_STORE,)
    assert broken(after(sound, wait, write)) == (ordering.NO_BARRIER_AFTER_WAIT,)
    for kind, expected in ((".read", (ordering.UNFINISHED_BULK_STORE,)), ("", ())):
        waiting = re.sub(rf"{wait}(?:\.read)?\s+0", f"{wait}{kind} 0", sound)
        assert broken(after(waiting, wait, f"bar.sync 0;\n{arrival}")) == expected


def test_rules_of_operands_in_shared_memory():
    _, _, _, bulk, copied, _ = compiled()
    for sound in (bulk, copied):
        assert ordering.broken(groups.ptx(sound)) == ()

    def broken(text: str) -> set[str]:
        assert text not in (bulk, copied)
        return set(ordering.broken(groups.ptx(text)))

    # Barriers behind the wait in the loop: for pixels, for filters and, by some Tritons, for the wait itself.
    barrier, wait, load, copy = "bar.sync", "cp.async.wait_group", "ldmatrix.", "cp.async.cg."
    last = max(i for i, line in enumerate(bulk.splitlines()) if re.search(r"shared::\w+\.global", line))
    loop = max(i for i, line in enumerate(bulk.splitlines()[:last]) if "wgmma.wait_group" in line)
    guards = sum(barrier in line for line in bulk.splitlines()[loop:last])
    assert guards
    unguarded = without(bulk, barrier, bulk.splitlines()[last], count=guards)
    assert ordering.NO_BARRIER_AFTER_PRODUCT in broken(unguarded)
    assert broken(without(copied, wait, load, count=99)) == {ordering.UNFINISHED_COPY}
    assert ordering.NO_BARRIER_AFTER_COPY in broken(without(copied, barrier, load, count=99))
    assert ordering.NO_BARRIER_BEFORE_COPY in broken(without(copied, barrier, copy, count=99))


def test_what_comes_before_the_wait_for_the_launch_before():
    _, _, (ptx, machine), *_ = compiled()
    wait, let_in, load = "griddepcontrol.wait", "griddepcontrol.launch_dependents", "cp.async.bulk.tensor"
    store, atomic = "st.global.b32 [%rd1], %r2;", "atom.global.gpu.acq_rel.add.u32 %r1, [%rd1], 1;"

    def faults(text: str = ptx, code: str = machine) -> tuple[str, ...]:
        return dependent.follow(groups.ptx(text), code).faults

    def before(text: str, mark: str, new: str) -> str:
        head, found, tail = text.partition(mark)
        assert found
        return head + new + found + tail

    def line(name: str) -> str:
        """The last of machine code with this instruction."""
        return next(line for line in reversed(machine.splitlines(keepends=True)) if re.search(rf"\b{name}\b", line))

    sound = dependent.follow(groups.ptx(ptx), machine)
    assert sound.faults == ()
    x_desc, w_desc, norm = 0, 9, {18, 19, 20, 21}  # of descriptors, each side and stride is another parameter
    assert {w_desc, *norm} <= set(sound.parameters)
    assert x_desc not in sound.parameters, "but for a box outside, which reads nothing"
    later = before(ptx, wait, "griddepcontrol.later").replace(f"griddepcontrol.later{wait}", "griddepcontrol.later")
    lines, waited = later.splitlines(), later[: later.index("griddepcontrol.later")].count("\n")
    asked = [i for i, text in enumerate(lines) if load in text and i > waited]
    lines.insert(asked[0] + 1, f"{wait};")
    assert x_desc in dependent.follow(groups.ptx("\n".join(lines)), machine).parameters
    for early in (store, atomic):
        assert faults(before(ptx, wait, f"{early}\n")) == ("a store or an atomic before griddepcontrol.wait",)
    swapped = ptx.replace(wait, "griddepcontrol.then").replace(let_in, wait).replace("griddepcontrol.then", let_in)
    assert faults(swapped) == ("griddepcontrol.launch_dependents before griddepcontrol.wait",)
    assert faults(ptx.replace(wait, "griddepcontrol.not")) == (
        "the next launch is let in, and this one waits for none before",
    )
    start = line("ACQBULK")
    assert faults(code=before(machine, start, line("STG"))) == ("a store or an atomic before ACQBULK",)
    assert faults(code=before(machine, start, line("ATOMG"))) == ("a store or an atomic before ACQBULK",)
    assert faults(code=before(machine, start, line("PREEXIT"))) == ("PREEXIT before ACQBULK",)
    for name in ("UTMALDG", "LDG"):
        (fault,) = faults(code=before(machine, start, line(name)))
        assert re.fullmatch(rf"\d+ {name} before ACQBULK, expected at most \d+", fault)
    assert faults(code=machine.replace(start, "")) == (
        "no ACQBULK in the machine code, expected that of griddepcontrol.wait",
    )
    assert dependent.follow(groups.ptx(compiled()[3]), "") == ((), ()), "one that waits for no launch"


def parts(text: str) -> tuple[str, str, str]:
    """A warp-specialised kernel's text before, in and after the second group that multiplies."""
    lines = text.splitlines(keepends=True)
    own = [i for i, line in enumerate(lines) if re.match(r"\s*bar\.sync\s+2, 128;", line)]
    start, stop = own[0], next(i for i in range(own[-1], len(lines)) if re.match(r"\s*bra\.uni\s+\$L", lines[i]))
    return "".join(lines[:start]), "".join(lines[start:stop]), "".join(lines[stop:])


def test_rules_of_a_kernel_whose_warps_have_different_parts():
    sound = compiled()[-1]
    head, group, tail = parts(sound)
    barrier, wait = "bar.sync", "cp.async.bulk.wait_group"
    assert ordering.broken(groups.ptx(sound)) == ()

    def broken(changed: str, before: str = head, after: str = tail) -> set[str]:
        assert before + changed + after != sound
        return set(ordering.broken(groups.ptx(before + changed + after)))

    everything = {
        ordering.NO_BARRIER_BEFORE_ATOMIC, ordering.NO_BARRIER_AFTER_ATOMIC, ordering.NO_BARRIER_BEFORE_BULK_STORE,
        ordering.NO_BARRIER_AFTER_WAIT, ordering.NO_BARRIER_BEFORE_HANDOVER,
    }  # fmt: skip
    for other in ("0, 128", "2, 64", "2, 256"):
        assert broken(re.sub(r"bar\.sync\s+2, 128", f"bar.sync {other}", group)) == everything, other
    assert broken(re.sub(r"bar\.sync\s+2, 128", "bar.warp.sync -1", group)) == everything
    assert broken(re.sub(r"bar\.sync\s+2, 128", "bar.sync 3, 128", group)) == set(), "a number of its own"
    table = re.search(r"st\.shared\.v2\.b32\s+\[global_smem\+\d+\], \{0, \d+\};\n", sound)[0]
    for wrong in (table.replace("{0,", "{1,"), table.replace("v2.", "").replace("{0, ", "").replace("}", ""), ""):
        assert broken(group, before=head.replace(table, wrong), after=tail.replace(table, wrong)) == everything, wrong

    lines = group.splitlines(keepends=True)
    barriers = [i for i, line in enumerate(lines) if barrier in line]
    single = [broken("".join(lines[:i] + lines[i + 1 :])) for i in barriers]
    for rule in everything:
        assert ADDS_BARRIERS or {rule} in single, rule
    write, announce = "st.shared.b32 [%r1], %r2;", "atom.global.gpu.acq_rel.add.u32 %r1, [%rd1], 1;"
    assert broken(without(group, barrier, "bulk_group [")) == {ordering.NO_BARRIER_BEFORE_BULK_STORE}
    assert broken(without(group, "fence.proxy.async", "bulk_group [")) == {ordering.UNFENCED_BULK_STORE}
    assert broken(re.sub(rf"{wait}\.read\s+0", f"{wait}.read 1", group)) == {ordering.UNREAD_BULK_STORE}
    assert broken(after(group, "bulk_group [", write)) == {ordering.UNREAD_BULK_STORE}
    announced = after(group, "cp.async.bulk.commit_group", f"bar.sync 2, 128;\n{announce}\nbar.sync 2, 128;")
    assert broken(announced) == {ordering.UNFINISHED_BULK_STORE}, "what the bulk store itself wrote"


def test_a_maximum_that_drops_nan():
    """ReLU as we write it keeps it."""
    assert [signs(name).dropped_nans for name in ("maximum", "propagating maximum", "where")] == [1, 0, 0]


def test_an_approximate_root_or_quotient():
    assert [signs(name).approximations for name in ("sqrt", "rsqrt", "divide", "exact")] == [1, 1, 1, 0]


def test_tf32_where_ieee_was_asked_for():
    found = {name: replace(ROW, dtype="float32", code=signs(name), batch=1).faults() for name in ("ieee", "tf32")}
    assert found == {"ieee": [], "tf32": ["IEEE fp32 on tensor cores (mma)"]}


@pytest.mark.parametrize(("conv", "matmul"), [("tf32", "ieee"), ("ieee", "tf32")])  # the first is PyTorch's default
def test_each_switch_rules_its_own_operators(conv, matmul):
    with fp32_precision(conv):  # which restores both
        torch.backends.cuda.matmul.fp32_precision = matmul
        calls = [call for call in trace(resnet18().eval(), (32, 3, 224, 224)) if call.operator in OPERATORS]
        launches = [(call.operator, launch.arguments) for call in calls for launch in call.launches(KNOWN[80])]
    asked = {(name, arguments["PRECISION"]) for name, arguments in launches if "PRECISION" in arguments}
    assert asked == {("stem", conv), ("conv_bn_relu", conv), ("avg_pool_linear", matmul)}


@pytest.mark.parametrize("matmul", ["ieee", "tf32"])
def test_without_cudnn_the_switch_of_products_rules_convolutions(monkeypatch, matmul):
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    with fp32_precision("ieee" if matmul == "tf32" else "tf32"):
        torch.backends.cuda.matmul.fp32_precision = matmul
        assert conv_precision(torch.float32) == matmul


def test_narrow_loads_in_a_loop_and_wide_ones_of_unaligned_memory():
    assert [signs(name).narrowest_load for name in ("dense", "strided", "unaligned", "claimed")] == [16, 2, 2, 16]
    assert [signs(name).widest_access for name in ("dense", "unaligned", "claimed")] == [16, 2, 16]


def test_a_kernel_that_knows_of_no_alignment_moves_single_elements():
    _, widths, *_ = compiled()
    ours = ("conv_pointer", "max_pool", "global_avg_pool", "linear", "avg_pool_linear")
    assert widths == {**{f"{name}_kernel": 2 for name in ours}, "add_relu_kernel": 4}


def test_widths_are_read():
    lines = """
    ld.global.L1::evict_last.v8.b32 {}, [ %rd1 + 0 ];
    ld.global.cg.b16 { %rs1 }, [ %rd1 + 0 ];
    cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;
    @%p1 st.global.v2.b64 [ %rd1 + 0 ], { %rd2, %rd3 };
    ld.shared.b8 %r1, [%r2];
    ld.param.b64 %rd1, [x];
    """.splitlines()
    assert list(stores(lines)) == [16]
    assert list(loads(lines)) == [32, 2, 4]


PATHS = """
    @%p1 bra $ELSE;
    guard;
    bra.uni $END;
$ELSE:
    {
waitLoop:
    @!complete bra.uni waitLoop;
    }
$END:
    end;
    {
waitLoop:
    inner;
    @!complete bra.uni waitLoop;
    }
    ret;
    end;
"""


TWO = """
top:
    st.shared.b32 [%r1], %r2;
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r1, %r2}], [%r1];
    st.shared.b32 [%r3], %r2;
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r1, %r2}], [%r3];
    cp.async.bulk.wait_group.read 0;
    @%p1 bra top;
"""


def test_each_bulk_store_has_stores_of_its_own():
    def unread(text: str) -> bool:
        return ordering.UNREAD_BULK_STORE in ordering.broken(groups.ptx(text))

    assert not unread(TWO), "two buffers, each stored to and then stored from"
    wait = "    cp.async.bulk.wait_group.read 0;\n"
    assert unread(TWO.replace(wait, "")), "the next turn stores to both again"
    assert unread(TWO.replace(wait, "    st.shared.b32 [%r3], %r2;\n" + wait)), "for the first of the next turn"
    assert unread(
        TWO.replace("    cp", "    @%p2 bra over;\n    cp", 1).replace(
            "    st.shared.b32 [%r3]", "over:\n@%p3 bra top;\n    st.shared.b32 [%r3]"
        )
    ), "a turn without the second"


SWITCH = """
    start;
    $L_brx_0: .branchtargets
        $ONE,
        $OTHER;
    brx.idx %r1, $L_brx_0;
$ONE:
    guard;
$OTHER:
    end;
"""


def test_every_path_counts():
    def meets(text: str) -> bool:
        return flow.ptx(text).meets("start", "end;", r"\s*guard")

    assert meets("start;" + PATHS)
    assert not meets("start;" + PATHS.replace("$ELSE:", "$ELSE:\nguard;")), "a guard on both paths"
    assert not meets("start;" + PATHS.replace("    @%p1", "    guard;\n    @%p1"))
    assert meets("start;" + PATHS.replace("    @%p1", "    @%p2 guard;\n    @%p1")), "some threads alone"
    assert not meets(PATHS.replace("ret;", "start;\n    ret;")), "nothing comes after the end"
    assert meets(
        PATHS.replace("inner;", "start;").replace("@!complete bra.uni waitLoop;\n    }\n    ret", "@%p bra $END")
    )
    assert meets(SWITCH), "a switch leads to all its labels"
    assert not meets(SWITCH.replace("$OTHER;", "$ONE;"))
    with pytest.raises(ValueError, match=r"a jump to \$NONE, which is not there"):
        meets(SWITCH.replace("$OTHER;", "$NONE;"))
    looped = [line.strip() for line in flow.ptx(PATHS).looped()]
    assert looped == [
        "waitLoop:",
        "@!complete bra.uni waitLoop;",
        "waitLoop:",
        "inner;",
        "@!complete bra.uni waitLoop;",
    ]
