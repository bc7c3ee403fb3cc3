"""optimize, revert and disabled on torchvision's models and on models that contain one."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from compiling import run
from torch import Tensor, nn
from torchvision_models import close, image, randomised, reasons, small, torchvision, tv

import resnet_triton
from resnet_triton import converted, disabled, filters, models, optimize, precompile, refresh, report, revert
from resnet_triton.ops import dispatch, original

# --- optimize --------------------------------------------------------------------------------------------------------


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@torch.no_grad()
def test_the_model_stays_what_it_is(name):
    model = randomised(getattr(torchvision.models, name)(num_classes=10))
    expected = model(image())
    before, state = tensors(model), {k: v.clone() for k, v in model.state_dict().items()}
    assert optimize(model) is model
    assert type(model) is converted.ResNet
    assert isinstance(model, tv.ResNet)
    assert isinstance(model, models.ResNet)
    block = tv.BasicBlock if name == "resnet18" else tv.Bottleneck
    assert all(isinstance(b, block) for i in range(1, 5) for b in model.get_submodule(f"layer{i}"))
    assert list(tensors(model)) == list(before)
    assert all(now is before[key] for key, now in tensors(model).items())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    close(model(image()), expected)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4)
    assert type(small()) is tv.ResNet  # the class itself is as it was


@torch.no_grad()
def test_a_copy_shares_nothing():
    original = small()
    original.moods = [torch.zeros(2)]
    strides = {key: t.stride() for key, t in tensors(original).items()}
    expected = original(image())
    fast = optimize(original, inplace=False)
    assert (type(original), type(fast)) == (tv.ResNet, converted.ResNet)
    mine = {t.untyped_storage().data_ptr() for t in [*tensors(fast).values(), *fast.moods]}
    yours = {t.untyped_storage().data_ptr() for t in [*tensors(original).values(), *original.moods]}
    assert not mine & yours
    assert {key: t.stride() for key, t in tensors(original).items()} == strides
    for move in (lambda m: m.double(), lambda m: m.load_state_dict(small().double().state_dict()), lambda m: m.half()):
        move(original)
        for p in original.parameters():
            p.mul_(2)
        close(fast(image()), expected)
    original.float().train()(torch.randn(4, 3, 64, 64))
    close(fast(image()), expected)


class Selfish(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        return self


UNCOPIED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "lock": (lambda m: setattr(m, "lock", threading.Lock()), "the model cannot be copied .*lock"),
    "tensor": (lambda m: setattr(m.layer1, "seen", m.fc.weight * 2), "the model cannot be copied .*leaves"),
    "shared": (lambda m: setattr(m, "fc", Selfish(512, 10)), "fc.weight is shared by a deep copy"),
}


@pytest.mark.parametrize("kind", UNCOPIED)
def test_what_cannot_be_copied_is_one_line(kind):
    change, said = UNCOPIED[kind]
    model = small()
    change(model)
    with pytest.raises(TypeError, match=said + r".*; optimize\(model, inplace=True\)") as raised:
        optimize(model, inplace=False)
    assert "\n" not in str(raised.value)
    assert type(model) is tv.ResNet
    with torch.no_grad():
        expected = model(image())
        close(optimize(model)(image()), expected)  # in place it does not matter


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("made_inside", [False, True])
def test_weights_stay_parameters_under_the_callers_mode(inplace, made_inside):
    with torch.inference_mode(made_inside):
        original = small()
    with torch.inference_mode():
        model = optimize(original, inplace=inplace)
    assert {p.is_inference() for p in tensors(model).values()} == {made_inside and inplace}
    if not made_inside:
        model.train()(image()).sum().backward()
        assert model.layer1[0].conv1.weight.grad.any()
    with torch.inference_mode():
        revert(model)
        model.eval()(image())
    assert {p.is_inference() for p in tensors(model).values()} == {made_inside and inplace}


def test_only_filters_of_the_resnet_change_their_memory_format():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = small("Bottleneck")
            self.backbone.extra = nn.Conv2d(4, 4, 3)
            self.head = nn.Conv2d(10, 4, 3)
            self.table = nn.Parameter(torch.zeros(2, 3, 4, 5))

    model = Net()
    nn.utils.parametrizations.weight_norm(model.backbone.layer1[0].conv2)
    before = {key: p.stride() for key, p in model.named_parameters()}
    optimize(model)
    changed = {key for key, p in model.named_parameters() if p.stride() != before[key]}
    assert changed == {
        "backbone.conv1.weight",
        *(f"backbone.layer{i}.0.conv2.weight" for i in (2, 3, 4)),
    }  # 1x1 has one
    revert(model)
    assert {key: p.stride() for key, p in model.named_parameters()} == before


@torch.no_grad()
def test_twice():
    model = small()
    expected = model(image())
    once = optimize(model)
    twice = optimize(once, kernels="torch", inplace=False)
    assert (once.kernels, twice.kernels, twice.layer4[0].kernels) == ("auto", "torch", "torch")
    assert optimize(once, kernels="torch").layer1[0].kernels == "torch"
    for m in (once, twice):
        close(m(image()), expected)
        assert type(revert(m)) is tv.ResNet
        assert not m.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_unknown_mode():
    model = small()
    with pytest.raises(ValueError, match="kernels='cuda', expected one of 'auto', 'torch', 'triton'"):
        optimize(model, kernels="cuda")
    for name in ("freeze", "batch_invariant", "inplace"):
        for value in ("yes", 1, None):
            with pytest.raises(ValueError, match=f"{name}={value!r}, expected True or False"):
                optimize(model, **{name: value})
    assert type(model) is tv.ResNet


def test_nothing_to_optimize():
    with pytest.raises(ValueError, match=r"Sequential contains no Conv2d to optimize; where .* torch\.compile\("):
        optimize(nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU()))
    with pytest.raises(ValueError, match="Linear was not converted"):
        revert(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"ResNet was not converted .* nothing to revert$"):
        revert(small())
    with pytest.raises(ValueError, match=r"ResNet was not converted .*; for filters .*torch\.contiguous_format"):
        revert(models.ResNet(models.BasicBlock, [1, 1, 1, 1]))
    with pytest.raises(ValueError, match="ResNet contains nothing of ours to disable"), disabled(small()):
        pass


@pytest.mark.parametrize("function", [optimize, revert, refresh, report, disabled])
@pytest.mark.parametrize("model", ["resnet18", None, [small], small], ids=["str", "None", "list", "function"])
def test_what_is_no_module(function, model):
    with pytest.raises(TypeError, match=f"model is a {type(model).__name__}, expected a torch.nn.Module"):
        function(model)


@pytest.mark.parametrize("function", [report, precompile])
@pytest.mark.parametrize("inputs", [224, "1, 3, 8, 8"], ids=["int", "str"])
def test_what_is_no_input(function, inputs):
    with pytest.raises(TypeError, match=f"inputs is a {type(inputs).__name__}, expected a tensor, or a tuple as"):
        function(small(), inputs)


@torch.no_grad()
def test_a_shortcut_without_layers():
    model = small()
    model.layer1[0].downsample = nn.Sequential()
    expected = model(image())
    close(optimize(model)(image()), expected)
    assert torch.equal(revert(model)(image()), expected)


def deep_stem() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1))


class Wrapped(nn.Module):
    """As LoRA and quantisation wrap layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 64, 7, 2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@torch.no_grad()
