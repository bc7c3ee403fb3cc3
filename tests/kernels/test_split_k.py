"""Several programs a tile: exact, repeatable, counters left at zero, and ordered in the machine code."""

import contextlib
import itertools
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import shadow
import torch
from compiling import run as run_compiled
from exact import choosing, conv_call, conv_reference, generator, plan

from resnet_triton.config import ConvConfig, ConvShape, conv_heuristic, is_legal
from resnet_triton.config.targets import KNOWN
from resnet_triton.ops import ConvBnRelu, conv, in_graph, interpreter

TILE = ConvConfig(16, 32, 16, 4, 2)
PATHS = {"pointer": TILE, "box": TILE.on((4, 4, 1)), "one row": TILE.on((1, 8, 2))}


def split_config(shape: ConvShape, split: int, path: str) -> ConvConfig:
    chosen = replace(PATHS[path], split_k=split)
    assert is_legal(chosen, shape, KNOWN[90])
    return chosen


def launch(call: ConvBnRelu, chosen: ConvConfig) -> torch.Tensor:
    out = call.output().fill_(float("nan"))
    (planned,) = plan(replace(call, tile=chosen), out)
    planned.arguments["partials_ptr"].fill_(float("nan"))
    with torch.cuda.device(out.device) if out.is_cuda else interpreter.ready():
        planned.run()
    assert planned.grid[1] == chosen.split_k
    assert not planned.arguments["semaphores_ptr"].any(), "the next launch needs its counters at zero"
    return out


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("split", "dtype"),
    [
        (2, "float32"),
        (3, "bfloat16"),
        (6, "float16"),
        pytest.param(9, "float16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("extra", ["residual", "shortcut"])
def test_any_number_of_partials_is_exact(device, path, split, extra, dtype):
    stride = (2, 2) if path == "one row" else (1, 1)
    shape = ConvShape(
        1, 32, 5, 6, 40, 3, 3, stride, (1, 1), dtype=dtype, residual=extra == "residual",
        shortcut_c=24 if extra == "shortcut" else 0, shortcut_stride=(2, 2) if path == "one row" else (1, 1),
    )  # fmt: skip
    call = conv_call(generator(device, split), shape)
    expected = conv_reference(call).to(getattr(torch, dtype))
    for _ in range(2 if device.type == "cuda" else 1):  # the interpreter's programs come in one order
        assert torch.equal(launch(call, split_config(shape, split, path)), expected)


@pytest.mark.parametrize("path", PATHS)
def test_only_the_last_share_writes_the_output(device, path):
    """Here programs run in turns, and the last one's values would hide what others have written."""
    shape = ConvShape(1, 32, 5, 6, 40, 3, 3, padding=(1, 1), residual=True)
    call = conv_call(generator(device, 0), shape)
    out = call.output().fill_(float("nan"))
    (planned,) = plan(replace(call, tile=split_config(shape, 3, path)), out)
    semaphores = planned.arguments["semaphores_ptr"]
    with contextlib.ExitStack() as stack:
        if out.is_cuda:
            stack.enter_context(torch.cuda.device(device))
        else:
            stack.enter_context(shadow.watch(whole=False))
            stack.enter_context(interpreter.ready())
        replace(planned, grid=(planned.grid[0], 2)).run()
    assert out.isnan().all()
    assert semaphores[: planned.grid[0]].eq(2).all()
    if out.is_cuda:
        semaphores.zero_()
    assert torch.equal(launch(call, split_config(shape, 3, path)), conv_reference(call).half()), "as if interrupted"


def test_semaphores_are_of_a_stream_or_a_graph(monkeypatch):
    """Launches that may run at once share none."""
    zeros, now = torch.zeros, SimpleNamespace(cuda_stream=1, capturing=False)
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **options: zeros(*size, **options))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: now)
    monkeypatch.setattr(in_graph, "_kept", {})
    taken = {}
    for where, now.cuda_stream in itertools.product((torch.device("cuda:0"), torch.device("cuda:1")), (1, 2)):
        assert in_graph.semaphores_for(where, 8).numel() < 1025
        taken[where, now.cuda_stream] = in_graph.semaphores_for(where, 1025)
        assert in_graph.semaphores_for(where, 8) is taken[where, now.cuda_stream]
        assert taken[where, now.cuda_stream].numel() == 1025
    borrowed = in_graph.borrowing.set(True)
    taken["memory that is lent"], taken["again"] = in_graph.semaphores_for(where, 8), in_graph.semaphores_for(where, 8)
    in_graph.borrowing.reset(borrowed)
    now.capturing = True
    taken["a capture"], taken["another"] = in_graph.semaphores_for(where, 8), in_graph.semaphores_for(where, 8)
    lent = in_graph.graph_semaphores.set(zeros(16, dtype=torch.int32))
    taken["a graph of a model"] = in_graph.semaphores_for(where, 16)
    assert taken["a graph of a model"] is in_graph.graph_semaphores.get()
    taken["a larger layer"] = in_graph.semaphores_for(where, 17)
    in_graph.graph_semaphores.reset(lent)
    assert len({t.data_ptr() for t in taken.values()}) == len(taken) == 10


