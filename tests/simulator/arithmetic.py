"""What each opcode computes, on arrays of lanes: one table, from its name to a function and the types it works on.

Registers hold bits, and a type says how to read them. fma rounds twice, in fp64 and in fp32: exact on integers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = Any
TYPES: dict[str, Any] = {
    "pred": np.bool_, "u8": np.uint8, "s8": np.int8, "b8": np.uint8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip


class Operation(NamedTuple):
    compute: Callable[..., Array]
    result: str
    sources: tuple[str, ...]


TABLE: dict[str, Operation] = {}


def _add(name: str, compute: Callable[..., Array], result: str, *sources: str) -> None:
    TABLE[name] = Operation(compute, result, sources)


BITS = {t: 1 if t == "pred" else max(8 * np.dtype(dtype).itemsize, 16) for t, dtype in TYPES.items()}
"""The width of the register that holds a type."""


def from_bf16(a: Array) -> Array:
    return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(a: Array) -> Array:
    """To nearest even; NaN stays NaN."""
    word = a.view(np.uint32).astype(np.uint64)
    rounded = word + 0x7FFF + (word >> 16 & 1) >> 16
    return np.where(np.isnan(a), 0x7FFF, rounded).astype(np.uint16)


def _to_tf32(a: Array) -> Array:
    return np.where(np.isnan(a), np.uint32(0x7FFFE000), a.view(np.uint32) + np.uint32(0x1000) & np.uint32(0xFFFFE000))


def _divide(a: Array, b: Array) -> Array:
    """Towards zero, as in C; what a division by zero gives, nobody may use."""
    a, b = a.astype(np.int64), np.where(b == 0, 1, b).astype(np.int64)
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


def _shift(shift: Callable[..., Array], t: str) -> Callable[..., Array]:
    """By the register's width or more, nothing is left but the sign."""
    width, dtype = 8 * np.dtype(TYPES[t]).itemsize, TYPES[t]
    keep = shift is np.right_shift and t[0] == "s"
    return lambda a, n: np.where(keep | (n < width), shift(a, np.minimum(n, width - 1).astype(dtype)), 0)


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


def _maximum(a: Array, b: Array) -> Array:
    """NaN wins, and +0 is more than -0."""
    return np.where((a == 0) & (b == 0), a + b, np.maximum(a, b)).astype(a.dtype)


def _halves(a: Array) -> Array:
    return np.ascontiguousarray(a).view(np.float16)


def _pack(to: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda high, low: to(low).astype(np.uint32) | to(high).astype(np.uint32) << np.uint32(16)


_COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_INTEGER = {"add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "min": np.minimum, "max": np.maximum,
            "div": _divide, "rem": lambda a, b: a - _divide(a, b) * b}  # fmt: skip

for t in ("s16", "u16", "s32", "u32", "s64", "u64", "b16", "b32", "b64"):
    for name, compute in _COMPARE.items():
        _add(f"setp.{name}.{t}", compute, "pred", t, t)
    for name, compute in (_LOGIC if t[0] == "b" else _INTEGER).items():
        if t != "u64" or compute is not _divide:
            _add(f"{name}.{t}", compute, t, t, t)
    _add(f"shl.{t}", _shift(np.left_shift, t), t, t, "u32")
    _add(f"shr.{t}", _shift(np.right_shift, t), t, t, "u32")
    _add(f"not.{t}", np.invert, t, t)
    _add(f"neg.{t}", np.negative, t, t)
    _add(f"mad.lo.{t}", lambda a, b, c: a * b + c, t, t, t, t)
    wide = t[0] + {"16": "32", "32": "64"}.get(t[1:], "")
    if wide in TYPES:
        w, half = TYPES[wide], TYPES[wide](int(t[1:]))
        _add(f"mul.wide.{t}", lambda a, b, w=w: a.astype(w) * b.astype(w), wide, t, t)
        _add(f"mad.wide.{t}", lambda a, b, c, w=w: a.astype(w) * b.astype(w) + c, wide, t, t, wide)
        _add(f"mul.hi.{t}", lambda a, b, w=w, half=half: a.astype(w) * b.astype(w) >> half, t, t, t)
for name, compute in _LOGIC.items():
    _add(f"{name}.pred", compute, "pred", "pred", "pred")
_add("not.pred", np.invert, "pred", "pred")
for t in TYPES:
    _add(f"mov.{t}", lambda a: a, t, t)
    _add(f"selp.{t}", lambda a, b, c: np.where(c, a, b), t, t, t, "pred")
for t in ("u64", "u32"):
    for way in ("param", "to.global"):
        _add(f"cvta.{way}.{t}", lambda a: a, t, t)
_add("bfe.u32", _field, "u32", "u32", "u32", "u32")
_add("bfe.s32", _field, "s32", "s32", "u32", "u32")
_add("prmt.b32", _permute, "b32", "b32", "b32", "b32")
_add("shf.l.wrap.b32", lambda a, b, n: (b.astype(np.uint64) << 32 | a) << (n & 31).astype(np.uint64) >> 32,
     "b32", "b32", "b32", "u32")  # fmt: skip

for rounding in ("", ".rn"):
    for name, compute in {"add": np.add, "sub": np.subtract, "mul": np.multiply}.items():
        for t in ("f16", "f32"):
            _add(f"{name}{rounding}.{t}", compute, t, t, t)
_add("fma.rn.f32", lambda a, b, c: a.astype(np.float64) * b + c, "f32", "f32", "f32", "f32")
_add("div.rn.f32", np.divide, "f32", "f32", "f32")
_add("sqrt.rn.f32", np.sqrt, "f32", "f32")
_add("neg.f32", np.negative, "f32", "f32")
for t in ("f16", "f32"):
    _add(f"max.NaN.{t}", _maximum, t, t, t)
    _add(f"setp.nan.{t}", lambda a, b: np.isnan(a) | np.isnan(b), "pred", t, t)
    for name, inverse in {"eq": "neu", "lt": "geu", "le": "gtu", "gt": "leu", "ge": "ltu"}.items():
        _add(f"setp.{name}.{t}", _COMPARE[name], "pred", t, t)
        _add(f"setp.{inverse}.{t}", lambda a, b, f=_COMPARE[name]: ~f(a, b), "pred", t, t)
_add("max.NaN.f16x2", lambda a, b: _maximum(_halves(a), _halves(b)).view(np.uint32), "b32", "b32", "b32")

_SIZED = ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")
for source in _SIZED:
    _add(f"cvt.rn.f32.{source}", lambda a: a.astype(np.float32), "f32", source)
    for into in _SIZED:
        _add(f"cvt.{into}.{source}", lambda a, d=TYPES[into]: a.astype(d), into, source)
for name, to, back in (("f16", lambda a: a.astype(np.float16).view(np.uint16), lambda a: a.view(np.float16)),
                       ("bf16", to_bf16, from_bf16)):  # fmt: skip
    _add(f"cvt.rn.{name}.f32", to, "b16", "f32")
    _add(f"cvt.rn.{name}x2.f32", _pack(to), "b32", "f32", "f32")
    _add(f"cvt.f32.{name}", back, "f32", "b16")
_add("cvt.rna.tf32.f32", _to_tf32, "b32", "f32")