@pytest.mark.parametrize("modes", [{}, {"freeze": True}], ids=str)
@pytest.mark.parametrize("stem", [deep_stem, Wrapped])
def test_a_stem_of_somebodys_own(stem, modes):
    """Bytes are normalised in front of it."""
    model = small()
    model.conv1 = stem()
    expected = model(image())
    close(optimize(model, **modes)(image()), expected)
    pixels = image().clamp(0, 1).mul(255).byte()
    model.normalize = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if modes:
        resnet_triton.refresh(model)
    close(model(pixels), model(pixels / 255))
    with disabled(model):
        close(model(pixels), model(pixels / 255))


@torch.no_grad()
def test_a_missing_activation_is_an_error_as_ever():
    model = optimize(small())
    model.layer1[0].relu = None
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        model(image())


@torch.no_grad()
def test_segmentation_backbone():
    """IntermediateLayerGetter keeps the children of a ResNet, not the ResNet; half of its blocks are dilated."""
    torch.manual_seed(0)
    model = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3)
    randomised(model)
    expected = model(image())["out"]
    fast = optimize(model)
    kinds = Counter(type(m) for m in fast.modules())
    assert kinds[converted.Bottleneck] == 16
    assert kinds[tv.Bottleneck] == 0
    before = Counter(dispatch.calls)
    close(fast(image())["out"], expected)
    assert dispatch.calls - before == {
        ("conv_bn_relu", "torch"): 48
    }  # four shortcuts ride along; the stem is the getter's
    outside = "outside what optimize takes: torch.compile(model, backend='resnet_triton') reaches it, too"
    assert reasons(fast)["classifier.0"] == outside
    with disabled(fast):
        assert reasons(fast)["backbone.layer1.0.conv1"] == "disabled"
    reached = report(torch.compile(fast, backend="resnet_triton"), image()).calls
    assert not [call for call in reached if call.operator == "aten.convolution"]


