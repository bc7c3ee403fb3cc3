"""The command line: what it prints where, its exit codes, and one line for whatever is wrong with the input."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from resnet_triton import ops
from resnet_triton.support import vision
from resnet_triton.tools import cli, predict

PIL_Image = pytest.importorskip("PIL.Image")
sklearn_datasets = pytest.importorskip("sklearn.datasets")
pytest.importorskip("rich")
models = vision.torchvision().models
PACKAGE = Path(cli.__file__).parents[1]
PHOTOS = [Path(sklearn_datasets.__file__).parent / "images" / name for name in ("china.jpg", "flower.jpg")]
GREY = (200, 200, 200)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process."""

    def call(*arguments: object) -> Outcome:
        code = cli.main([str(a) for a in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


def fails(outcome: Outcome, *words: str, code: int = 2) -> None:
    assert outcome.code == code
    assert outcome.out == ""
    assert re.fullmatch(r"resnet-triton: error: [^\n]+\n", outcome.err), outcome.err
    for word in words:
        assert word in outcome.err


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    """What `predict --json` printed: an object a line."""
    return [json.loads(line) for line in outcome.out.splitlines()]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random weights of torchvision's ResNet-18 with ten classes."""
    torch.manual_seed(0)
    return models.resnet18(num_classes=10).state_dict()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, state: dict[str, torch.Tensor]) -> Path:
    path = tmp_path_factory.mktemp("weights") / "ten.pt"
    torch.save(state, path)
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "grey.png"
    PIL_Image.new("RGB", (40, 30), GREY).save(path)
    return path


# --- the command itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", "doctor", "predict", "demo", "bench", "compare", "codegen", "report", "tune"])
def test_help(run: Run, command: str) -> None:
    outcome = run(*command.split(), "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"usage: resnet-triton {command}".rstrip())


def test_module_survives_a_closed_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-m", "resnet_triton", "--help"], cwd=PACKAGE.parent, env=buffered, stdout=writer, stderr=-1
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_module_survives_without_a_stdout() -> None:
    command = shlex.join([sys.executable, "-m", "resnet_triton", "--version"])
    done = subprocess.run(f"exec {command} >&-", shell=True, cwd=PACKAGE.parent, stderr=-1)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "COMMAND"),
        (["paint"], "paint"),
        (["predict"], "IMAGE"),
        (["predict", "a.png", "--topk", "0"], "positive"),
        (["predict", "a.png", "--kernels", "cudnn"], "cudnn"),
        (["predict", "a.png", "--device", "toaster"], "toaster"),
    ],
)
def test_wrong_arguments(run: Run, arguments: list[str], word: str) -> None:
    fails(run(*arguments), word)


def test_debug_shows_the_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ["predict", "a.png", "--device", "toaster"]
    with pytest.raises(ValueError, match="toaster"):
        run(*wrong, "--debug")
    monkeypatch.setenv("RESNET_TRITON_DEBUG", "1")
    with pytest.raises(ValueError, match="toaster"):
        run(*wrong)


