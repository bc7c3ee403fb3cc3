"""Full disks, folders of others, interrupts while writing: an old file survives, and the error names the new one."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_results import failed, row

from resnet_triton.bench import command, output, results
from resnet_triton.bench.results import Ceiling
from resnet_triton.bench.runner import OutOfTime, Phase, Run, Steps
from resnet_triton.codegen import report as codegen
from resnet_triton.config import ConvConfig, ConvShape, choice, lookup, table
from resnet_triton.config.conv import is_legal
from resnet_triton.config.targets import KNOWN
from resnet_triton.support import files
from resnet_triton.tools import cli, digits

resource = pytest.importorskip("resource")
GPU = KNOWN[90]
SHAPE = ConvShape(32, 64, 56, 56, 64, 3, 3, padding=(1, 1))
CONFIG = ConvConfig(64, 32, 32, 4, 2, (2, 1, 32), swap=True)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may become longer than 100 bytes: a real failure of the system's, in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- every file that is written --------------------------------------------------------------------------------------

Writer = Callable[[Path, str], object]


def save_table(folder: Path, driver: str) -> None:
    table.save(table.Table(GPU.name, driver, entries={SHAPE: table.Entry(CONFIG)}), folder / "gpu.json")


def write_codegen(folder: Path, version: str) -> None:
    codegen.write({"triton": version * 100, "rows": []}, folder)


def add_to_table(folder: Path, driver: str) -> None:
    if not (folder / "gpu.json").exists():
        save_table(folder, "old")
    entry = table.Entry(CONFIG)
    table.add(table.Table(GPU.name, driver), replace(SHAPE, n=64), entry, folder / "gpu.json")


WRITERS: dict[str, Writer] = {
    "a file": lambda folder, text: files.replace(folder / "file", text * 100),
    "entry of a tuned table": add_to_table,
    "report": lambda folder, name: output.write(results.Results([row(name)]), folder),
    "codegen": write_codegen,
    "demo's weights": lambda folder, text: digits._keep(folder / "digits.pt", text.encode() * 100),
}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("fault", ["full disk", "interrupt", "interrupt at the end"])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fault: str
) -> None:
    WRITERS[kind](tmp_path, "old")
    before = content(tmp_path)
    assert before
    if fault == "full disk":
        with full_disk(), pytest.raises(OSError, match="File too large") as raised:
            WRITERS[kind](tmp_path, "new")
        assert Path(raised.value.filename).name in before
    else:
        step = "fsync" if fault == "interrupt" else "replace"
        monkeypatch.setattr(os, step, lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            WRITERS[kind](tmp_path, "new")
        monkeypatch.undo()
    assert content(tmp_path) == before
    WRITERS[kind](tmp_path, "new")
    assert content(tmp_path) != before
    assert set(content(tmp_path)) == set(before)


def test_modes_links_and_the_umask_are_respected(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    new, old = tmp_path / "elsewhere" / "new", tmp_path / "elsewhere" / "old"
    old.write_text("old")
    old.chmod(0o604)
    before = os.umask(0o027)
    try:
        for file in (new, old):
            (tmp_path / file.name).symlink_to(file)
            files.replace(tmp_path / file.name, "text")
    finally:
        os.umask(before)
    assert all((tmp_path / file.name).is_symlink() and file.read_text() == "text" for file in (new, old))
    assert [file.stat().st_mode & 0o777 for file in (new, old)] == [0o640, 0o604]


def test_a_full_disk_costs_the_demo_nothing_but_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn.datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(digits, "train", lambda *arguments: {"fc.weight": digits.torch.ones(100)})
    with full_disk():
        state, path, notes = digits.trained(digits.Recipe(), None, lambda *arguments: None)  # type: ignore[arg-type]
    assert list(state) == ["fc.weight"]
    assert path is None
    assert "could not be kept" in notes[-1]


# --- what was measured -----------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark that takes no time and finds one row."""
    pytest.importorskip("matplotlib")

    def steps(run: Run) -> Steps:
        yield "step", lambda: [[row("measured")]]

    monkeypatch.setattr(command, "phases", lambda plan: [Phase("models", steps)])


def once(action: Callable[[], Any]) -> Callable[[Run], Steps]:
    def steps(run: Run) -> Steps:
        yield "step", action

    return steps


def late(run: Run) -> Steps:
    raise OutOfTime("no time left")
    yield


def stopped() -> Any:
    raise KeyboardInterrupt


NOTHING: dict[str, tuple[int, list[Callable[[Run], Steps]]]] = {
    "Ctrl-C after the ceilings": (130, [once(lambda: [[Ceiling("copy", bytes_per_s=1.0)]]), once(stopped)]),
    "no time": (1, [late]),
    "every step fails": (1, [once(lambda: 1 / 0), once(lambda: 1 / 0)]),
    "every alternative fails": (1, [once(lambda: [[failed("ours", 1, "no memory"), failed("eager", 1, "no memory")]])]),
}


