"""Photographs, a ResNet-18 that knows their statistics, and the calls that it makes of them."""

from __future__ import annotations

import functools
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_triton import resnet18
from resnet_triton.ops import Operation

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@functools.cache
def _photographs() -> Tensor:
    """scikit-learn's two, normalised, a quarter as wide: (2, 3, 106, 160)."""
    from sklearn.datasets import load_sample_images

    photos = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
    pixels = F.avg_pool2d(photos.permute(0, 3, 1, 2) / 255, 4)
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def crops(n: int, size: int, seed: int = 0) -> Tensor:
    """Square pieces of the photographs, (n, 3, size, size)."""
    g, photos = torch.Generator().manual_seed(seed), _photographs()
    pieces = []
    for i in range(n):
        top, left = (int(torch.randint(edge - size + 1, (), generator=g)) for edge in photos.shape[2:])
        pieces.append(photos[i % 2, :, top : top + size, left : left + size])
    return torch.stack(pieces)


@functools.cache
def state(num_classes: int) -> dict[str, Tensor]:
    """Of a ResNet-18 as it is initialised, with the statistics of crops, so that its activations keep their size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet18(num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(crops(16, 64))
    return model.state_dict()


@functools.cache
def calls() -> list[Operation]:
    """What the model calls for 16 crops, in fp32, in order."""
    model = resnet18(num_classes=100).eval()
    model.load_state_dict(state(100))
    made: list[Operation] = []
    run = Operation.run

    def record(operation: Operation) -> Tensor:
        made.append(operation)
        return run(operation)

    with torch.no_grad(), mock.patch.object(Operation, "run", record):
        model(crops(16, 64, seed=1))
    return made
