"""Find, for each picture of a folder, the one most like it.

    python examples/find_neighbours.py FOLDER --weights DEFAULT

ResNet-18 without its classifier turns a picture into 512 numbers; alike pictures have alike numbers. Without a folder
the pictures are pieces of scikit-learn's two photographs. Without --weights the network is not trained, and still sends
most pieces to their own photograph: random filters tell textures and colours apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from PIL import ImageOps
from torch import Tensor, nn

import resnet_triton
from resnet_triton.support.images import load_image

SIZE = 128  # pixels a side: enough to compare, and any size runs
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="default: pieces of scikit-learn's two photographs")
    parser.add_argument("--weights", choices=["DEFAULT", "IMAGENET1K_V1"], help="torchvision's name of trained weights")
    args = parser.parse_args(argv)
    names, pictures = read(args.folder) if args.folder else pieces()

    torch.manual_seed(0)
    model = resnet_triton.resnet18(weights=args.weights)
    model.fc = nn.Identity()  # what comes out is the average over all pixels: (N, 512)
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = model.eval().to(device, dtype)
    model.normalize = MEAN, STD

    with torch.inference_mode():
        embeddings = torch.cat([model(batch.to(device)).float() for batch in pictures.split(64)])
    embeddings = nn.functional.normalize(embeddings - embeddings.mean(0))
    likeness = (embeddings @ embeddings.T).fill_diagonal_(-2)  # cosines, from -1 to 1; nobody is their own neighbour
    best = likeness.max(1)
    for name, cosine, neighbour in zip(names, best.values.tolist(), best.indices.tolist(), strict=True):
        print(f"{name} -> {names[neighbour]} ({cosine:.2f})")


def read(folder: Path) -> tuple[list[str], Tensor]:
    """The pictures of a folder: names, and bytes (N, 3, SIZE, SIZE)."""
    squares = {}
    for path in sorted(path for path in folder.glob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"}):
        try:
            squares[path.name] = numpy.array(ImageOps.fit(load_image(path), (SIZE, SIZE)))
        except ValueError as error:  # a broken picture: one line, which names the file
            print(error, file=sys.stderr)
    if len(squares) < 2:
        sys.exit(f"{folder}: {len(squares)} pictures, expected at least two")
    return list(squares), torch.from_numpy(numpy.stack(list(squares.values()))).permute(0, 3, 1, 2)


def pieces() -> tuple[list[str], Tensor]:
    """Three rows of five pieces of each photograph: names, and bytes (30, 3, SIZE, SIZE)."""
    from sklearn.datasets import load_sample_images

    names, parts = [], []
    for title, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        for row in range(3):
            for column in range(5):
                names.append(f"{title} {row + 1}/{column + 1}")
                part = photo[SIZE * row : SIZE * (row + 1), SIZE * column : SIZE * (column + 1)]
                parts.append(torch.from_numpy(part.copy()).permute(2, 0, 1))
    return names, torch.stack(parts)


if __name__ == "__main__":
    main()
