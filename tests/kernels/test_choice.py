"""What a lookup finds: a table's entry, unless the table is not beyond doubt, or the heuristic's."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from exact import conv_call, generator, plan

from resnet_triton.config import (
    ConvConfig,
    ConvShape,
    candidates,
    choice,
    conv_heuristic,
    is_legal,
    lookup,
    table,
    targets,
)
from resnet_triton.config.device import DeviceFacts
from resnet_triton.config.targets import KNOWN

SHAPE = ConvShape(32, 64, 56, 56, 64, 3, 3, padding=(1, 1))
CONFIG = ConvConfig(128, 64, 64, 4, 3)
BOX = replace(CONFIG, box=(1, 4, 32), swap=True)
STRIDED = replace(SHAPE, stride=(2, 2))
GPU = KNOWN[90]
FACTS = table.Facts(90, 132, 227 * 1024, sm_warps=64, sm_programs=32, sm_shared_memory=228 * 1024)
TUNED = ConvConfig(64, 32, 32, 4, 2, (2, 1, 32), swap=True)


# --- tables ----------------------------------------------------------------------------------------------------------


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "nvidia-h200.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def document(shape: Any = SHAPE, chosen: Any = TUNED, **changes: Any) -> str:
    """A table of one entry."""
    entry = {"shape": asdict(shape) if isinstance(shape, ConvShape) else shape,
             "config": asdict(chosen) if isinstance(chosen, ConvConfig) else chosen}  # fmt: skip
    return json.dumps({"schema": 1, "gpu": GPU.name, "triton": triton.__version__, "entries": [entry], **changes})


def test_shipped_tables_are_sound() -> None:
    devices = {table.slug(device.name): device for device in KNOWN.values()}
    for path in table.FOLDER.glob("*.json"):
        known = table.sound(path)
        assert known is not None, "and no warning"
        for shape, entry in known.entries.items():
            assert path.stem not in devices or is_legal(entry.config, shape, devices[path.stem]), (path.name, shape)


def test_a_gpu_is_known_by_its_file() -> None:
    assert list(KNOWN) == [80, 86, 89, 90, 100, 120]
    assert DeviceFacts("NVIDIA H200", 90, 132, 227 * 1024) == GPU
    assert targets.TARGETS[90].known == FACTS


def test_an_architecture_is_the_first_gpu_by_name(tmp_path: Path) -> None:
    def keep(gpu: str, facts: table.Facts | None) -> None:
        table.save(table.Table(gpu, facts=facts), tmp_path / f"{table.slug(gpu)}.json")

    keep("NVIDIA H200", FACTS)
    keep("NVIDIA L4", replace(FACTS, arch=89))
    keep("NVIDIA H100 PCIe", None)
    assert [target.facts.name for target in targets.read(tmp_path).values()] == ["NVIDIA L4", "NVIDIA H200"]
    keep("NVIDIA H100 PCIe", replace(FACTS, sm_count=114))
    assert targets.read(tmp_path)[90].facts == DeviceFacts("NVIDIA H100 PCIe", 90, 114, 227 * 1024)
    (tmp_path / "nvidia-l4.json").write_text("half a ta")
    with pytest.warns(UserWarning, match="nvidia-l4.json: not JSON"):
        assert list(targets.read(tmp_path)) == [90]


def test_file_names() -> None:
    assert table.slug(GPU.name) == "nvidia-h200"
    assert re.fullmatch(r"[a-z0-9-]+", table.slug("../../etc/NVIDIA\0 H100 (80 GB)"))


def test_exact_entry_wins(folder: Path) -> None:
    write(folder, document())
    assert conv_heuristic(SHAPE, GPU) != TUNED
    assert lookup(SHAPE, GPU) == TUNED
    for other in (replace(SHAPE, n=65), replace(SHAPE, residual=True), replace(SHAPE, dtype="bfloat16")):
        assert lookup(other, GPU) == conv_heuristic(other, GPU)
    assert lookup(SHAPE, KNOWN[100]) == conv_heuristic(SHAPE, KNOWN[100])  # another GPU


TIMING = table.Timing(3.5, 3.25, 4.0, 5.0, 20, triton.__version__, "2026-01-31")


def test_entry_may_leave_out_defaults_and_carry_a_timing(folder: Path) -> None:
    entry = {"shape": {"n": 1, "c": 64, "h": 8, "w": 8, "k": 64}, "timing": {**asdict(TIMING), "p80_us": 4},
             "config": {"block_m": 64, "block_k": 64, "block_c": 64, "num_warps": 4, "num_stages": 2}}  # fmt: skip
    path = write(folder, document(entries=[entry]))
    expected = table.Entry(ConvConfig(64, 64, 64, 4, 2), TIMING)
    assert table.load(path).entries == {ConvShape(1, 64, 8, 8, 64): expected}


def test_unaligned_tensors_ignore_a_box(folder: Path) -> None:
    write(folder, document())
    assert lookup(SHAPE, GPU, descriptors=False) == conv_heuristic(SHAPE, GPU, descriptors=False)


def test_illegal_entry_is_ignored(folder: Path) -> None:
    write(folder, document(SHAPE, replace(CONFIG, block_m=256, block_k=256, num_stages=8)))
    assert lookup(SHAPE, GPU) == conv_heuristic(SHAPE, GPU)


def test_no_table(folder: Path) -> None:
    assert lookup(SHAPE, GPU) == conv_heuristic(SHAPE, GPU)


def changed(**changes: Any) -> str:
    """The good table with changed fields of its entry's shape."""
    return document({**asdict(SHAPE), **changes})