def test_how_a_command_ends(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends_with(error: BaseException) -> Outcome:
        monkeypatch.setattr(predict, "predict", lambda *_, **__: (_ for _ in ()).throw(error))
        return run("predict", "a.png")

    assert ends_with(KeyboardInterrupt()) == (130, "", "")
    fails(ends_with(MemoryError()), "this machine has too little free memory")
    fails(ends_with(torch.OutOfMemoryError("CUDA out of memory")), "the GPU has too little free memory")
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        ends_with(ZeroDivisionError())


def test_missing_packages(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for package, command, installs in (
        ("safetensors.torch", ["predict", "a.png", "--weights", "w.safetensors"], "safetensors"),
        ("PIL", ["predict", "a.png"], "pillow"),
        ("rich", ["doctor"], "rich, or use --json"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        fails(run(*command), package.partition(".")[0], f"pip install {installs}\n")


# --- predict ---------------------------------------------------------------------------------------------------------


def test_predict_agrees_with_torchvision(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = models.resnet18().eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "random.pth")
    options = ["--topk", 3, "--json", "--device", "cpu"]
    outcome = run("predict", *PHOTOS, "--weights", tmp_path / "random.pth", "--classes", "imagenet", *options)
    assert outcome.code == 0
    answer = rows(outcome)
    weights = models.ResNet18_Weights.IMAGENET1K_V1
    for photo, got in zip(PHOTOS, answer, strict=True):
        with PIL_Image.open(photo) as image, torch.inference_mode():
            wanted = model(weights.transforms()(image)[None])[0].softmax(0).topk(3)
        assert got["file"] == str(photo)
        assert [top["index"] for top in got["top"]] == wanted.indices.tolist()
        assert [top["probability"] for top in got["top"]] == pytest.approx(wanted.values.tolist(), rel=1e-4)
        assert [top["label"] for top in got["top"]] == [weights.meta["categories"][i] for i in wanted.indices]
    assert re.fullmatch(r"\d+ layer calls ran on Triton kernels, \d+ on PyTorch\n", outcome.err)


def test_predict_in_batches_and_in_words(run: Run, checkpoint: Path, picture: Path) -> None:
    odd = picture.with_name("[red]\x1b[2J.png")
    shutil.copy(picture, odd)
    outcome = run(
        "predict", *[picture] * 3, odd, "--weights", checkpoint, "--batch", 2, "--topk", 99, "--device", "cpu"
    )
    assert outcome.code == 0
    assert "[red]\\x1b[2J.png" in re.sub(r"\s", "", outcome.out)
    assert outcome.out.count("%") == 40


def test_folders(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Path, picture: Path) -> None:
    for name in (
        "b/2.JPG",
        "b/1.png",
        "b/.hidden.png",
        ".cache/3.png",
        "a/4.tiff",
        "closed/5.png",
        "notes.txt",
        "z.gif",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(picture, tmp_path / name)
    (tmp_path / "a" / "empty").mkdir()
    scandir = os.scandir

    def denied(path: str) -> Any:  # a mode would not stop root
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    classify = "--weights", checkpoint, "--device", "cpu", "--json"
    outcome = run("predict", tmp_path, picture, tmp_path / "a" / "empty", *classify)
    assert outcome.code == 2
    found = {Path(row["file"]).relative_to(tmp_path).as_posix(): row.get("error") for row in rows(outcome)}
    good = ["grey.png", "z.gif", "a/4.tiff", "b/1.png", "b/2.JPG"]
    assert list(found) == [*good, "closed", "a/empty"]
    assert not any(found[name] for name in good)
    assert found["closed"] == "Permission denied; expected a folder to read"
    assert found["a/empty"].startswith("no images in this folder, expected files ending in .jpg, ")


def test_a_checkpoint_names_its_classes_and_image_size(
    run: Run, tmp_path: Path, state: dict[str, torch.Tensor], picture: Path
) -> None:
    torch.save({"state_dict": state, "image_size": 32, "categories": list("abcdefghij")}, tmp_path / "small.pt")
    assert predict.find_classifier(str(tmp_path / "small.pt")).transforms(PIL_Image.open(picture)).shape == (3, 32, 32)
    outcome = run("predict", picture, "--weights", tmp_path / "small.pt", "--json", "--kernels", "torch", "--topk", 1)
    ((top,),) = (answer["top"] for answer in rows(outcome))
    assert top["label"] == "abcdefghij"[top["index"]]


@pytest.mark.gpu
def test_predict_on_the_kernels(run: Run, picture: Path, checkpoint: Path) -> None:
    answers = []
    for kernels in ("torch", "triton"):
        outcome = run("predict", picture, "--weights", checkpoint, "--json", "--topk", 10, "--kernels", kernels)
        assert outcome.code == 0
        answers.append({top["label"]: top["probability"] for top in rows(outcome)[0]["top"]})
    assert answers[0] == pytest.approx(answers[1], abs=1e-2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("picture.ppm", ["JPEG", "not an image"]),  # an image, of a format that is not on the list
        ("truncated.jpg", ["cannot be decoded", "truncated"]),
        ("absent.jpg", ["No such file"]),
    ],
)
def test_a_bad_image_is_named_and_the_others_go_on(
    run: Run, tmp_path: Path, checkpoint: Path, picture: Path, name: str, words: list[str]
) -> None:
    (tmp_path / "picture.ppm").write_bytes(b"P6 1 1 255 abc")
    (tmp_path / "truncated.jpg").write_bytes(PHOTOS[0].read_bytes()[:20000])
    path = tmp_path / name
    fails(run("predict", path, "--weights", checkpoint, "--device", "cpu"), str(path), *words)
    outcome = run("predict", picture, path, picture, "--weights", checkpoint, "--device", "cpu", "--json", "--batch", 2)
    first, bad, last = rows(outcome)
    assert outcome.code == 2
    assert (bad["file"], first["top"]) == (str(path), last["top"])
    assert f"resnet-triton: error: {path}: {bad['error']}\n" in outcome.err
    assert outcome.err.endswith("\n0 layer calls ran on Triton kernels, 18 on PyTorch\n"), "one batch of two"


def test_unknown_weights(run: Run, monkeypatch: pytest.MonkeyPatch, picture: Path) -> None:
    monkeypatch.chdir(picture.parent)
    for weights, word in (
        ("IMAGENET1K_V9", "expected one of IMAGENET1K_V1, DEFAULT, or a checkpoint"),
        ("grey.png", "expected a file of torch.save or safetensors"),
        (".", "not a regular file, expected a checkpoint"),
    ):
        fails(run("predict", picture, "--weights", weights), weights, word)
    fails(run("predict", "absent.png", "--weights", "DEFAULT"), "absent.png")  # found before a download


State = dict[str, Any]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"state_dict": s, "categories": ["one"]}, ["categories", "10"]),
        (lambda s: {"state_dict": s, "image_size": True}, ["image_size", "1 to 4096", "True"]),
        (
            lambda s: {**s, "fc.weight": s["fc.weight"][:1], "fc.bias": s["fc.bias"][:1]},
            ["one output", "torch.sigmoid"],
        ),
        (lambda s: {"student": s, "teacher": {k: v + 1 for k, v in s.items()}}, ["'student' and 'teacher'", "key"]),
        (lambda s: {**s, "bn1.running_var": s["bn1.running_var"] * -1}, ["NaN"]),  # in the scores
    ],
)
def test_bad_checkpoints(
    run: Run, tmp_path: Path, picture: Path, state: State, change: Callable[[State], Any], words: list[str]
) -> None:
    torch.save(change(state), tmp_path / "bad.pt")
    fails(run("predict", picture, "--weights", tmp_path / "bad.pt", "--device", "cpu"), "bad.pt", *words)


