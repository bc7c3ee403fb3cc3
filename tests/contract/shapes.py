"""Sizes, layouts in memory, and shapes that are refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import exact
import torch
from torch import Tensor

from .subjects import CONVS, FILTERED, SUBJECTS
from .term import EVERY, FP16, FP32, Args, Term

ANYWHERE = tuple(SUBJECTS)
IMAGES = tuple(s for s in SUBJECTS if s != "linear")

EMPTY, ONE, ODD, PIXEL = "empty batch", "batch 1", "odd height and width", "1x1 images"
NOT_SQUARE, SMALLER = "images that are not square", "smaller than the filter"


def _size(subject: str, h: int, w: int) -> dict[str, int]:
    """Stems and models want a few more pixels to show something."""
    return {"h": 2 * h + 1, "w": 2 * w + 1} if subject in ("stem", "model") and h > 1 else {"h": h, "w": w}


def _without_padding(args: Args) -> None:
    args["padding"] = 0


def _no_pixels(args: Args) -> None:
    args["x"] = args["x"][..., :0]


def _odd_shortcut(args: Args) -> None:
    args["short_x"] = args["short_x"][:, :, :-1, :-1]


def _sized(case: str, h: int, w: int) -> list[Term]:
    return [
        Term(case, s, f"{h} x {w} and the like", sizes=_size(s, h, w), dtypes=(FP32, FP16),
            tolerance={"global_avg_pool": 1e-3, "model": 5e-3}.get(s, 0.0))
        for s in IMAGES
    ]  # fmt: skip


_TOO_SMALL = (ValueError, "expected at least (3, 3) pixels")
_ONE_PIXEL = (ValueError, "at least one channel and one pixel")
_NO_MEAN = "the mean of no pixel is an error that names the shape, not NaN"
SIZE_ROWS = [
    *(Term(EMPTY, s, "an empty result, and no launch", sizes={"n": 0}, dtypes=EVERY) for s in ANYWHERE),
    *(Term(ONE, s, "one image", sizes={"n": 1}, dtypes=(FP32, FP16), tolerance=5e-3 * (s == "model"))
      for s in ANYWHERE),
    *_sized(ODD, 5, 7),
    Term(ODD, "shortcut", "an odd input of the shortcut", _odd_shortcut, sizes={"h": 5, "w": 7}, pointers=True),
    *_sized(PIXEL, 1, 1),
    *_sized(NOT_SQUARE, 2, 13),
    *(Term(SMALLER, s, "with padding, an answer", sizes={"h": 2, "w": 1}, tolerance=5e-3 * (s == "model"))
      for s in (*FILTERED, "max_pool2d", "model")),
    *(Term(SMALLER, s, "without padding, an error", _without_padding, sizes={"h": 2, "w": 1}, raises=_TOO_SMALL)
      for s in (*CONVS, "max_pool2d")),
    Term(SMALLER, "stem", "no pixel, an error", _no_pixels, raises=(ValueError, "has shape (2, 3, 8, 0)")),
    *(Term(SMALLER, s, "no pixel, an error", _no_pixels, raises=_ONE_PIXEL, theirs=None, because=_NO_MEAN)
      for s in ("global_avg_pool", "avg_pool_linear")),
]  # fmt: skip

NCHW, CHANNELS_LAST, MIXED, SLICE = "NCHW", "channels_last", "NCHW images, channels_last weight", "slices"
EXPANDED, TRANSPOSED, OFFSET = "expanded", "transposed", "an offset in the storage"
NEGATIVE, UNALIGNED = "negative views", "unaligned pointers"


def _shifted(t: Tensor) -> Tensor:
    """All but the first of one image more: aligned, but not at the storage's start."""
    return exact.channels_last(torch.cat([t[:1] * torch.nan, t]))[1:]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    NCHW: exact.LAYOUTS["contiguous"],
    CHANNELS_LAST: exact.LAYOUTS["channels_last"],
    SLICE: exact.LAYOUTS["slice"],
    EXPANDED: exact.LAYOUTS["expanded"],
    TRANSPOSED: exact.LAYOUTS["transposed"],
    OFFSET: _shifted,
    NEGATIVE: lambda t: torch._neg_view(-t),
    UNALIGNED: exact.LAYOUTS["offset by one"],
}


def _laid_out(layout: Callable[[Tensor], Tensor], names: tuple[str, ...] = ()) -> Callable[[Args], None]:
    """Every 2-D and 4-D tensor of the call, or those named, in this layout."""

    def edit(args: Args) -> None:
        for name, t in args.items():
            if isinstance(t, Tensor) and t.dim() in (2, 4) and (not names or name in names):
                args[name] = layout(t) if t.dim() == 4 else layout(t[:, :, None, None])[:, :, 0, 0]

    return edit


def _channels_last_answer(subject: str, args: Args) -> Tensor:
    return exact.channels_last(SUBJECTS[subject].theirs(**args))


_OUR_FORMAT = "results are channels_last whatever comes in: so the next kernel reads them"
LAYOUT_ROWS = [
    *(Term(layout, s, "equal to the contiguous copy; channels_last comes out", _laid_out(change), dtypes=(FP32, FP16),
          pointers=layout == UNALIGNED and s in CONVS, tolerance=5e-3 * (s == "model"))
      for layout, change in LAYOUTS.items() for s in ANYWHERE
      if layout != NCHW or s in ("global_avg_pool", "linear", "avg_pool_linear", "model")),
    *(Term(NCHW, s, "channels_last comes out", _laid_out(LAYOUTS[NCHW]), because=_OUR_FORMAT,
          expected=functools.partial(_channels_last_answer, s))
      for s in (*FILTERED, "add_relu", "max_pool2d")),
    *(Term(MIXED, s, "channels_last comes out, as from PyTorch", _laid_out(LAYOUTS[CHANNELS_LAST], ("weight", "other")))
      for s in (*FILTERED, "add_relu")),
    Term(MIXED, "model", "as torchvision", lambda a: a["model"].to(memory_format=torch.channels_last),
        tolerance=5e-3),
]  # fmt: skip

