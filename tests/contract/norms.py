"""Batch norms of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .subjects import FILTERED
from .term import BF16, FP16, FP32, Args, Term
from .values import INF, NAN, model_row, put, row, statistic

VARIANCE_0, EPS_0, VARIANCE_NEGATIVE = "variance 0", "variance 0, eps 0", "variance -1"
VARIANCE_INF, WEIGHT_0, NOT_AFFINE = "variance Inf", "batch norm weight 0", "affine=False"
DENORMAL, NO_STATISTICS = "a denormal variance", "track_running_stats=False"
WIDE_NORM = "fp32 batch norm beside fp16 and bf16"
CASES = (VARIANCE_0, EPS_0, DENORMAL, VARIANCE_NEGATIVE, VARIANCE_INF, WEIGHT_0, NOT_AFFINE, NO_STATISTICS,
              WIDE_NORM)  # fmt: skip

_ZERO = 1e-60
"""In fp32; torch 2.11's modules refuse an eps of 0."""
_STATISTICS = ("running_mean", "running_var", "bn_weight", "bn_bias")


def _norm(name: str, *values: float, eps: float = 0.0) -> Callable[[Args], None]:
    """A statistic with these values first, of the convolution and of its shortcut."""

    def edit(args: Args) -> None:
        for prefix in ("", "short_"):
            if prefix + name in args:
                args[f"{prefix}eps"] = eps
                args[prefix + name][: len(values)] = torch.tensor(values)

    return edit


def _eps_scales(args: Args) -> None:
    for name in ("running_var", "short_running_var"):
        if name in args:
            args[name] -= 0.25  # which eps brings back
    _norm("running_var", 0.0, 0.0, eps=0.25)(args)


def _without_affine(args: Args) -> None:
    args.update({name: None for name in args if name.endswith(("bn_weight", "bn_bias"))})


def _wide_norm(args: Args) -> None:
    args.update({name: args[name].float() for name in args if name.endswith(_STATISTICS)})
    args["running_mean"] += 2.0**-12  # not a number of fp16 or bf16


def _replaced(args: Args, **changes: Any) -> None:
    args["model"].layer1[0].bn1 = nn.BatchNorm2d(8, **changes).eval().to(args["x"].device, args["x"].dtype)


def _norm_rows() -> list[Term]:
    rows = []
    for s in FILTERED:
        rows += [
            row(VARIANCE_0, s, "eps alone scales", _eps_scales),
            row(EPS_0, s, "Inf, -Inf and NaN", _norm("running_var", 0.0, 0.0, 0.0)),
            row(VARIANCE_NEGATIVE, s, "NaN", _norm("running_var", -1.0, -INF, NAN)),
            row(VARIANCE_INF, s, "the shift alone", _norm("running_var", INF, INF)),
            row(WEIGHT_0, s, "the shift alone, or NaN of an infinite mean", lambda a: (
                _norm("bn_weight", 0.0, 0.0, -0.0)(a), put(running_mean={(1,): INF, (2,): NAN})(a))),
            row(NOT_AFFINE, s, "scale and shift are the statistics'", _without_affine),
            Term(NO_STATISTICS, s, "statistics are not optional", lambda a: a.update(running_mean=None),
                raises=(TypeError, "running_mean is None")),
            Term(DENORMAL, s, "1e-40 is not 0", _norm("running_var", 1e-40, 1e-39), dtypes=(FP32,), tolerance=1e-6),
            Term(WIDE_NORM, s, "the result keeps x's dtype", _wide_norm, dtypes=(FP16, BF16), tolerance=8e-3),
        ]  # fmt: skip
    return rows


def _model_norms(args: Args) -> None:
    for m in args["model"].modules():
        if isinstance(m, nn.BatchNorm2d):
            m.float()


ROWS = [
    *_norm_rows(),
    model_row(VARIANCE_0, promise="eps alone scales", edit=lambda a: statistic(a, "running_var", 0.0, 0.0, eps=0.25)),
    model_row(EPS_0, promise="as torchvision", edit=lambda a: statistic(a, "running_var", 0.0, eps=_ZERO)),
    model_row(DENORMAL, promise="1e-40 is not 0", edit=lambda a: statistic(a, "running_var", 1e-40, eps=_ZERO),
              dtypes=(FP32,), tolerance=1e-5),
    model_row(VARIANCE_NEGATIVE, promise="NaN", edit=lambda a: statistic(a, "running_var", -1.0)),
    model_row(VARIANCE_INF, promise="the shift alone", edit=lambda a: statistic(a, "running_var", INF, INF)),
    model_row(WEIGHT_0, promise="the shift alone", edit=lambda a: statistic(a, "weight", 0.0, -0.0)),
    model_row(NOT_AFFINE, promise="scale and shift are the statistics'", edit=lambda a: _replaced(a, affine=False)),
    model_row(NO_STATISTICS, promise="the batch's statistics, in eval mode, too", sizes={"h": 12, "w": 12},
              edit=lambda a: _replaced(a, track_running_stats=False), dtypes=(FP32,), tolerance=1e-4,
              refused="batch norm without running statistics"),
    Term(WIDE_NORM, "model", "as torchvision", _model_norms, dtypes=(FP16, BF16), tolerance=4e-2),
]  # fmt: skip

_NO_NORM = {"no batch norm": ("add_relu", "max_pool2d", "global_avg_pool", "linear", "avg_pool_linear")}
ABSENT: dict[str, dict[str, tuple[str, ...]]] = dict.fromkeys(CASES, _NO_NORM)