@pytest.mark.parametrize("way", NOTHING)
def test_earlier_results_stay_until_something_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    pytest.importorskip("matplotlib")
    code, steps = NOTHING[way]
    bench = ["bench", "--device", "cpu", "--json", "--out"]
    phases = [Phase(f"phase {i}", some) for i, some in enumerate(steps)]
    monkeypatch.setattr(command, "phases", lambda plan: phases)
    output.write(results.Results([row("earlier")]), tmp_path / "used")
    before = content(tmp_path / "used")
    for name in ("used", "new"):
        assert cli.main([*bench, str(tmp_path / name)]) == code
        nothing = "error: nothing was timed, and nothing written; a larger --budget gives more\n"
        _, err = capsys.readouterr()
        said = nothing in err, "stopped; nothing was timed, and nothing written\n" in err, "written:" in err
        assert said == (code == 1, code == 130, False)
    assert (content(tmp_path / "used"), content(tmp_path / "new")) == (before, {})

    phases.insert(0, Phase("timed", once(lambda: [[row("new")]])))
    cli.main([*bench, str(tmp_path / "used")])
    assert results.load(tmp_path / "used").rows[0].alternative == "new"
    assert all(content(tmp_path / "used")[name] != before[name] for name in before)


@pytest.mark.usefixtures("measured")
def test_a_file_of_somebody_elses_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text("[]")
    assert cli.main(["bench", "--device", "cpu", "--json", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), content(tmp_path)) == ("", 1, {"results.json": b"[]"})
    assert err.endswith("; move it away, or choose another folder with --out\n")


@pytest.mark.usefixtures("measured")
def test_a_disk_that_becomes_full_costs_no_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "results.json"))

    monkeypatch.setattr(files, "replace", full)
    assert cli.main(["bench", "--suites", "model", "--device", "cpu", "--json", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert [found["alternative"] for found in json.loads(out)["rows"]] == ["measured"]
    assert "results.json yet: No space left on device" in err, "said when it was found"
    last = err.splitlines()[-1]
    assert last == f"resnet-triton: error: {tmp_path}/results.json: No space left on device"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_output_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results.save(results.Results([row("ours", ours=True)]), tmp_path / "results.json")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["compare", "--json", str(tmp_path), str(tmp_path)]) == 2
        monkeypatch.undo()
    assert capsys.readouterr().err == "resnet-triton: error: output: No space left on device\n"


# --- Triton's cache --------------------------------------------------------------------------------------------------


def test_doctor_warns_of_a_full_disk_and_of_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_triton.tools import doctor

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert doctor._cache()["warning"] is None
    with full_disk():
        assert ": File too large, so no kernel can be compiled; set TRITON_CACHE_DIR" in doctor._cache()["warning"]
    (tmp_path / "cache").symlink_to("cache")
    assert "Too many levels of symbolic links" in doctor._cache()["warning"]


# --- tuned tables ----------------------------------------------------------------------------------------------------


def test_numbers_of_a_table_never_break_a_lookup(folder: Path) -> None:
    """All that the schema lets through: the extremes of each field, one and two at a time."""
    extremes = [-8, 0, 1, 3, 10**30]
    names = ["block_m", "block_k", "block_c", "num_warps", "num_stages", "split_k"]
    boxes = [None, (0, 0, 0), (1, 1, 64), (-1, -1, 64), (10**30,) * 3]
    few = ConvConfig(32, 64, 64, 4, 1, (4, 8, 1), kernel="hopper_few")
    for start in (CONFIG, replace(CONFIG, box=None), few, *(replace(few, kernel=k) for k in ("hopper_conv64", "?"))):
        tried = [replace(start, **{a: x, b: y}) for a in names for b in names for x in extremes for y in extremes]
        tried += [replace(config, box=box) for config in tried[::7] for box in boxes]
        for config in tried:
            assert is_legal(config, SHAPE, GPU) in (True, False)
        known = {replace(SHAPE, n=n): table.Entry(c) for n, c in enumerate(tried[:: len(tried) // 48], 16)}
        table.save(table.Table(GPU.name, entries=known), folder / "nvidia-h200.json")
        choice.forget()
        for n in (0, 1, 31, 32, 33, 100):
            assert is_legal(lookup(replace(SHAPE, n=n), GPU), replace(SHAPE, n=n), GPU) or n == 0


def test_two_tuners_of_one_table_lose_nothing(tmp_path: Path) -> None:
    """Each knows the table as it was when it began; both write at once."""
    path = tmp_path / "gpu.json"
    table.save(table.Table(GPU.name, entries={replace(SHAPE, n=999): table.Entry(CONFIG)}), path)

    def tune(first: int) -> None:
        known = table.load(path)
        ready.wait()
        for n in range(first, 20, 2):
            known = table.add(known, replace(SHAPE, n=n), table.Entry(CONFIG), path)

    ready = threading.Barrier(2)
    tuners = [threading.Thread(target=tune, args=(first,)) for first in (1, 2)]
    for tuner in tuners:
        tuner.start()
    for tuner in tuners:
        tuner.join()
    assert {shape.n for shape in table.load(path).entries} == {*range(1, 20), 999}
