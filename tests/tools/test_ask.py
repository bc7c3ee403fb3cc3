"""What each command says of what is missing, before it works: exit codes and messages, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from exact import pretending
from synthetic_results import row

from resnet_triton.bench import results
from resnet_triton.config.targets import KNOWN
from resnet_triton.support import files, vision
from resnet_triton.support.names import find_device
from resnet_triton.tools import ask, cli
from resnet_triton.tools.arguments import parser

for name in ("PIL.Image", "sklearn.datasets", "rich", "matplotlib", "triton"):
    pytest.importorskip(name)
ROOT = Path(__file__).parents[2]

# Runs commands one after another, those of each condition in a fork of its own: what all import is imported once.
# Long work, which would follow, is an error of its own.
RUN = """
import contextlib, io, json, os, sys, warnings
import sklearn.utils, torch
conditions, base = json.loads(sys.argv[1])

class Without:  # finds nothing, as if not installed; a finder that raised would break find_spec() too
    def __init__(self, finder, absent):
        self.finder, self.absent = finder, absent

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.absent else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

def begins(*_, **__):
    raise ValueError("the work begins")

def answers(absent, environ, lines):
    os.environ.update(environ)
    sys.meta_path[:] = [Without(finder, absent) for finder in sys.meta_path]
    from benchmarks import gpu
    from resnet_triton.bench import command
    from resnet_triton.codegen import report
    from resnet_triton.tools import cli, demo, doctor, tune

    command.phases = report.compile_all = demo.load_digits = tune.run = gpu.run = begins
    doctor._interpreted_self_test = lambda: []
    os.chdir(base)
    for line in lines:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                code = gpu.main(line[1:]) if line[0] == "gpu" else cli.main(line)
            except BaseException as error:
                code = repr(error)
        yield code, out.getvalue(), err.getvalue()

warnings.filterwarnings("ignore", ".*multi-threaded, use of fork")  # PyTorch's threads, in none of which we are
for condition in conditions:
    if os.fork():
        os.wait()
        continue
    try:
        print(json.dumps(list(answers(*condition))), flush=True)
    finally:
        os._exit(0)
