"""The ResNet family with torchvision's names, registration order, initialisation and state_dict.

The modules hold parameters exactly as torchvision's do; only `forward` differs: each convolution goes, with its batch
norm, ReLU and residual or shortcut, into one fused call where `fusion.py` finds that it may.

Architecture: He et al., "Deep Residual Learning for Image Recognition", 2015; the stride sits in the bottleneck's 3x3
convolution, as in torchvision ("ResNet v1.5").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import ops
from .filters import is_plain
from .fusion import call_module, conv_norm_act, fuse, is_frozen_norm, plain, plain_pool, watched
from .graphs import runner
from .graphs.cuda_graph import Entry
from .graphs.runner import Graphed
from .ops import original, reference
from .ops.checks import check_pixels, pair
from .ops.dispatch import Kernels, Modes
from .ops.original import is_disabled, replaced
from .ops.schema import check_tensor
from .ops.stem import STEM_CONV, STEM_POOL
from .support import vision

NormLayer = Callable[[int], nn.Module]


def _conv3x3(c: int, k: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c, k, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False)


def _conv1x1(c: int, k: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c, k, 1, stride, bias=False)


class _HasModes(nn.Module):
    """A module whose calls run as `optimize` sets on it."""

    kernels: Kernels = "auto"
    batch_invariant = False

    @property
    def modes(self) -> Modes:
        return Modes(self.batch_invariant, self.kernels)

    def _floats(self, x: Any) -> Any:
        """An input of ours as torchvision's code takes it."""
        return x

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError(
            f"torch.jit.script cannot compile a {type(self).__name__} of ours; use torch.jit.trace or torch.export, or "
            "resnet_triton.revert a model that was optimized"
        )


class BasicBlock(_HasModes):
    """Two 3x3 convolutions and a shortcut, of ResNet-18 and 34: (N, inplanes, H, W) to (N, planes, P, Q).

    Raises ValueError for groups, another base_width, or dilation.
    """

    expansion = 1

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, groups: int = 1,
        base_width: int = 64, dilation: int = 1, norm_layer: NormLayer | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1 or base_width != 64 or dilation > 1:
            raise ValueError("BasicBlock takes groups=1, width_per_group=64 and no dilation; use Bottleneck")
        self.conv1 = _conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if original.anywhere and is_disabled(self):
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            y += x if self.downsample is None else self.downsample(x)
            return self.relu(y)
        own, modes = self._modules, self.modes  # for the way through Module.__getattr__ costs more
        y = conv_norm_act(x, own["conv1"], own["bn1"], own["relu"], modes)
        return conv_norm_act(y, own["conv2"], own["bn2"], own["relu"], modes, identity=x, downsample=self.downsample)


class Bottleneck(_HasModes):
    """1x1, 3x3, 1x1 convolutions and a shortcut, of ResNet-50 and up: (N, inplanes, H, W) to (N, 4 * planes, P, Q)."""

    expansion = 4

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, groups: int = 1,
        base_width: int = 64, dilation: int = 1, norm_layer: NormLayer | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = _conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = _conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = _conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if original.anywhere and is_disabled(self):
            y = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
            y = self.bn3(self.conv3(y))
            y += x if self.downsample is None else self.downsample(x)
            return self.relu(y)
        own, modes = self._modules, self.modes  # for the way through Module.__getattr__ costs more
        y = conv_norm_act(x, own["conv1"], own["bn1"], own["relu"], modes)
        y = conv_norm_act(y, own["conv2"], own["bn2"], own["relu"], modes)
        return conv_norm_act(y, own["conv3"], own["bn3"], own["relu"], modes, identity=x, downsample=self.downsample)


