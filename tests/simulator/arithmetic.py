"""What each opcode computes, on arrays of lanes: one table, from its name to a function and the types it works on.

Registers hold bits, and a type says how to read them. fma rounds twice, in fp64 and in fp32: exact on integers. What
hardware approximates is the nearest number here.
"""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .ptx import Unknown

Array = Any
TYPES: dict[str, Any] = {"pred": np.bool_, "f16": np.float16, "f32": np.float32, "bf16": np.uint16}
for bits in (8, 16, 32, 64):
    TYPES |= {f"{letter}{bits}": np.dtype(f"{kind}{bits // 8}").type for letter, kind in zip("bus", "uui", strict=True)}
BITS = {t: 1 if t == "pred" else max(8 * np.dtype(dtype).itemsize, 16) for t, dtype in TYPES.items()}
"""The width of the register that holds a type."""


class Operation(NamedTuple):
    compute: Callable[..., Array]
    result: str
    sources: list[str]


TABLE: dict[tuple[str, int], Operation] = {}
"""By opcode and number of sources."""
_KINDS = {"p": "pred", "n": "u32", "b": "b32", "h": "b16", "f": "f32", "d": "b64"}


def _define(signature: str, types: str, operations: dict[str, Callable[..., Array]]) -> None:
    """Operations on each type t. `signature` has a letter for the result and each source: t, w of double width, and
    what `_KINDS` says."""
    for t in types.split():
        kinds = {**_KINDS, "t": t, "w": t[0] + {"16": "32", "32": "64"}.get(t[1:], "")}
        result, *sources = (kinds[letter] for letter in signature)
        for name, compute in operations.items():
            TABLE[f"{name}.{t}", len(sources)] = Operation(compute, result, sources)


def from_bf16(a: Array) -> Array:
    return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_f16(a: Array) -> Array:
    return a.astype(np.float16).view(np.uint16)


def to_bf16(a: Array) -> Array:
    """To nearest even; NaN stays NaN."""
    word = a.view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(a), 0x7FFF, word + 0x7FFF + (word >> 16 & 1) >> 16).astype(np.uint16)


def to_tf32(word: Array) -> Array:
    """fp32 bits to nearest even; infinities and NaN stay."""
    finite = word & np.uint32(0x7F800000) != np.uint32(0x7F800000)
    return np.where(finite, word + np.uint32(0xFFF) + (word >> 13 & 1) & np.uint32(0xFFFFE000), word)


def _pack(to: Callable[[Array], Array], high: Array, low: Array) -> Array:
    return to(low) | to(high).astype(np.uint32) << np.uint32(16)


def _cast(t: str, a: Array) -> Array:
    return a.astype(TYPES[t])


def _divide(a: Array, b: Array) -> Array:
    """Towards zero, as in C; what a division by zero gives, nobody may use."""
    a, b = a.astype(np.int64), np.where(b == 0, 1, b).astype(np.int64)
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


def _shift(shift: Callable[..., Array]) -> Callable[..., Array]:
    """By the register's width or more, nothing is left but the sign."""

    def shifted(a: Array, n: Array) -> Array:
        width, sign = 8 * a.itemsize, shift is np.right_shift and a.dtype.kind == "i"
        return np.where(sign | (n < width), shift(a, np.minimum(n, width - 1).astype(a.dtype)), 0)

    return shifted


def _wide(a: Array) -> Array:
    return a.astype(f"{a.dtype.kind}{2 * a.itemsize}")


def _field(a: Array, position: Array, length: Array) -> Array:
    """bfe of a field within the register: signed if `a` is."""
    up = 64 - position.astype(np.int64) - length.astype(np.int64)
    wide = a.astype(np.int64) << up
    down = 64 - length.astype(np.int64)
    return wide >> down if a.dtype == np.int32 else wide.view(np.uint64) >> down.astype(np.uint64)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    both = np.stack([a, b], 1).view(np.uint8)
    picks = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
    taken = np.take_along_axis(both, (picks & 7).astype(np.int64), 1)
    signs = np.where(taken & 128, np.uint8(255), np.uint8(0))
    return np.where(picks & 8, signs, taken).view(np.uint32)[:, 0]


def _funnel(a: Array, b: Array, n: Array) -> Array:
    """The upper half of b and a, shifted left."""
    return (b.astype(np.uint64) << 32 | a) << (n % 32).astype(np.uint64) >> 32


def _maximum(a: Array, b: Array) -> Array:
    """NaN wins, and +0 is more than -0."""
    return np.where((a == 0) & (b == 0), a + b, np.maximum(a, b)).astype(a.dtype)


def _fma(a: Array, b: Array, c: Array) -> Array:
    return a.astype(np.float64) * b + c


def _of_pairs(compute: Callable[..., Array], *pairs: Array) -> Array:
    """On two fp32 values in each register of 64 bits."""
    return compute(*(pair.copy().view(np.float32) for pair in pairs)).astype(np.float32).view(np.uint64)


def _bf16_pairs(*pairs: Array) -> list[Array]:
    return [from_bf16(pair.copy().view(np.uint16)) for pair in pairs]


