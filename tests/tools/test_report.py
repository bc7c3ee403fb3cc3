"""Which kernels layers get, for GPUs that are not here; and the line about a GPU on which no tile was timed."""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from compiling import seen_by_compilers
from exact import pretending

pytest.importorskip("rich")
pytest.importorskip("triton")

from resnet_triton import config, models, optimize
from resnet_triton.bench import command
from resnet_triton.bench.results import Results
from resnet_triton.codegen.compiler import Specialisation, specialise
from resnet_triton.config import table
from resnet_triton.config.choice import forget
from resnet_triton.config.targets import KNOWN
from resnet_triton.coverage import report as report_of
from resnet_triton.ops import interpreter
from resnet_triton.ops.trace import trace
from resnet_triton.tools import cli, doctor

H200 = KNOWN[90]
H100_PCIE = replace(H200, name="NVIDIA H100 PCIe", sm_count=114)
MIG = replace(H200, name="NVIDIA H200 MIG 1g.18gb", sm_count=16)
UNTUNED = "no tile was timed on {}, a model of an H200 chooses them; resnet-triton tune times them there"
MANY = {"hopper_conv", "hopper_pingpong", "hopper_conv64"}
FEW = {"hopper_few"}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices are those for a compiler: nothing here launches."""
    monkeypatch.setattr(interpreter, "active", lambda: False)


@pytest.mark.usefixtures("compiled")
def test_every_convolution_has_its_kernel_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From 32 images on, the engine for many images has them all; below, it and the one for few have most."""
    arguments = ["report", "--arch", "sm_90", "--models", "resnet18,resnet50", "--batches", "1,8,32,256"]
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gpu"], found["sms"], found["untuned"]) == ("NVIDIA H200", 132, UNTUNED.format("NVIDIA H200"))
    kernels: dict[tuple[str, int], list[str]] = {}
    for row in found["rows"]:
        if row["operator"] == "conv_bn_relu":
            (name,) = row["kernels"]
            kernels.setdefault((row["model"], row["batch"]), []).append(name)
    for (model, batch), names in kernels.items():
        assert len(names) == {"resnet18": 16, "resnet50": 48}[model], "shortcuts of ResNet-18 are in their blocks"
        if batch >= 32:
            assert set(names) <= MANY, (model, batch, Counter(names))
        elif model == "resnet18" or batch == 8:
            assert sum(name in MANY | FEW for name in names) > 0.75 * len(names), (model, batch, Counter(names))
    assert len(kernels) == 8

    monkeypatch.setenv("COLUMNS", "160")
    arguments[arguments.index("resnet18,resnet50")] = "resnet18"
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("conv_bn_relu" in line for line in lines) == 16
    assert sum(line.split()[:1] == ["conv1"] and line.count("hopper_stem") == 4 for line in lines) == 1
    last = next(line for line in lines if "layer4.1.conv2" in line)
    assert last.split()[2::2] == ["hopper_few", "hopper_conv", "hopper_conv", "hopper_pingpong"]
    assert lines[-2:] == ["A tile is pixels x filters / programs that share it.", found["untuned"]]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("facts", [H200, H100_PCIE, MIG], ids=lambda facts: str(facts.sm_count))
@pytest.mark.parametrize("batch", [1, 32, 256])
def test_a_warp_specialised_kernel_has_a_program_for_each_multiprocessor(facts, batch):
    calls = [c for c in trace(models.resnet18().eval(), (batch, 3, 224, 224), torch.float16) if c.operation is not None]
    launches = [launch for call in calls for launch in call.launches(facts) if launch.is_gluon]
    if batch > 1:
        assert len(launches) == 17
        assert max(launch.grid[0] for launch in launches) == facts.sm_count
    for launch in launches:
        assert launch.grid[0] <= facts.sm_count
        if "items" in launch.arguments:
            assert launch.grid == (min(facts.sm_count, launch.arguments["items"]),)