class ResNet(_HasModes, Graphed):
    """torchvision's `ResNet`, argument for argument; `kernels` and `batch_invariant` on it and its blocks are modes.

    Takes images (N, 3, H, W) in the weights' floating dtype, returns logits (N, num_classes) in it. A call raises
    TypeError for another dtype, ValueError for another shape or device.

    With `normalize` set to a mean and a standard deviation for each channel, images may also be bytes (torch.uint8),
    which become `(x / 255 - mean) / std` on the way in; others are taken as they are. `cuda_graph` and `frozen` are as
    `optimize` sets them.
    """

    _triton_normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: list[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: list[bool] | None = None,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        dilate = replace_stride_with_dilation or [False, False, False]
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation={dilate!r}, expected None or three bools")
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._initialise(zero_init_residual)

    def _make_layer(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        previous = self.dilation
        if dilate:
            self.dilation, stride = self.dilation * stride, 1
        width = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != width:
            downsample = nn.Sequential(_conv1x1(self.inplanes, width, stride), self._norm_layer(width))
        groups, base, norm = self.groups, self.base_width, self._norm_layer
        stack = [block(self.inplanes, planes, stride, downsample, groups, base, previous, norm)]
        self.inplanes = width
        stack += [block(width, planes, 1, None, groups, base, self.dilation, norm) for _ in range(1, blocks)]
        return nn.Sequential(*stack)

    def _initialise(self, zero_init_residual: bool) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.constant_(m.weight, 1)
                nn.init.constant_(m.bias, 0)
        if zero_init_residual:
            for m in self.modules():
                last = m.bn3 if isinstance(m, Bottleneck) else m.bn2 if isinstance(m, BasicBlock) else None
                if last is not None and last.weight is not None:
                    nn.init.constant_(last.weight, 0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or type(x) is not Tensor or self.training or not runner.wanted(self, x):
            return self._forward_impl(x)
        if original.anywhere and any(map(is_disabled, self.modules())):
            return self._forward_impl(x)
        return runner.run(self, x)

    def _forward_impl(self, x: Tensor, *, stem: bool = True) -> Tensor:
        """Without the stem, `x` is what the stem returns."""
        if type(x) is not Tensor:
            check_tensor("x", x)
        if original.anywhere and is_disabled(self):
            x = self.maxpool(self.relu(self.bn1(self.conv1(self._floats(x)))))
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return self.fc(torch.flatten(self.avgpool(x), 1))
        x = self._stem(x) if stem else x
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            # Block by block, for calling the stage would keep its input, the largest tensor of all, until its end.
            whole = isinstance(x, fx.Proxy) or not plain(stage, nn.Sequential)
            for block in (stage,) if whole else stage:
                x = block(x) if not self.batch_invariant or _keeps_apart(block) else call_module(block, x, self.modes)
        return self._head(x)

    def _entry(self, x: Tensor) -> Entry:
        call = self._fused_stem(x)
        alone = None if call is None else call.alone()
        if alone is None:
            return super()._entry(x)
        out, launch = alone
        fill = launch.repeat("x_ptr")
        fill(x)
        return Entry(out, fill, partial(ResNet._forward_impl, self, stem=False))

    def uncaptured_model_reason(self) -> str | None:
        for name, module in self.named_modules():
            where = name or "the model"
            if type(module) not in STATELESS and not is_frozen_norm(type(module)):
                return f"{where} is a {type(module).__name__}, which may do more than compute"
            if (code := replaced(module)) is not None:
                return f"{where} is not as written, {code}"
            if watched(module):
                return f"{where} has a hook"
            if module.training and isinstance(module, _TRAINED):
                return f"{where} is in training mode"
            tables = (module._parameters, module._buffers, vars(module))
            if any(isinstance(t, Tensor) and not is_plain(t) for table in tables for t in list(table.values())):
                return f"{where} has a tensor of another kind, whose memory may be replaced unseen"
            if any(isinstance(vars(module).get(name), list) for name in _SIZES):
                return f"{where} has a list as an attribute, which may be edited unseen"
        return None

    @property
    def normalize(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation of each channel of bytes, or None: numbers, which cannot be changed in place.

        Images of floating dtype are taken as they are: who passes those normalises them.

        Setting it raises ValueError if there is not one of each for every channel that `conv1` takes, if a mean is not
        finite, or a standard deviation not finite and positive.
        """
        return self._triton_normalize

    @normalize.setter
    def normalize(self, statistics: tuple[Sequence[float], Sequence[float]] | None) -> None:
        if statistics is not None:
            try:
                mean, std = (tuple(map(float, values)) for values in statistics)
            except (TypeError, ValueError):
                wanted = "a mean and a standard deviation for each channel, ((0.5, ...), (0.2, ...))"
                raise ValueError(f"normalize={statistics!r}, expected None or {wanted}") from None
            check_pixels(mean, std, getattr(self.conv1, "in_channels", len(mean)))
            statistics = mean, std
        self._triton_normalize = statistics

    def _floats(self, x: Any) -> Any:
        if not isinstance(x, fx.Proxy) and x.dtype == torch.uint8:
            if self.normalize is None:
                if not plain(self.conv1, nn.Conv2d):  # a hook, or somebody's own layer, may take bytes
                    return x
                raise TypeError("x has dtype torch.uint8, expected a floating one; set model.normalize to pass bytes")
            check_pixels(*self.normalize, x.shape[1])
            weight = getattr(self.conv1, "weight", None)  # somebody's own stem may have none
            dtype = (next(self.parameters()) if weight is None else weight).dtype
            return reference.normalize(x, *self.normalize).to(dtype)
        return x

    def _stem(self, x: Tensor) -> Tensor:
        call = self._fused_stem(x)
        if call is not None:
            return call.run()
        return self._pool(conv_norm_act(self._floats(x), self.conv1, self.bn1, self.relu, self.modes))

    def _fused_stem(self, x: Tensor) -> ops.Stem | None:
        """Convolution, batch norm, ReLU and pool as one call, if they are what it computes."""
        conv, pool = self.conv1, self.maxpool
        fused = fuse(conv, self.bn1)
        if isinstance(x, fx.Proxy) or isinstance(fused, str) or fused.geometry != STEM_CONV:
            return None
        ordinary = (
            conv.kernel_size == (7, 7)
            and plain(self.relu, nn.ReLU)
            and plain_pool(pool)
            and (pair(pool.kernel_size), pair(pool.stride), pair(pool.padding)) == STEM_POOL
        )
        if not ordinary:
            return None
        pixels = self.normalize if x.dtype == torch.uint8 else None
        if x.dtype != fused.weight.dtype and pixels is None:
            return None
        mean, std = pixels or (None, None)
        return ops.Stem(x, fused.weight, fused.batch_norm, mean, std, self.modes)

    # Feature extractors ask for the pools and the classifier by name: while torch.fx traces, they stay module calls.

    def _head(self, x: Tensor) -> Tensor:
        if not isinstance(x, fx.Proxy) and self._averages_everything() and plain(self.fc, nn.Linear):
            return ops.AvgPoolLinear(x, self.fc.weight, self.fc.bias, self.modes).run()
        return self._classify(torch.flatten(self._average(x), 1))

    def _pool(self, x: Tensor) -> Any:
        pool = self.maxpool
        if plain_pool(pool) and not isinstance(x, fx.Proxy):
            window = (pair(pool.kernel_size), pair(pool.stride), pair(pool.padding))
            return ops.MaxPool2d(x, *window, modes=self.modes).run()
        return call_module(pool, x, self.modes)

    def _average(self, x: Tensor) -> Any:
        if self._averages_everything() and not isinstance(x, fx.Proxy):
            return ops.GlobalAvgPool(x, self.modes).run()
        return call_module(self.avgpool, x, self.modes)

    def _averages_everything(self) -> bool:
        return plain(self.avgpool, nn.AdaptiveAvgPool2d) and self.avgpool.output_size in (1, (1, 1))

    def _classify(self, x: Tensor) -> Any:
        if plain(self.fc, nn.Linear) and not isinstance(x, fx.Proxy):
            return ops.Linear(x, self.fc.weight, self.fc.bias, self.modes).run()
        return call_module(self.fc, x, self.modes)


def _keeps_apart(block: Any) -> bool:
    """Whether a block is ours, with nothing added, and computes each image of a batch as if it were alone."""
    return type(block) in BLOCKS and not watched(block) and replaced(block) is None and block.batch_invariant


BLOCKS: set[type] = {BasicBlock, Bottleneck}
STATELESS: set[type] = {
    ResNet, BasicBlock, Bottleneck, nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm, nn.ReLU, nn.MaxPool2d,
    nn.AdaptiveAvgPool2d, nn.Linear, nn.Identity,
    # what people put into heads
    nn.Dropout, nn.BatchNorm1d, nn.LayerNorm, nn.Flatten, nn.AvgPool2d, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU,
    nn.Hardswish, nn.Tanh, nn.Sigmoid, nn.Softmax, nn.LogSoftmax,
}  # fmt: skip
"""A call of these, but for training, depends on its input, tensors and plain attributes, and changes nothing."""
_TRAINED = (nn.BatchNorm2d, nn.BatchNorm1d, nn.Dropout)
_SIZES = ("kernel_size", "stride", "padding", "dilation", "output_size", "normalized_shape")
"""Attributes that may be lists."""
for _cls in STATELESS - original.LAYERS.keys():
    original.remember(_cls)


def _resnet(
    name: str,
    block: type[BasicBlock] | type[Bottleneck],
    layers: list[int],
    weights: Any,
    progress: bool,
    **kwargs: Any,
) -> ResNet:
    """Build, initialise as torchvision does, then move the filters to channels_last memory, where kernels read them."""
    state = None
    if weights is not None:
        pretrained = vision.find_weights(name, weights)
        classes = len(pretrained.meta["categories"])
        if kwargs.setdefault("num_classes", classes) != classes:
            given = f"num_classes={kwargs['num_classes']}, expected {classes} for weights {pretrained}"
            raise ValueError(f"{given}; replace model.fc afterwards")
        state = pretrained.get_state_dict(progress=progress, check_hash=True, weights_only=True)
    model = ResNet(block, layers, **kwargs)
    if state is not None:
        model.load_state_dict(state)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def resnet18(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18: images (N, 3, H, W) of the weights' dtype, or bytes if `normalize` is set; logits (N, num_classes).

    `weights`: None, torchvision's `ResNet18_Weights` member or its name ("IMAGENET1K_V1", "DEFAULT"); they need
    torchvision and, the first time, a network. Further arguments go to `ResNet`. Filters are in channels_last memory,
    where kernels read them. Raises ValueError for unknown weights and for a `num_classes` that is not theirs.
    """
    return _resnet("resnet18", BasicBlock, [2, 2, 2, 2], weights, progress, **kwargs)


def resnet34(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34; arguments, input, result and errors as for `resnet18`."""
    return _resnet("resnet34", BasicBlock, [3, 4, 6, 3], weights, progress, **kwargs)


def resnet50(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50; arguments, input, result and errors as for `resnet18`."""
    return _resnet("resnet50", Bottleneck, [3, 4, 6, 3], weights, progress, **kwargs)


def resnet101(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101; arguments, input, result and errors as for `resnet18`."""
    return _resnet("resnet101", Bottleneck, [3, 4, 23, 3], weights, progress, **kwargs)


def resnet152(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152; arguments, input, result and errors as for `resnet18`."""
    return _resnet("resnet152", Bottleneck, [3, 8, 36, 3], weights, progress, **kwargs)


def wide_resnet50_2(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-50-2; arguments, input, result and errors as for `resnet18`."""
    return _resnet("wide_resnet50_2", Bottleneck, [3, 4, 6, 3], weights, progress, width_per_group=128, **kwargs)


def wide_resnet101_2(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-101-2; arguments, input, result and errors as for `resnet18`."""
    return _resnet("wide_resnet101_2", Bottleneck, [3, 4, 23, 3], weights, progress, width_per_group=128, **kwargs)


def resnext50_32x4d(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-50, 32x4d; arguments, input, result and errors as for `resnet18`."""
    return _resnet(
        "resnext50_32x4d", Bottleneck, [3, 4, 6, 3], weights, progress, groups=32, width_per_group=4, **kwargs
    )


def resnext101_32x8d(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101, 32x8d; arguments, input, result and errors as for `resnet18`."""
    return _resnet(
        "resnext101_32x8d", Bottleneck, [3, 4, 23, 3], weights, progress, groups=32, width_per_group=8, **kwargs
    )


def resnext101_64x4d(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101, 64x4d; arguments, input, result and errors as for `resnet18`."""
    return _resnet(
        "resnext101_64x4d", Bottleneck, [3, 4, 23, 3], weights, progress, groups=64, width_per_group=4, **kwargs
    )
