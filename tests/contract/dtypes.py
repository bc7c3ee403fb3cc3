"""Dtypes: mixed, wide, and such as no kernel takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .subjects import CONVS, FILTERED, PIXELS, SUBJECTS
from .term import EVERY, FP16, FP32, FP64, Args, Function, Term

MIXED, BYTES, DOUBLE, COMPLEX = "mixed dtypes", "uint8", "float64", "complex"
TENSORS = ("x", "weight", "residual", "short_x", "short_weight", "other", "bias")


def _to(dtype: torch.dtype, *names: str) -> Callable[[Args], None]:
    def edit(args: Args) -> None:
        args.update({name: args[name].to(dtype) for name in names or TENSORS if name in args})

    return edit


def pixels(args: Args) -> None:
    """Of what was negative, 255."""
    args["x"] = torch.where(args["x"] < 0, 255, 0).byte()


def _wide_shortcut(args: Args) -> None:
    args.update({name: t.float() for name, t in args.items() if name.startswith("short_") and isinstance(t, Tensor)})


def _differentiable(f: Function, args: Args) -> Any:
    args["weight"].requires_grad_()
    return f(**args).detach()


def _theirs(subject: str, dtype: str | None = None, **edits: torch.dtype) -> Callable[[Args], Any]:
    """PyTorch's answer to arguments of other dtypes, in the dtype of one of the arguments."""

    def expected(args: Args) -> Tensor:
        like = args[dtype or "x"].dtype
        args = {name: t.to(edits[name]) if name in edits else t for name, t in args.items()}
        return SUBJECTS[subject].theirs(**args).to(like)

    return expected


def _wrong(case: str, subject: str, promise: str, edit: Any, words: str, **other: Any) -> Term:
    return Term(case, subject, promise, edit, raises=(TypeError, words), **other)


_WEIGHT = "x has dtype torch.float16, weight torch.float32; expected one dtype"
_BIAS = "x has dtype torch.float16, bias torch.float32; expected one dtype"
_ONE_DTYPE = "the result has x's dtype, whatever is added"
_REAL = "activations are real floating-point numbers; anything else is a mistake that is named"
ROWS = [
    *(_wrong(MIXED, s, "a wider weight", _to(FP32, "weight"), _WEIGHT) for s in (*CONVS, "linear", "avg_pool_linear")),
    *(_wrong(MIXED, s, "a wider bias", _to(FP32, "bias"), _BIAS) for s in ("linear", "avg_pool_linear")),
    Term(MIXED, "residual", "a wider residual does not widen the result", _to(FP32, "residual"), refused="mixed dtypes",
        expected=_theirs("residual"), because=_ONE_DTYPE),
    Term(MIXED, "residual", "nor where a gradient is wanted", _to(FP32, "residual"), act=_differentiable,
        refused="gradient", expected=_theirs("residual"), because=_ONE_DTYPE),
    Term(MIXED, "shortcut", "a wider shortcut does not widen the result", _wide_shortcut,
        refused="mixed dtypes", expected=_theirs("shortcut"), because=_ONE_DTYPE),
    Term(MIXED, "stem", "x is rounded to the weight's dtype", _to(FP32, "x"),
        expected=_theirs("stem", "weight", x=FP16), because="images come as they are and become what the weights are"),
    Term(MIXED, "add_relu", "the wider of the two", _to(FP32, "other"), refused="mixed dtypes"),
    _wrong(MIXED, "model", "images wider than the model", _to(FP32, "x"), _WEIGHT.replace("32", "__").replace(
        "16", "32").replace("__", "16")),
    *(_wrong(BYTES, s, "bytes are no activations", _to(torch.uint8, "x"), "x has dtype torch.uint8")
      for s in (*FILTERED, "global_avg_pool", "linear", "avg_pool_linear")),
    _wrong(BYTES, "model", "bytes are no activations", _to(torch.uint8, "x"), "set model.normalize to pass bytes"),
    *(_wrong(BYTES, s, "bytes are no activations", _to(torch.uint8), "x has dtype torch.uint8", theirs=None,
             because=_REAL) for s in ("add_relu", "max_pool2d")),
    Term(BYTES, "stem", "bytes with their mean and deviation", lambda a: (pixels(a), a.update(PIXELS)),
        dtypes=EVERY),
    Term(BYTES, "model", "bytes with `normalize`", lambda a: (pixels(a), a.update(normalize=tuple(PIXELS.values())))
       , dtypes=(FP32, FP16), tolerance=5e-3),
    *(Term(DOUBLE, s, "PyTorch's answer", dtypes=(FP64,), refused="torch.float64", tolerance=1e-12) for s in SUBJECTS),
    Term(DOUBLE, "stem", "PyTorch's answer to bytes", lambda a: (pixels(a), a.update(PIXELS)), dtypes=(FP64,),
        refused="torch.float64", tolerance=1e-6),
    *(_wrong(COMPLEX, s, "an error that names x", _to(torch.complex64), "has dtype torch.complex64", dtypes=(FP32,))
      for s in (*FILTERED, "add_relu", "max_pool2d", "model")),
    *(_wrong(COMPLEX, s, "an error that names x", _to(torch.complex64), "has dtype torch.complex64", dtypes=(FP32,),
             theirs=None, because=_REAL) for s in ("global_avg_pool", "linear", "avg_pool_linear")),
]  # fmt: skip
CASES = (MIXED, BYTES, DOUBLE, COMPLEX)

ABSENT: dict[str, dict[str, tuple[str, ...]]] = {MIXED: {"one tensor": ("max_pool2d", "global_avg_pool")}}
