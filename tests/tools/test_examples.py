"""What users copy or look at: the examples, README's lines of Python, the pictures and the links between pages."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import resnet_triton
from resnet_triton.ops import interpreter
from resnet_triton.support import vision
from resnet_triton.tools import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("kernels/*.md"), *ROOT.glob("benchmarks/*.md")])


def run(name: str, *arguments: str) -> None:
    runpy.run_path(str(ROOT / "examples" / name))["main"](arguments)


def test_classify_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.new("L", (40, 30)).save(tmp_path / "grey.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "broken.png").write_bytes((tmp_path / "grey.png").read_bytes()[:50])
    run("classify_folder.py")
    run("classify_folder.py", str(tmp_path))
    run("classify_folder.py", str(tmp_path), "--batch", "1")
    with pytest.raises(SystemExit, match="absent: no pictures"):
        run("classify_folder.py", str(tmp_path / "absent"))
    output, notes = capsys.readouterr()
    assert [line.partition(":")[0] for line in output.splitlines()] == ["china.jpg", "flower.jpg"] + ["grey.png"] * 2
    assert notes.count("not trained and its labels mean nothing") == 3
    assert notes.count("broken.png: the image cannot be decoded") == 2
    assert notes.count("\n") == 5


WRONG = ("classify_folder --batch 0", "classify_folder --weights trained.ckpt", "compare_with_compile --runs 0",
         "compare_with_compile --size 0", "ray_data --workers 0", "finetune --images 0")  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_option_is_one_line(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, option, value = wrong.split()
    with pytest.raises(SystemExit):
        run(f"{name}.py", option, value)
    assert re.search(rf"error: argument {option}: [^\n]*'{value}'[^\n]*\n$", capsys.readouterr().err)


def test_find_neighbours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("find_neighbours.py")
    pairs = [re.findall(r"(\w+) \d/\d", line) for line in capsys.readouterr().out.splitlines()]
    assert len(pairs) == 30
    assert sum(piece == neighbour for piece, neighbour in pairs) > 20  # by chance it would be 14

    from PIL import Image

    with pytest.raises(SystemExit, match="0 pictures, expected at least two"):
        run("find_neighbours.py", str(tmp_path))
    for name, shade in (("a", 40), ("b", 45), ("c", 200)):
        Image.effect_noise((60, 50), shade).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    run("find_neighbours.py", str(tmp_path))
    output, notes = capsys.readouterr()
    assert len(output.splitlines()) == 3
    (tmp_path / "c.png").unlink()
    run("find_neighbours.py", str(tmp_path))  # opposite to each other, but none their own neighbour
    assert [line.partition(" (")[0] for line in capsys.readouterr().out.splitlines()] == [
        "a.png -> b.png", "b.png -> a.png",
    ]  # fmt: skip
    assert re.fullmatch(r".*broken.png: the image cannot be decoded .*\n", notes)


def test_finetune(capsys: pytest.CaptureFixture[str]) -> None:
    run("finetune.py", "--images", "65")  # one is no batch to normalise over
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0].split()[0] for line in lines[:3]] == ["before", "epoch", "after"]
    assert "layer1.0.conv1" in "\n".join(lines)


@pytest.mark.slow  # torch.compile
def test_compare_with_compile(capsys: pytest.CaptureFixture[str]) -> None:
    run("compare_with_compile.py", "--batch", "1", "--size", "32", "--runs", "1")
    lines = capsys.readouterr().out.splitlines()
    errors = [float(value) for line in lines for value in re.findall(r"within (\S+) of fp64", line)]
    assert len(errors) == 3
    assert max(errors) < (1e-2 if torch.cuda.is_available() else 1e-5)
    assert sum("images/s" in line for line in lines) == 3


def test_ray_data_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=re.escape("this example needs Ray: pip install '.[ray]'")):
        run("ray_data.py", ".")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two nodes on this machine, each with two CPUs and, as Ray believes, a GPU for a model."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        pytest.skip("CUDA_VISIBLE_DEVICES hides all GPUs, and Ray is to believe in one")
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="`make slow` installs Ray")
    import ray
    from PIL import Image

    for i in range(8):
        Image.effect_noise((60 + i, 50), 30 * i).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "1.png").read_bytes()[:500])
    torch.manual_seed(0)
    torch.save(resnet_triton.resnet18(num_classes=10).state_dict(), tmp_path / "ten.pt")
    arguments = [str(tmp_path), "--weights", str(tmp_path / "ten.pt"), "--batch", "2"]
    assert cli.main(["predict", *arguments, "--json"]) == 2
    wanted = capsys.readouterr().out

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # a token would be written to the home folder
    node = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": 100 << 20}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**node)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        run("ray_data.py", *arguments, "--workers", "2")
    finally:
        ray.shutdown()
        cluster.shutdown()
    rows = [
        {row["file"]: row for row in map(json.loads, out.splitlines())} for out in (capsys.readouterr().out, wanted)
    ]
    assert len(rows[0]) == 9
    for file, row in rows[1].items():
        assert rows[0][file].keys() == row.keys()
        assert rows[0][file].get("error") == row.get("error")
        pairs = zip(rows[0][file].get("top", []), row.get("top", []), strict=True)
        assert all(ours == {**top, "probability": pytest.approx(top["probability"], abs=1e-3)} for ours, top in pairs)


def test_every_example_is_tested() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in (ROOT / "examples").iterdir() if f'run("{path.name}"' not in tests] == []


def test_lines_of_the_readme_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(resnet_triton.resnet34(num_classes=3).state_dict(), "trained.ckpt")
    lines = "".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL))
    where, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    yours, theirs = (vision.torchvision().models.resnet18().eval().to(where, dtype) for _ in range(2))
    names: dict[str, Any] = {"yours": yours, "theirs": theirs}
    exec(lines.replace("224, 224, device", "64, 64, device"), names)
    assert names["logits"].shape == (8, 1000)
    assert isinstance(names["yours"], resnet_triton.ResNet)
    assert len(names["trained"].layer3) == 6
    assert "layer4.1.conv2" in capsys.readouterr().out
    with torch.inference_mode():
        assert names["model"]((names["images"] * 255).byte()).isfinite().all()


@pytest.mark.skipif(not (torch.cuda.is_available() or interpreter.active()), reason="kernels cannot run here")
def test_lines_of_the_kernels_readme_run() -> None:
    lines = "".join(re.findall(r"```python\n(.*?)```", (ROOT / "kernels/README.md").read_text("utf-8"), re.DOTALL))
    names: dict[str, Any] = {}
    if not torch.cuda.is_available():
        interpreter.repair()
        lines = lines.replace('"cuda"', '"cpu"').replace("8, 64, 56, 56", "1, 64, 8, 8")
    exec(lines, names)
    conv = torch.nn.functional.conv2d(names["x"].double(), names["weight"].double(), padding=1) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(names["out"].double(), (conv + names["other"]).relu(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        target = page.parent / link if link else page
        assert "://" in link or target.exists(), link
        if anchor and "://" not in link:
            headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{link}#{anchor}"


def test_every_public_name_is_documented() -> None:
    public = {name: getattr(resnet_triton, name) for name in resnet_triton.__all__}
    module = resnet_triton.functional
    public |= {n: f for n, f in vars(module).items() if getattr(f, "__module__", None) == module.__name__}
    assert len(public) > 20
    assert [name for name, value in public.items() if not (value.__doc__ or "").strip()] == []
