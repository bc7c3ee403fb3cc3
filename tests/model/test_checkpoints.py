"""`load_checkpoint`: what people save around a ResNet's weights loads; of anything else one line says what it is."""

from __future__ import annotations

import argparse
import collections
import copy
import io
import os
import pickle
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor, nn

import resnet_triton
from resnet_triton.support import vision

torchvision = vision.torchvision()
models = torchvision.models
State = dict[str, Tensor]
OLD = {"_use_new_zipfile_serialization": False}  # as before torch 1.6


def state_of(name: str = "resnet18", start: float = 1.0, **kwargs: Any) -> State:
    """torchvision's names and shapes, a number of its own in each tensor, and next to nothing to write."""
    with torch.device("meta"):
        state = models.get_model(name, **{"num_classes": 10, **kwargs}).state_dict()
    for i, (key, value) in enumerate(state.items()):  # the same dictionary, with torch's metadata
        state[key] = torch.full((), start + i, dtype=value.dtype).expand(value.shape)
    return state


def named(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def load(content: bytes, **options: Any) -> resnet_triton.ResNet:
    return resnet_triton.load_checkpoint(io.BytesIO(content), **options)


def holds(model: nn.Module, state: State) -> bool:
    return all(torch.equal(value, state[key].to(value.dtype)) for key, value in model.state_dict().items())


class Configuration:
    """A class that whoever loads need not have."""

    def __init__(self) -> None:
        self.depth = 18


def averaged(state: State) -> State:
    return {"n_averaged": torch.tensor(3), **named("module.", state)}


def endless(data: Any) -> Any:
    data["self"] = data
    for _ in range(64):
        data = {"a": data, "b": data}
    return data


def without_counters(state: State) -> State:
    """As from before torch 0.4.1, but with the metadata of today."""
    for key in [key for key in state if key.endswith("num_batches_tracked")]:
        del state[key]
    return state


def compiled_in_part() -> State:
    model = models.resnet18(num_classes=10)
    model.layer1, model.layer2[1] = torch.compile(model.layer1), nn.DataParallel(model.layer2[1])
    return dict(zip(model.state_dict(), state_of().values(), strict=True))


FORMS: dict[str, Callable[[State], Any]] = {
    "a state_dict": lambda s: s,
    "parameters": lambda s: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()},
    "no num_batches_tracked": without_counters,
    "prefixes in any order": lambda s: named("_orig_mod.module.model._orig_mod.model.", s),
    "Lightning": lambda s: {"state_dict": named("net.", s), "pytorch-lightning_version": "2.5", "loops": {"fit": [1]}},
    "compiled in part": lambda _: compiled_in_part(),
    "FSDP": lambda s: {k.replace("layer1.", "layer1._fsdp_wrapped_module."): v for k, v in s.items()},
    "AveragedModel of DataParallel": lambda s: averaged(named("module.", s)),
    "ema_pytorch's counters": lambda s: {"initted": torch.tensor(True), "step": torch.tensor(9), **named("ema.", s)},
    "an optimizer": lambda s: {"model_state_dict": s, "epoch": 3, "optimizer": {0: {"exp_avg": s["fc.bias"]}}},
    "nested": lambda s: [{"epoch": 3}, {"checkpoint": {"network": {"weights": named("module.", s)}}}],
    "the same twice": lambda s: {"best": s, "last": s},
    "holds itself, and doubles 64 times": lambda s: endless({"state_dict": s}),
    "argparse.Namespace": lambda s: {"model": s, "args": argparse.Namespace(out=Path("x"), on=torch.device("cpu"))},
    "NumPy": lambda s: {"net": s, "acc": numpy.float64(0.9), "losses": numpy.arange(3.0), "kind": numpy.dtype("f4")},
    "foreign objects": lambda s: {"state": s, "config": Configuration(), "failed": OSError("x"), "schedule": print},
    "defaultdict": lambda s: {"model": s, "history": collections.defaultdict(list, loss=[0.5])},
    "wrapped, before 1.6": lambda s: {"net": named("module.", s)},
    "bfloat16, batch norms in float32": lambda s: {k: v.bfloat16() if v.dim() > 1 else v for k, v in s.items()},
    "float8": lambda s: {k: v.to(torch.float8_e4m3fn) if v.dim() > 1 else v for k, v in s.items()},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_what_people_save_loads(form: str) -> None:
    options = OLD if form.endswith("before 1.6") else {}
    content = FORMS[form](state_of())
    model = load(saved(content, **options))
    assert (type(model), model.training) == (resnet_triton.ResNet, False)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    expected = state_of()
    if form in ("bfloat16, batch norms in float32", "float8"):
        expected = {k: content[k].to(v.dtype) for k, v in expected.items()}
    if form == "no num_batches_tracked":
        expected |= {k: torch.tensor(0) for k in expected if k.endswith("num_batches_tracked")}
    assert holds(model, expected)


@pytest.mark.parametrize(("safetensors", "suffix"), [(False, ".safetensors"), (True, ".pth")])
def test_the_suffix_does_not_matter(tmp_path: Path, suffix: str, safetensors: bool) -> None:
    path = tmp_path / f"größe 1{suffix}"
    if safetensors:
        library = pytest.importorskip("safetensors.torch")
        library.save_file({k: v.contiguous() for k, v in named("module.", state_of()).items()}, path)
    else:
        torch.save(state_of(), path)
    assert holds(resnet_triton.load_checkpoint(path if safetensors else str(path)), state_of())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "resnext50_32x4d", "resnext101_64x4d"],
)
def test_the_file_says_which_resnet_it_is(name: str) -> None:
    state = state_of(name, num_classes=3)
    model = load(saved({"state_dict": named("module.", state)}))
    assert holds(model, state)
    with torch.device("meta"):
        expected = models.get_model(name, num_classes=3)
    described = [[repr(m) for m in net.modules() if not list(m.children())] for net in (model, expected)]
    assert described[0] == described[1]  # strides and groups, too


