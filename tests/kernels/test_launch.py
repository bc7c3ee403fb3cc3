"""What a launcher is told, its launch does: whoever times or compiles a configuration relies on it."""

from __future__ import annotations

import weakref
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from resnet_triton.kernels.add_relu import add_relu
from resnet_triton.kernels.avg_pool_linear import avg_pool_linear
from resnet_triton.kernels.conv_bn_relu import conv_bn_relu
from resnet_triton.kernels.conv_depthwise import conv_depthwise
from resnet_triton.kernels.global_avg_pool import global_avg_pool
from resnet_triton.kernels.launch import Launch, cdiv, next_power_of_2, round_to_tf32
from resnet_triton.kernels.linear import linear
from resnet_triton.kernels.max_pool import max_pool
from resnet_triton.kernels.stem import pack, packed_shape, stem
from resnet_triton.kernels.values import (
    NONE,
    BatchNorm,
    ConvConfig,
    Convolution,
    Geometry,
    Shortcut,
    has_several_sides,
    is_flat,
)


def images(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16).contiguous(memory_format=torch.channels_last)


NORM = BatchNorm(torch.zeros(40), torch.ones(40), None, None, 0.0)
X, Y = images(5, 24, 7, 12), images(5, 40, 7, 12)
CONVOLUTION: dict[str, Any] = {
    "out": Y, "x": X, "weight": images(40, 24, 3, 3), "batch_norm": NORM, "geometry": Geometry(padding=(1, 1)),
    "residual": None, "shortcut": None, "activation": NONE, "precision": "ieee", "programs": 132, "partials": None,
    "semaphores": None,
}  # fmt: skip
TILE = ConvConfig(block_m=64, block_k=32, block_c=16, num_warps=8, num_stages=3)


def _convolution(**tiles: Any) -> Launch:
    return conv_bn_relu(Convolution(**CONVOLUTION, config=ConvConfig(**tiles)))


def _grouped(**tiles: Any) -> Launch:
    """Of eight groups: a program's 32 filters are of five, each of three channels."""
    told = {"weight": images(40, 3, 3, 3), "geometry": Geometry(padding=(1, 1), groups=8)}
    return conv_bn_relu(Convolution(**CONVOLUTION | told, config=ConvConfig(**tiles)))


def _pack(mean: Any = None, std: Any = None, **tiles: Any) -> Launch:
    marks = torch.zeros(packed_shape(5, 7, 12)[:2], dtype=torch.int32)
    return pack(out=torch.zeros(packed_shape(5, 7, 12)), marks=marks, x=X[:, :3], mean=mean, std=std, **tiles)


def _stem(**tiles: Any) -> Launch:
    packed = torch.zeros(packed_shape(5, 28, 48), dtype=torch.float16)
    marks = torch.zeros(packed.shape[:2], dtype=torch.int32)
    weight = images(40, 3, 7, 7)
    return stem(out=Y, packed=packed, marks=marks, weight=weight, batch_norm=NORM, **tiles)


