"""NaN, infinities, zeros and sums that overflow."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .subjects import CONVS, FILTERED, in_fp64
from .term import BF16, EVERY, FP16, FP32, Args, Function, Term, call

NAN, INF = float("nan"), float("inf")
LARGEST = 65504.0
SPECIAL = (NAN, INF, -INF, -0.0, 0.0, -1.0, 1.0, 2.0)

row = functools.partial(Term, dtypes=EVERY)
model_row = functools.partial(Term, subject="model", dtypes=(FP32, FP16), tolerance=5e-3)


def filled(name: str, *values: float) -> Callable[[Args], None]:
    """The argument's channels hold these values in turn."""

    def edit(args: Args) -> None:
        t = args[name]
        args[name] = torch.tensor(values, dtype=t.dtype, device=t.device).repeat(t.numel())[: t.numel()].view(t.shape)

    return edit


def put(**elements: dict[tuple[Any, ...], float]) -> Callable[[Args], None]:
    """Of each argument named, these elements hold these values."""

    def edit(args: Args) -> None:
        for name, places in elements.items():
            for place, value in places.items():
                args[name][place] = value

    return edit


def statistic(args: Args, name: str, *values: float, eps: float | None = None) -> None:
    """The first of the model's first and of its shortcut's batch norm."""
    for norm in (args["model"].bn1, args["model"].layer2[0].downsample[1]):
        for i, value in enumerate(values):
            getattr(norm, name).data[i] = value
        norm.eps = norm.eps if eps is None else eps


RELU = "ReLU of NaN, infinities and zeros"


def _special_sums(args: Args) -> None:
    filled("x", *SPECIAL)(args)
    args["other"] = torch.full_like(args["x"], -0.0)


def _scaled_zeros(args: Args) -> None:
    filled("bn_weight", -1.0, -0.0, 0.0, 1.0)(args)
    filled("running_mean", 0.0, 0.0, 0.0, 0.0, -0.0, -0.0, -0.0, -0.0)(args)
    filled("bn_bias", *[-0.0] * 8, *[0.0] * 8)(args)
    args["x"] = torch.zeros_like(args["x"])
    args["weight"].abs_()  # what sign a sum of zeros of either sign has is the algorithm's


def _unshifted_zeros(args: Args) -> None:
    _scaled_zeros(args)
    args["bn_bias"] = None


def _special_residual(args: Args) -> None:
    filled("residual", *SPECIAL)(args)
    args["x"] = torch.zeros_like(args["x"])


def _of_either_sign(f: Function, args: Args) -> Any:
    """Of 0.0 and -0.0 a maximum may take either: a GPU's takes 0.0, NumPy's and PyTorch's differ by machine."""
    return call(f, args) + 0.0


RELU_ROWS = [
    row(RELU, "conv_bn_relu", "a shift of any value", filled("bn_bias", *SPECIAL)),
    row(RELU, "conv_bn_relu", "a sum of zero, scaled by negative and zero factors", _scaled_zeros, _of_either_sign),
    row(RELU, "conv_bn_relu", "a sum of zero without a shift", _unshifted_zeros, _of_either_sign),
    row(RELU, "residual", "a residual of any value on top of zero", _special_residual),
    row(RELU, "shortcut", "a shortcut's shift of any value", filled("short_bn_bias", *SPECIAL)),
    row(RELU, "stem", "a shift of any value", filled("bn_bias", *SPECIAL)),
    row(RELU, "add_relu", "NaN, Inf, 0, ... as they are; of -0.0, zero of either sign", _special_sums, _of_either_sign),
    row(RELU, "add_relu", "Inf - Inf is NaN", put(x={(0, 0): INF, (0, 1): NAN}, other={(0, 0): -INF, (1, 1): -INF})),
    model_row(RELU, promise="a batch norm's shift of -Inf", edit=lambda a: statistic(a, "bias", -INF)),
    model_row(RELU, promise="a pixel of NaN makes its own image NaN, no other", edit=put(x={(1, 1, 7, 7): NAN})),
]  # fmt: skip


NAN_WINDOW = "NaN in the window of a max pool"
PADDED_POOL = "a max pool pads with -Inf"
INF_AVERAGE = "an average of infinities"
LARGEST_AVERAGE = "an average of fp16's largest number"


def _largest_and_its_opposite(args: Args) -> None:
    args["x"].fill_(LARGEST)
    args["bias"].zero_()
    args["weight"].zero_()[:, 0] = 1.0
    args["weight"][3, 0] = -1.0


_BF16_STEM = (
    "PyTorch's bf16 convolution of few channels on CPUs (oneDNN) multiplies pixels beside the window by zero, and Inf "
    "times zero is NaN"
)
_bad_pixels = put(x={(1, 2, 7, 9): NAN, (0, 0, 0, 0): INF})


def _last_norm(args: Args) -> Any:
    return args["model"].layer2[0].bn2


