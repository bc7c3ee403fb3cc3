"""Images and downloads that somebody prepared, or that broke on the way: `predict` says what is wrong, in one line."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import re
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_triton.support import images, vision
from resnet_triton.tools import cli, predict

PIL_Image = pytest.importorskip("PIL.Image")
pytest.importorskip("rich")
torchvision = vision.torchvision()
GREY = (200, 200, 200)

# --- images ----------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes, *chunks: bytes, depth: int = 8, colour: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IDAT", zlib.compress(pixels, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(samples: bytes, bits: int, white: int, *, kind: int = 1, order: str = "<", turned: int = 1) -> bytes:
    """Grey, 4x3, samples of `bits`; `white` is 0 where 0 means white, else 1; `kind` 1 unsigned, 2 signed, 3 float."""
    tags = {
        256: 4, 257: 3, 258: bits, 259: 1, 262: white, 273: 8, 274: turned, 278: 3, 279: len(samples), 339: kind,
    }  # fmt: skip
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(samples))
    return head + samples + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def deep_png(value: int, transparent: int | None = None, *, channels: int = 1) -> bytes:
    """4x3 pixels of 16 bits, grey or coloured; one value may be transparent."""
    key = [] if transparent is None else [chunk(b"tRNS", struct.pack(">H", transparent) * channels)]
    row = b"\0" + struct.pack(">H", value) * (4 * channels)
    return png(4, 3, row * 3, *key, depth=16, colour=0 if channels == 1 else 2)


def saved(image: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(mode: str, value: Any) -> Any:
    return PIL_Image.new(mode, (40, 30), value)


def frames(kind: str, **options: Any) -> bytes:
    return saved(grey("RGB", GREY), kind, save_all=True, append_images=[grey("RGB", (0, 0, 0))], duration=50, **options)


BOMB = png(60_000, 60_000, bytes(60_001))
TEXT_BOMB = png(4, 3, bytes(5 * 3), chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 20))))

HOSTILE = {
    "bomb.png": (BOMB, "pixels; scale it down first"),
    "large.png": (png(12_000, 12_000, bytes(12_001)), "over [0-9]+ pixels"),  # of which Pillow only warns
    "sliver.png": (png(1, 1000, bytes(2000)), "1x1000 pixels, expected sides within 50:1"),
    "text-bomb.png": (TEXT_BOMB, "cannot be decoded"),
    "no-pixels.png": (png(0, 7, b""), "cannot be decoded|not an image"),
    "too-few.png": (png(40, 30, bytes(100)), "cannot be decoded"),
    "cut.jpg": (saved(grey("RGB", GREY), "JPEG")[:-200], "cannot be decoded"),
    "cut.gif": (saved(grey("RGB", GREY), "GIF")[:-20], "cannot be decoded"),
    "cut.webp": (saved(grey("RGB", GREY), "WEBP")[:-20], "cannot be decoded|not an image"),
    "cut.tif": (saved(grey("RGB", GREY), "TIFF", compression="tiff_lzw")[:-200], "cannot be decoded|not an image"),
    "head.jpg": (saved(grey("RGB", GREY), "JPEG")[:11], "not an image|cannot be decoded"),
    "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "text.jpg": (b"a shopping list", "not an image"),
    "zeros.png": (bytes(10_000), "not an image"),
    "unsigned-32.tif": (tiff(struct.pack("<12I", *[200 * 257] * 12), 32, 1), "32-bit samples"),
    "signed-32.tif": (tiff(struct.pack("<12i", *[200 * 257] * 12), 32, 1, kind=2), "32-bit signed samples"),
    "signed-16.tif": (tiff(struct.pack(">12h", *[20_000] * 12), 16, 1, kind=2, order=">"), "16-bit signed samples"),
    "signed-8.tif": (tiff(bytes([100] * 12), 8, 1, kind=2), "8-bit signed samples"),
    "float.tif": (tiff(struct.pack("<12f", *[0.8] * 12), 32, 0, kind=3), "32-bit floating-point samples"),
    "key-16-rgb.png": (deep_png(200 * 257, 200, channels=3), "a transparent colour of 16 bits"),
}


def refused(path: Path, words: str) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=words) as raised:
        images.load_image(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)
    assert time.monotonic() - start < 5, "refused before it is decoded"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_images_are_refused(tmp_path: Path, name: str) -> None:
    content, words = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, words)


@pytest.mark.skipif(os.name != "posix", reason="POSIX's files")
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    refused(tmp_path / "pipe.png", "not a regular file")
    refused(tmp_path / "loop.png", "Too many levels of symbolic links")
    refused(Path("/dev/zero"), "not a regular file")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("sixteen.png", deep_png(200 * 257)),
        ("sixteen-rgb.png", deep_png(200 * 257, channels=3)),
        ("sixteen-key.png", deep_png(200 * 257, 200)),
        ("sixteen.tif", saved(grey("I;16", 200 * 257), "TIFF")),
        ("big-endian.tif", saved(grey("I;16B", 200 * 257), "TIFF")),
        ("inverted-16.tif", tiff(struct.pack("<12H", *[55 * 257] * 12), 16, 0)),
        ("inverted-8.tif", tiff(bytes([55] * 12), 8, 0)),
        ("twelve.tif", tiff(bytes.fromhex("c8cc8c" * 6), 12, 1)),
        ("animated.gif", frames("GIF")),
        ("animated.webp", frames("WEBP", lossless=True)),
        ("animated.png", frames("PNG")),
        ("pages.tif", frames("TIFF")),
        ("rgb.webp", saved(grey("RGB", GREY), "WEBP", lossless=True)),
        ("rgb.bmp", saved(grey("RGB", GREY), "BMP")),
        ("luminance.png", saved(grey("L", 200), "PNG")),
        ("alpha.png", saved(grey("RGBA", (145, 145, 145, 128)), "PNG")),  # half of 145, half of white
        ("grey-alpha.png", saved(grey("LA", (145, 128)), "PNG")),
        ("key.png", saved(grey("RGB", GREY), "PNG", transparency=(1, 2, 3))),
        ("palette.gif", saved(grey("RGB", GREY).quantize(4), "GIF")),
        ("palette-alpha.png", saved(grey("RGBA", (145, 145, 145, 128)).quantize(4), "PNG")),
        ("cmyk.tif", saved(grey("CMYK", (55, 55, 55, 0)), "TIFF")),
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
    ("name", "content"),
    [
        ("1.tif", tiff(bytes([0b00000000] * 3), 1, 0)),
        ("1.png", png(4, 3, b"\0\0" * 3, chunk(b"tRNS", b"\0\0"), depth=1)),
        ("2.png", png(4, 3, b"\0\x55" * 3, chunk(b"tRNS", b"\0\x01"), depth=2)),
        ("4.png", png(4, 3, b"\0\x55\x55" * 3, chunk(b"tRNS", b"\0\x05"), depth=4)),
        ("8.png", png(4, 3, b"\0\x55\x55\x55\x55" * 3, chunk(b"tRNS", b"\0\x55"))),
        ("16.png", deep_png(100 * 257 + 3, 100 * 257 + 3)),
        ("palette.png", png(4, 3, bytes(15), chunk(b"PLTE", b"\x0a\x14\x1e"), chunk(b"tRNS", b"\0"), colour=3)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_white_and_transparent_values_are_white_at_every_depth(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert images.load_image(tmp_path / name).getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    exif = PIL_Image.Exif()
    exif[0x0112] = orientation
    PIL_Image.effect_noise((40, 20), 60).convert("RGB").save(tmp_path / "lying.jpg", exif=exif, quality=95)
    grid = bytes(range(0, 240, 20))
    (tmp_path / "lying.tif").write_bytes(tiff(grid, 8, 1, turned=orientation))
    with PIL_Image.open(tmp_path / "lying.jpg") as stored:
        expected = {"lying.jpg": ImageOps.exif_transpose(stored)}
    scan = PIL_Image.frombytes("L", (4, 3), grid)
    scan.getexif().update(exif)
    expected["lying.tif"] = ImageOps.exif_transpose(scan).convert("RGB")
    for name, picture in expected.items():
        loaded = images.load_image(tmp_path / name)
        assert (loaded.width > loaded.height) == (orientation < 5)
        assert (loaded.size, loaded.tobytes()) == (picture.size, picture.tobytes()), name


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


def test_too_little_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: not enough "
                                              "memory: you tried to allocate 4000000000000 bytes.")):  # fmt: skip
        monkeypatch.setattr(predict, "predict", lambda *_, **__: (_ for _ in ()).throw(error))  # noqa: B023
        assert cli.main(["predict", "a.png"]) == 2
        assert capsys.readouterr().err.startswith("resnet-triton: error: this machine has too little free memory, ")


# --- downloads -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights() -> bytes:
    """Random weights as a file: small, for all that a download can go wrong with."""
    torch.manual_seed(0)
    buffer = io.BytesIO()
    torch.save(torchvision.models.resnet18().state_dict(), buffer)
    return buffer.getvalue()


Serve = Callable[[str], None]


@pytest.fixture
def server(tmp_path: Path, weights: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """A server on this machine in place of torchvision's, and an empty cache; call it with what is to go wrong."""
    fault = [""]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if fault[0] == "not found":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(weights)))
            self.end_headers()
            self.wfile.write(weights[: len(weights) // 2] if fault[0] == "half" else weights)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    digest = hashlib.sha256(weights).hexdigest()[:8]
    chosen = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    url = f"http://127.0.0.1:{http.server_port}/resnet18-{digest}.pth"
    monkeypatch.setattr(chosen, "_value_", dataclasses.replace(chosen.value, url=url))
    monkeypatch.setenv("no_proxy", "*")
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path / "hub")
    yield lambda kind: fault.__setitem__(0, kind)
    torch.hub.set_dir(before)
    http.shutdown()
    http.server_close()


def stored(folder: Path) -> list[str]:
    return [path.name for path in (folder / "hub" / "checkpoints").iterdir()]


@pytest.mark.filterwarnings("ignore:Implicitly cleaning up <HTTPError:ResourceWarning")  # torch.hub leaves it open
@pytest.mark.parametrize(("fault", "word"), [("half", "invalid hash value"), ("not found", "404")])
def test_a_failed_download_leaves_nothing_and_the_next_one_works(
    server: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, word: str
) -> None:
    grey("RGB", GREY).save(tmp_path / "grey.png")
    run = ["predict", str(tmp_path / "grey.png"), "--device", "cpu", "--json"]
    server(fault)
    assert cli.main(run) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"resnet-triton: error: cannot download .*{word}.*; try again, or use --weights FILE.*\n", err)
    assert stored(tmp_path) == []
    if fault == "half":
        server("")
        assert cli.main(run) == 0
        assert len(stored(tmp_path)) == 1


def test_a_damaged_file_in_the_cache_is_named(
    server: Serve, tmp_path: Path, weights: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch checks what it downloads, and believes what it finds."""
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    kept = tmp_path / "hub" / "checkpoints" / os.path.basename(url)
    kept.parent.mkdir(parents=True)
    kept.write_bytes(weights[:100_000])
    grey("RGB", GREY).save(tmp_path / "grey.png")
    assert cli.main(["predict", str(tmp_path / "grey.png"), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"resnet-triton: error: {kept}: ResNet18_Weights.IMAGENET1K_V1 cannot be read (")
    assert err.endswith("; delete the file\n")
    assert len(err) < 600
