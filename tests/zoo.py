"""Models of other people, and what `optimize` makes of each: the rows of docs/models.md.

    TRITON_INTERPRET=1 PYTHONPATH=tests:. python tests/zoo.py

writes the rows there again. It needs the extra `zoo`. Weights are random, for what is compared is the optimized model
with itself as it was.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from resnet_triton import disabled, optimize, report
from resnet_triton.ops import ConvBnRelu
from resnet_triton.support import vision

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
SIZE = 64
vision.torchvision()  # the others import it themselves, which a CPU-only torch does not survive


class Row(NamedTuple):
    taken: int
    convolutions: int
    inside: Counter[str]
    left: Counter[str]
    difference: float

    def __str__(self) -> str:
        inside, left = (", ".join(f"{k} {n}" for k, n in sorted(c.items())) or "–" for c in (self.inside, self.left))
        difference = "under 1e-5" if self.difference < 1e-5 else "**large**"
        return f"{self.taken} of {self.convolutions} | {inside} | {difference} | {left}"


def randomised(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics and affine parameters that are not 0 and 1."""
    g = torch.Generator().manual_seed(0)
    for m in model.modules():
        if getattr(m, "running_mean", None) is not None:
            nn.init.uniform_(m.running_mean, -0.2, 0.2, generator=g)
            nn.init.uniform_(m.running_var, 0.5, 2.0, generator=g)
            if m.weight is not None:
                nn.init.uniform_(m.weight, 0.5, 1.5, generator=g)
                nn.init.uniform_(m.bias, -0.2, 0.2, generator=g)
    return model.eval()


def examine(model: nn.Module, size: int = SIZE, **modes: Any) -> Row:
    """Optimize `model`; compare it with itself as it was, and count its convolutions."""
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    optimize(model, **modes)
    with torch.inference_mode():
        with disabled(model):
            expected = tensors(model(x))
        actual = tensors(model(x))
    assert expected
    largest = max(float(t.abs().max()) for t in expected)
    difference = max(float((a - b).abs().max()) for a, b in zip(actual, expected, strict=True)) / largest
    calls = report(model, (1, 3, size, size)).calls
    convolutions = [c.operation for c in calls if isinstance(c.operation, ConvBnRelu)]
    stems = sum(c.operator == "stem" for c in calls)
    taken = stems + len(convolutions) + sum(c.shortcut is not None for c in convolutions)
    inside = Counter(c.activation.activation for c in convolutions) + Counter(relu=stems)
    del inside["none"]
    left = Counter(c.reason.partition(":")[0] for c in calls if c.operator == "aten.convolution")
    return Row(taken, taken + left.total(), inside, left, difference)


def tensors(value: Any) -> list[Tensor]:
    """Those of floating point in a model's output."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [t for part in parts for t in tensors(part)]


# --- models ----------------------------------------------------------------------------------------------------------


def timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10)

    return make


def hugging_face() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], embedding_size=16, layer_type="basic")
    return ResNetForImageClassification(config)


def timm_wrapper() -> nn.Module:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnet18", num_labels=10))


def torchvision(path: str, **arguments: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made: Any = vision.torchvision().models
        for name in path.split("."):
            made = getattr(made, name)
        return made(**arguments)

    return make


def frozen_backbone() -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(backbone_name="resnet50", weights=None)


def vendored() -> nn.Module:
    """torchvision's file, copied into somebody's repository."""
    path = Path(vision.torchvision().__file__).parent / "models" / "resnet.py"
    module = types.ModuleType("vendored_resnet")
    module.__package__ = "torchvision.models"
    sys.modules["vendored_resnet"] = module
    code = path.read_text().replace("@register_model()", "").replace("@handle_legacy_interface", "#")
    exec(compile(code, str(path), "exec"), module.__dict__)
    return module.ResNet(module.BasicBlock, [2, 2, 2, 2], num_classes=10)


def folded() -> nn.Module:
    """A ResNet-18 whose batch norms were folded into its convolutions."""
    model = randomised(torchvision("resnet18", num_classes=10)())
    for module in [model, *model.modules()]:
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("0", "1")):
            if isinstance(getattr(module, norm, None), nn.BatchNorm2d):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
    return model


class CifarBlock(nn.Module):
    """As in many repositories: a shortcut without parameters."""

    def __init__(self, c: int, k: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, k, 3, stride, 1, bias=False), nn.BatchNorm2d(k)
        self.conv2, self.bn2 = nn.Conv2d(k, k, 3, 1, 1, bias=False), nn.BatchNorm2d(k)
        self.stride, self.more = stride, k - c

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(x, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2)))


def cifar() -> nn.Module:
    blocks = [CifarBlock(c, k, s) for c, k, s in ((16, 16, 1), (16, 32, 2), (32, 64, 2))]
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class KernelBench(nn.Module):
    """A ResNet as benchmarks of generated kernels write it: one class, no weights of anybody's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.a, self.bn_a = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.bn_b = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
        self.downsample = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        y = self.relu(self.bn_a(self.a(x)))
        y = self.bn_b(self.b(y))
        y += self.downsample(x)
        return self.fc(torch.flatten(self.avgpool(self.relu(y)), 1))


