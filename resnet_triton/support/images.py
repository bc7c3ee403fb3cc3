"""Image files of unknown origin to pixels: only what is intact and known to be right, in one line what is not."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from torch import Tensor

from . import vision

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""What is decoded at all. Pillow knows many more formats, some of them run other programs."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Which files of a folder are taken for images."""
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF,
UNSIGNED, WHITE_IS_ZERO = 1, 0  # and two of their values
MAX_ASPECT = 50  # resizing the short side to 256 pixels multiplies the long side


def find_images(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each path with "" for its problem; in place of a folder, the files below it that are named like images.

    They are sorted, a folder's own before those of its folders, and read from the disk one folder at a time. Hidden
    ones (".name") and links to folders are left out. A folder that cannot be read or holds none comes with the problem.
    """
    for path in paths:
        if not os.path.isdir(path):
            yield path, ""
            continue
        empty = True
        unread: list[OSError] = []
        for folder, folders, names in os.walk(path, onerror=unread.append):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                    empty = False
                    yield os.path.join(folder, name), ""
        yield from ((str(error.filename), f"{error.strerror}; expected a folder to read") for error in unread)
        if empty and not unread:
            yield path, f"no images in this folder, expected files ending in {', '.join(SUFFIXES)}"


def read_pixels(path: str | os.PathLike[str], transforms: Any, file: BinaryIO | None = None) -> Tensor:
    """An image's pixels, torch.uint8 (3, H, W), scaled and cropped as torchvision's `transforms` say.

    `path`, `file` and errors are as for `load_image`.
    """
    functional = vision.torchvision().transforms.functional
    image = functional.resize(
        load_image(path, file), transforms.resize_size, transforms.interpolation, antialias=transforms.antialias
    )
    return functional.pil_to_tensor(functional.center_crop(image, transforms.crop_size))


def load_image(path: str | os.PathLike[str], file: BinaryIO | None = None) -> Any:
    """An RGB Pillow image: the first, of several, turned upright as its EXIF data say.

    It is read from `file`, if that is given, and `path` is only its name. 9 to 16 bits are scaled to 8, where Pillow's
    own conversion would clip nearly all of them to white; transparent is white; signed and floating-point samples and
    those of more bits are refused, because nobody knows their range. ValueError, naming the file, if there is no image
    to be had.
    """
    from PIL import Image, UnidentifiedImageError

    wanted = f"expected an intact {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
    if file is None:  # Pillow is given no path: it would map some TIFF files into memory, and turn those wrongly
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ValueError(f"{path}: not a regular file; {wanted}")
            file = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; {wanted}") from None
        with file:
            return load_image(path, file)
    if file.seek(0, os.SEEK_END) == 0:
        raise ValueError(f"{path}: the file is empty; {wanted}")
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError
            largest, inverted = _read_tags(image)
            image.load()
            upright = _to_rgb(_upright(image), largest, inverted)
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image this program reads; {wanted}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"{path}: over {Image.MAX_IMAGE_PIXELS} pixels; scale it down first") from None
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error over damaged files
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path}: the image cannot be decoded ({reason}); {wanted}") from None
    if max(upright.size) > MAX_ASPECT * min(upright.size):
        width, height = upright.size
        raise ValueError(f"{path}: {width}x{height} pixels, expected sides within {MAX_ASPECT}:1; crop it first")
    return upright


def _read_tags(image: Any) -> tuple[int, bool]:
    """The largest value of a sample, and whether it means black, of an image that is open and not yet loaded.

    The file's tags say so, decoded values do not. Puts right the transparent value of a PNG, which is in units of its
    samples, while Pillow scales those of less than 8 bits.
    """
    tags = getattr(image, "tag_v2", {})  # TIFF's
    bits = max(tags.get(BITS_PER_SAMPLE, (1,))) if tags else 16
    kinds = {UNSIGNED: "", 2: "signed ", 3: "floating-point "}
    kind = kinds.get(max(tags.get(SAMPLE_FORMAT, (UNSIGNED,))), "unknown ")
    if kind or bits > 16:
        raise ValueError(f"{bits}-bit {kind}samples, expected unsigned ones of up to 16 bits")
    if image.format == "PNG" and "transparency" in image.info:
        stored = image.tile[0][3]
        if stored == "RGB;16B":
            raise ValueError("a transparent colour of 16 bits, expected 8 bits or an alpha channel")
        image.info["transparency"] *= {"L;2": 85, "L;4": 17}.get(stored, 1)
    return 2**bits - 1, bool(tags) and tags.get(PHOTOMETRIC, WHITE_IS_ZERO) == WHITE_IS_ZERO


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken metadata does not break the picture
        return image


def _to_rgb(image: Any, largest: int, inverted: bool) -> Any:
    """Any mode to RGB: transparency over white rather than dropped."""
    from PIL import Image

    if image.mode.startswith("I"):
        image = _to_8_bits(image, largest, inverted)
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return image.convert("RGB")


def _to_8_bits(image: Any, largest: int, inverted: bool) -> Any:
    """Grey samples, which Pillow leaves as they are stored, to mode L, or LA if one value is transparent."""
    import numpy
    from PIL import Image

    stored = numpy.asarray(image)
    grey = ((stored.astype(numpy.uint32) * 255 + largest // 2) // largest).astype(numpy.uint8)
    scaled = Image.fromarray(255 - grey if inverted else grey)
    if "transparency" not in image.info:
        return scaled
    opaque = stored != image.info["transparency"]
    return Image.merge("LA", (scaled, Image.fromarray(opaque.astype(numpy.uint8) * 255)))