CHANNELS, RANK, LARGE = "wrong channels", "3-D input", "more than 2^31 elements"


def _first(*names: str) -> Callable[[Args], None]:
    def edit(args: Args) -> None:
        args.update({name: args[name][0] for name in names})

    return edit


def _narrow(name: str, channels: int = 4) -> Callable[[Args], None]:
    def edit(args: Args) -> None:
        args[name] = args[name][:, :channels]

    return edit


def _wrong(case: str, subject: str, promise: str, edit: Any, words: str, **other: Any) -> Term:
    return Term(case, subject, promise, edit, raises=(ValueError, words), **other)


_BROADCAST = "a broadcast that is not meant is found; `expand` says that it is"
_UNBATCHED = "four dimensions, so that a forgotten batch is found"
_RANK = "expected 4 dimensions"
REFUSED_ROWS = [
    *(_wrong(CHANNELS, s, "x's channels", _narrow("x"), "x has 4 channels, expected 16") for s in CONVS),
    _wrong(CHANNELS, "residual", "a residual of other channels", _narrow("residual"), "residual has shape"),
    _wrong(CHANNELS, "residual", "a residual of one channel", _narrow("residual", 1), "residual has shape",
           theirs=None, because=_BROADCAST),
    _wrong(CHANNELS, "shortcut", "the shortcut's channels", _narrow("short_x"),
           "shortcut_weight has shape (16, 16, 1, 1), expected (16, 4, 1, 1)"),
    *(_wrong(CHANNELS, s, "statistics of other channels", lambda a: a.update(running_var=a["running_var"][:5]),
             "running_var has shape (5,)") for s in FILTERED),
    _wrong(CHANNELS, "stem", "x's channels", _narrow("x", 2), "x has 2 channels, expected 3"),
    _wrong(CHANNELS, "add_relu", "other channels", _narrow("other"), "other has shape (2, 4, 4, 8)"),
    _wrong(CHANNELS, "add_relu", "one channel", _narrow("other", 1), "other has shape (2, 1, 4, 8)", theirs=None,
           because=_BROADCAST),
    _wrong(CHANNELS, "linear", "x's features", _narrow("x"), "x has shape (2, 4), expected (..., 8)"),
    _wrong(CHANNELS, "linear", "the bias's classes", lambda a: a.update(bias=a["bias"][:5]), "bias has shape (5,)"),
    _wrong(CHANNELS, "avg_pool_linear", "x's channels", _narrow("x"), "expected 8 channels"),
    _wrong(CHANNELS, "avg_pool_linear", "the bias's classes", lambda a: a.update(bias=a["bias"][:5]), "bias has shape"),
    _wrong(CHANNELS, "model", "grey images", _narrow("x", 1), "x has 1 channels, expected 3"),
    *(_wrong(RANK, s, "no batch", _first("x"), _RANK) for s in (*FILTERED, "avg_pool_linear")),
    *(_wrong(RANK, s, "no batch", _first("x"), _RANK, theirs=None, because=_UNBATCHED)
      for s in ("max_pool2d", "global_avg_pool")),
    _wrong(RANK, "add_relu", "no batch", _first("x", "other"), _RANK, theirs=None, because=_UNBATCHED),
    Term(RANK, "linear", "any number of dimensions", lambda a: a.update(x=a["x"].expand(3, 2, 8)), dtypes=EVERY),
    Term(RANK, "linear", "one dimension", _first("x"), dtypes=EVERY),
    _wrong(RANK, "model", "no batch", _first("x"), _RANK, theirs=ValueError),
]  # fmt: skip

ROWS = [*SIZE_ROWS, *LAYOUT_ROWS, *REFUSED_ROWS]
CASES = (EMPTY, ONE, ODD, PIXEL, NOT_SQUARE, SMALLER, *LAYOUTS, MIXED, CHANNELS, RANK, LARGE)

_VECTORS = {"x has no pixels": ("linear",)}
_BEYOND = "tests/kernels/test_beyond_int32.py::"
ABSENT: dict[str, dict[str, tuple[str, ...]]] = {
    **dict.fromkeys((ODD, PIXEL, NOT_SQUARE), _VECTORS),
    SMALLER: {"no filter": ("add_relu", "linear")},
    MIXED: {"one 4-D tensor": ("max_pool2d", "global_avg_pool", "linear", "avg_pool_linear")},
    CHANNELS: {"any number of channels is right": ("max_pool2d", "global_avg_pool")},
    LARGE: {
        f"{_BEYOND}test_conv_pointer": ("conv_bn_relu",),
        f"{_BEYOND}test_conv_box": ("residual",),
        f"{_BEYOND}test_filters_of_a_shortcut": ("shortcut",),
        f"{_BEYOND}test_max_pool": ("max_pool2d",),
        **{f"{_BEYOND}test_{s}": (s,) for s in ("stem", "add_relu", "global_avg_pool", "linear", "avg_pool_linear")},
        "tests/model/test_gpu.py::test_more_elements_than_int32_counts": ("model",),
    },
}
