"""What each command says of what is missing, before it works."""

from __future__ import annotations

import os
import re
import sys
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from exact import pretending

from resnet_triton.config.targets import KNOWN
from resnet_triton.support import files, vision
from resnet_triton.support.names import find_device, use_device
from resnet_triton.tools import ask, cli
from resnet_triton.tools.arguments import parser

for name in ("PIL.Image", "sklearn.datasets", "rich", "triton"):
    pytest.importorskip(name)
vision.torchvision()
TABLES = {"doctor", "demo", "bench", "compare", "report", "tune"}
COMPILED = {"codegen", "report"}
ON_A_GPU = {"bench", "tune", "benchmarks.gpu"}
PICTURES = {"predict", "demo", "bench", "benchmarks.gpu", "benchmarks.gpu --rehearse"}
CACHED = {"predict", "demo", "codegen", *ON_A_GPU}

# Trouble, on a machine with a GPU or without: what is said, and which commands say it. The others go on.
TROUBLES: dict[tuple[str, bool], tuple[str, set[str]]] = {
    ("none", True): ("", set()),
    ("none", False): ("no GPU found|no device 'cuda' here", {"tune", "benchmarks.gpu"}),
    ("rich", True): ("rich", TABLES),
    ("PIL.Image", True): ("PIL", PICTURES),
    ("torchvision", True): ("torchvision", PICTURES),
    ("sklearn.datasets", True): ("sklearn", {"demo"}),
    ("no Triton", True): ("Triton is not installed", {*COMPILED, *ON_A_GPU, "demo", "benchmarks.gpu --rehearse"}),
    ("interpreted", True): ("TRITON_INTERPRET is set", {*COMPILED, *ON_A_GPU}),
    ("old GPU", True): ("cannot run on cuda: compute capability 7.5, below 8.0", ON_A_GPU),
    ("no cache", True): ("File too large, so no kernel can be compiled; set TRITON_CACHE_DIR to", CACHED),
    ("no cache", False): ("File too large, so|no GPU found", {"codegen", "tune", "benchmarks.gpu"}),
}


@pytest.mark.parametrize(("trouble", "gpu"), TROUBLES)
def test_every_command_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, trouble: str, gpu: bool) -> None:
    def full(folder: object, size: int) -> None:
        raise OSError(27, os.strerror(27), str(folder))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
    monkeypatch.setattr(ask.interpreter, "active", lambda: trouble == "interpreted")
    if trouble == "no Triton":
        monkeypatch.setattr(ask.dispatch, "HAS_TRITON", False)
    elif trouble == "no cache":
        monkeypatch.setattr(files, "probe", full)
    elif trouble in sys.modules:
        monkeypatch.setitem(sys.modules, trouble, None)
    facts = replace(KNOWN[80], arch=75) if trouble == "old GPU" else KNOWN[90]
    words, commands = TROUBLES[trouble, gpu]
    with pretending(facts) if gpu else nullcontext():
        for command in ask.NEEDS:
            has_device = command in ("predict", "demo", "bench")
            args = Namespace(json=False, **({"device": "auto"} if has_device else {}))
            if command in commands:
                with pytest.raises((ValueError, ModuleNotFoundError), match=words):
                    ask.ask(command, args)
            else:
                ask.ask(command, args)


def test_a_package_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(vision, "torchvision", broken)
    with pytest.raises(ValueError, match=r"torchvision is installed, but cannot be imported \(operator .*install it"):
        ask.ask("predict", Namespace(device="cpu"))


def test_tables_in_json_need_no_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    ask.ask("compare", Namespace(json=True))


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    found = {name: find_device(name) for name in ("auto", "cpu", "cuda", "cuda:0")}
    assert found == {name: use_device(name) for name in found}
    assert current == [torch.device("cuda:0")], "what is timed by events and streams is on it"
    assert [str(device) for device in found.values()] == ["cuda", "cpu", "cuda", "cuda:0"]
    for name in ("cuda:1", "cuda:256", "cuda:99999999999"):  # torch takes the second for its first GPU
        with pytest.raises(ValueError, match=f"no device '{name}' here, torch sees 1 GPUs; use --device cpu"):
            find_device(name)
    for name in ("cuda:", "cuda:00", "cuda:٣", "cuda\n", "cpu:0", "hip", " cpu"):
        with pytest.raises(ValueError, match=r"unknown device .*, expected auto, cpu, cuda or cuda:N"):
            find_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune for")
def test_every_command_asks_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (commands,) = (action for action in parser()._actions if action.metavar == "COMMAND")
    assert set(commands.choices or ()) == {name for name in ask.NEEDS if " " not in name and "." not in name}
    assert set(commands.choices or ()) == set(cli._COMMANDS)
    for command in cli._COMMANDS:
        monkeypatch.setitem(cli._COMMANDS, command, lambda args: 0)
    assert cli.main(["tune"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"resnet-triton: error: no GPU found, [^\n]+\n", err)