def timed(timing: Any) -> str:
    """The good table with a timing."""
    return document(entries=[{**json.loads(document())["entries"][0], "timing": timing}])


HOSTILE: dict[str, tuple[str | bytes, str]] = {
    "half a file": (document()[:-20], "not JSON"),
    "binary": (bytes(range(256)) * 100, "not JSON"),
    "deep nesting": ('{"schema": 1, "entries": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON"),
    "oversize": (document() + " " * (4 << 20), "expected at most 4194304 bytes"),
    "NaN": (changed(n=float("nan")), "not JSON"),
    "a key twice": (document().replace('"n": 32', '"n": 32, "n": 64'), "not JSON"),
    "a list": ("[]", 'expected an object with "schema": 1'),
    "schema 2": (document(schema=2), 'expected an object with "schema": 1'),
    "entry no object": (document(entries=[[]]), 'entry 0 must have "shape"'),
    "shape no object": (document([1, 64]), "ConvShape must be an object, got list"),
    "config incomplete": (document(SHAPE, {"block_m": 64}), "missing 4 required"),
    "unknown key": (document(SHAPE, {**asdict(TUNED), "__class__": "x"}), "unknown key '__class__' in ConvConfig"),
    "string for int": (changed(n="32"), r"ConvShape\.n must be int"),
    "float for int": (document(SHAPE, {**asdict(TUNED), "block_m": 64.0}), r"ConvConfig\.block_m must be int"),
    "bool for int": (document(SHAPE, {**asdict(TUNED), "split_k": True}), r"ConvConfig\.split_k must be int"),
    "box of floats": (document(SHAPE, {**asdict(TUNED), "box": [1.0, 2.0, 32.0]}), r"ConvConfig\.box must be tuple"),
    "pair too short": (changed(stride=[1]), r"ConvShape\.stride must be tuple"),
    "long value": (changed(dtype=["x" * 1_000_000]), r"ConvShape\.dtype must be str"),
    "facts incomplete": (document(facts={"arch": 90}), "missing 5 required"),
    "a time without an end": (timed({**asdict(TIMING), "us": 9e99}).replace("9e+99", "1e999"), r"Timing\.us must be f"),
    "Triton as a number": (timed({**asdict(TIMING), "triton": 3.7}), r"Timing\.triton must be str"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_table_is_one_short_warning_that_says_what_to_do(folder: Path, name: str) -> None:
    content, fault = HOSTILE[name]
    ignored(write(folder, content), fault)


def ignored(path: Path, fault: str) -> None:
    with pytest.warns(UserWarning, match=fault) as caught:
        assert lookup(SHAPE, GPU) == lookup(replace(SHAPE), GPU) == conv_heuristic(SHAPE, GPU)
    (warning,) = (str(w.message) for w in caught)
    assert str(path) in warning
    assert "; delete it, or mend what it says" in warning
    assert "heuristic" in warning
    assert "\n" not in warning
    assert len(warning) < 500


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (Path.mkdir, "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.symlink_to(path), "symbolic link"),
    ],
    ids=["folder", "device", "symlink loop"],
)
def test_what_is_no_file_is_ignored(folder: Path, make: Callable[[Path], object], fault: str) -> None:
    make(folder / "nvidia-h200.json")
    ignored(folder / "nvidia-h200.json", fault)


def test_another_gpus_table_is_ignored(folder: Path) -> None:
    write(folder, document(gpu="NVIDIA H100"))
    with pytest.warns(UserWarning, match=r"about 'NVIDIA H100', expected nvidia-h100\.json as its name"):
        assert lookup(SHAPE, GPU) == conv_heuristic(SHAPE, GPU)


@pytest.mark.parametrize("with_timing", [True, False])
def test_another_triton_is_warned_of_once_and_used(folder: Path, with_timing: bool) -> None:
    """An entry's own version counts, where there is one."""
    old = document(triton="3.1.4")
    if with_timing:
        old = timed({**asdict(TIMING), "triton": "3.1.4"})
    write(folder, old)
    with pytest.warns(UserWarning, match=r"nvidia-h200.json was tuned with Triton 3\.1\.4, this is"):
        assert lookup(SHAPE, GPU) == TUNED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lookup(replace(SHAPE), GPU) == TUNED
        write(folder, document(triton=triton.__version__.rpartition(".")[0] + ".99"))  # a patch release is no other
        choice.forget()
        assert lookup(SHAPE, GPU) == TUNED


def test_a_saved_table_is_the_table_that_was_saved(folder: Path) -> None:
    path = table.path_of(GPU.name)
    entries = {
        replace(SHAPE, n=2): table.Entry(TUNED),
        SHAPE: table.Entry(CONFIG, TIMING),
        replace(SHAPE, n=1): table.Entry(BOX),
    }
    saved = table.Table(GPU.name, "570.86.15", triton.__version__, torch.__version__, "2026-01-31", FACTS, entries)
    table.save(saved, path)
    assert table.load(path) == saved
    *_, first, second, third, _ = path.read_text().splitlines()
    in_order = [json.loads(line.rstrip(","))["shape"]["n"] for line in (first, second, third)]
    assert in_order == [1, 2, 32], "one line each"
    table.save(table.Table(GPU.name), path)
    assert table.load(path) == table.Table(GPU.name)
    assert [p.name for p in folder.iterdir()] == [path.name]


# --- another batch size ----------------------------------------------------------------------------------------------

WIDE = ConvConfig(128, 64, 64, 4, 4, (1, 1, 128))
AT_128 = replace(SHAPE, n=128)


def tabled(folder: Path, *entries: tuple[ConvShape, ConvConfig]) -> None:
    found = {shape: table.Entry(config) for shape, config in entries}
    table.save(table.Table(GPU.name, triton=triton.__version__, entries=found), table.path_of(GPU.name))


def test_a_near_batch_size_takes_the_tile(folder: Path) -> None:
    tabled(folder, (AT_128, WIDE))
    assert conv_heuristic(AT_128, GPU) != WIDE
    assert lookup(replace(SHAPE, n=255), GPU) == WIDE
    for n in (57, 63, 257, 1024):  # more than a factor of two away
        assert lookup(replace(SHAPE, n=n), GPU) == conv_heuristic(replace(SHAPE, n=n), GPU)
    for other in (replace(AT_128, n=120, residual=True), replace(AT_128, n=120, dtype="bfloat16")):
        assert lookup(other, GPU) == conv_heuristic(other, GPU)


def test_the_nearest_batch_size_wins(folder: Path) -> None:
    narrow = replace(WIDE, num_stages=3)
    tabled(folder, (replace(SHAPE, n=64), narrow), (AT_128, WIDE))
    assert lookup(replace(SHAPE, n=80), GPU).num_stages == 3
    assert lookup(replace(SHAPE, n=112), GPU).num_stages == 4


def test_a_box_is_fitted_to_the_batch_size(folder: Path) -> None:
    """(1, 1, 128) would compute 128 images to keep 64 of them."""
    tabled(folder, (AT_128, WIDE))
    chosen = lookup(replace(SHAPE, n=64), GPU)
    assert chosen.box is not None
    assert chosen.box[2] <= 64
    assert chosen == WIDE.on(chosen.box)
    assert is_legal(chosen, replace(SHAPE, n=64), GPU)


def test_a_tile_that_fits_worse_here_than_where_it_was_tuned_is_refused(folder: Path) -> None:
    """Tiles of 256 pixels make 98 programs of 8 images, enough for 132 SMs, but only 49 of 4 images."""
    at_8, tile = replace(SHAPE, n=8), ConvConfig(256, 64, 64, 8, 3, (4, 8, 8), swap=True)
    tabled(folder, (at_8, tile))
    assert lookup(at_8, GPU) == tile
    assert lookup(replace(SHAPE, n=7), GPU).block_m == 256
    assert candidates.adapt(tile, at_8, replace(SHAPE, n=4), GPU) is None
    assert lookup(replace(SHAPE, n=4), GPU) == conv_heuristic(replace(SHAPE, n=4), GPU)


def test_unaligned_tensors_take_only_pointers_from_another_batch_size(folder: Path) -> None:
    at_100 = replace(SHAPE, n=100)
    tabled(folder, (AT_128, WIDE))
    assert lookup(at_100, GPU, descriptors=False) == conv_heuristic(at_100, GPU, descriptors=False)
    pointers = replace(WIDE, box=None, swap=False)
    tabled(folder, (AT_128, pointers))
    choice.forget()
    assert conv_heuristic(at_100, GPU, descriptors=False) != pointers
    assert lookup(at_100, GPU, descriptors=False) == pointers


def test_an_illegal_neighbour_is_refused(folder: Path) -> None:
    tabled(folder, (AT_128, replace(WIDE, num_stages=8, block_k=256)))
    assert lookup(replace(SHAPE, n=100), GPU) == conv_heuristic(replace(SHAPE, n=100), GPU)


def test_launches_alike_look_up_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighing what may be chosen takes milliseconds. A table that is written is asked again."""
    asked = []

    def counted(shape: ConvShape, *arguments: Any, **options: Any) -> choice.Chosen:
        asked.append(shape)
        return choice.choose(shape, *arguments, **options)

    monkeypatch.setattr("resnet_triton.config.choose", counted)
    call = conv_call(generator(torch.device("cpu"), 0), ConvShape(1, 16, 4, 4, 16, 1, 1))
    for forgotten in (False, True):
        plan(call)
        plan(call)
        assert asked == [call.shape] * (1 + forgotten)
        choice.forget()
