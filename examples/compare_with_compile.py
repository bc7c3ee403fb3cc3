"""Compare ResNet-18 on our kernels with torch.compile: same weights, same images, answers first, then times.

    python examples/compare_with_compile.py --batch 32

A first impression. Published figures come from `resnet-triton bench`, which gives every alternative a process of its
own. On a CPU ours runs on PyTorch, and torch.compile is faster there.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor, nn

import resnet_triton
from resnet_triton.support.vision import torchvision
from resnet_triton.tools.arguments import positive


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--size", type=positive, default=224, help="pixels a side")
    parser.add_argument("--mode", default="reduce-overhead", help="torch.compile's: default, reduce-overhead, ...")
    parser.add_argument("--runs", type=positive, default=20)
    args = parser.parse_args(argv)

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    torch.manual_seed(0)
    original = torchvision().models.resnet18().eval().to(device, dtype)
    images = torch.randn(args.batch, 3, args.size, args.size, device=device, dtype=dtype)
    images = images.contiguous(memory_format=torch.channels_last)

    # Three models that share nothing, so that nobody's change of a weight's layout helps or harms another.
    ours = resnet_triton.optimize(copy.deepcopy(original))
    compiled = torch.compile(copy.deepcopy(original).to(memory_format=torch.channels_last), mode=args.mode)
    models = {"eager": original.to(memory_format=torch.channels_last), "compiled": compiled, "ours": ours}

    with torch.inference_mode():
        exact = copy.deepcopy(original).cpu().double()(images.cpu().double())
        for name, model in models.items():
            for _ in range(3):  # the first calls compile and capture
                logits = model(images)
            error = (logits.cpu().double() - exact).abs().max() / exact.abs().max()
            print(f"{name}: answers within {error:.1e} of fp64's, relative to the largest")
        seconds = {name: [] for name in models}
        for _ in range(args.runs):  # in turns: a clock that drifts then drifts for all
            for name, model in models.items():
                seconds[name].append(timed(model, images))
    for name, samples in seconds.items():
        print(f"{name}: {median(samples) * 1e3:.2f} ms a batch, {args.batch / median(samples):,.0f} images/s")


def timed(model: nn.Module, images: Tensor) -> float:
    started = time.perf_counter()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
