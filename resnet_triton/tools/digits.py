"""The demo's network: torchvision's ResNet-18, trained on scikit-learn's handwritten digits and kept.

The digits are 1797 scans of 8x8 pixels, real data inside a package. Training takes about a minute on two cores.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..support import files, vision
from ..support.terminal import Bar
from .predict import read_checkpoint

IMAGE_SIZE = 32
CATEGORIES = [str(digit) for digit in range(10)]


@dataclass(frozen=True)
class Recipe:
    """How the network is trained; together with the version of torch, the key under which the result is kept."""

    version: int = 1
    epochs: int = 3
    batch: int = 64
    learning_rate: float = 2e-3
    train_images: int = 1437
    seed: int = 0


class Digits(NamedTuple):
    """Normalised images (N, 3, 32, 32), their labels (N,), and the first held-out digit as scanned, uint8 (8, 8)."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    labels: Tensor
    scan: Tensor


def load_digits(recipe: Recipe) -> Digits:
    """scikit-learn's digits, white on black, split in a fixed, stratified way; 360 are held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    pixels = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)
    prepare = vision.torchvision().models.ResNet18_Weights.IMAGENET1K_V1.transforms(
        crop_size=IMAGE_SIZE, resize_size=IMAGE_SIZE
    )
    images = prepare(pixels[:, None].expand(-1, 3, -1, -1))
    labels = torch.from_numpy(data.target)
    train, held_out = train_test_split(
        torch.arange(len(labels)), train_size=recipe.train_images, test_size=360, stratify=labels, random_state=0
    )
    return Digits(images[train], labels[train], images[held_out], labels[held_out], pixels[held_out[0]])


def trained(recipe: Recipe, digits: Digits, bar: Bar) -> tuple[dict[str, Tensor], Path | None, list[str]]:
    """Weights by this recipe, the file they are kept in (None if it cannot be written), and a note on both."""
    determined_by = json.dumps([asdict(recipe), torch.__version__], sort_keys=True)
    path = cache_folder() / f"digits-{hashlib.sha256(determined_by.encode()).hexdigest()[:12]}.pt"
    try:
        return read_checkpoint(path).model.state_dict(), path, ["The weights were trained by an earlier run."]
    except (ValueError, OSError):  # not there, or damaged: train again
        started = time.perf_counter()
        state = train(recipe, digits, bar)
    notes = [f"Trained {recipe.epochs} epochs in {time.perf_counter() - started:.0f} s."]
    try:
        checkpoint = {"state_dict": state, "categories": CATEGORIES, "image_size": IMAGE_SIZE}
        buffer = io.BytesIO()  # on a full disk torch.save raises something else than OSError
        torch.save(checkpoint, buffer)
        _keep(path, buffer.getvalue())
    except OSError as error:
        why = f"{path.parent}: {error.strerror}; XDG_CACHE_HOME names another folder"
        return state, None, [*notes, f"The weights could not be kept: {why}."]
    return state, path, notes


def train(recipe: Recipe, digits: Digits, bar: Bar) -> dict[str, Tensor]:
    """Train torchvision's ResNet-18 on the CPU, where it takes about a minute on two cores."""
    batches = len(digits.train) // recipe.batch
    progress = bar("training ResNet-18 on digits", recipe.epochs * batches)
    with torch.random.fork_rng(devices=[]), half_the_threads(), progress as step:
        torch.manual_seed(recipe.seed)
        model = vision.torchvision().models.resnet18(num_classes=10)
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, total_steps=recipe.epochs * batches
        )
        for _ in range(recipe.epochs):
            order = torch.randperm(len(digits.train))[: batches * recipe.batch]
            for chosen in order.split(recipe.batch):
                loss = nn.functional.cross_entropy(model(digits.train[chosen]), digits.train_labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                step()
    state: dict[str, Tensor] = model.state_dict()
    return state


@contextmanager
def half_the_threads() -> Iterator[int]:
    """Layers this small gain little from more threads, and lose much where other work delays one of them.

    Two busy cores: 184 s of training with two threads, 45 s with one; 1 to 30 ms an image with two.
    """
    before = torch.get_num_threads()
    threads = max(1, before // 2)
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


def cache_folder() -> Path:
    """Where results are kept: $XDG_CACHE_HOME/resnet-triton, by default ~/.cache/resnet-triton."""
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (configured if configured.is_absolute() else Path.home() / ".cache") / "resnet-triton"
    except RuntimeError:  # a user without a name, as in containers
        raise ValueError("no home folder, expected one for a cache; set XDG_CACHE_HOME to a folder") from None


def sample(digits: Digits, folder: Path) -> Path:
    """A held-out digit as a PNG file in `folder`, to try `predict` on."""
    from PIL import Image

    path = folder / f"digit-{digits.labels[0]}.png"
    if not path.exists():
        buffer = io.BytesIO()
        Image.fromarray(digits.scan.numpy()).save(buffer, "PNG")
        with contextlib.suppress(OSError):
            _keep(path, buffer.getvalue())
    return path


def _keep(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    files.replace(path, content)
