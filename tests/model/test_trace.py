"""Tracing a model without computing anything, and planning launches for GPUs that are not there."""

from __future__ import annotations

import pytest
import torch

from resnet_triton import resnet18, resnet50
from resnet_triton.config.targets import KNOWN
from resnet_triton.ops import dispatch, gluon
from resnet_triton.ops.trace import Call, trace

BLOCKS = [f"layer{i}.{b}.conv{j}" for i in range(1, 5) for b in range(2) for j in (1, 2)]


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    """A ResNet-18 in fp16 at 224 x 224, batch 16, on the meta device: no memory is touched."""
    with torch.device("meta"):
        model = resnet18().eval()
    return trace(model, (16, 3, 224, 224), torch.float16)


def test_names_in_execution_order(calls):
    assert [c.name for c in calls] == ["conv1", *BLOCKS, "fc"]
    assert [c.operator for c in calls] == ["stem", *["conv_bn_relu"] * 16, "avg_pool_linear"]


def test_shapes(calls):
    shapes = {c.name: c.shape for c in calls if c.operator == "conv_bn_relu"}
    strided = shapes["layer2.0.conv1"]
    assert (strided.n, strided.c, strided.h, strided.w, strided.k, strided.r, strided.s) == (16, 64, 56, 56, 128, 3, 3)
    assert (strided.stride, strided.padding, strided.p, strided.q) == ((2, 2), (1, 1), 28, 28)
    assert {shape.dtype for shape in shapes.values()} == {"float16"}
    assert [tuple(t.shape) for t in (calls[0].ours.x, calls[0].ours.weight)] == [(16, 3, 224, 224), (64, 3, 7, 7)]
    assert [tuple(t.shape) for t in (calls[-1].ours.x, calls[-1].ours.weight)] == [(16, 512, 7, 7), (1000, 512)]
    for stage, (channels, edge) in enumerate([(64, 56), (128, 28), (256, 14), (512, 7)], start=1):
        last = shapes[f"layer{stage}.1.conv2"]
        assert (last.n, last.c, last.k, last.p, last.q) == (16, channels, channels, edge, edge)
        assert last.residual
        assert last.shortcut_c == 0
        first = shapes[f"layer{stage}.0.conv2"]
        assert first.residual == (stage == 1)
        assert first.shortcut_c == (0 if stage == 1 else channels // 2)


def test_arguments_are_meta_tensors_in_the_dtype_asked_for(calls):
    tensors = [t for c in calls for t in c.ours.schema.tensors(c.ours)]
    assert {t.device.type for t in tensors} == {"meta"}
    assert {t.dtype for t in tensors} == {torch.float16}
    assert calls[1].ours.weight.is_contiguous(memory_format=torch.channels_last)  # strides are the model's


def test_tracing_leaves_the_model_alone():
    torch.manual_seed(0)
    model = resnet18(num_classes=3)  # in training mode, where a real forward would move the statistics
    model.bn1.register_forward_hook(lambda norm, *_: setattr(norm, "running_var", norm.running_var * 2))
    before = dict(dispatch.calls), {k: v.clone() for k, v in model.state_dict().items()}
    trace(model, (2, 3, 64, 64))
    assert dict(dispatch.calls) == before[0]
    for key, value in model.state_dict().items():
        assert type(value) is torch.Tensor
        assert torch.equal(value, before[1][key]), key


def test_dtype_defaults_to_that_of_the_model():
    with torch.device("meta"):
        model = resnet50().eval().bfloat16()
    calls = trace(model, (2, 3, 64, 64))
    assert len(calls) == 1 + 3 * 16 + 1
    assert {c.ours.x.dtype for c in calls} == {torch.bfloat16}


@pytest.mark.parametrize("arch", KNOWN)
def test_launches_for_a_gpu_that_is_not_there(calls, arch):
    facts = gluon.without(KNOWN[arch])
    for call in calls:
        launches = call.launches(facts)
        assert launches, call.name
        for launch in launches:
            assert all(n > 0 for n in launch.grid)
            assert set(launch.arguments) == set(launch.kernel.arg_names), call.name
    (launch,) = calls[1].launches(facts)  # layer1.0.conv1
    has_descriptors = facts.has_descriptors
    assert launch.kernel.__name__ == ("conv_box_kernel" if has_descriptors else "conv_pointer_kernel")
    if has_descriptors:
        h, w, n = (launch.arguments[name] for name in ("BOX_H", "BOX_W", "BOX_N"))
        tiles = -(-56 // h) * -(-56 // w) * -(-16 // n)
    else:
        tiles = -(-16 * 56 * 56 // launch.arguments["BLOCK_M"])
    assert launch.grid == (tiles * -(-64 // launch.arguments["BLOCK_K"]), launch.arguments["SPLIT_K"])