@pytest.mark.usefixtures("compiled")
def test_a_batch_size_compiles_nothing_but_tiles_that_are_new():
    """A layer in one tile is one compilation, for any number of images."""
    found: dict[object, set[Specialisation]] = {}
    model = models.resnet18().eval()
    for batch in (1, 2, 8, 31, 32, 129, 200, 255, 256):
        for call in trace(model, (batch, 3, 224, 224), torch.float16):
            tile = config.lookup(call.shape, H200) if call.operator == "conv_bn_relu" else None
            for launch in call.launches(H200) if call.operation is not None else ():
                key = (
                    call.name,
                    launch.kernel.__name__,
                    tile or (launch.arguments.get("BLOCK_M"), launch.arguments.get("BLOCK_K")),
                )
                found.setdefault(key, set()).add(specialise(seen_by_compilers(launch)))
    assert len(found) > 100
    assert {key for key, different in found.items() if len(different) > 1} == set()


def tune(shape, facts):
    """Write a table with the heuristic's choice for one shape, as the tuner might."""
    entry = table.Entry(config.conv_heuristic(shape, facts))
    table.save(table.Table(facts.name, entries={shape: entry}), table.path_of(facts.name))
    forget()


@pytest.mark.parametrize("tuned", [False, True], ids=["untuned", "tuned"])
@pytest.mark.parametrize("facts", [KNOWN[80], H100_PCIE, MIG, H200], ids=lambda facts: facts.name)
def test_a_gpu_without_a_tuned_table(facts, tuned, monkeypatch, capsys, device, folder):
    """`report`, `doctor` and `bench` say so, in one line; they are silent about one with a table."""
    line = UNTUNED.format(facts.name)
    if tuned:
        tune(config.ConvShape(1, 64, 8, 8, 64, 3, 3, padding=(1, 1)), facts)
    assert config.untuned(facts) == (None if tuned else line)
    with pretending(facts):
        model = optimize(models.resnet18(num_classes=10).eval().to(device), kernels="triton")
        assert str(report_of(model)).splitlines().count(line) == (not tuned)

        monkeypatch.setattr(command, "plan", lambda **_: SimpleNamespace(device=torch.device("cuda"), budget=1))
        monkeypatch.setattr(command, "run", lambda *_: Results())
        monkeypatch.setattr(cli, "fail", lambda failures: 0)
        monkeypatch.setattr("resnet_triton.tools.ask.ask", lambda *_: None)
        assert cli.main(["bench", "--json"]) == 0
        notes = [text for text in capsys.readouterr().err.splitlines() if text.startswith("note: ")]
        assert notes == ([] if tuned else [f"note: {line}"])

        monkeypatch.setattr(doctor, "no_kernels", lambda where: None)
        monkeypatch.setattr(doctor, "self_test", lambda device: [])
        monkeypatch.setattr(doctor, "_machine_code", lambda *_: {"triton": None, "hazards": []})
        monkeypatch.setenv("COLUMNS", "200")
        assert cli._doctor(Namespace(json=False)) == 0
        assert ("no tile was timed" in capsys.readouterr().out) == (not tuned)


@pytest.mark.usefixtures("compiled", "folder")
def test_tiles_that_were_timed_are_counted(capsys):
    calls = trace(models.resnet18().eval(), (1, 3, 224, 224), torch.float16)
    tune(next(call.shape for call in calls if call.tiled), H200)
    assert cli.main(["report", "--arch", "sm_90", "--batches", "1,8"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "2 of these 32 tiles were timed on NVIDIA H200; a cost model chose the others."


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arch", "sm_1"], "cannot compile for 'sm_1', expected one of sm_80"),
        (["--models", "vgg"], "no model 'vgg', expected some of resnet18"),
        (["--dtypes", "int8"], "no dtype 'int8', expected some of float16"),
    ],
)
def test_what_is_not_known(arguments, words, capsys):
    assert cli.main(["report", *arguments]) == 2
    assert words in capsys.readouterr().err