def test_what_torch_calls_for_a_compiler_may_be_lent_its_memory(device, monkeypatch):
    call = conv_call(generator(device, 0), ConvShape(1, 32, 5, 6, 40, 3, 3, padding=(1, 1)))
    take, borrowing = conv.semaphores_for, []
    monkeypatch.setattr(conv, "semaphores_for", lambda *a: borrowing.append(in_graph.borrowing.get()) or take(*a))
    with choosing(lambda *_, **__: split_config(call.shape, 3, "pointer")):
        assert torch.equal(call.run(), call.dispatched())
    assert borrowing == [False, True]
    assert not in_graph.borrowing.get()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_shift_that_is_not_finite_is_added_once(device, value):
    shape = ConvShape(1, 32, 4, 4, 32, 3, 3, padding=(1, 1), residual=True)
    call = conv_call(generator(device, 0), shape)
    call.batch_norm.bn_bias[3] = value
    y = launch(call, split_config(shape, 3, "pointer"))
    assert torch.equal(y.isnan(), conv_reference(call).isnan())
    assert torch.equal(y.isinf(), conv_reference(call).isinf())


def test_shares_are_equal_small_and_few():
    shape = ConvShape(1, 256, 7, 7, 512, 3, 3, padding=(1, 1))
    legal = [
        s for s in range(1, 40) if is_legal(ConvConfig(64, 64, 64, 4, 3, (8, 8, 1), s, swap=True), shape, KNOWN[90])
    ]
    assert legal == [1, 2, 3, 4, 6, 9, 12]  # 36 steps; at most 16 partials
    assert not is_legal(ConvConfig(256, 128, 64, 8, 3, (8, 32, 1), 2, swap=True), shape, KNOWN[90]), (
        "a partial of 128 KB"
    )
    stem = ConvShape(1, 3, 224, 224, 64, 7, 7, (2, 2), (3, 3))
    assert not is_legal(ConvConfig(64, 64, 32, 4, 2, None, 5), stem, KNOWN[90]), "the flat reduction is not split"


def test_only_small_launches_are_split():
    layer4 = ConvShape(1, 512, 7, 7, 512, 3, 3, padding=(1, 1), residual=True)
    assert conv_heuristic(layer4, KNOWN[90]).split_k > 1
    assert all(
        conv_heuristic(ConvShape(n, 64, 56, 56, 64, 3, 3, padding=(1, 1)), KNOWN[90]).split_k == 1 for n in (8, 256)
    )


ASSEMBLY = """
import contextlib
import itertools
import json
import torch
import resnet_triton
from resnet_triton import codegen
from resnet_triton.config.targets import KNOWN
from resnet_triton.ops.trace import trace
calls = trace(resnet_triton.resnet18().eval(), (1, 3, 224, 224), torch.float16)
call = next(c for c in calls if c.name == "layer4.1.conv2")
found = []
for arch in (80, 90, 100):
    launch = call.launches(KNOWN[arch])[-1]
    assert launch.arguments["SPLIT_K"] > 1, launch
    ptx = codegen.triton_compile(codegen.specialise(launch), arch).asm["ptx"]
    found.append([launch.arguments["SPLIT_K"], ptx])
print(json.dumps(found))
"""


def test_a_barrier_stands_between_the_share_and_its_announcement():
    """Nothing in the interpreter shows this order: it runs one program at a time."""
    for partials, ptx in json.loads(run_compiled(ASSEMBLY)):
        lines = ptx.splitlines()
        arrival = next(i for i, line in enumerate(lines) if re.search(r"\batom\..*\.add", line))
        assert "acq_rel" in lines[arrival]
        assert ".gpu" in lines[arrival]
        stores = [i for i, line in enumerate(lines[:arrival]) if "st.global" in line]
        assert stores, "the partial is stored before it is announced"
        # The loop over the other partials is unrolled by some compilers (all but Triton 3.9's for sm_100).
        loads, of_each = ptx.count("ld.global.cg"), (partials * len(stores), 2 * len(stores))
        assert loads in of_each, "partials come from where they are, not from a stale L1"
        assert any("bar.sync" in line for line in lines[stores[-1] : arrival])
        assert not re.search(r"\b(atom|red)\b.*\.f(16|32)", ptx), "floating-point atomics are not repeatable"