LAUNCHERS: dict[str, tuple[Any, dict[str, Any], dict[str, Any], tuple[int, ...]]] = {
    # launcher, tensors, what it is told, the grid
    "add_relu": (add_relu, {"out": X, "x": X, "other": X}, {"block": 64, "num_warps": 8}, (158,)),
    "avg_pool_linear": (
        avg_pool_linear,
        {"out": torch.zeros(5, 40), "x": X, "weight": torch.zeros(40, 24), "bias": None},
        {"block_p": 64, "block_k": 32, "block_c": 16, "num_warps": 8},
        (10,),
    ),
    "global_avg_pool": (
        global_avg_pool, {"out": X[..., :1, :1], "x": X}, {"block_p": 64, "block_c": 16, "num_warps": 8}, (10,)
    ),
    "linear": (
        linear,
        {"out": torch.zeros(130, 40), "x": torch.zeros(130, 24), "weight": torch.zeros(40, 24), "bias": None},
        {"precision": "tf32", "block_m": 64, "block_k": 32, "block_c": 16, "num_warps": 8, "num_stages": 3},
        (6,),
    ),
    "max_pool": (
        max_pool,
        {"out": X, "x": X, "kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1)},
        {"block_m": 64, "block_c": 16, "unroll": 2, "num_warps": 8},
        (14,),
    ),
    "conv_depthwise": (
        conv_depthwise,
        {"out": X, "x": X, "weight": torch.zeros(24, 1, 3, 3), "batch_norm": NORM, "residual": None,
         "geometry": Geometry(padding=(1, 1), groups=24), "activation": NONE},
        {"rows": 4, "box_w": 8, "block_c": 16, "num_warps": 8},
        (40,),
    ),
    "pack": (_pack, {}, {"block": 64, "num_warps": 8}, (35,)),
    "pack of bytes": (_pack, {"mean": [0.5] * 3, "std": [0.2] * 3}, {"block": 64, "num_warps": 8}, (35,)),
    "stem": (_stem, {}, {"block_q": 16, "block_k": 32, "strip": 3, "num_warps": 8, "num_stages": 3}, (60,)),
    "conv through pointers": (_convolution, {}, asdict(replace(TILE, split_k=3)), (14, 3)),
    "conv of groups": (_grouped, {}, asdict(TILE), (14, 1)),
    "conv in boxes": (_convolution, {}, asdict(replace(TILE.on((2, 8, 4)), split_k=3)), (32, 3)),
}  # fmt: skip


@pytest.mark.parametrize(("launcher", "tensors", "told", "grid"), LAUNCHERS.values(), ids=LAUNCHERS)
def test_a_launch_is_what_was_asked_for(launcher: Any, tensors: Any, told: dict[str, Any], grid: Any) -> None:
    launch = launcher(**tensors, **told)
    names = [n for n in told if n.upper() in launch.kernel.arg_names]
    assert {n: launch.arguments[n.upper()] for n in names} == {n: told[n] for n in names}
    assert launch.num_warps == told["num_warps"]
    assert launch.num_stages == told.get("num_stages", 2)
    assert launch.grid == grid
    assert set(launch.arguments) == set(launch.kernel.arg_names)


@pytest.mark.parametrize(("num_warps", "where"), [(8, "res_ptr"), (1, "res_desc")])
def test_a_residual_comes_once(num_warps: int, where: str) -> None:
    """Early where registers have room for it."""
    tile = replace(TILE.on((1, 1, 64)), block_k=64, num_warps=num_warps)
    assert tile.early_residual == (where == "res_ptr")
    arguments = conv_bn_relu(Convolution(**CONVOLUTION | {"residual": Y}, config=tile)).arguments
    assert [name for name in ("res_ptr", "res_desc") if arguments[name] is not None] == [where]


@pytest.mark.skipif(triton.__version__.startswith("3.6."), reason="this Triton's descriptors round nothing")
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_factors_in_boxes_are_rounded_to_tf32(precision: str) -> None:
    """While they are loaded, or products would cut them; nothing else is rounded."""
    x, weight, y = X.float(), images(40, 24, 3, 3).float(), Y.float()
    shortcut = Shortcut(x, images(40, 24, 1, 1).float(), NORM, (1, 1))
    told = {"x": x, "weight": weight, "out": y, "precision": precision}
    told["config"] = replace(TILE.on((1, 1, 64)), block_k=64, num_warps=1)
    calls = [Convolution(**CONVOLUTION | told | added) for added in ({"residual": y}, {"shortcut": shortcut})]
    found = {name: d.round_f32_to_tf32 for launch in map(conv_bn_relu, calls) for name, d in launch.arguments.items()
             if name.endswith("_desc") and d is not None}  # fmt: skip
    factors = {"x_desc", "w_desc", "short_x_desc", "short_w_desc"}
    assert found == {name: precision == "tf32" and name in factors for name in (*factors, "y_desc", "res_desc")}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_rounded_to_tf32(dtype: torch.dtype) -> None:
    desc = SimpleNamespace(base=torch.empty(0, dtype=dtype), round_f32_to_tf32=None)
    round_to_tf32(desc)
    assert desc.round_f32_to_tf32 is (dtype == torch.float32)
    older = SimpleNamespace(base=desc.base)  # Triton 3.6.0's
    round_to_tf32(older)
    assert not hasattr(older, "round_f32_to_tf32")


def test_parameters_are_those_of_layers() -> None:
    """All else may be written by the kernel before: the input, a residual, and what no one has thought of."""
    own = {"w_ptr", "short_w_desc", "bias_ptr", "mean_ptr", "short_var_ptr"}
    others = {"x_desc", "res_ptr", "short_x_desc", "y_ptr", "partials_ptr", "mean_0", "w_other_ptr"}
    assert Launch(None, (), dict.fromkeys(own | others)).parameters == own


def test_rounding_up() -> None:
    assert [cdiv(a, 3) for a in range(8)] == [0, 1, 1, 1, 2, 2, 2, 3]
    assert [next_power_of_2(n) for n in range(10)] == [1, 1, 2, 4, 4, 8, 8, 8, 8, 16]


@pytest.mark.parametrize("on", [True, False])
def test_what_a_kernel_is_launched_with(on: bool) -> None:
    """And compiled for: what is judged is what will run."""

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda **options: seen.append((grid, options))

        def warmup(self, *, grid: Any, **options: Any) -> str:
            seen.append((grid, options))
            return "compiled"

    seen: list[Any] = []
    launch = Launch(Kernel(), (2, 3), {"x": 1}, 8, 5, dependent=on)
    launch.run()
    assert launch.compile() == "compiled"
    options = {"x": 1, "num_warps": 8, "num_stages": 5, "enable_fp_fusion": True}
    assert seen == [((2, 3), options | ({"launch_pdl": True} if on else {}))] * 2


@pytest.mark.parametrize("grid", [(2,), (2, 3), (2, 3, 4)])
def test_a_launch_repeated_has_one_other_argument(grid: tuple[int, ...]) -> None:
    class Kernel:
        arg_names = ("a", "x", "b", "c")

        def warmup(self, **options: Any) -> Any:
            return self

        def __getitem__(self, where: Any) -> Any:
            return lambda *arguments: seen.append((where, arguments))

    seen: list[Any] = []
    a, x, other = (torch.zeros(2) for _ in range(3))
    again = Launch(Kernel(), grid, {"b": 3, "x": x, "a": a, "c": None}).repeat("x")
    assert not seen
    again(x)
    again(other)
    assert seen == [((*grid, 1, 1)[:3], (a.data_ptr(), t.data_ptr(), 3, None)) for t in (x, other)]
    kept, changing = weakref.ref(a), weakref.ref(x)
    seen.clear()
    del a, x
    assert changing() is None
    assert kept() is not None
    del again
    assert kept() is None


def test_values():
    names = ("mean_ptr", "var_ptr", "bn_weight_ptr", "bn_bias_ptr", "eps")
    wide = torch.arange(8.0).reshape(4, 2)
    norm = BatchNorm(*wide.T[:1], *wide.T[1:], None, wide.T[0], 0.5)
    assert norm.arguments("short_") == {f"short_{name}": value for name, value in zip(names, norm, strict=True)}
    dense = norm.contiguous()
    assert all(t is None or t.is_contiguous() for t in dense[:4])
    assert [None if t is None else t.tolist() for t in dense[:4]] == [
        None if t is None else t.tolist() for t in norm[:4]
    ]
    assert (dense.bn_weight, dense.eps) == (None, 0.5)
    assert norm._replace(bn_weight=wide.T[1], bn_bias=None).contiguous().bn_weight.is_contiguous()
    tile = ConvConfig(128, 64, 64, 4, 3)
    assert (tile.kernel, tile.early_residual) == ("conv_pointer", False)
    several, one = tile.on((2, 4, 8)), tile.on((1, 1, 32))
    assert (several.block_m, several.box, several.swap, several.kernel) == (64, (2, 4, 8), True, "conv_box")
    assert (one.block_m, one.box, one.swap) == (32, (1, 1, 32), False)
    assert replace(tile, swap=True).on((1, 1, 32)).swap
    assert tile.on((1, 1, 128)).early_residual, "64 accumulators a thread"
    assert not replace(tile, block_k=128).on((1, 1, 128)).early_residual
    assert not replace(tile, split_k=2).on((1, 1, 128)).early_residual
    assert [has_several_sides(box) for box in ((1, 1, 1), (1, 8, 1), (8, 1, 2), (2, 2, 1))] == [
        False,
        False,
        True,
        True,
    ]
    assert [is_flat(c) for c in (8, 15, 16, 17, 20, 24)] == [True, True, False, True, True, False]