def test_answers_are_torchvisions() -> None:
    torch.manual_seed(0)
    theirs = models.resnext50_32x4d(num_classes=4).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(load(saved({"model": theirs.state_dict()}))(x), theirs(x))


@pytest.mark.parametrize(("name", "doubted"), [("resnetblur18", True), ("resnet18.a1_in1k", False), ("mine", False)])
def test_a_file_that_names_another_model_is_doubted(name: str, doubted: bool) -> None:
    """Anti-aliased pooling has no weights."""
    state = state_of()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert holds(load(saved({"arch": name, "state_dict": state})), state)
    assert [f"names its model {name!r}" in str(w.message) for w in said] == [True] * doubted


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        (lambda a, b: {"state_dict": a, "state_dict_ema": b}, ("state_dict", "state_dict_ema")),  # timm's
        (lambda a, b: {"model_ema": averaged(b), "model": a}, ("model", "model_ema")),  # torchvision's
        (lambda a, b: {"state_dict": named("model.", a) | named("ema_model.module.", b)},
         ("state_dict.model", "state_dict.ema_model")),
        (lambda a, b: {**a, "ema": b}, ("", "ema")),
    ],
)  # fmt: skip
def test_a_model_and_its_average(content: Callable[[State, State], Any], keys: tuple[str, str]) -> None:
    plain, average = state_of(), state_of(start=500.0)
    file = saved(content(plain, average))
    with pytest.warns(
        UserWarning, match=re.escape(f"took the average, {keys[1]!r}; the key {keys[0]!r} takes the other")
    ):
        assert holds(load(file), average)
    assert holds(load(file, key=keys[0]), plain)  # and no warning
    assert holds(load(file, key=keys[1]), average)
    with pytest.raises(ValueError, match="holds no ResNet with the key 'head', expected '"):
        load(file, key="head")


def test_a_key_where_the_weights_lie_at_the_top() -> None:
    with pytest.raises(ValueError, match=r"holds no key 'ema', for its weights lie at the top; leave the key out$"):
        load(saved(state_of()), key="ema")
    assert holds(load(saved(state_of()), key=""), state_of())