POOL_ROWS = [
    row(NAN_WINDOW, "max_pool2d", "NaN wins, be it first, last or in between; infinities and -0.0 stay",
        put(x={(0, 0, 0, 0): NAN, (0, 1, 4, 7): NAN, (0, 2, 1, 1): NAN, (0, 2, 1, 2): 5.0, (1, 0, 2, 2): INF,
               (1, 1): -INF, (1, 2): -0.0})),
    row(NAN_WINDOW, "max_pool2d", "of 0.0 and -0.0 either may be the larger",
        lambda a: (filled("x", 0.0, -0.0, -0.0, 0.0)(a), a.update(kernel_size=2, stride=2, padding=0)),
        _of_either_sign),
    Term(NAN_WINDOW, "stem", "a pixel of NaN or Inf reaches its windows alone", _bad_pixels, dtypes=(FP32, FP16)),
    Term(NAN_WINDOW, "stem", "a pixel of NaN or Inf reaches its windows alone, in bf16, too", _bad_pixels,
        dtypes=(BF16,), expected=in_fp64["stem"], because=_BF16_STEM, kernels_alone=True),
    model_row(NAN_WINDOW, promise="a pixel of NaN in the corner", edit=put(x={(0, 2, 7, 7): NAN})),
    row(PADDED_POOL, "max_pool2d", "a padding of zeros would win",
        lambda a: a.update(x=a["x"] - 10, kernel_size=5, padding=2)),
    row(PADDED_POOL, "max_pool2d", "nothing but -Inf", lambda a: a["x"].fill_(-INF)),
    row(INF_AVERAGE, "global_avg_pool", "Inf stays, Inf - Inf and NaN are NaN, -0.0 is as PyTorch's",
        put(x={(0, 0, 1, 1): INF, (0, 1, 0, 0): INF, (0, 1, 3, 7): -INF, (0, 2, 3, 6): NAN, (0, 3, 0, 0): -INF})),
    row(INF_AVERAGE, "avg_pool_linear", "Inf, Inf - Inf and NaN reach every class",
        put(x={(0, 0, 1, 1): INF, (1, 2, 3, 6): NAN})),
    model_row(INF_AVERAGE, promise="infinite features",
              edit=lambda a: _last_norm(a).bias.data.copy_(torch.tensor([INF, 0.0] * 8))),
    Term(LARGEST_AVERAGE, "global_avg_pool", "49 times 65504 is 65504", lambda a: a["x"].fill_(LARGEST),
        sizes={"h": 7, "w": 7}),
    Term(LARGEST_AVERAGE, "avg_pool_linear", "49 times 65504 is 65504, times one and minus one",
        _largest_and_its_opposite, sizes={"h": 7, "w": 7}),
    Term(LARGEST_AVERAGE, "model", "features of 65504", lambda a: (
        _last_norm(a).bias.data.fill_(LARGEST), _last_norm(a).weight.data.zero_(),
        a["model"].fc.weight.data.clamp_(-0.05, 0.05),
    ), tolerance=5e-3),
]  # fmt: skip

INF_ZERO = "infinity times a zero weight"
PADDED_NAN = "NaN weight under a padded tap"
PADDED_INF = "infinite weight under a padded tap"
OVERFLOW = "fp16 sums past 65504 that come back"

_ONEDNN = (
    "PyTorch's fp32 and bf16 convolution on CPUs (oneDNN), and on some CPUs its fp16 one, leaves padded taps out; in "
    "fp64, and in these kernels, the padding is zero and zero times NaN or Inf is NaN"
)
_ROUNDED_ONCE = "PyTorch rounds the convolution to fp16 before batch norm, these kernels round once, at the end"


def _infinite_pixel(args: Args) -> None:
    args["x"][0, 1, 2, 3] = INF
    args["weight"][:, 1] = 0.0
    args["weight"][::2, 1] = 1.0


def _infinite_shortcut(args: Args) -> None:
    args["short_x"][0, 1, 2, 4] = INF
    args["short_weight"][:, 1] = 0.0


def _infinite_feature(args: Args) -> None:
    args["x"][0, 1] = INF
    args["weight"][:, 1] = 0.0
    args["weight"][::2, 1] = 1.0


def _model_overflow(args: Args) -> None:
    """A stem whose sums pass 65504, and a batch norm that brings them back."""
    args["model"].conv1.weight.data.mul_(2.0**17)
    args["model"].bn1.running_var.fill_(2.0**15)
    args["model"].bn1.weight.data.fill_(2.0**-7)
    args["model"].bn1.running_mean.zero_()


def _overflow(prefix: str) -> Callable[[Args], None]:
    """Sums of 72 * 2048 and more, scaled by 1/256."""

    def edit(args: Args) -> None:
        args[f"{prefix}x"].fill_(64.0)
        args[f"{prefix}weight"].fill_(128.0)
        args[f"{prefix}running_var"].fill_(16384.0)
        args[f"{prefix}bn_weight"].fill_(0.5)

    return edit


def _back_and_forth(args: Args) -> None:
    """Past 2 ** 23 in the first half of the channels, and back in the second: whole tiles of either."""
    args["x"][:] = 256.0
    args["weight"].chunk(2, 1)[0].fill_(256.0)
    args["weight"].chunk(2, 1)[1].fill_(-256.0)


