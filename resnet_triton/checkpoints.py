"""From a checkpoint of unknown origin to a ResNet: the one way in for every file of weights.

Wrappers need no list of their names. A ResNet's layers are what is called `conv1.weight` and `layer1.0.conv1.weight`
behind the same names, whatever these are: dictionaries ("state_dict"), modules ("model.", "backbone.") or both.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from . import models
from .models import BasicBlock, Bottleneck, ResNet
from .support import tensor_files
from .support.tensor_files import Foreign

_DEPTHS: dict[tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]], int] = {
    (BasicBlock, (2, 2, 2, 2)): 18, (BasicBlock, (3, 4, 6, 3)): 34, (Bottleneck, (3, 4, 6, 3)): 50,
    (Bottleneck, (3, 4, 23, 3)): 101, (Bottleneck, (3, 8, 36, 3)): 152,
}  # fmt: skip
_NAMED_BY = "arch", "model_name"
"""Where timm's and PyTorch's training scripts write the name of a model."""
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16} | {
    getattr(torch, f"float8_{kind}") for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")
}
_INTEGERS = {torch.int64, torch.int32}
_STEM, _BLOCK, _COUNTER = "conv1.weight", "layer1.0.conv1.weight", "num_batches_tracked"
_LAYER = re.compile(
    r"(^|\.)(layer[1-4]\.\d+\.(downsample\.[01]|(conv|bn)[123])|conv1|bn1|fc)"
    rf"\.(weight|bias|running_mean|running_var|{_COUNTER})$"
)
# What torch.compile, DataParallel, FSDP and activation checkpointing put into names, at any level.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class Checkpoint(NamedTuple):
    """A model in eval mode, the names that led to its weights, those of other models, and all that the file holds."""

    model: ResNet
    key: str
    others: list[str]
    data: Any


def load_checkpoint(file: str | os.PathLike[str] | BinaryIO, *, key: str | None = None) -> ResNet:
    """The ResNet whose weights a checkpoint holds: in eval mode, on the CPU, in float32.

    It returns a model, and takes none as timm's function of this name does, because the file says which one it is:
    depth, width, groups and number of classes show in names and shapes. ResNet-18, 34, 50, 101 and 152, wide ones and
    ResNeXts with torchvision's layers are built. Dilation, a batch norm's epsilon, anti-aliased pooling and a stride in
    another place do not show, and are taken as torchvision's; a warning says if the file names another model.

    `file` is a path, or a binary file that can seek, of what torch.save or safetensors wrote. No code in it runs; its
    suffix does not matter. The weights may lie in dictionaries of any names and depth, and their own names may have any
    prefixes: DataParallel's, torch.compile's, Lightning's, AveragedModel's.

    `key` says which ResNet, if a file holds several, or other layers beside it, by the names that lead to it:
    "state_dict", "model.encoder". Of a model and its moving average (whose key has the word "ema") the average is taken
    by default; a warning says so.

    Weights have to be dense, finite floating-point numbers of the right shapes. Raises ValueError, in one line, if
    anything is wrong, OSError if the file cannot be opened, and TypeError if `file` is neither.
    """
    found = read(file, key)
    for said in ([which(found)] if found.others and key is None else []) + doubts(found):
        warnings.warn(f"{_name(file)}: {said}", stacklevel=2)
    return found.model


def which(found: Checkpoint) -> str:
    """Says which of several ResNets was taken, and how to take the other."""
    return f"took the average, {found.key!r}; the key {found.others[0]!r} takes the other weights"


def doubts(found: Checkpoint) -> list[str]:
    """Says that the file names another model than those that are built, if it does."""
    names = [found.data.get(key) for key in _NAMED_BY] if isinstance(found.data, dict) else []
    return [
        f"names its model {name!r}, but its layers are taken as those of torchvision's, so logits may differ"
        for name in names
        if isinstance(name, str) and "resne" in name and not hasattr(models, name.partition(".")[0])  # timm: "name.tag"
    ]


def read(file: str | os.PathLike[str] | BinaryIO, key: str | None = None) -> Checkpoint:
    """As `load_checkpoint`, with what it found on the way, and without a warning."""
    if not isinstance(file, str | os.PathLike):
        if not hasattr(file, "read"):
            raise TypeError(f"file is a {type(file).__name__}, expected a path or a binary file")
        return _read(file, key)
    path = Path(file)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a regular file, expected a checkpoint, one file of torch.save or safetensors")
    with path.open("rb") as opened:
        return _read(opened, key)


def _read(file: BinaryIO, key: str | None) -> Checkpoint:
    try:
        data = tensor_files.read(file)
        networks = _find(data)
        if key is not None and key not in networks:
            networks |= _find(data, key)
        chosen = _choose(list(networks), key)
        network = networks[chosen]
        model = _build(network if key is None else network._replace(besides=[]), chosen)
    except ValueError as error:
        raise ValueError(f"{_name(file)}: {error}") from None
    return Checkpoint(model, chosen, [other for other in networks if other != chosen], data)


def _name(file: str | os.PathLike[str] | BinaryIO) -> str:
    return os.fspath(file) if isinstance(file, str | os.PathLike) else str(getattr(file, "name", "checkpoint"))


# --- finding ---------------------------------------------------------------------------------------------------------


class _Network(NamedTuple):
    """A ResNet's weights by its own names, and what its state dict holds besides."""

    state: dict[str, Tensor]
    besides: list[str]


