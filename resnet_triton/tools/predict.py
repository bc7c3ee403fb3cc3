"""`resnet-triton predict`: read image files safely, prepare them as torchvision does, classify them in batches."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import checkpoints, models
from ..convert import optimize
from ..ops import dispatch
from ..ops.dispatch import Kernels
from ..support import files, vision
from ..support.images import find_images, read_pixels
from ..support.names import find_device
from ..support.terminal import printable


class Checkpoint(NamedTuple):
    """What a checkpoint file holds: a ResNet and, optionally, class names and the image size it wants."""

    model: models.ResNet
    categories: list[str] | None = None
    image_size: int | None = None
    notes: tuple[str, ...] = ()


class Classifier(NamedTuple):
    """How to build a model, its class names, torchvision's transforms from an image to its input, and what to know."""

    build: Callable[[], nn.Module]
    categories: list[str]
    transforms: Any
    notes: tuple[str, ...] = ()


class Predictor:
    """What `predict` does with a batch. The model is built, or downloaded, for the first one.

    `weights`, `key` and `classes` are as for `find_classifier`, `topk` is the number of classes (as many as there are,
    at most). ValueError, in one line, for anything that is wrong with the arguments.
    """

    def __init__(
        self, weights: str = "DEFAULT", *, topk: int = 5, device: str = "auto", dtype: str = "auto",
        kernels: Kernels = "auto", key: str | None = None, classes: str | None = None,
    ) -> None:  # fmt: skip
        self.weights, self.topk, self.kernels = weights, topk, kernels
        self.device = find_device(device)
        on_gpu = self.device.type == "cuda"
        self.dtype = getattr(torch, dtype) if dtype != "auto" else torch.float16 if on_gpu else torch.float32
        try:
            dispatch.choose(kernels, self.device, self.dtype)
        except NotImplementedError as error:
            raise ValueError(f"{error}; use a GPU of compute capability 8.0 or newer, or kernels=auto") from None
        self.classifier = find_classifier(weights, key, classes)

    @functools.cached_property
    def model(self) -> Any:
        """Takes bytes, torch.uint8 (N, 3, H, W), on its device. ValueError if its weights cannot be downloaded."""
        with contextlib.redirect_stdout(io.StringIO()):  # torch.hub says "Downloading ..." there
            built = self.classifier.build()
        model: Any = optimize(built.eval().to(self.device, self.dtype), kernels=self.kernels)
        model.normalize = self.classifier.transforms.mean, self.classifier.transforms.std
        return model

    def classify(self, pixels: Tensor) -> list[dict[str, Any]]:
        """What `predict` says of each of a batch, "top" or "error". `pixels` are torch.uint8 (N, 3, H, W)."""
        with torch.inference_mode():
            scores = self.model(pixels.to(self.device)).float().cpu()
        best = scores.softmax(1).topk(min(self.topk, scores.shape[1]))
        said: list[dict[str, Any]] = []
        for good, *pairs in zip(scores.isfinite().all(1).tolist(), *(t.tolist() for t in best), strict=True):
            if good:
                names = self.classifier.categories
                top = [{"label": names[i], "index": i, "probability": p} for p, i in zip(*pairs, strict=True)]
                said.append({"top": top})
            else:
                said.append({"error": f"{self.weights} gives NaN or infinite scores in {self.dtype}; try float32"})
        return said


def predict(paths: Iterable[str], predictor: Predictor, batch: int = 32) -> Generator[dict[str, Any], None, None]:
    """Classify image files as a stream, in their order; a folder stands for the images in it, as `find_images` says.

    For each `{"file", "top": [{"label", "index", "probability"}]}`, most probable first, or `{"file", "error"}`, in one
    line, if it cannot be classified. Threads read the next batch while the model classifies one, so memory does not
    grow with the number of files.
    """
    waiting: list[tuple[str, Tensor | str]] = []
    good = 0
    for path, pixels in _read_ahead(predictor, find_images(paths), batch):
        waiting.append((path, pixels))
        good += isinstance(pixels, Tensor)
        if good in (0, batch):  # a broken image takes no place in a batch, and does not wait for one
            yield from _classify(predictor, waiting)
            waiting, good = [], 0
    yield from _classify(predictor, waiting)


def _classify(predictor: Predictor, waiting: list[tuple[str, Tensor | str]]) -> Iterator[dict[str, Any]]:
    images = [pixels for _, pixels in waiting if isinstance(pixels, Tensor)]
    said = iter(predictor.classify(torch.stack(images)) if images else ())
    for path, pixels in waiting:
        yield {"file": path, **({"error": pixels} if isinstance(pixels, str) else next(said))}