def _without_onednn(f: Function, args: Args) -> Any:
    """A call in which PyTorch's fp16 convolution is its own on every CPU."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags sets more, and warns of it on some CPUs
    try:
        return call(f, args)
    finally:
        torch._C._set_mkldnn_enabled(before)


def _padded(value: float, case: str) -> list[Term]:
    rows = []
    for subject in FILTERED:
        corner = {(3, 2, 0, 2): value, (5, 0, 2, 0): value}
        if subject == "stem":
            corner = {(3, 2, 0, 6): value, (5, 0, 6, 0): value}
        edit = put(weight=corner)
        rows += [
            Term(case, subject, "no tap is skipped in the padding", edit, _without_onednn),
            Term(case, subject, "no tap is skipped in the padding, where oneDNN skips it", edit, dtypes=(FP32, BF16),
                expected=in_fp64[subject], because=_ONEDNN, kernels_alone=True),
        ]  # fmt: skip
    filters = put(weight={(1, 2, 0, 2): value})
    edit = lambda a: filters({"weight": a["model"].layer2[0].conv2.weight.data})  # noqa: E731
    return [*rows, Term(case, "model", "no tap is skipped in the padding", edit, _without_onednn, tolerance=5e-3)]


PRODUCT_ROWS = [
    *(row(INF_ZERO, s, "Inf times 0 is NaN", _infinite_pixel) for s in ("conv_bn_relu", "residual")),
    row(INF_ZERO, "shortcut", "Inf times 0 is NaN, in the convolution", _infinite_pixel),
    row(INF_ZERO, "shortcut", "Inf times 0 is NaN, in the shortcut", _infinite_shortcut),
    row(INF_ZERO, "stem", "Inf times 0 is NaN", _infinite_pixel),
    row(INF_ZERO, "linear", "Inf times 0 is NaN", _infinite_feature),
    row(INF_ZERO, "avg_pool_linear", "Inf times 0 is NaN", _infinite_feature),
    model_row(INF_ZERO, promise="infinite features times a zero weight", edit=lambda a: (
        _last_norm(a).bias.data[3].fill_(INF), a["model"].fc.weight.data[2, 3].zero_())),
    *_padded(NAN, PADDED_NAN),
    *_padded(INF, PADDED_INF),
    *(Term(OVERFLOW, s, "batch norm brings a sum back", _overflow(""), expected=in_fp64[s], because=_ROUNDED_ONCE,
          kernels_alone=True) for s in FILTERED),
    Term(OVERFLOW, "shortcut", "the shortcut's batch norm brings its sum back", _overflow("short_"),
        expected=in_fp64["shortcut"], because=_ROUNDED_ONCE, kernels_alone=True),
    *(Term(OVERFLOW, s, "later products bring a sum back", _back_and_forth, sizes={"c": 512})
      for s in ("linear", "avg_pool_linear")),
    Term(OVERFLOW, "global_avg_pool", "negative pixels bring a sum back",
        lambda a: (a["x"].fill_(60000.0), a["x"][:, :, 2:].fill_(-60000.0))),
    Term(OVERFLOW, "add_relu", "a sum of two does not come back: Inf", lambda a: (
        a["x"].fill_(60000.0), a["other"].fill_(6000.0))),
    Term(OVERFLOW, "model", "batch norm brings the stem's sums back", _model_overflow, kernels_alone=True,
        expected=lambda a: a["model"].double()(a["x"].double()).to(a["x"].dtype), because=_ROUNDED_ONCE,
        tolerance=5e-3),
]  # fmt: skip

ROWS = [*RELU_ROWS, *POOL_ROWS, *PRODUCT_ROWS]
CASES = (RELU, NAN_WINDOW, PADDED_POOL, INF_AVERAGE, LARGEST_AVERAGE, INF_ZERO, PADDED_NAN, PADDED_INF, OVERFLOW)

_NO_FILTER = ("add_relu", "max_pool2d", "global_avg_pool", "linear", "avg_pool_linear")
ABSENT: dict[str, dict[str, tuple[str, ...]]] = {
    RELU: {"no ReLU": ("max_pool2d", "global_avg_pool", "linear", "avg_pool_linear")},
    NAN_WINDOW: {"no max pool": (*CONVS, "add_relu", "global_avg_pool", "linear", "avg_pool_linear")},
    PADDED_POOL: {
        "no max pool": (*CONVS, "add_relu", "global_avg_pool", "linear", "avg_pool_linear"),
        "its pool follows a ReLU, where a padding of zeros gives the same": ("stem", "model"),
    },
    INF_AVERAGE: {"no average": (*FILTERED, "add_relu", "max_pool2d", "linear")},
    LARGEST_AVERAGE: {"no average": (*FILTERED, "add_relu", "max_pool2d", "linear")},
    INF_ZERO: {"no weights": ("add_relu", "max_pool2d", "global_avg_pool")},
    PADDED_NAN: {"no filter": _NO_FILTER},
    PADDED_INF: {"no filter": _NO_FILTER},
    OVERFLOW: {"no sum": ("max_pool2d",)},
}
