"""The demo, with a training so short that it learns nothing: what it compares does not depend on that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_triton.support import terminal
from resnet_triton.tools import cli, demo, digits

pytest.importorskip("sklearn.datasets")
pytest.importorskip("rich")
pytest.importorskip("triton")
RECIPE = digits.Recipe(epochs=1, batch=20, train_images=40)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "resnet-triton"


def run() -> dict[str, Any]:
    return demo.run(RECIPE, kernel_images=1, device="cpu", bar=terminal.bar)


@pytest.mark.slow
def test_demo(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = run()
    assert result["failures"] == []
    assert result["images"] == 360
    assert result["accuracy_ours"] == result["accuracy_torchvision"]
    assert (result["kernel_backend"], result["kernel_images"]) == ("interpreter", 1)
    assert (result["kernel_launches"], result["kernel_fallbacks"]) == (18, 0)
    assert result["top1_agreement"] == result["kernel_top1_agreement"] == 1.0
    assert 0 <= max(result["max_abs_error"], result["kernel_max_abs_error"], result["photo_max_abs_error"]) < 1e-3

    monkeypatch.setattr(demo, "run", lambda **_: result)
    assert cli.main(["demo", "--json"]) == 0
    captured = capsys.readouterr()
    assert (json.loads(captured.out), captured.err) == (result, "")
    assert cli.main(["demo"]) == 0
    assert "checks values, says nothing about speed" in capsys.readouterr().out

    monkeypatch.setattr(demo, "run", lambda **_: {**result, "failures": ["our kernels: logits differ"]})
    assert cli.main(["demo", "--json"]) == 1
    error = "resnet-triton: error: the demo failed: our kernels: logits differ; resnet-triton doctor tests each kernel"
    assert capsys.readouterr().err == f"{error} by itself\n"

    (sample,) = cache.glob("digit-*.png")
    assert cli.main(["predict", str(sample), "--weights", result["checkpoint"], "--json", "--device", "cpu"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {top["label"] for top in answer["top"]} <= set("0123456789")
    assert sorted(path.suffix for path in cache.iterdir()) == [".png", ".pt"]


@pytest.mark.parametrize(
    ("wrong_by", "launches", "fallbacks", "wanted"),
    [
        (0.0, 18, 0, []),
        (0.0, 0, 0, ["0 layer calls on the kernels and 0 on PyTorch, expected some and none"]),
        (0.0, 17, 1, ["17 layer calls on the kernels and 1 on PyTorch, expected some and none"]),
        (0.01, 18, 0, ["kernels: logits differ by 1.0e-02, expected at most 1e-03"]),
        (float("nan"), 18, 0, ["kernels: 50.0% of the answers are torchvision's, expected 100%",
                               "kernels: logits differ by NaN, expected at most 1e-03"]),
    ],
)  # fmt: skip
def test_what_fails_the_demo(wrong_by: float, launches: int, fallbacks: int, wanted: list[str]) -> None:
    logits, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64), torch.tensor([0, 1])
    ours = demo._outcome("ours", logits, logits, labels, 1.0)
    kernels = demo._outcome("kernels", logits + torch.tensor([wrong_by, 0.0]), logits, labels, None)
    assert demo._failures(ours, kernels, 0.0, launches, fallbacks) == wanted
    json.dumps(demo.asdict(kernels), allow_nan=False)


def test_weights_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = []
    real = digits.train
    monkeypatch.setattr(digits, "train", lambda *arguments: trainings.append(1) or real(*arguments))
    data = digits.load_digits(RECIPE)

    first, path, _ = digits.trained(RECIPE, data, terminal.bar)
    assert path is not None
    assert path.parent == cache
    again, _, _ = digits.trained(RECIPE, data, terminal.bar)
    assert len(trainings) == 1
    assert all(torch.equal(again[key], value) for key, value in first.items())

    path.write_bytes(path.read_bytes()[:5000])  # damaged
    digits.trained(RECIPE, data, terminal.bar)
    assert len(trainings) == 2
    assert digits.read_checkpoint(path).image_size == 32

    another = digits.Recipe(epochs=1, batch=40, train_images=40)
    _, other, _ = digits.trained(another, data, terminal.bar)
    assert len(trainings) == 3
    assert other != path
    assert all(file.suffix == ".pt" for file in cache.iterdir())  # no temporary files


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    cache.write_text("in the way")
    state, path, notes = digits.trained(RECIPE, digits.load_digits(RECIPE), terminal.bar)
    assert path is None
    assert notes[-1].startswith(f"The weights could not be kept: {cache}: ")
    assert notes[-1].endswith("; XDG_CACHE_HOME names another folder.")
    assert "fc.weight" in state


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(ValueError, match="no home folder, expected one for a cache; set XDG_CACHE_HOME to a folder"):
        digits.cache_folder()