def test_a_model_and_its_average(run: Run, tmp_path: Path, picture: Path, state: State) -> None:
    plain, average = ({**state, "fc.bias": 1e4 * torch.eye(10)[favourite]} for favourite in (1, 2))
    torch.save({"state_dict": plain, "state_dict_ema": average}, tmp_path / "timm.pth.tar")
    options = ["--weights", tmp_path / "timm.pth.tar", "--device", "cpu", "--json", "--topk", 1]
    for key, index in (([], 2), (["--key", "state_dict"], 1)):
        outcome = run("predict", picture, *options, *key)
        assert [top["index"] for top in rows(outcome)[0]["top"]] == [index]
        assert ("took the average, 'state_dict_ema'" in outcome.err) == (not key)


@pytest.mark.parametrize("outputs", [10, 1000])
def test_only_who_knows_the_classes_names_them(run: Run, tmp_path: Path, picture: Path, outputs: int) -> None:
    """Many networks have 1000 classes."""
    torch.manual_seed(0)
    torch.save(models.resnet18(num_classes=outputs).state_dict(), tmp_path / "w.bin")
    (tmp_path / "names.txt").write_text("\n".join(f"größe {i}" for i in range(outputs)) + "\n", encoding="utf-8")
    command = ["predict", picture, "--weights", tmp_path / "w.bin", "--device", "cpu", "--json", "--topk", 1]

    def label(*more: object) -> tuple[str, int, bool]:
        outcome = run(*command, *more)
        (top,) = rows(outcome)[0]["top"]
        return top["label"], top["index"], "w.bin does not name its classes" in outcome.err

    name, index, noted = label()
    assert (name, noted) == (str(index), True)
    assert label("--classes", tmp_path / "names.txt") == (f"größe {index}", index, False)
    if outputs == 1000:
        imagenet = models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
        assert label("--classes", "imagenet") == (imagenet[index], index, False)
    else:
        fails(run(*command, "--classes", "imagenet"), "imagenet: 1000 class names", str(outputs))
        fails(run(*command, "--classes", picture), "grey.png", "a class name a line")


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor(run: Run) -> None:
    outcome = run("doctor", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    findings = json.loads(outcome.out)
    assert findings["versions"]["torch"] == torch.__version__
    assert findings["self_test"]["backend"] == ("cuda" if torch.cuda.is_available() else "interpreter")
    tested = findings["self_test"]["results"]
    assert {t["call"].partition(",")[0] for t in tested} == set(ops.OPERATORS)
    assert all(t["ok"] is not False and (t["ok"] is None) == (t["kernels"] == []) for t in tested)
    assert len(findings["layers"]) == 18


def test_doctor_launches_every_kernel_on_the_path_it_names(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    from resnet_triton.config.device import facts
    from resnet_triton.kernels.launch import Launch
    from resnet_triton.tools import self_test

    if not facts(device).has_descriptors:
        pytest.skip("no descriptors here")
    launched: list[str] = []
    real = Launch.run

    def recorded(launch: Launch) -> None:
        launched.append(launch.kernel.__name__)
        real(launch)

    monkeypatch.setattr(Launch, "run", recorded)
    paths: dict[str, set[str]] = {}
    skipped: set[str] = set()
    for case in self_test.CASES:
        launched.clear()
        result = self_test.attempt(case, device)
        if case.path.startswith("hopper") and result["ok"] is None:
            skipped.add(f"{case.path}_kernel".replace("pingpong", "conv"))  # two ways of one kernel
            continue
        assert result["ok"]
        assert result["kernels"] == launched
        paths.setdefault(case.path, set()).update(launched)
    assert paths["descriptor"] == {"pack_kernel", "stem_kernel", "conv_box_kernel"}
    assert paths["pointer"] == {"conv_pointer_kernel", "max_pool_kernel"}
    sources = (path.read_text(encoding="utf-8") for path in (PACKAGE / "kernels").glob("*.py"))
    assert set.union(skipped, *paths.values()) == {
        name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)
    }


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="plants a fault in the interpreter's process")
def test_doctor_finds_a_broken_kernel(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that tests the kernels gets a copy of the package in which one load looks a pixel too far."""
    shutil.copytree(PACKAGE, tmp_path / "resnet_triton")
    kernel = tmp_path / "resnet_triton" / "kernels" / "conv_box.py"
    source = kernel.read_text(encoding="utf-8")
    load = "desc.load([p * 2 + r, column, parity, n, c])"
    assert source.count(load) == 1
    kernel.write_text(source.replace(load, load.replace("column,", "column + 1,")), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    outcome = run("doctor", "--json")
    assert outcome.code == 1
    (wrong,) = (test for test in json.loads(outcome.out)["self_test"]["results"] if test["ok"] is False)
    assert (wrong["call"], wrong["kernels"]) == ("conv_bn_relu, 3x3/2", ["conv_box_kernel"])
    assert re.fullmatch(r"\d+ of 8192 values differ", wrong["detail"])


def test_doctor_fails_where_the_kernels_cannot_be_tested(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_triton.tools import doctor

    def crashes(module: str) -> None:
        raise RuntimeError("the process with Triton's interpreter failed: no memory")

    monkeypatch.setattr(doctor, "no_kernels", lambda where: "a reason")
    monkeypatch.setattr(doctor, "in_interpreter", crashes)
    monkeypatch.setenv("COLUMNS", "200")
    outcome = run("doctor")
    assert (outcome.code, outcome.err) == (1, "")
    for words in ("WRONG", "no memory", "layer4.1.conv2", "A kernel is wrong"):
        assert words in outcome.out