class Doubled(tv.ResNet):
    """A subclass with code of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@torch.no_grad()
def test_a_subclass_keeps_its_code():
    torch.manual_seed(0)
    model = randomised(Doubled(tv.BasicBlock, [1, 1, 1, 1], num_classes=10))
    expected = model(image())
    fast = optimize(nn.Sequential(model))
    assert original.origin(model) is Doubled
    assert {type(model.get_submodule(f"layer{i}.0")) for i in range(1, 5)} == {converted.BasicBlock}
    before = Counter(dispatch.calls)
    close(fast(image()), expected)
    assert {name for name, _ in dispatch.calls - before} == {"stem", "conv_bn_relu", "avg_pool_linear"}
    assert [c.operator for c in report(fast).calls] == ["stem", *["conv_bn_relu"] * 8, "avg_pool_linear"]
    assert (type(revert(fast)[0]), type(model.layer1[0])) == (Doubled, tv.BasicBlock)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_frozen_batch_norm_is_fused(training, monkeypatch):
    """What torchvision's detectors have: four buffers, which training mode does not touch."""
    frozen = torchvision.ops.FrozenBatchNorm2d
    model = small("Bottleneck", norm_layer=frozen).train(training)
    for norm in model.modules():
        if isinstance(norm, frozen):
            for buffer in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                nn.init.uniform_(buffer, 0.5, 2.0)
    expected = model(image())
    fast, before = optimize(model), Counter(dispatch.calls)
    close(fast(image()), expected)
    assert dispatch.calls - before == {
        ("stem", "torch"): 1, ("conv_bn_relu", "torch"): 12, ("avg_pool_linear", "torch"): 1,
    }  # fmt: skip
    monkeypatch.setattr(frozen, "forward", lambda self, x: 2 * x)
    assert "FrozenBatchNorm2d.forward was replaced" in str(report(fast))
    assert not torch.allclose(fast(image()), expected), "the replaced forward runs"


ALONE = """
import torch
from resnet_triton import optimize, report, resnet18
from resnet_triton.support import vision
model = optimize(resnet18(norm_layer=vision.torchvision().ops.FrozenBatchNorm2d).eval())
print(*sorted({call.operator for call in report(model, (1, 3, 32, 32)).calls}), model.uncaptured_model_reason())
"""


def test_frozen_batch_norm_is_fused_in_a_process_that_has_seen_no_other_model():
    assert run(ALONE) == "avg_pool_linear conv_bn_relu stem None\n"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize(("block", "last"), [("BasicBlock", "bn2"), ("Bottleneck", "bn3")])