def _read_ahead(
    predictor: Predictor, found: Iterable[tuple[str, str]], ahead: int
) -> Iterator[tuple[str, Tensor | str]]:
    """Paths with their pixels or what is wrong, in order; threads read at most `ahead` before they are asked for."""

    def read(path: str, problem: str) -> tuple[str, Tensor | str]:
        try:
            return path, problem or read_pixels(path, predictor.classifier.transforms)
        except ValueError as error:
            return path, str(error).removeprefix(f"{path}: ")

    pool = ThreadPoolExecutor()
    begun: deque[Future[tuple[str, Tensor | str]]] = deque()
    try:
        for path, problem in found:
            begun.append(pool.submit(read, path, problem))
            if len(begun) > ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:  # of an interrupted stream, too
        pool.shutdown(cancel_futures=True)


def show(prediction: dict[str, Any]) -> None:
    """Print one of what `predict` yields, errors excepted: the file, then a class a line."""
    print(printable(prediction["file"]))
    for top in prediction["top"]:
        print(f"  {top['probability']:7.2%}  {top['index']:4}  {printable(top['label'])}")


# --- weights ---------------------------------------------------------------------------------------------------------


def find_classifier(weights: str, key: str | None = None, classes: str | None = None) -> Classifier:
    """A ResNet from a checkpoint file, or a ResNet-18 from the name of torchvision's weights.

    A checkpoint is read at once, torchvision's weights are downloaded when the model is built. `key` is as for
    `load_checkpoint`, `classes` a text file with a name a line, or "imagenet". Classes that nobody names get numbers.
    ValueError, in one line, if anything is unusable.
    """
    imagenet = vision.torchvision().models.ResNet18_Weights.IMAGENET1K_V1
    if not os.path.exists(weights):
        chosen = _find_weights(weights)
        names = _class_names(classes, 1000) if classes else chosen.meta["categories"]
        return Classifier(lambda: _download(chosen), names, chosen.transforms())
    checkpoint = read_checkpoint(weights, key)
    outputs = len(checkpoint.model.fc.weight)
    if outputs == 1:  # it can be a score of yes or no, or a quantity, and no file says which
        raise ValueError(
            f"{weights}: has one output, and the probability of one class among one is always 100 %, expected two or "
            "more; use resnet_triton.load_checkpoint, and torch.sigmoid if it was trained for yes or no"
        )
    names = _class_names(classes, outputs) if classes else checkpoint.categories
    notes = checkpoint.notes
    if names is None:
        names = [str(i) for i in range(outputs)]
        notes += (
            f"{weights} does not name its classes, here are their numbers; --classes FILE (or imagenet) names them",
        )
    size = {} if checkpoint.image_size is None else dict.fromkeys(("crop_size", "resize_size"), checkpoint.image_size)
    return Classifier(lambda: checkpoint.model, names, imagenet.transforms(**size), notes)


def _class_names(source: str, outputs: int) -> list[str]:
    if source == "imagenet":
        names = vision.torchvision().models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    else:
        try:
            names = Path(source).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{source}: no text in UTF-8, expected a class name a line") from None
    if len(names) != outputs:
        raise ValueError(f"{source}: {len(names)} class names, expected {outputs}, one for each output of the model")
    return names


def _download(chosen: Any) -> nn.Module:
    kept = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(chosen.url))
    try:
        if not kept.exists():
            files.prepare(kept.parent)
    except OSError as error:
        where = f"{error.filename}: {error.strerror}"
        raise ValueError(f"{where}; {chosen} is kept there, set TORCH_HOME to a folder that takes it") from None
    try:
        return models.resnet18(weights=chosen, progress=sys.stderr.isatty())
    except MemoryError:
        raise
    except Exception as error:  # the network, a proxy, the disk, a wrong hash
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
        raise ValueError(f"{str(error).partition(';')[0]}, or a checkpoint; no such file") from None


def read_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> Checkpoint:
    """A ResNet as `load_checkpoint` reads it, and what stands beside its weights, at the top of the file.

    These are `{"categories": list[str], "image_size": int}`, both optional. ValueError, in one line, if they are not.
    """
    found = checkpoints.read(path, key)
    data, classes = found.data if isinstance(found.data, dict) else {}, len(found.model.fc.weight)
    categories, size = data.get("categories"), data.get("image_size")
    named = isinstance(categories, list) and all(isinstance(c, str) for c in categories) and len(categories) == classes
    if categories is not None and not named:
        raise ValueError(f'{path}: "categories" must be a list of {classes} names, one for each class')
    if size is not None and not (type(size) is int and 1 <= size <= 4096):
        raise ValueError(f'{path}: "image_size" must be a number of pixels from 1 to 4096, got {size!r}')
    chosen_by_us = found.others and key is None
    said = [checkpoints.which(found)] if chosen_by_us else []
    return Checkpoint(
        found.model, categories, size, tuple(f"{path}: {line}" for line in said + checkpoints.doubts(found))
    )
