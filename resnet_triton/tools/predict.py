"""`resnet-triton predict`: read image files safely, prepare them as torchvision does, classify them in batches."""

from __future__ import annotations

import os
import stat
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import models
from ..convert import optimize
from ..ops import dispatch
from ..ops.dispatch import Kernels
from ..support import vision
from ..support.terminal import Bar, table

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""What is decoded at all. Pillow knows many more formats, some of them run other programs."""
SUFFIXES = (".pt", ".pth", ".safetensors")
MAX_ASPECT = 50  # resizing the short side to 256 pixels multiplies the long side


class Checkpoint(NamedTuple):
    """What a checkpoint file holds: weights of a ResNet-18 and, optionally, class names and the image size it wants."""

    state: dict[str, Tensor]
    categories: list[str] | None = None
    image_size: int | None = None


class Classifier(NamedTuple):
    """How to build a model, its class names, and what turns a Pillow image into its input (3, H, W)."""

    build: Callable[[], nn.Module]
    categories: list[str]
    transforms: Callable[[Any], Tensor]


def predict(
    paths: Sequence[str], weights: str = "DEFAULT", *, topk: int = 5, batch: int = 32, device: str = "auto",
    dtype: str = "auto", kernels: Kernels = "auto", bar: Bar,
) -> list[dict[str, Any]]:  # fmt: skip
    """Classify image files: for each `{"file", "top": [{"label", "index", "probability"}]}`, most probable first.

    `weights` is a checkpoint file or the name of torchvision's weights, `topk` the number of classes (as many as there
    are, at most). ValueError, in one line, for anything that is wrong with the input; no image is classified then.
    """
    where = find_device(device)
    on_gpu = where.type == "cuda"
    precision = getattr(torch, dtype) if dtype != "auto" else torch.float16 if on_gpu else torch.float32
    try:
        dispatch.choose(kernels, where, precision)
    except NotImplementedError as error:
        raise ValueError(f"{error}; use a GPU of compute capability 8.0 or newer, or kernels=auto") from None
    classifier = find_classifier(weights)
    inputs = []
    with bar("reading", len(paths)) as step:
        for path in paths:
            inputs.append(classifier.transforms(load_image(path)))
            step()
    model = optimize(classifier.build().eval().to(where, precision), kernels=kernels)
    logits = []
    with bar("classifying", -(-len(inputs) // batch)) as step, torch.inference_mode():
        for start in range(0, len(inputs), batch):
            logits.append(model(torch.stack(inputs[start : start + batch]).to(where, precision)).float().cpu())
            step()
    scores = torch.cat(logits)
    if not scores.isfinite().all():
        raise ValueError(f"{weights} gives NaN or infinite scores in {precision}, expected numbers; try float32")
    best = scores.softmax(1).topk(min(topk, scores.shape[1]))
    return [
        {
            "file": os.fspath(path),
            "top": [
                {"label": classifier.categories[i], "index": i, "probability": p}
                for p, i in zip(probabilities, indices, strict=True)
            ],
        }
        for path, probabilities, indices in zip(paths, best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def show(predictions: list[dict[str, Any]]) -> None:
    """Print what `predict` returned."""
    rows = [
        (p["file"] if rank == 0 else "", top["label"], top["index"], f"{top['probability']:.2%}")
        for p in predictions
        for rank, top in enumerate(p["top"])
    ]
    table("Predictions", ("file", "label", ">class", ">probability"), rows)


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}, expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no device {name!r} here, torch sees {torch.cuda.device_count()} GPUs; use --device cpu")
    return device


# --- images ----------------------------------------------------------------------------------------------------------


def load_image(path: str | os.PathLike[str]) -> Any:
    """An RGB Pillow image: the first, of several, turned upright as its EXIF data say.

    16 bits are scaled to 8, where Pillow's own conversion would clip nearly all of them to white; transparent is white;
    numbers of 32 bits and floating-point ones are refused, because nobody knows their range. ValueError, naming the
    file, if there is no image to be had.
    """
    from PIL import Image, UnidentifiedImageError

    wanted = f"expected an intact {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; {wanted}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: not a regular file; {wanted}")
    if status.st_size == 0:
        raise ValueError(f"{path}: the file is empty; {wanted}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=FORMATS) as image:
                image.load()
                upright = _to_rgb(_upright(image))
        except PermissionError as error:
            raise ValueError(f"{path}: {error.strerror}; {wanted}") from None
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


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken metadata does not break the picture
        return image


def _to_rgb(image: Any) -> Any:
    """Any mode to RGB: 16 bits scaled to 8 rather than clipped, transparency over white rather than dropped."""
    from PIL import Image

    if image.mode.startswith("I"):
        deep = image.convert("I")
        if not 0 <= deep.getextrema()[0] <= deep.getextrema()[1] <= 0xFFFF:
            raise ValueError("32-bit pixels, expected 8 or 16 bits")
        image = deep.point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if image.mode == "F":
        raise ValueError("floating-point pixels, expected 8 or 16 bits")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return image.convert("RGB")


# --- weights ---------------------------------------------------------------------------------------------------------


def find_classifier(weights: str) -> Classifier:
    """A ResNet-18 from a checkpoint file or the name of torchvision's weights. ValueError, in one line, if unusable.

    A checkpoint is read at once, torchvision's weights are downloaded when the model is built.
    """
    imagenet = vision.torchvision().models.ResNet18_Weights.IMAGENET1K_V1
    if not weights.endswith(SUFFIXES) and not os.path.exists(weights):
        chosen = _find_weights(weights)
        return Classifier(lambda: _download(chosen), chosen.meta["categories"], chosen.transforms())
    checkpoint = read_checkpoint(weights)
    classes = len(checkpoint.state["fc.bias"])

    def build() -> nn.Module:
        model = models.resnet18(num_classes=classes)
        model.load_state_dict(checkpoint.state)
        return model

    names = imagenet.meta["categories"] if classes == 1000 else [str(i) for i in range(classes)]
    size = {} if checkpoint.image_size is None else dict.fromkeys(("crop_size", "resize_size"), checkpoint.image_size)
    return Classifier(build, checkpoint.categories or names, imagenet.transforms(**size))


def _download(chosen: Any) -> nn.Module:
    try:
        return models.resnet18(weights=chosen, progress=sys.stderr.isatty())
    except MemoryError:
        raise
    except Exception as error:  # the network, a proxy, the disk, a wrong hash
        kept = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(chosen.url))
        if kept.exists():  # torch checks what it downloads, not what it finds
            raise ValueError(f"{kept}: {chosen} cannot be read ({_brief(error)}); delete the file") from None
        raise ValueError(
            f"cannot download {chosen} ({_brief(error)}); try again, or use --weights FILE, a checkpoint you have"
        ) from None


def _brief(error: Exception) -> str:
    """The first sentence: torch explains some of its errors on pages."""
    return str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__


def _find_weights(name: str) -> Any:
    try:
        return vision.find_weights("resnet18", name)
    except ValueError as error:
        raise ValueError(f"{error}, or a file ending in {', '.join(SUFFIXES)}") from None


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read and check a ResNet-18 checkpoint; nothing in the file is executed.

    A state_dict, or `{"state_dict" or "model": state_dict, "categories": list[str], "image_size": int}`, the last two
    optional; "module." before every key, DataParallel's, is dropped. ValueError, in one line, if it is anything else.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file}: no such file, expected a checkpoint ending in {', '.join(SUFFIXES)}")
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file}: expected a checkpoint ending in {', '.join(SUFFIXES)}")
    data = _read(file)
    state = next((data[key] for key in ("state_dict", "model") if isinstance(data.get(key), dict)), data)
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"{file}: holds no state_dict, expected names and tensors, as model.state_dict() gives")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    _check_state(file, state)
    if state is data:
        return Checkpoint(state)
    categories, size, classes = data.get("categories"), data.get("image_size"), len(state["fc.bias"])
    named = isinstance(categories, list) and all(isinstance(c, str) for c in categories) and len(categories) == classes
    if categories is not None and not named:
        raise ValueError(f'{file}: "categories" must be a list of {classes} names, one for each class')
    if size is not None and not (isinstance(size, int) and 1 <= size <= 4096):
        raise ValueError(f'{file}: "image_size" must be a number of pixels from 1 to 4096, got {size!r}')
    return Checkpoint(state, categories, size)


def _read(file: Path) -> dict[Any, Any]:
    if file.suffix == ".safetensors":
        import safetensors.torch
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if file.suffix == ".safetensors":
                data = safetensors.torch.load_file(file)
            else:
                data = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of unknown origin can fail in any way, with pages of explanation
        raise ValueError(
            f"{file}: cannot be read safely as a checkpoint ({_brief(error)}); save a plain state_dict"
        ) from None
    if not isinstance(data, dict):
        raise ValueError(f"{file}: holds a {type(data).__name__}, expected a state_dict")
    return data


def _check_state(file: Path, state: dict[str, Tensor]) -> None:
    head = state.get("fc.weight")
    classes = head.shape[0] if head is not None and head.dim() == 2 and head.shape[0] else 1000
    with torch.device("meta"):
        expected = models.resnet18(num_classes=classes).state_dict()
    shared = [key for key in expected if key in state]
    problems = {
        "missing": [k for k in expected if k not in state and not k.endswith("num_batches_tracked")],
        "unexpected": [k for k in state if k not in expected],
        "of the wrong shape": [
            f"{k} {tuple(state[k].shape)} instead of {tuple(expected[k].shape)}"
            for k in shared if state[k].shape != expected[k].shape or state[k].layout != torch.strided
        ],
    }  # fmt: skip
    found = [
        f"{len(keys)} {problem} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for problem, keys in problems.items()
        if keys
    ]
    if found:
        raise ValueError(f"{file}: expected the state_dict of a ResNet-18, but {'; '.join(found)}")
