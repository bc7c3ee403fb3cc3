"""Classify the pictures of a folder on several machines with Ray Data.

    python examples/ray_data.py FOLDER --weights FILE --workers 2

Prints the rows of `resnet-triton predict FOLDER --json`, in the order in which they are done. Tasks read and decode;
each worker is an actor that holds the model, on a GPU of its own if the cluster has any. What travels between them is
bytes, which the first kernel normalises. Without a cluster, that is without RAY_ADDRESS, Ray makes one of this machine.
All machines need the folder, the weights and `pip install '.[ray]'`. docs/many-pictures.md says when it pays.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from resnet_triton.support.images import find_images, read_pixels
from resnet_triton.support.vision import torchvision
from resnet_triton.tools.arguments import positive
from resnet_triton.tools.predict import Predictor, find_classifier


def decode(row: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """A file to pixels, bytes (3, H, W), by the same code as the command's; to black ones if it is broken."""
    transforms = torchvision().models.ResNet18_Weights.DEFAULT.transforms(**sizes)
    error, pixels = "", torch.zeros(3, sizes["crop_size"], sizes["crop_size"], dtype=torch.uint8)
    try:
        pixels = read_pixels(row["path"], transforms, io.BytesIO(row["bytes"]))
    except ValueError as problem:
        error = str(problem).removeprefix(f"{row['path']}: ")
    return {"file": row["path"], "error": error, "pixels": pixels.numpy()}


class Classify:
    """The actor: it builds the model once, and classifies batches of what `decode` returns."""

    def __init__(self, weights: str) -> None:
        self.predictor = Predictor(weights)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        said = self.predictor.classify(torch.tensor(batch["pixels"]))
        rows = [
            {"file": file, **({"error": error} if error else answer)}
            for file, error, answer in zip(batch["file"], batch["error"], said, strict=True)
        ]
        return {"row": [json.dumps(row) for row in rows]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--weights", default="DEFAULT", help="a checkpoint, or torchvision's name of trained weights")
    parser.add_argument("--workers", type=positive, default=1, help="how many models; one a GPU, if there are any")
    parser.add_argument("--batch", type=positive, default=32)
    args = parser.parse_args(argv)
    if find_spec("ray") is None:
        sys.exit("this example needs Ray: pip install '.[ray]'")
    import ray

    transforms = find_classifier(args.weights).transforms
    sizes = {"crop_size": transforms.crop_size[0], "resize_size": transforms.resize_size[0]}
    found = list(find_images([args.folder]))
    for path, problem in found:
        if problem:
            print(json.dumps({"file": path, "error": problem}))
    paths = [path for path, problem in found if not problem]
    if not paths:
        return
    ray.init()
    cpus, gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
    most = min(gpus or cpus, cpus - 1)  # a worker takes a CPU, too, and one has to be left to read with
    if args.workers > most:
        sys.exit(f"--workers {args.workers}: this cluster has room for {most}, and would wait for more for ever")
    rows = (
        ray.data.read_binary_files(paths, include_paths=True)
        .map(decode, fn_args=[sizes])
        .map_batches(
            Classify,
            fn_constructor_args=[args.weights],
            compute=ray.data.ActorPoolStrategy(size=args.workers),
            num_gpus=1 if gpus else 0,
            batch_size=args.batch,
        )
    )
    for row in rows.iter_rows():
        print(row["row"], flush=True)


if __name__ == "__main__":
    main()
