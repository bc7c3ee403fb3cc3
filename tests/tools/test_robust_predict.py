"""Images and downloads that somebody prepared, or that broke on the way: `predict` says what is wrong, in one line."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import re
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from resnet_triton.support import images, vision
from resnet_triton.tools import cli

PIL_Image = pytest.importorskip("PIL.Image")
pytest.importorskip("rich")
torchvision = vision.torchvision()
GREY = (200, 200, 200)
DEEP = (b"\0" + struct.pack(">H", 200 * 257) * 12) * 3  # 4x3 pixels of 16 bits, in colour

# --- images ----------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes, *chunks: bytes, depth: int = 8, colour: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IDAT", zlib.compress(pixels, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(samples: bytes, *, bits: int = 8, white: int = 1, kind: int = 1, turned: int = 1) -> bytes:
    """Grey, 4x3; `white` is 0 where 0 means white, else 1; `kind` 1 unsigned, 2 signed, 3 float."""
    tags = {
        256: 4, 257: 3, 258: bits, 259: 1, 262: white, 273: 8, 274: turned, 278: 3, 279: len(samples), 339: kind,
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(samples)) + samples + struct.pack("<H", 10) + entries + bytes(4)


def saved(image: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(mode: str, value: Any) -> Any:
    return PIL_Image.new(mode, (40, 30), value)


EIGHT = "samples of other than 8 bits, or signed ones; convert it to 8 bits first"
HOSTILE = {
    "bomb.png": (png(60_000, 60_000, bytes(60_001)), "pixels; scale it down first"),
    "large.png": (png(12_000, 12_000, bytes(12_001)), "over [0-9]+ pixels"),  # of which Pillow only warns
    "sliver.png": (png(1, 1000, bytes(2000)), "1x1000 pixels, expected sides within 50:1"),
    "text-bomb.png": (
        png(4, 3, bytes(5 * 3), chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 20)))), "cannot be decoded",
    ),
    "too-few.png": (png(40, 30, bytes(100)), "cannot be decoded"),
    "cut.jpg": (saved(grey("RGB", GREY), "JPEG")[:-200], "cannot be decoded"),
    "cut.tif": (saved(grey("RGB", GREY), "TIFF", compression="tiff_lzw")[:-200], "cannot be decoded|not an image"),
    "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "empty.jpg": (b"", "not an image"),
    "grey-16.png": (saved(grey("I;16", 200 * 257), "PNG"), EIGHT),
    "grey-16.tif": (saved(grey("I;16B", 200 * 257), "TIFF"), EIGHT),
    "signed-8.tif": (tiff(bytes(12), kind=2), EIGHT),
    "float.tif": (tiff(bytes(48), bits=32, kind=3), EIGHT),
    "key-2.png": (png(4, 3, b"\0\x55" * 3, chunk(b"tRNS", b"\0\x01"), depth=2), EIGHT),
    "key-4.png": (png(4, 3, b"\0\x55\x55" * 3, chunk(b"tRNS", b"\0\x05"), depth=4), EIGHT),
    "key-16.png": (png(4, 3, DEEP, chunk(b"tRNS", b"\0\xc8" * 3), depth=16, colour=2), EIGHT),
}  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="POSIX's files")
@pytest.mark.parametrize("name", [*HOSTILE, "pipe.png", "loop.png", "/dev/zero"])
def test_hostile_images_are_refused_without_waiting(tmp_path: Path, name: str) -> None:
    content, words = HOSTILE.get(name, (b"", "not a regular file|Too many levels of symbolic links"))
    path = tmp_path / name
    if name == "pipe.png":
        os.mkfifo(path)
    elif name == "loop.png":
        path.symlink_to(path)
    elif name in HOSTILE:
        path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(ValueError, match=words) as raised:
        images.load_image(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)
    assert time.monotonic() - start < 5, "refused before it is decoded"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("16-rgb.png", png(4, 3, DEEP, depth=16, colour=2)),
        ("inverted.tif", tiff(b"\x37" * 12, white=0)),
        ("animated.gif", saved(grey("RGB", GREY), "GIF", save_all=True, append_images=[grey("RGB", 0)])),
        ("alpha.png", saved(grey("RGBA", (145, 145, 145, 128)), "PNG")),  # half of 145, half of white
        ("grey-alpha.png", saved(grey("LA", (145, 128)), "PNG")),
        ("key.png", saved(grey("RGB", GREY), "PNG", transparency=(1, 2, 3))),
        ("palette-alpha.png", saved(grey("RGBA", (145, 145, 145, 128)).quantize(4), "PNG")),
        ("cmyk.jpg", saved(grey("CMYK", (55, 55, 55, 0)), "JPEG", quality=95)),
        ("ycbcr.tif", saved(grey("YCbCr", (200, 128, 128)), "TIFF")),
        ("not a PNG.png", saved(grey("L", 200), "BMP")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusual_images_come_out_as_they_look(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    loaded = images.load_image(tmp_path / name)
    with PIL_Image.open(tmp_path / name) as stored:
        assert (loaded.mode, loaded.size) == ("RGB", stored.size)
    assert all(abs(low - 200) <= 1 and low == high for low, high in loaded.getextrema())


@pytest.mark.parametrize(
    "content",
    [
        png(4, 3, b"\0\0" * 3, chunk(b"tRNS", b"\0\0"), depth=1),
        png(4, 3, b"\0\x55\x55\x55\x55" * 3, chunk(b"tRNS", b"\0\x55")),
        png(4, 3, bytes(15), chunk(b"PLTE", b"\x0a\x14\x1e"), chunk(b"tRNS", b"\0"), colour=3),
    ],
    ids=["1 bit", "8 bits", "palette"],
)
def test_a_transparent_colour_is_white(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key.png").write_bytes(content)
    assert images.load_image(tmp_path / "key.png").getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    exif = PIL_Image.Exif()
    exif[0x0112] = orientation
    PIL_Image.effect_noise((40, 20), 60).convert("RGB").save(tmp_path / "lying.jpg", exif=exif, quality=95)
    grid = bytes(range(0, 240, 20))
    (tmp_path / "lying.tif").write_bytes(tiff(grid, turned=orientation))
    scan = PIL_Image.frombytes("L", (4, 3), grid)
    scan.getexif().update(exif)
    for name, stored in (("lying.jpg", PIL_Image.open(tmp_path / "lying.jpg")), ("lying.tif", scan)):
        expected, loaded = ImageOps.exif_transpose(stored).convert("RGB"), images.load_image(tmp_path / name)
        assert (loaded.width > loaded.height) == (orientation < 5)
        assert (loaded.size, loaded.tobytes()) == (expected.size, expected.tobytes()), name


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX")
def test_file_names_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), tmp_path / "ten.pt")
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n.png")
    grey("RGB", GREY).save(path)
    run = ["predict", path, "--weights", str(tmp_path / "ten.pt"), "--device", "cpu"]
    assert cli.main([*run, "--json"]) == 0
    assert "caf\\udce9\\n.png" in capsys.readouterr().out
    assert cli.main(run) == 0
    assert "caf\\udce9\\n.png" in re.sub(r"\s", "", capsys.readouterr().out)
    os.truncate(path, 20)
    assert cli.main(run) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "caf\\udce9" in err


# --- downloads -------------------------------------------------------------------------------------------------------


class Download(NamedTuple):
    """What is downloaded, whole, from where, and where to; and the command that downloads it."""

    content: bytes
    source: Path
    kept: Path
    command: list[str]


@pytest.fixture
def download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Download]:
    """Random weights in a file of this machine in place of torchvision's, and an empty cache."""
    torch.manual_seed(0)
    buffer = io.BytesIO()
    torch.save(torchvision.models.resnet18().state_dict(), buffer)
    source = tmp_path / f"resnet18-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pth"
    chosen = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setattr(chosen, "_value_", dataclasses.replace(chosen.value, url=source.as_uri()))
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path / "hub")
    grey("RGB", GREY).save(tmp_path / "grey.png")
    kept = tmp_path / "hub" / "checkpoints" / source.name
    yield Download(buffer.getvalue(), source, kept, ["predict", str(tmp_path / "grey.png"), "--device", "cpu"])
    torch.hub.set_dir(before)


def test_a_failed_download_leaves_nothing_and_the_next_one_works(
    download: Download, capsys: pytest.CaptureFixture[str]
) -> None:
    for content, word in ((b"", "No such file"), (download.content[:100_000], "invalid hash value")):
        if content:
            download.source.write_bytes(content)
        assert cli.main(download.command) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(rf"resnet-triton: error: cannot download .*{word}.*; try again, or use --weights.*\n", err)
        assert list(download.kept.parent.iterdir()) == []
    download.source.write_bytes(download.content)
    assert cli.main(download.command) == 0
    assert list(download.kept.parent.iterdir()) == [download.kept]


def test_a_damaged_file_in_the_cache_is_named(download: Download, capsys: pytest.CaptureFixture[str]) -> None:
    """torch checks what it downloads, and believes what it finds."""
    download.kept.parent.mkdir(parents=True)
    download.kept.write_bytes(download.content[:100_000])
    assert cli.main(download.command) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"resnet-triton: error: {download.kept}: ResNet18_Weights.IMAGENET1K_V1 cannot be read (")
    assert err.endswith("; delete the file\n")
