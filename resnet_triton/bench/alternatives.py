"""ResNet as PyTorch's users run it today, in every way that might be faster than ours.

An alternative takes a torchvision model in eval mode, already on its device and in its dtype, and images, and returns
a function from images to logits. It may change the model. Each is built in a process of its own (`worker.py`), so what
one switches on, such as Inductor's freezing, never helps or harms another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_triton

from ..ops.dispatch import Kernels

Model = Callable[[Tensor], Tensor]
Build = Callable[[nn.Module, Tensor], Model]

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Alternative:
    """One way to run the model. Images come to it in the memory format it likes best, and no one pays for that.

    `cold` says that a first call compiles, which takes long.
    """

    name: str
    build: Build
    ours: bool = False
    channels_last: bool = True
    cold: bool = False

    def images(self, x: Tensor) -> Tensor:
        """`x` in this alternative's memory format."""
        return x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)


def alternatives(device: torch.device) -> dict[str, Alternative]:
    """All that can run on a device with what is installed, by name, ours last."""
    cuda = device.type == "cuda"
    found = [
        Alternative("eager", _eager, channels_last=False),
        Alternative("eager channels_last", _eager),
        Alternative("folded", _folded),
    ]
    if cuda:
        found += [
            Alternative("eager graph", partial(_graph, _eager)),
            Alternative("folded graph", partial(_graph, _folded)),
            Alternative("cudnn fused graph", partial(_graph, cudnn_model)),
        ]
    for mode in COMPILE_MODES if cuda else COMPILE_MODES[:1]:  # the others are about a GPU
        for freezing in (False, True):
            name = f"compile {mode}" + " freezing" * freezing
            found.append(Alternative(name, partial(_compiled, mode, freezing), cold=True))
    found.append(Alternative("ours", partial(_ours, False), ours=True, cold=cuda))
    if cuda:
        found.append(Alternative("ours graph", partial(_ours, True), ours=True, cold=True))
    return {a.name: a for a in found}


def select(names: list[str], device: torch.device) -> list[Alternative]:
    """Alternatives by name, in the order of `alternatives`. ValueError names the first unknown one."""
    known = alternatives(device)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no alternative {unknown[0]!r} on {device.type}, expected some of {', '.join(known)}")
    return [a for name, a in known.items() if name in names]


def _eager(model: nn.Module, images: Tensor) -> Any:
    """In the images' memory format, or each convolution would convert one of its operands."""
    last = images.is_contiguous(memory_format=torch.channels_last)
    moved: Any = model
    return moved.to(memory_format=torch.channels_last if last else torch.contiguous_format)


def _folded(model: nn.Module, images: Tensor) -> Model:
    from torch.fx.experimental.optimization import fuse

    del images
    folded: Any = fuse(model)
    return folded.to(memory_format=torch.channels_last)


def _compiled(mode: str, freezing: bool, model: nn.Module, images: Tensor) -> Model:
    import torch._inductor.config as inductor

    del images
    torch.compiler.reset()  # each batch size compiles anew, and none meets the limit on recompilations
    inductor.freezing = freezing
    return torch.compile(model, mode=mode, dynamic=False)


def _ours(cuda_graph: bool, model: nn.Module, images: Tensor) -> Model:
    kernels: Kernels = "triton" if images.is_cuda else "auto"
    return resnet_triton.optimize(model, kernels=kernels, cuda_graph=cuda_graph)


def _graph(build: Build, model: nn.Module, images: Tensor) -> Model:
    """The model as one CUDA graph with an input buffer of its own."""
    call, static = build(model, images), images.clone(memory_format=torch.preserve_format)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = call(static)

    def replay(x: Tensor) -> Tensor:
        static.copy_(x)
        graph.replay()
        return answer

    return replay


def cudnn_model(model: nn.Module, images: Tensor) -> Model:
    """cuDNN's own fused convolution + bias [+ residual] + ReLU, batch norm folded: the strongest plain PyTorch."""
    m: Any = _folded(model, images)

    def conv_relu(x: Tensor, conv: Any) -> Tensor:
        return torch.cudnn_convolution_relu(
            x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )

    def conv_add_relu(x: Tensor, conv: Any, residual: Tensor) -> Tensor:
        return torch.cudnn_convolution_add_relu(
            x, conv.weight, residual, 1.0, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )

    def call(x: Tensor) -> Tensor:
        y = m.maxpool(conv_relu(x, m.conv1))
        for block in (block for i in range(1, 5) for block in getattr(m, f"layer{i}").children()):
            short = getattr(block, "downsample", None)
            residual = y if short is None else getattr(short, "0")(y)
            *first, last = [c for name, c in block.named_children() if name.startswith("conv")]
            for conv in first:
                y = conv_relu(y, conv)
            y = conv_add_relu(y, last, residual)
        return m.fc(F.adaptive_avg_pool2d(y, 1).flatten(1))

    return call