def _shuffle(how: str, a: Array, by: Array, clamp: Array, members: Array) -> Array:
    """Between the lanes of a warp, all of them."""
    if (clamp != 31).any() or (members != 0xFFFFFFFF).any():
        raise Unknown("a shuffle of some lanes")
    lane = np.arange(len(a))
    return a[lane // 32 * 32 + ((by if how == "idx" else lane ^ by) & 31)]


def _reduce(reduce: Callable[..., Array], a: Array, members: Array) -> Array:
    if (members != 0xFFFFFFFF).any():
        raise Unknown("a reduction of some lanes")
    return reduce(a.reshape(-1, 32), 1).repeat(32)


INTEGERS = "s16 u16 s32 u32 s64 u64"
_INF = np.float32(np.inf)
COMPARE = {f"setp.{name}": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
SUMS = {"add": np.add, "sub": np.subtract}
PRODUCT_OR_SUM = {**SUMS, "mul": np.multiply}

_define("ptt", INTEGERS + " b16 b32 b64", COMPARE)
_define("ttt", "b16 b32 b64 pred", {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor})
_define("tt", "b16 b32 b64 pred", {"not": np.invert})
_define("ttn", INTEGERS + " b16 b32 b64", {"shl": _shift(np.left_shift), "shr": _shift(np.right_shift)})
_define("ttt", INTEGERS, {**SUMS, "mul.lo": np.multiply, "min": np.minimum, "max": np.maximum})
_define("ttt", "s16 u16 s32 u32 s64", {"div": _divide, "rem": lambda a, b: a - _divide(a, b) * b})
_define("tttt", INTEGERS, {"mad.lo": lambda a, b, c: a * b + c})
_define("ttt", "s16 u16 s32 u32", {"mul.hi": lambda a, b: _wide(a) * _wide(b) >> 8 * a.itemsize})
_define("ttt", "u64", {"mul.hi": lambda a, b: (a.astype(object) * b.astype(object) >> 64).astype(np.uint64)})
_define("wtt", "s16 u16 s32 u32", {"mul.wide": lambda a, b: _wide(a) * _wide(b)})
_define("wttw", "s16 u16 s32 u32", {"mad.wide": lambda a, b, c: _wide(a) * _wide(b) + c})
_define("tt", " ".join(TYPES), {"mov": lambda a: a})
_define("tttp", " ".join(TYPES), {"selp": lambda a, b, c: np.where(c, a, b)})
_define("tt", "u32 u64", {"cvta.param": lambda a: a})
_define("ttnn", "u32 s32", {"bfe": _field})
_define("tttt", "b32", {"prmt": _permute})
_define("tttn", "b32", {"shf.l.wrap": _funnel})
_define("ttnnn", "b32", {f"shfl.sync.{how}": partial(_shuffle, how) for how in ("idx", "bfly")})
_define("ttn", "s32 u32", {"redux.sync.min": partial(_reduce, np.min), "redux.sync.max": partial(_reduce, np.max)})

_define("ttt", "f16 f32", {**PRODUCT_OR_SUM, "max.NaN": _maximum})
_define("ttt", "f32", {"add.rn": np.add, "div.rn": np.divide, "div.full": lambda a, b: np.nextafter(a / b, _INF)})
_define("tttt", "f32", {"fma.rn": _fma})
_define("tt", "s16 s32 s64 f32", {"neg": np.negative})
_define("tt", "f32", {"sqrt.rn": np.sqrt, "abs": np.abs, "ex2.approx": np.exp2, "ex2.approx.ftz": np.exp2})
_define("tttt", "f32", {"max.NaN": lambda a, b, c: _maximum(_maximum(a, b), c)})
_define("hhh", "bf16", {"max.NaN": lambda a, b: to_bf16(_maximum(from_bf16(a), from_bf16(b)))})
_define("bbb", "bf16x2", {"max.NaN": lambda a, b: to_bf16(_maximum(*_bf16_pairs(a, b))).view(np.uint32)})
_define("ddd", "f32x2", {name: partial(_of_pairs, compute) for name, compute in PRODUCT_OR_SUM.items()})
_define("dddd", "f32x2", {"fma.rn": partial(_of_pairs, _fma)})
_define("ptt", "f16 f32", {**COMPARE, "setp.nan": lambda a, b: np.isnan(a) | np.isnan(b)})
_define("ptt", "f32", {"setp.num": lambda a, b: ~(np.isnan(a) | np.isnan(b))})
_define("bbb", "f16x2", {"max.NaN": lambda a, b: _maximum(a.view(np.float16), b.view(np.float16)).view(np.uint32)})
_define("bbb", "s16x2 u16x2", {"add": lambda a, b: (a.view(np.uint16) + b.view(np.uint16)).view(np.uint32)})

for t in (SIZED := "s8 u8 " + INTEGERS).split():
    _define("ft", t, {"cvt.rn.f32": lambda a: a.astype(np.float32)})
    TABLE |= {(f"cvt.{t}.{source}", 1): Operation(partial(_cast, t), t, [source]) for source in SIZED.split()}
_define("ht", "f32", {"cvt.rn.f16": to_f16, "cvt.rn.bf16": to_bf16})
_define("btt", "f32", {"cvt.rn.f16x2": partial(_pack, to_f16), "cvt.rn.bf16x2": partial(_pack, to_bf16)})
_define("fh", "f16", {"cvt.f32": lambda a: a.view(np.float16)})
_define("fh", "bf16", {"cvt.f32": from_bf16})
for t, wide in (("f16", lambda a: a.view(np.float16).astype(np.float32)), ("bf16", from_bf16)):
    _define("fhf", t, {"add.rn.f32": lambda a, c, wide=wide: wide(a) + c})
    _define("fhhf", t, {"fma.rn.f32": lambda a, b, c, wide=wide: _fma(wide(a), wide(b), c)})