def test_what_a_hook_keeps_is_what_torchvision_makes_of_it(block, last, mode):
    """Behind a block's last batch norm, its sum and its ReLU write into that."""
    own = models.ResNet(getattr(models, block), [1, 1, 1, 1], num_classes=10).eval()
    theirs, ours, kept = small(block), optimize(small(block)), list[list[Tensor]]()
    own.load_state_dict(theirs.state_dict())
    for model in (theirs, ours, own):
        kept.append(found := [])
        for stage in (model.layer1, model.layer2):
            getattr(stage[0], last).register_forward_hook(lambda module, given, y, found=found: found.append(y))
    with mode(), disabled(own):
        logits = [model(image()) for model in (theirs, ours, own)]
    for expected, *others in zip(*kept, strict=True):
        for y in others:
            assert y.min() == expected.min() == 0
            close(y.detach(), expected.detach())
    if mode is torch.enable_grad:
        sum(logits).sum().backward()
        close(ours.conv1.weight.grad, theirs.conv1.weight.grad)


@pytest.mark.parametrize("make", [small, lambda: resnet_triton.resnet18(), lambda: nn.Sequential(small())])
def test_scripting_names_the_way_out(make):
    model = optimize(make())
    with pytest.raises(NotImplementedError, match=r"script cannot .* use torch.jit.trace or torch.export, or .*revert"):
        torch.jit.script(model)
    if make is small:
        torch.jit.script(revert(model))


@pytest.mark.slow
def test_in_a_fresh_process(tmp_path):
    """A pickle brings its classes along, and what was patched before the first `optimize` is as patched as ever."""
    torch.save(optimize(small(), kernels="torch"), tmp_path / "model.pt")
    program = """
        import sys, torch, resnet_triton.converted
        assert "torchvision" not in sys.modules
        model = torch.load(sys.argv[1], weights_only=False)
        from torchvision.models.resnet import BasicBlock, ResNet
        print(isinstance(model, ResNet), isinstance(model.layer2[0], BasicBlock), model.layer2[0].kernels)
        print(type(resnet_triton.revert(model)) is ResNet)
    """
    patched = """
        import torch
        written = torch.nn.MaxPool2d.forward
        torch.nn.MaxPool2d.forward = lambda self, x: written(self, x) * 2
        from resnet_triton import disabled, optimize
        from resnet_triton.support.vision import torchvision
        resnet = torchvision().models.resnet
        block = resnet.BasicBlock.forward
        resnet.BasicBlock.forward = lambda self, x: block(self, x) * 2
        model, x = resnet.resnet18().eval(), torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            expected = model(x)
            torch.testing.assert_close(optimize(model)(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        print("True")
    """
    for text in (program, patched):
        command = [sys.executable, "-c", textwrap.dedent(text), str(tmp_path / "model.pt")]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300).stdout
        assert "True" in printed
        assert "False" not in printed


# --- revert ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@torch.no_grad()
def test_revert(inplace):
    original = small("Bottleneck")
    original.frozen, original.layer1[0].kernels = "the user's", 3  # names that are ours as well
    before = copy.deepcopy(original)
    fast = optimize(original, inplace=inplace)
    fast.normalize = [0.5] * 3, [0.2] * 3
    assert (fast.frozen, fast.layer1[0].kernels) == (False, "auto")
    assert revert(fast) is fast
    assert (fast.frozen, fast.layer1[0].kernels) == ("the user's", 3)
    assert [type(m) for m in fast.modules()] == [type(m) for m in before.modules()]
    for a, b in zip(fast.modules(), before.modules(), strict=True):
        assert vars(a).keys() == vars(b).keys()
    for key, value in tensors(before).items():
        now = tensors(fast)[key]
        assert (now is tensors(original)[key]) == inplace
        assert now.stride() == value.stride(), key
        assert torch.equal(now, value), key
    assert torch.equal(fast(image()), before(image()))


@torch.no_grad()
def test_revert_keeps_a_channels_last_model_channels_last():
    model = small().to(memory_format=torch.channels_last)
    reverted = revert(optimize(model))
    assert reverted.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_revert_of_a_part():
    model = nn.Sequential(small(), small())
    before = copy.deepcopy(model)
    optimize(model)
    revert(model[0])
    assert [type(m) for m in model] == [tv.ResNet, converted.ResNet]
    optimize(model)
    revert(model)
    for (key, now), was in zip(model.named_parameters(), before.parameters(), strict=True):
        assert now.stride() == was.stride(), key


