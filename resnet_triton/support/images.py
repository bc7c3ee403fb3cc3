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

    It is read from `file`, if that is given, and `path` is only its name. Transparent is white. ValueError, naming the
    file, if there is no image to be had, or one of whose samples Pillow makes no 8 bits.
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
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError
            _check_samples(image)
            image.load()
            upright = _to_rgb(_upright(image))
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


def _check_samples(image: Any) -> None:
    """ValueError if Pillow would clip or misread the samples of an image that is open and not yet loaded."""
    sample_format = getattr(image, "tag_v2", {}).get(339, (1,))  # TIFF's; 1 is unsigned
    keyed = image.format == "PNG" and "transparency" in image.info
    misread = keyed and image.tile[0][3] in ("L;2", "L;4", "RGB;16B")  # scaled, but not the transparent colour
    if image.mode.startswith(("I", "F")) or set(sample_format) != {1} or misread:
        raise ValueError("samples of other than 8 bits, or signed ones; convert it to 8 bits first")


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken metadata does not break the picture
        return image


def _to_rgb(image: Any) -> Any:
    """Any mode to RGB: transparency over white rather than dropped."""
    from PIL import Image

    if image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return image.convert("RGB")