"""


class Condition(NamedTuple):
    """Packages that are absent, the environment, and for each command its exit code and what it says."""

    absent: str
    environ: dict[str, str]
    lines: dict[str, tuple[int, str]]


PREDICT = "predict a.png --weights ten.pt --topk 1"
BENCH = "bench --device cpu --out new"
CODEGEN = "codegen --archs 90 --batches 1"
REPORT = "report --arch 90 --batches 1"
GPU = "gpu --out gpu"
BEGINS = 2, "error: the work begins\n"
NO_GPU = 2, "error: no GPU found, expected one (resnet-triton doctor says why)\n"
NO_TRITON = 2, "error: Triton is not installed, expected it for the kernels; install triton (Linux only)\n"
NO_TORCHVISION = 2, "error: torchvision is not installed; install it with: pip install torchvision\n"
NO_PILLOW = 2, "error: PIL is not installed; install it with: pip install pillow\n"
INTERPRETED = 2, "error: TRITON_INTERPRET is set, expected kernels that are compiled; unset it\n"
NO_CUDA = 2, "error: no device 'cuda' here, torch sees 0 GPUs; use --device cpu\n"
UNKNOWN = 2, "', expected auto, cpu, cuda or cuda:N\n"
WORKS = 0, ""
ELSEWHERE = "; move it away, or choose another folder with --out\n"

CONDITIONS = {
    "no GPU": Condition("", {}, {
        "doctor --json": (0, '"usable": false'), PREDICT: (0, "layer calls ran on Triton kernels"),
        f"{PREDICT} --device cuda": NO_CUDA, "demo": BEGINS, "demo --device cuda": NO_CUDA, BENCH: BEGINS,
        "bench --out new --device cuda": NO_CUDA,
        "bench --out new --device cuda:256": (2, "error: no device 'cuda:256' here, torch sees 0 GPUs"),
        "compare old new": WORKS, CODEGEN: BEGINS, "tune": NO_GPU, "tune --out x.json": NO_GPU, GPU: NO_GPU,
        REPORT: WORKS,
        f"{GPU} --rehearse": BEGINS,
        f"{PREDICT} --device gpu": UNKNOWN, "demo --device mps": UNKNOWN, "bench --device CUDA": UNKNOWN,
        # empty and foreign results
        "compare empty new": (1, "nothing was compared: no row of ours has p50 in both results\n"),
        "compare new empty --fail-if p50:+5%": (1, "ours: is missing in the new results\n"),
        "compare foreign new": (2, 'results.json: no results of bench, expected an object with "format"'),
        "compare new blank": (2, "error: blank/results.json: not JSON (Expecting value"),
        "compare new a.png": (2, "error: a.png: not JSON ("),
        "compare new nowhere": (2, "error: nowhere: No such file or directory\n"),
        "bench --device cpu --out foreign": (2, ELSEWHERE), "bench --device cpu --out blank": (2, ELSEWHERE),
        "gpu --rehearse --out foreign": (2, ELSEWHERE), "gpu --rehearse --out blank": (2, ELSEWHERE),
        f"{CODEGEN} --budget foreign/results.json": (2, 'expected an object with "triton" and "rows"'),
        f"{CODEGEN} --budget blank/results.json": (2, "error: blank/results.json: not JSON (Expecting value"),
        f"{CODEGEN} --out file/new": (2, "error: file/new: Not a directory\n"),
    }),
    "no Triton": Condition("triton", {}, {
        "doctor --json": (0, "Triton is not installed"), PREDICT: (0, "0 layer calls ran on Triton kernels"),
        "demo": NO_TRITON, BENCH: BEGINS, "compare old new": WORKS, CODEGEN: NO_TRITON, "tune": NO_GPU, GPU: NO_GPU,
        REPORT: NO_TRITON,
        f"{GPU} --rehearse": NO_TRITON,
    }),
    "no torchvision": Condition("torchvision", {}, {
        "doctor --json": (0, '"torchvision": null'), PREDICT: NO_TORCHVISION, "demo": NO_TORCHVISION,
        BENCH: NO_TORCHVISION, "compare old new": WORKS, CODEGEN: BEGINS, "tune": NO_GPU, GPU: NO_TORCHVISION,
        f"{GPU} --rehearse": NO_TORCHVISION,
    }),
    "no extras": Condition("rich PIL matplotlib", {}, {
        "doctor": (2, "error: rich is not installed; install it with: pip install rich, or use --json"),
        "doctor --json": WORKS, f"{PREDICT} --json": NO_PILLOW, "demo --json": NO_PILLOW,
        f"{BENCH} --json": NO_PILLOW, "compare old new --json": WORKS,
        CODEGEN: BEGINS,
    }),
    "TRITON_INTERPRET": Condition("", {"TRITON_INTERPRET": "1"}, {
        "doctor --json": WORKS,
        "demo": BEGINS, BENCH: BEGINS, "compare old new": WORKS, CODEGEN: INTERPRETED, "tune": NO_GPU, GPU: NO_GPU,
        REPORT: INTERPRETED,
    }),
    # Whoever runs this may be root, who can write everywhere but into a file.
    "read-only home": Condition("", {"HOME": "{base}/file"}, {
        "doctor --json": (0, "Not a directory, so no kernel can be compiled; set TRITON_CACHE_DIR to a folder"),
        PREDICT: WORKS, "demo": BEGINS, "compare old new": WORKS, "tune": NO_GPU, GPU: NO_GPU, BENCH: BEGINS,
        "predict a.png": (2, "; ResNet18_Weights.IMAGENET1K_V1 is kept there, set TORCH_HOME to a folder that takes"),
        CODEGEN: (2, "file: Not a directory, so no kernel can be compiled; set TRITON_CACHE_DIR to a folder"),
        "bench --device cpu --out file/new": (2, "error: file/new: Not a directory\n"),
        "gpu --out file/new --rehearse": (2, "error: file/new: Not a directory\n"),
    }),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, a checkpoint, results of today and yesterday, and what is none."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("base")
    Image.new("RGB", (40, 30)).save(folder / "a.png")
    torch.manual_seed(0)
    state = vision.torchvision().models.resnet18(num_classes=10).state_dict()
    torch.save({"state_dict": state, "image_size": 32}, folder / "ten.pt")
    for name, rows in {"old": [row("ours", ours=True)], "new": [row("ours", ms=1.01, ours=True)], "empty": []}.items():
        (folder / name).mkdir()
        results.save(results.Results(rows), folder / name / results.FILE)
    for name, text in {"foreign": '{"benchmarks": []}', "blank": ""}.items():
        (folder / name).mkdir()
        (folder / name / results.FILE).write_text(text)
    (folder / "file").touch()
    return folder


@pytest.mark.slow
def test_every_command_asks_first(base: Path) -> None:
    ours = ("TRITON_", "TORCH", "XDG_", "CUDA_", "RESNET_TRITON_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    before = {path: path.stat().st_mtime_ns for path in base.rglob("*") if path.is_file()}
    conditions = [
        (absent.split(), {key: value.format(base=base) for key, value in environ.items()}, [*map(shlex.split, lines)])
        for absent, environ, lines in CONDITIONS.values()
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([conditions, str(base)])], capture_output=True, text=True, cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    said = [json.loads(line) for line in done.stdout.splitlines()]
    for (name, condition), answers in zip(CONDITIONS.items(), said, strict=True):
        for (line, (code, message)), (got, out, err) in zip(condition.lines.items(), answers, strict=True):
            assert got == code, (name, line, err)
            assert message in (err if code else out + err), (name, line)
            if code == 2:  # in the last line; matplotlib has something to say of a home that it cannot write to
                assert (out, [line.partition(": ")[0] for line in err.splitlines() if "atplotlib" not in line]) == (
                    "",
                    ["resnet-triton"],
                ), (name, line)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not (base / "new" / "results.html").exists()


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One GPU, as far as torch says, and kernels that would be compiled."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ask.interpreter, "active", lambda: False)
    with pretending(KNOWN[90]):
        yield


@pytest.mark.usefixtures("one_gpu")
def test_devices_by_name() -> None:
    found = {name: find_device(name) for name in ("auto", "cpu", "cuda", "cuda:0")}
    assert [str(device) for device in found.values()] == ["cuda", "cpu", "cuda", "cuda:0"]
    for name in ("cuda:1", "cuda:256", "cuda:99999999999"):  # torch takes the second for its first GPU
        with pytest.raises(ValueError, match=f"no device '{name}' here, torch sees 1 GPUs; use --device cpu"):
            find_device(name)
    for name in ("cuda:", "cuda:00", "cuda:٣", "cuda:1.0", "cuda\n", "cpu:0", "hip", "auto:0", " cpu"):
        with pytest.raises(ValueError, match=r"unknown device .*, expected auto, cpu, cuda or cuda:N"):
            find_device(name)


SAYS = {
    "no Triton": "Triton is not installed, expected it",
    "interpreted": "TRITON_INTERPRET is set, expected kernels that are compiled",
    "old": "our kernels cannot run on cuda: compute capability 7.5, below 8.0; resnet-triton doctor says more",
    "no cache": "File too large, so no kernel can be compiled; set TRITON_CACHE_DIR to",
}
ON_A_GPU = {
    "predict": ["no cache"], "demo": ["no Triton", "no cache"],
    "bench": list(SAYS), "tune": list(SAYS), "benchmarks.gpu": list(SAYS),
}  # fmt: skip


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("trouble", SAYS)
def test_on_a_gpu_kernels_have_to_compile_and_run(monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    def full(folder: Path, size: int) -> None:
        raise OSError(27, os.strerror(27), str(folder))

    if trouble == "no Triton":
        monkeypatch.setattr(ask.dispatch, "HAS_TRITON", False)
    elif trouble == "interpreted":
        monkeypatch.setattr(ask.interpreter, "active", lambda: True)
    elif trouble == "no cache":
        monkeypatch.setattr(files, "probe", full)
    old = pretending(replace(KNOWN[80], arch=75)) if trouble == "old" else nullcontext()
    with old:
        for command, troubles in ON_A_GPU.items():
            args = Namespace(json=True, **({} if command in ("tune", "benchmarks.gpu") else {"device": "cuda"}))
            if trouble in troubles:
                with pytest.raises(ValueError, match=re.escape(SAYS[trouble])):
                    ask.ask(command, args)
            else:
                ask.ask(command, args)  # PyTorch does it


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libGL.so.1: cannot open"), OSError("libcudart.so"), RuntimeError("a\nb"),
        ModuleNotFoundError("No module named 'scipy'", name="scipy"),
    ],
)  # fmt: skip
def test_a_broken_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def broken(name: str) -> Any:
        raise error

    monkeypatch.setattr(ask.importlib, "import_module", broken)
    assert cli.main(["predict", "a.png", "--json"]) == 2
    why = str(error).partition("\n")[0]
    said = f"resnet-triton: error: PIL is installed, but cannot be imported ({why}); install it again\n"
    assert capsys.readouterr() == ("", said)


def test_no_temporary_folder_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    assert cli.main(["bench", "--device", "cpu"]) == 2
    said = "No usable temporary directory found in ['/nowhere']; set TMPDIR to a folder that you can write to"
    assert capsys.readouterr() == ("", f"resnet-triton: error: {said}\n")


def test_every_command_runs_and_says_what_it_needs() -> None:
    (commands,) = (action for action in parser()._actions if action.metavar == "COMMAND")
    assert set(commands.choices or ()) == {name for name in ask.NEEDS if not name.startswith("benchmarks")}
    assert set(commands.choices or ()) == set(cli._COMMANDS)