def test_filters_that_were_moved_when_memory_ran_out_are_moved_back(monkeypatch):
    model = small()
    before = [p.stride() for p in model.parameters()]
    room = [filters._lay_out, filters._lay_out]  # for the stem's filters, and for one of the two of a block

    def scarce(*filter_and_format):
        if not room:
            raise torch.OutOfMemoryError
        room.pop()(*filter_and_format)

    monkeypatch.setattr(filters, "_lay_out", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        optimize(model)
    monkeypatch.undo()
    revert(optimize(model))
    assert [p.stride() for p in model.parameters()] == before


@torch.no_grad()
def test_filters_in_memory_that_others_use_stay_there():
    shared, flat = small().share_memory(), small()
    whole = nn.utils.parameters_to_vector(flat.parameters())
    for p, part in zip(flat.parameters(), whole.split([p.numel() for p in flat.parameters()]), strict=True):
        p.data = part.view_as(p)
    expected = flat(image())
    close(optimize(shared)(image()), expected)
    close(optimize(flat)(image()), expected)
    assert all(p.is_shared() for p in shared.parameters())
    whole.zero_()  # as an optimizer writes it
    assert not optimize(flat)(image()).any()


class Derived(tv.ResNet):
    """It has code of its own, so it is compiled."""

    def forward(self, x):
        return super().forward(x) * 1


@torch.no_grad()
@pytest.mark.parametrize("tied_first", [True, False])
@pytest.mark.parametrize("derived", [False, True])
def test_filters_that_two_parts_of_a_model_share_stay_shared(derived, tied_first):
    """Parts that are converted apart, by their memory: an edit of one is an edit of the other."""
    model = Derived(tv.BasicBlock, [1, 1, 1, 1], num_classes=10).eval() if derived else small()
    conv, twin = model.conv1, nn.Conv2d(3, 64, 7, bias=False)
    both = nn.ModuleDict({"resnet": model, "twin": twin})

    def tie():
        twin.weight.data = conv.weight.data

    def edits_are_of_both():
        conv.weight.mul_(-1)
        return torch.equal(conv.weight, twin.weight)

    if tied_first:
        tie()
    optimize(both, kernels="triton")
    warns = pytest.warns(RuntimeWarning, match="each call copies 1 filters")
    with warns if derived and tied_first else nullcontext():
        model(image())
    if not tied_first:
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
        tie()
    assert edits_are_of_both()
    revert(both)
    assert edits_are_of_both()
    if tied_first and derived:  # alone, nobody has to stay
        optimize(model, kernels="triton")(image())
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)


