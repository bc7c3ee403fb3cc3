"""Classify the pictures of a folder with ResNet-18.

    python examples/classify_folder.py FOLDER --weights DEFAULT

Without a folder it takes scikit-learn's two photographs. Without --weights the network is not trained: it runs, but its
labels mean nothing. The command `resnet-triton predict` does the same with more options.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from PIL import ImageOps
from torch import Tensor

import resnet_triton
from resnet_triton.support.images import load_image
from resnet_triton.support.vision import torchvision
from resnet_triton.tools.arguments import positive

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect


def read(path: Path) -> Tensor | None:
    """A picture as bytes, (3, 224, 224): short side scaled to 256 pixels, then the middle; None if it is broken."""
    try:
        square = ImageOps.fit(load_image(path), (256, 256)).crop((16, 16, 240, 240))
    except ValueError as error:  # one line, which names the file
        print(error, file=sys.stderr)
        return None
    return torch.from_numpy(numpy.array(square)).permute(2, 0, 1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="default: scikit-learn's two photographs")
    parser.add_argument("--weights", choices=["DEFAULT", "IMAGENET1K_V1"], help="torchvision's name of trained weights")
    parser.add_argument("--batch", type=positive, default=64)
    args = parser.parse_args(argv)
    folder = args.folder or photographs()
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        sys.exit(f"{folder}: no pictures, expected files ending in {', '.join(sorted(SUFFIXES))}")

    if args.weights is None:
        print("no --weights, so the network is not trained and its labels mean nothing", file=sys.stderr)
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = resnet_triton.resnet18(weights=args.weights).eval().to(device, dtype)
    model.normalize = MEAN, STD  # now it takes bytes, and normalises them on the device
    labels = torchvision().models.ResNet18_Weights.DEFAULT.meta["categories"]

    for start in range(0, len(paths), args.batch):
        pictures = {path: picture for path in paths[start : start + args.batch] if (picture := read(path)) is not None}
        if not pictures:
            continue
        with torch.inference_mode():
            logits = model(torch.stack(list(pictures.values())).to(device))
        best = logits.float().softmax(1).max(1)
        for path, probability, label in zip(pictures, best.values.tolist(), best.indices.tolist(), strict=True):
            print(f"{path.name}: {labels[label]} ({probability:.0%})")


def photographs() -> Path:
    """The folder of china.jpg and flower.jpg, which scikit-learn brings along."""
    from sklearn import datasets

    return Path(datasets.__file__).parent / "images"


if __name__ == "__main__":
    main()