class UNet(nn.Module):
    """A decoder on somebody's ResNet encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.down = nn.ModuleList([CifarBlock(16, 32, 2), CifarBlock(32, 64, 2)])
        self.up = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(64 + 32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
                nn.Sequential(nn.Conv2d(32 + 16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            ]
        )
        self.out = nn.ConvTranspose2d(16, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.stem(x)]
        for block in self.down:
            skips.append(block(skips[-1]))
        y = skips.pop()
        for block in self.up:
            y = block(torch.cat([F.interpolate(y, scale_factor=2.0), skips.pop()], 1))
        return self.out(y)


class Yolo(nn.Module):
    """A detector of YOLO's kind: Darknet's blocks, a pooled pyramid, a neck, heads of two scales."""

    def __init__(self) -> None:
        super().__init__()

        def conv(c: int, k: int, size: int = 3, stride: int = 1, act: nn.Module | None = None) -> nn.Module:
            filters = nn.Conv2d(c, k, size, stride, size // 2, bias=False)
            return nn.Sequential(filters, nn.BatchNorm2d(k, eps=1e-3), act or nn.SiLU(inplace=True))

        self.stem, self.down = conv(3, 16, 3, 2), nn.ModuleList([conv(16, 32, 3, 2), conv(32, 64, 3, 2)])
        self.block = nn.ModuleList([nn.Sequential(conv(k, k // 2, 1), conv(k // 2, k)) for k in (32, 64)])
        self.squeeze, self.merge = conv(64, 32, 1), conv(128, 64, 1)
        self.neck, self.fuse = (conv(64, 32, size, act=nn.LeakyReLU(0.1, inplace=True)) for size in (1, 3))
        self.heads = nn.ModuleList([nn.Conv2d(32, 18, 1), nn.Conv2d(64, 18, 1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        x, levels = self.stem(x), []
        for down, block in zip(self.down, self.block, strict=True):
            x = down(x)
            x = x + block(x)
            levels.append(x)
        pooled = [self.squeeze(x)]
        for _ in range(3):
            pooled.append(F.max_pool2d(pooled[-1], 5, 1, 2))
        x = self.merge(torch.cat(pooled, 1))
        near = self.fuse(torch.cat([F.interpolate(self.neck(x), scale_factor=2.0), levels[0]], 1))
        return [head(level) for head, level in zip(self.heads, (near, x), strict=True)]


MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    **{name: ("timm", timm(name)) for name in (
        "resnet18", "resnet34", "resnet50", "resnet26", "resnet18d", "seresnet50", "resnetblur50", "resnet50_gn",
        "resnetv2_50", "wide_resnet50_2", "resnext50_32x4d", "vgg11_bn", "regnetx_002", "densenet121",
        "mobilenetv2_100", "mobilenetv3_large_100", "efficientnet_lite0", "convnext_atto",
    )},
    "ResNetForImageClassification, basic blocks": ("transformers", hugging_face),
    "TimmWrapperForImageClassification": ("transformers", timm_wrapper),
    "fcn_resnet50": ("torchvision", torchvision("segmentation.fcn_resnet50", weights_backbone=None, num_classes=5)),
    "deeplabv3_resnet50": (
        "torchvision", torchvision("segmentation.deeplabv3_resnet50", weights_backbone=None, num_classes=5),
    ),
    "resnet50 with FPN and FrozenBatchNorm2d": ("torchvision", frozen_backbone),
    "resnet18, a vendored copy": ("by hand", vendored),
    "resnet18, batch norms folded": ("by hand", folded),
    "a ResNet for CIFAR": ("by hand", cifar),
    "a ResNet as KernelBench writes it": ("by hand", KernelBench),
    "a U-Net on a ResNet encoder": ("by hand", UNet),
    "a detector of YOLO's kind": ("by hand", Yolo),
}  # fmt: skip


def has(package: str) -> bool:
    return package in ("by hand", "torchvision") or importlib.util.find_spec(package) is not None


def line(name: str) -> str:
    """A row of the table."""
    package, make = MODELS[name]
    torch.manual_seed(0)
    torch.compiler.reset()
    return f"| {name} | {package} | {examine(randomised(make()))} |"


if __name__ == "__main__":
    rows = []
    for name in MODELS:
        rows.append(line(name))
        print(rows[-1], flush=True)
    before, head, behind = re.split(r"(?m)(^\|(?: --- \|)+\n)", PAGE.read_text(encoding="utf-8"), maxsplit=1)
    _, _, rest = behind.partition("\n\n")
    PAGE.write_text(before + head + "\n".join(rows) + "\n\n" + rest, encoding="utf-8")