def _find(data: Any, key: str | None = None) -> dict[str, _Network]:
    """Every ResNet in `data`, or on the way to `key`, by the names that lead to it. ValueError if `data` has none."""
    networks = {}
    for path, value in _contents(data, key):
        tensors = _tensors(value)
        prefixes = [name.removesuffix(_BLOCK) for name in tensors if f".{name}".endswith(f".{_BLOCK}")]
        prefixes = sorted((prefix for prefix in prefixes if f"{prefix}{_STEM}" in tensors), key=len)
        owners = {name: next(filter(name.startswith, reversed(prefixes)), None) for name in tensors}
        for prefix in prefixes:
            state = {name.removeprefix(prefix): tensors[name] for name, owner in owners.items() if owner == prefix}
            besides = [name for name, owner in owners.items() if owner is None]
            networks[f"{path}.{prefix}".strip(".")] = _Network(state, besides)
    if not networks and key is None:
        raise _no_resnet(data)
    return networks


def _contents(data: Any, key: str | None = None) -> Iterator[tuple[str, Any]]:
    """`data` and what it holds, dictionaries and lists at any depth, each once, with the names that lead to it; or what
    lies on the way to `key`, also where it is the same as something elsewhere."""
    pending, seen = [("", data)], set()
    while pending:
        path, value = pending.pop()
        this = id(value), "" if key is None else path
        if this in seen or (key is not None and path and not f"{key}.".startswith(f"{path}.")):
            continue
        seen.add(this)
        yield path, value
        inside: Any = value.items() if isinstance(value, dict) else ()
        if isinstance(value, list | tuple):
            inside = enumerate(value)
        parts = [(name, part) for name, part in inside if isinstance(part, dict | list | tuple | Foreign)]
        pending += [(f"{path}.{name}".strip("."), part) for name, part in reversed(parts)]


def _tensors(value: Any) -> dict[str, Tensor]:
    """A dictionary's tensors, their names without wrappers. Lone integers, which count something, are left out."""
    found: dict[str, Tensor] = {}
    for name, tensor in value.items() if isinstance(value, dict) else ():
        if not isinstance(tensor, Tensor):
            continue
        parts = str(name).split(".")
        if tensor.dim() or tensor.is_floating_point() or parts[-1] == _COUNTER:
            plain = ".".join(part for part in parts if part not in _WRAPPERS)
            if plain in found:
                raise ValueError(f"holds {plain} twice, once as {name}; save the state_dict of one model")
            found[plain] = tensor
    return found


def _no_resnet(data: Any) -> ValueError:
    """What `data` is instead."""
    modules = [value for _, value in _contents(data) if isinstance(value, Foreign) and value.is_module]
    if modules:
        return tensor_files.pickled_module(modules[0])
    names = max((_tensors(value) for _, value in _contents(data)), key=len)
    if not names:
        what = data if isinstance(data, Foreign) else type(data).__name__
        return ValueError(f"holds no tensors ({what}), expected a state_dict, as model.state_dict() gives")
    other = next((name for name in names if not _LAYER.search(name)), None)
    if other is None:
        return ValueError(f"holds no ResNet with {_STEM} and {_BLOCK}, expected all layers of one")
    shape = tuple(names[other].shape)
    return ValueError(
        f"holds another architecture: {other} {shape} is no layer of a ResNet, expected {_STEM}, {_BLOCK} and so on; "
        "build it where it is from, as by timm.create_model, and call optimize(model)"
    )