def test_several_that_nobody_can_choose_between() -> None:
    a, b = state_of(), state_of(start=500.0)
    queue = {"module.queue": torch.ones(8, 4), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    file = saved({"state_dict": named("module.encoder_q.", a) | named("module.encoder_k.", b) | queue})  # MoCo's
    with pytest.raises(ValueError, match=r"holds 2 ResNets, 'state_dict.encoder_q' and 'state_dict.encoder_k'; choose"):
        load(file)
    assert holds(load(file, key="state_dict.encoder_k"), b)


def without(part: str, state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith(part)}


def quantised(state: State) -> State:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from torch 2.13 on it is deprecated
        return {**state, "fc.weight": torch.quantize_per_tensor(state["fc.weight"], 0.1, 0, torch.qint8)}


NO_CHECKPOINTS: dict[str, tuple[Callable[[State], Any], str]] = {
    "one of uint8": (lambda s: {**s, "fc.bias": s["fc.bias"].byte()}, r"1 unusable \(fc.bias is torch.uint8, expected"),
    "quantised": (quantised, "fc.weight is torch.qint8, expected floating-point"),
    "sparse": (lambda s: {**s, "fc.weight": s["fc.weight"].to_sparse()}, "fc.weight has the layout torch.sparse_coo"),
    "meta": (lambda s: {k: v.to("meta") for k, v in s.items()}, "122 unusable .conv1.weight is on the meta device"),
    "NaN": (lambda s: {**s, "bn1.bias": s["bn1.bias"] * torch.nan}, "bn1.bias holds NaN or infinity"),
    "too large": (lambda s: {**s, "fc.bias": s["fc.bias"].double() * 1e200}, "fc.bias holds NaN or infinity"),
    "CIFAR's stem": (lambda s: {**s, "conv1.weight": s["conv1.weight"][..., :3, :3]}, r"\(64, 3, 3, 3\) instead of"),
    "0 classes": (lambda s: {**s, "fc.weight": s["fc.weight"][:0], "fc.bias": s["fc.bias"][:0]}, "0 classes, expec"),
    "no classifier": (lambda s: without("fc", s), r"a ResNet-18, but 2 missing .fc.weight, fc.bias.; without a .*Fal"),
    "more than a ResNet": (lambda s: {**named("encoder.", s), "projector.weight": s["fc.weight"]},
                           r"1 unexpected \(projector.weight\); the key 'encoder' takes the ResNet alone"),
    "a block is missing": (lambda s: without("layer4.1", s), r"\(2, 2, 2, 1\) BasicBlocks, expected \(2, 2, 2, 2\) as"),
    "a stage is missing": (lambda s: without("layer1", s), "no ResNet with conv1.weight and layer1.0.conv1.weight"),
    "DenseNet": (lambda _: state_of("densenet121"), "another architecture: features.conv0.weight.*timm.create_model"),
    "with a wrapper and without": (lambda s: s | named("module.", s), "conv1.weight twice, once as module.conv1."),
    "a pickled model": (lambda _: {"m": models.resnet18()}, r"pickled model \(torchvision\S*.ResNet\).*save model"),
    "empty": (lambda _: {}, r"no tensors \(dict\), expected a state_dict"),
    "blocked code": (lambda s: {"state_dict": s, "x": os.system}, "cannot be read safely .*system.* is blocked"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_CHECKPOINTS)
def test_what_cannot_be_loaded_is_said(case: str) -> None:
    content, words = NO_CHECKPOINTS[case]
    refused(saved(content(state_of())), words)


def refused(content: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        load(content)
    assert re.fullmatch(r"checkpoint: [^\n]{10,250}", str(raised.value))


def script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(1)), buffer)
    return buffer.getvalue()


BEGINS = "expected a file of torch.save or safetensors, it begins "
REMEDY = "cannot be read safely .*; if it is complete"
OTHER_FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "LFS": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
        f"{BEGINS}b'version https://git-",
    ),
    "HTML": (lambda: b"\n<!DOCTYPE html>\n<html><title>Sign in", f"{BEGINS}.*<!DOCTYPE html>"),
    "empty": (lambda: b"", f"{BEGINS}b''"),
    "pickle": (lambda: pickle.dumps({"model": numpy.ones(3)}), f"{BEGINS}b'.x80"),
    "TorchScript": (script, r"torchscript checkpoint.*save model.state_dict\(\)"),
    "empty zip": (lambda: b"PK\5\6" + bytes(18), REMEDY),
    "half": (lambda: saved(state_of())[:9000], REMEDY),
    "half of one before 1.6": (lambda: saved(state_of(), **OLD)[:5000], REMEDY),
    "a model before 1.6": (lambda: saved(nn.ReLU(), **OLD), REMEDY),
    "a foreign object before 1.6": (lambda: saved({"a": state_of(), "b": Configuration()}, **OLD), REMEDY),
    "newer protocol": (lambda: saved(state_of(), pickle_protocol=4), REMEDY),
    "half a safetensors": (lambda: (80).to_bytes(8, "little") + b'{"conv1.weight":{"dtype"', "damaged safetensors"),
}


