"""Frozen models."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import captured, images, small
from torch import Tensor, nn

from resnet_triton import functional, refresh
from resnet_triton.graphs import fingerprint, snapshot
from resnet_triton.graphs.runner import Runner

pytestmark = pytest.mark.usefixtures("no_grad")


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graph"])
def test_a_frozen_model_is_a_snapshot_of_its_batch_norms(request, graphs):
    cuda = request.getfixturevalue("cuda") if graphs else None
    model, x = small(freeze=True), images()
    live = model._forward_impl(x)
    for _ in range(3):
        assert close(model(x), live)
    before = model(x)
    model.bn1.running_var.mul_(4)
    model.layer1[0].bn1.weight = nn.Parameter(model.layer1[0].bn1.weight * 2)
    model.layer2[0].bn1.eps = 0.5
    for _ in range(3):
        assert torch.equal(model(x), before)
    assert not close(before, model._forward_impl(x))
    assert refresh(model) is model
    for _ in range(3):
        assert close(model(x), model._forward_impl(x))
    if cuda is not None:
        assert [g.replays for g in cuda.graphs] == [5, 1]


def test_a_frozen_model_where_pytorch_refuses_an_eps_of_zero(monkeypatch):
    """As torch 2.11 does; the norms of a snapshot have one."""
    model, x, batch_norm = small(freeze=True), images(), F.batch_norm

    def refusing(*args):
        assert args[7] > 0
        return batch_norm(*args)

    live = model._forward_impl(x)
    monkeypatch.setattr(F, "batch_norm", refusing)
    assert close(model(x), live)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graph"])
def test_a_frozen_model_reads_filters_in_place(request, graphs):
    if graphs:
        request.getfixturevalue("cuda")
    model, x = small(freeze=True), images()
    captured(model, x)
    model.layer1[0].conv1.weight.mul_(2)
    model.fc.bias.add_(1)
    assert close(model(x), model._forward_impl(x))


def test_a_frozen_model_looks_for_no_changes(cuda, monkeypatch):
    model, x = small(freeze=True), images()
    captured(model, x)
    monkeypatch.setattr(fingerprint.Fingerprint, "holds", None)
    model(x)
    assert cuda.graphs[0].replays == 1


def test_a_move_renews_the_snapshot():
    model, x = small(freeze=True), images()
    model(x)
    model.bn1.running_var.mul_(4)
    model.double()
    assert close(model(x.double()), model._forward_impl(x.double()))
    model.float()
    assert close(model(x), model._forward_impl(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_scale_and_shift(dtype, affine):
    """Rounded to fp32 and no further, or to fp64."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(64, affine=affine).eval().to(dtype)
    for t in (*norm.parameters(), norm.running_mean):
        nn.init.uniform_(t, -1, 1)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    wide = copy.deepcopy(norm).double()
    x = torch.randn(3, 64, 2, 2, dtype=torch.float64)
    scale, shift = snapshot._scale_and_shift(norm)
    assert scale.dtype == shift.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = wide.running_mean.neg() * scale.double() + (wide.bias if affine else 0)
    assert torch.equal(shift, exact.to(shift.dtype))
    y = x * scale.double()[:, None, None] + shift.double()[:, None, None]
    torch.testing.assert_close(y, wide(x), rtol=1e-6, atol=1e-6)


def test_the_kernels_take_a_frozen_norm_as_it_is(device):
    """With numbers that have no roundings, not a bit changes."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16, eps=0).eval()
    conv.weight.copy_(torch.randint(-2, 3, conv.weight.shape))
    norm.running_var.copy_(torch.tensor([0.25, 1, 4, 16]).repeat(4))
    norm.running_mean.copy_(torch.randint(-3, 4, (16,)))
    norm.weight.copy_(torch.tensor([0.5, -1, 2, 0]).repeat(4))
    x = torch.randint(-3, 4, (2, 8, 6, 6)).float().to(device)
    frozen = copy.deepcopy(norm)
    snapshot._freeze(frozen)
    conv, norm, frozen = (m.to(device) for m in (conv, norm, frozen))
    live, stored = (
        functional.conv_bn_relu(
            x, conv.weight, n.running_mean, n.running_var, n.weight, n.bias, n.eps, kernels="triton"
        )
        for n in (norm, frozen)
    )
    assert torch.equal(live, stored)
    assert live.any()


def test_frozen_in_inference_mode_and_called_outside(cuda):
    model, x = small(freeze=True), images()
    with torch.inference_mode():
        captured(model, x)
    assert close(model(x), model._forward_impl(x))
    assert close(model(x[:1]), model._forward_impl(x[:1]))


@pytest.mark.parametrize("replays", [False, True])
def test_a_model_that_is_frozen_no_more(cuda, replays):
    model, x = small(freeze=True, cuda_graph=replays), images()
    captured(model, x)
    model.frozen = False
    model.bn1.weight.mul_(-1)
    assert close(model(x), model._forward_impl(x))
    captured(model, x)
    model.bn1.weight.mul_(-1)
    assert close(model(x), model._forward_impl(x)), "nor captured from the snapshot"
    assert not replays or cuda.graphs[-1].replays > 0, "and it has graphs again"
    model.frozen = True
    assert close(model(x), model._forward_impl(x)), "nor is the first snapshot kept for later"


def test_a_model_that_is_frozen_no_more_while_a_thread_captures_its_snapshot(cuda, monkeypatch):
    model, x = small(freeze=True, cuda_graph=True), images()
    consider = Runner.consider

    def thawed_before(runner, *arguments):
        monkeypatch.setattr(Runner, "consider", consider)
        model.frozen = False
        model.bn1.weight.mul_(-1)
        consider(runner, *arguments)

    monkeypatch.setattr(Runner, "consider", thawed_before)
    model(x)
    captured(model, x)
    assert close(model(x), model._forward_impl(x))


def test_a_snapshot_is_finished_before_another_stream_may_read_it(cuda):
    model = small(freeze=True)
    x = images()
    model(x)
    model(x)
    assert cuda.finished == 1, "the host waits once, where the snapshot is taken"


def test_no_snapshot_is_taken_while_somebody_else_captures(cuda):
    """Its kernels would only be recorded, and the tensors belong to the other graph."""
    model = small(freeze=True)
    x = images()
    cuda.available, cuda.captured_by_others = False, True
    model(x)
    assert model._triton_runner._snapshot is None
    cuda.captured_by_others = False
    model(x)
    assert model._triton_runner._snapshot is not None
