"""Fine-tune ResNet-18 on handwritten digits, then infer with the kernels again.

    python examples/finetune.py --weights DEFAULT --epochs 3

It is one model throughout. In training mode its layers run on PyTorch, with gradients; in inference they run on the
kernels (on a CPU, on PyTorch). Nothing has to be folded, exported or refreshed in between. scikit-learn brings the
1797 digits; three epochs take about a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import resnet_triton
from resnet_triton.tools.arguments import positive

HELD_OUT = 1437  # the first digit that the model is not trained with


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", choices=["DEFAULT", "IMAGENET1K_V1"], help="torchvision's name of trained weights")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--images", type=positive, default=HELD_OUT, help="how many digits to train with")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = (tensor.to(device) for tensor in digits())
    model = resnet_triton.resnet18(weights=args.weights)
    model.fc = nn.Linear(512, 10)
    model.to(device)

    held_out, few = (images[HELD_OUT:], labels[HELD_OUT:]), min(args.images, HELD_OUT)
    print(f"before: {accuracy(model, *held_out):.1%} of the held-out digits are right")
    train(model, images[:few], labels[:few], args.epochs)
    print(f"after: {accuracy(model, *held_out):.1%}")
    print(resnet_triton.report(model, (1, 3, 32, 32)))


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 3, 32, 32), about -1 to 1, and their labels, in random order."""
    data = load_digits()
    order = torch.randperm(len(data.target))
    scans = torch.from_numpy(data.images).float()[order, None] / 8 - 1
    return nn.functional.interpolate(scans, scale_factor=4).expand(-1, 3, -1, -1), torch.from_numpy(data.target)[order]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    for epoch in range(epochs):
        for chosen in torch.randperm(len(images), device=images.device).chunk(max(len(images) // 64, 1)):
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.2f}")


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.inference_mode():
        return (model(images).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    main()