@pytest.mark.parametrize("case", OTHER_FILES)
def test_what_is_no_checkpoint_is_called_by_its_name(case: str) -> None:
    content, words = OTHER_FILES[case]
    refused(content(), words)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"/absent\.pt"):
        resnet_triton.load_checkpoint(tmp_path / "absent.pt")
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"{path}: not a regular file, expected a checkpoint"):
            resnet_triton.load_checkpoint(path)
    anything: Any = {}
    torch.save({}, tmp_path / "real.pt")
    with open(__file__) as text, tempfile.NamedTemporaryFile("w+") as empty, tempfile.NamedTemporaryFile("r+") as real:
        shutil.copy(tmp_path / "real.pt", real.name)
        for anything in ({}, text, empty, real):
            with pytest.raises(TypeError, match=r"file is a \w+, expected a path or a binary file"):
                resnet_triton.load_checkpoint(anything)
    anything = io.RawIOBase()
    with pytest.raises(ValueError, match=r"^checkpoint: cannot seek, expected a file that can, as io\.BytesIO\(file"):
        resnet_triton.load_checkpoint(anything)


class Malicious(NamedTuple):
    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "before-1.6"])
def test_no_code_runs_and_torchs_list_stays(tmp_path: Path, options: dict[str, bool]) -> None:
    before = torch.serialization.get_safe_globals()
    target = tmp_path / "was here"
    inert = {"state_dict": state_of(), "extra": Malicious(shutil.copyfile, (__file__, str(target)))}
    if options:
        refused(saved(inert, **options), "cannot be read safely")
    else:
        assert holds(load(saved(inert)), state_of())
    for function in (Path.touch, os.mkdir):
        for content in (Malicious(function, (target,)), {"model": state_of(), "extra": Malicious(function, (target,))}):
            refused(saved(content, **options), "cannot be read safely")
    refused(pickle.dumps(Malicious(Path.touch, (target,))), BEGINS)
    assert not target.exists()
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_threads_load_at_once_and_warnings_are_heard_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the other, with its own stand-ins and filters."""
    files = [saved({"model": state_of(), "extra": extra}) for extra in (argparse.Namespace(), Configuration())]
    torch_load, done = torch.load, []
    thread = threading.Thread(target=lambda: done.append(holds(load(files[1]), state_of())))

    def meanwhile(*args: Any, **options: Any) -> Any:
        if thread.ident is None:
            thread.start()
            thread.join(0.5)
        return torch_load(*args, **options)

    monkeypatch.setattr(torch, "load", meanwhile)
    with warnings.catch_warnings():
        before = list(warnings.filters)
        assert holds(load(files[0]), state_of())
        thread.join()
        assert list(warnings.filters) == before
    assert done == [True]


def test_a_file_that_was_loaded_may_go(tmp_path: Path) -> None:
    """The model's memory is its own: it can be written to, trained, and outlives the file."""
    torch.save(state_of(), tmp_path / "a.pt")
    model = resnet_triton.load_checkpoint(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(b"")
    with torch.no_grad():
        model.fc.weight[0, 0] = 7
    assert model.fc.weight[0, 1] != 7
    copy.deepcopy(model).train()(torch.rand(2, 3, 32, 32)).sum().backward()


def test_the_same_model_by_each_of_its_names() -> None:
    """Also where there are more names than anybody could look at, or no end of them."""
    state = state_of()
    model = {"model": state}
    data: Any = {"student": model, "teacher": model, "best": state}
    for name in ("self", ""):
        data[name] = data
    for _ in range(64):  # twice as many names each time
        data = {"a": data, "b": data}
    file, way = saved(data), "a." * 32 + "b." * 32
    for key in ("student.model", "teacher.model", "best", "self.teacher.model"):
        assert holds(load(file, key=way + key), state)
    with pytest.raises(ValueError, match=r"holds no ResNet with the key 'a.student', expected 'a.a"):
        load(file, key="a.student")