def _choose(keys: list[str], key: str | None) -> str:
    known = " and ".join(map(repr, keys))
    if key is not None:
        if key not in keys and keys == [""]:
            raise ValueError(f"holds no key {key!r}, for its weights lie at the top; leave the key out")
        if key not in keys:
            raise ValueError(f"holds no ResNet with the key {key!r}, expected {known}")
        return key
    averages = [name for name in keys if "ema" in re.split(r"[^a-z]+", name.lower())]
    if len(keys) == 1 or (len(keys) == 2 and len(averages) == 1):
        return (averages or keys)[0]
    raise ValueError(f"holds {len(keys)} ResNets, {known}; choose one by its key")


# --- building --------------------------------------------------------------------------------------------------------


def _build(network: _Network, key: str) -> ResNet:
    """The model, without memory until the weights have proved right."""
    state = network.state
    head = state.get("fc.weight")
    classes = head.shape[0] if head is not None and head.dim() == 2 else 1000
    if not classes:
        raise ValueError("fc.weight is for 0 classes, expected one at least")
    block, layers, groups, width = _architecture(state)
    with torch.device("meta"):
        model = ResNet(block, layers, classes, groups=groups, width_per_group=width)
    expected = model.state_dict()
    wrong = {name: fault for name in expected if name in state and (fault := _fault(name, state[name], expected[name]))}
    problems = {
        "missing": [name for name in expected if name not in state and not name.endswith(_COUNTER)],
        "unexpected": [name for name in state if name not in expected] + network.besides,
        "unusable": [f"{name} {fault}" for name, fault in wrong.items()],
    }
    said = [
        f"{len(names)} {problem} ({', '.join(names[:2])}{', ...' * (len(names) > 2)})"
        for problem, names in problems.items()
        if names
    ]
    if said:
        shape = "" if (groups, width) == (1, 64) else f" of {groups} groups of width {width}"
        depth = _DEPTHS[block, tuple(layers)]
        beside = network.besides and (problems["unexpected"], len(said)) == (network.besides, 1)
        hint = f"; the key {key!r} takes the ResNet alone" if beside else ""
        if (problems["missing"], len(said)) == (["fc.weight", "fc.bias"], 1):
            hint = "; without a classifier, give it to load_state_dict(state, strict=False) of a model"
        raise ValueError(f"expected the weights of a ResNet-{depth}{shape}, but {'; '.join(said)}{hint}")
    weights = {name: _weight(name, state.get(name)) for name in expected}
    model.load_state_dict(weights, assign=True)
    return model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _architecture(state: dict[str, Tensor]) -> tuple[type[BasicBlock] | type[Bottleneck], list[int], int, int]:
    """Block, blocks in each stage, groups and width per group, from the names and one shape."""
    block = Bottleneck if "layer1.0.conv3.weight" in state else BasicBlock
    layers = [len({name.split(".")[1] for name in state if name.startswith(f"layer{i}.")}) for i in range(1, 5)]
    if (block, tuple(layers)) not in _DEPTHS:
        depths = "; ".join(
            f"{blocks} as in ResNet-{depth}" for (kind, blocks), depth in _DEPTHS.items() if kind is block
        )
        raise ValueError(f"holds {tuple(layers)} {block.__name__}s, expected {depths}")
    shape = state["layer1.0.conv2.weight"].shape if "layer1.0.conv2.weight" in state else ()
    if block is BasicBlock or len(shape) != 4 or 0 in shape or shape[0] % shape[1]:
        return block, layers, 1, 64
    return block, layers, shape[0] // shape[1], shape[1]


def _fault(name: str, tensor: Tensor, expected: Tensor) -> str | None:
    """Why a tensor cannot be used, in words that go after its name."""
    counter = name.endswith(_COUNTER)
    if tensor.is_quantized or (tensor.dtype not in _FLOATS and not (counter and tensor.dtype in _INTEGERS)):
        return f"is {tensor.dtype}, expected floating-point numbers"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"has the layout {tensor.layout}, expected dense numbers"
    if tensor.is_meta:
        return "is on the meta device, without its numbers"
    if tensor.shape != expected.shape:
        return f"{tuple(tensor.shape)} instead of {tuple(expected.shape)}"
    if not _weight(name, tensor).isfinite().all():
        return "holds NaN or infinity"
    return None


def _weight(name: str, tensor: Tensor | None) -> Tensor:
    """A tensor as the model holds it, in memory of its own."""
    dtype = torch.int64 if name.endswith(_COUNTER) else torch.float32
    return torch.zeros((), dtype=dtype) if tensor is None else tensor.detach().to(dtype, copy=True)