OWN = {
    "normalize": nn.Identity, "modes": nn.Identity, "kernels": nn.Identity, "_pool": lambda: nn.AvgPool2d(2),
    "_head": lambda: len,
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_a_model_whose_own_parts_have_our_names_is_left_alone(name):
    model = small()
    model.layer1[0].normalize = nn.Identity()  # which blocks of ours have not
    optimize(copy.deepcopy(model))
    setattr(model, name, OWN[name]())
    with pytest.raises(ValueError, match=f"ResNet has '{name}' already"):
        optimize(model)
    assert type(model) is tv.ResNet
    assert not any(
        p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.shape[2:] > (1, 1)
    )


# --- disabled --------------------------------------------------------------------------------------------------------


def ours_called(model: Any, x: Tensor) -> int:
    """How many operators of ours a call makes."""
    before = Counter(dispatch.calls)
    model(x)
    return (Counter(dispatch.calls) - before).total()


DISABLED: dict[str, Callable[[], nn.Module]] = {
    "torchvision": lambda: optimize(small()),
    "bottleneck": lambda: optimize(small("Bottleneck"), batch_invariant=True),
    "ours": lambda: randomised(resnet_triton.resnet18(num_classes=10)),
    "ours-bottleneck": lambda: randomised(models.ResNet(models.Bottleneck, [1, 1, 1, 1], num_classes=10)),
    "nested": lambda: optimize(nn.Sequential(small(), nn.Flatten(), nn.Linear(10, 4))),
    "subclass": lambda: optimize(randomised(Doubled(tv.BasicBlock, [1, 1, 1, 1]))),
    "blocks": lambda: optimize(small().layer1),
    "frozen": lambda: optimize(small(), freeze=True, kernels="torch"),
}


@pytest.mark.parametrize("kind", DISABLED)
@torch.no_grad()
def test_disabled(kind):
    model = DISABLED[kind]()
    x = image().repeat(1, 22, 1, 1)[:, :64] if kind == "blocks" else image()
    calls = ours_called(model, x)
    assert calls > 0
    with disabled(model):
        assert ours_called(model, x) == 0
        expected = model(x)
        with disabled(model):
            assert ours_called(model, x) == 0
        assert ours_called(model, x) == 0
    assert ours_called(model, x) == calls
    close(model(x), expected)
    with pytest.raises(RuntimeError, match="inside"), disabled(model):
        raise RuntimeError("inside")
    assert ours_called(model, x) == calls
    if kind != "ours" and kind != "ours-bottleneck":
        assert torch.equal(revert(model).to(memory_format=torch.channels_last)(x), expected)


@torch.no_grad()
def test_disabled_is_torchvisions_own_code(monkeypatch):
    model = optimize(small())
    expected = model(image())
    ran = []
    for cls in (tv.ResNet, tv.BasicBlock):
        code = cls.forward
        monkeypatch.setattr(cls, "forward", lambda self, x, code=code: ran.append(type(self)) or code(self, x))
    with disabled(model):
        close(model(image()), expected)
    assert Counter(ran) == {converted.ResNet: 1, converted.BasicBlock: 4}


@torch.no_grad()
def test_disabled_is_one_models_and_one_threads():
    model, other = optimize(small()), optimize(small())
    results = []
    with disabled(model):
        thread = threading.Thread(target=lambda: results.append(ours_called(model, image())))
        thread.start()
        thread.join()
        assert ours_called(model, image()) == 0
        assert results == [ours_called(other, image())]
        with disabled(other):
            assert ours_called(other, image()) == 0
        assert ours_called(other, image()) > 0
        with disabled(nn.Sequential(other, model)):
            assert ours_called(other, image()) == ours_called(model, image()) == 0
        assert ours_called(model, image()) == 0


@torch.no_grad()
def test_a_copy_of_a_feature_extractor_keeps_its_modes():
    """torchvision's copies of itself begin in training mode."""
    extract = importlib.import_module("torchvision.models.feature_extraction").create_feature_extractor
    copied = optimize(extract(small(), ["layer2", "fc"]), inplace=False)
    assert not any(module.training for module in copied.modules())


class OfBytes(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() / 255)


def takes_bytes_by_a_hook(model: Any) -> None:
    model.conv1.register_forward_pre_hook(lambda conv, args: (args[0].float() / 255,))


def takes_bytes_by_a_layer(model: Any) -> None:
    model.conv1.__class__ = OfBytes


@torch.no_grad()
@pytest.mark.parametrize("change", [takes_bytes_by_a_hook, takes_bytes_by_a_layer])
def test_who_takes_bytes_by_a_hook_or_a_layer_still_does(change):
    pixels, model = (image() * 50 + 120).clamp(0, 255).byte(), small()
    change(model)
    expected = model(pixels)
    close(optimize(model)(pixels), expected)
    with disabled(model):
        close(model(pixels), expected)


@torch.no_grad()
def test_disabled_reaches_compiled_code():
    torch._dynamo.reset()
    model, x, seen = optimize(small()), image(), []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append({node.target for node in graph.graph.nodes if "resnet_triton" in str(node.target)})
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(x)
    with disabled(model):
        compiled(x)
    compiled(x)
    assert [bool(operators) for operators in seen] == [True, False]
    torch._dynamo.reset()


@torch.no_grad()
def test_disabled_exports_operators_of_pytorch():
    """As torch.onnx.export needs them."""
    model = optimize(small())

    def ours() -> list[str]:
        program = torch.export.export(model, (image(),))
        return [name for node in program.graph.nodes if "resnet_triton" in (name := str(node.target))]

    assert ours()
    with disabled(model):
        assert not ours()
