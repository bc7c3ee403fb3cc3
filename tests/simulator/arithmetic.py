"""What each opcode computes, on arrays of lanes: one table from its name to a function and its types.

Registers hold bits; a type says how to read them. fma rounds twice, in fp64 and in fp32: exact on integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = Any

TYPES: dict[str, Any] = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "f16x2": np.uint32, "bf16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip


class Operation(NamedTuple):
    compute: Callable[..., Array]
    result: str
    sources: tuple[str, ...]


TABLE: dict[str, Operation] = {}


def _add(name: str, compute: Callable[..., Array], result: str, *sources: str) -> None:
    TABLE[name] = Operation(compute, result, sources)


def bits(t: str) -> int:
    return 8 * np.dtype(TYPES[t]).itemsize


def from_bf16(a: Array) -> Array:
    return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(a: Array) -> Array:
    """To nearest even; NaN stays NaN."""
    word = a.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((word + 0x7FFF + (word >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(a), np.uint16(0x7FFF), rounded)


def _divide(a: Array, b: Array) -> Array:
    """Towards zero, as in C; what a division by zero gives, nobody may use."""
    a, b = a.astype(np.int64), b.astype(np.int64)
    b = np.where(b == 0, 1, b)
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


def _shift(name: str, t: str) -> Callable[..., Array]:
    width, dtype = bits(t), TYPES[t]

    def left(a: Array, n: Array) -> Array:
        return np.where(n < width, a << np.minimum(n, width - 1).astype(dtype), 0)

    def right(a: Array, n: Array) -> Array:
        shifted = a >> np.minimum(n, width - 1).astype(dtype)
        return shifted if t[0] == "s" else np.where(n < width, shifted, 0)

    return left if name == "shl" else right


def _field(a: Array, position: Array, length: Array, signed: bool) -> Array:
    """bfe: bits of a 32-bit register, within it."""
    value = a.astype(np.int64) & 0xFFFFFFFF
    position, length = position.astype(np.int64) & 255, np.minimum(length.astype(np.int64) & 255, 32)
    value = value >> np.minimum(position, 63) & (1 << length) - 1
    if signed:
        length = np.minimum(length, 32 - np.minimum(position, 32))
        value = np.where(length > 0, value - ((value >> np.maximum(length - 1, 0) & 1) << length), 0)
    return value


def _permute(a: Array, b: Array, selector: Array) -> Array:
    both = np.concatenate([a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)], 1)
    picks = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
    taken = np.take_along_axis(both, (picks & 7).astype(np.int64), 1)
    return np.where(picks & 8, (taken.view(np.int8) >> 7).view(np.uint8), taken).copy().view(np.uint32)[:, 0]


def _extreme(pick: Callable[..., Array], nan: bool) -> Callable[..., Array]:
    """fp maximum or minimum; with .NaN a NaN wins, without it loses. -0 is less than +0."""

    def compute(a: Array, b: Array) -> Array:
        best = pick(a, b)
        zeros = (a == 0) & (b == 0)
        negative = np.signbit(a) & np.signbit(b) if pick in (np.maximum, np.fmax) else np.signbit(a) | np.signbit(b)
        best = np.where(zeros, np.where(negative, a.dtype.type(-0.0), a.dtype.type(0)), best)
        return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), best) if nan else best

    return compute


def _halves(compute: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *sources: compute(*(np.ascontiguousarray(a).view(np.float16) for a in sources)).view(np.uint32)


def _pack(to: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda high, low: to(low).astype(np.uint32) | to(high).astype(np.uint32) << np.uint32(16)


def _fma(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _to_tf32(a: Array) -> Array:
    rounded = (a.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(a), np.uint32(0x7FFFE000), rounded)


def _integers() -> None:
    for t in ("s16", "u16", "s32", "u32", "s64", "u64"):
        wide = {"16": "32", "32": "64"}.get(t[1:])
        for name, compute in (("add", np.add), ("sub", np.subtract), ("mul.lo", np.multiply), ("min", np.minimum),
                              ("max", np.maximum)):  # fmt: skip
            _add(f"{name}.{t}", compute, t, t, t)
        _add(f"mad.lo.{t}", lambda a, b, c: a * b + c, t, t, t, t)
        if t != "u64":  # which need more than 64 bits
            _add(f"div.{t}", _divide, t, t, t)
            _add(f"rem.{t}", lambda a, b: a - _divide(a, b) * b, t, t, t)
        if wide:
            w, into = TYPES[t[0] + wide], t[0] + wide
            _add(f"mul.wide.{t}", lambda a, b, w=w: a.astype(w) * b.astype(w), into, t, t)
            _add(f"mad.wide.{t}", lambda a, b, c, w=w: a.astype(w) * b.astype(w) + c, into, t, t, into)
            shift = w(bits(t))
            _add(f"mul.hi.{t}", lambda a, b, w=w, s=shift: a.astype(w) * b.astype(w) >> s, t, t, t)
        _add(f"shr.{t}", _shift("shr", t), t, t, "u32")
        for name, compare in (("eq", np.equal), ("ne", np.not_equal), ("lt", np.less), ("le", np.less_equal),
                              ("gt", np.greater), ("ge", np.greater_equal)):  # fmt: skip
            _add(f"setp.{name}.{t}", compare, "pred", t, t)
    for t in ("s16", "s32", "s64"):
        _add(f"neg.{t}", np.negative, t, t)
        _add(f"abs.{t}", np.abs, t, t)
    for t in ("b16", "b32", "b64", "pred"):
        for name, compute in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
            _add(f"{name}.{t}", compute, t, t, t)
        _add(f"not.{t}", np.invert, t, t)
        if t != "pred":
            _add(f"shl.{t}", _shift("shl", t), t, t, "u32")
            _add(f"shr.{t}", _shift("shr", t), t, t, "u32")
            _add(f"setp.eq.{t}", np.equal, "pred", t, t)
            _add(f"setp.ne.{t}", np.not_equal, "pred", t, t)
    for t in ("b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64"):
        _add(f"selp.{t}", lambda a, b, c: np.where(c, a, b), t, t, t, "pred")
        _add(f"mov.{t}", lambda a: a, t, t)
    _add("mov.pred", lambda a: a, "pred", "pred")
    _add("bfe.u32", lambda *a: _field(*a, signed=False), "u32", "u32", "u32", "u32")
    _add("bfe.s32", lambda *a: _field(*a, signed=True), "s32", "s32", "u32", "u32")
    _add("prmt.b32", _permute, "b32", "b32", "b32", "b32")
    _add("shf.l.wrap.b32", lambda a, b, n: (b.astype(np.uint64) << 32 | a) << (n & 31).astype(np.uint64) >> 32,
         "b32", "b32", "b32", "u32")  # fmt: skip
    for name in ("cvta.param.u64", "cvta.to.global.u64"):
        _add(name, lambda a: a, "u64", "u64")


def _floats() -> None:
    for rounding in ("", ".rn"):
        for name, compute in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
            _add(f"{name}{rounding}.f32", compute, "f32", "f32", "f32")
    _add("fma.rn.f32", _fma, "f32", "f32", "f32", "f32")
    _add("div.rn.f32", np.divide, "f32", "f32", "f32")
    _add("sqrt.rn.f32", np.sqrt, "f32", "f32")
    _add("neg.f32", lambda a: a ^ np.uint32(1 << 31), "b32", "b32")
    _add("abs.f32", lambda a: a & np.uint32(~(1 << 31) & 0xFFFFFFFF), "b32", "b32")
    for name, ordered, other in (("max", np.maximum, np.fmax), ("min", np.minimum, np.fmin)):
        _add(f"{name}.f32", _extreme(other, nan=False), "f32", "f32", "f32")
        _add(f"{name}.NaN.f32", _extreme(ordered, nan=True), "f32", "f32", "f32")
        _add(f"{name}.NaN.f16", _extreme(ordered, nan=True), "f16", "f16", "f16")
        _add(f"{name}.NaN.f16x2", _halves(_extreme(ordered, nan=True)), "b32", "b32", "b32")
    for name, compare in (("eq", np.equal), ("lt", np.less), ("le", np.less_equal), ("gt", np.greater),
                          ("ge", np.greater_equal)):  # fmt: skip
        for t in ("f32", "f16"):
            _add(f"setp.{name}.{t}", compare, "pred", t, t)
            inverse = {"eq": "neu", "lt": "geu", "le": "gtu", "gt": "leu", "ge": "ltu"}[name]
            _add(f"setp.{inverse}.{t}", lambda a, b, f=compare: ~f(a, b), "pred", t, t)
    for t in ("f32", "f16"):
        _add(f"setp.nan.{t}", lambda a, b: np.isnan(a) | np.isnan(b), "pred", t, t)
        _add(f"setp.num.{t}", lambda a, b: ~(np.isnan(a) | np.isnan(b)), "pred", t, t)


def _conversions() -> None:
    integers = ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")
    for source in integers:
        for into in integers:
            _add(f"cvt.{into}.{source}", lambda a, d=TYPES[into]: a.astype(d), into, source)
        _add(f"cvt.rn.f32.{source}", lambda a: a.astype(np.float32), "f32", source)
    _add("cvt.rzi.s32.f32", lambda a: np.trunc(np.nan_to_num(a)).clip(-(2.0**31), 2.0**31 - 128).astype(np.int32),
         "s32", "f32")  # fmt: skip
    _add("cvt.f32.f16", lambda a: a.astype(np.float32), "f32", "f16")
    _add("cvt.f32.bf16", from_bf16, "f32", "bf16")
    _add("cvt.rn.f16.f32", lambda a: a.astype(np.float16), "f16", "f32")
    _add("cvt.rn.bf16.f32", to_bf16, "bf16", "f32")
    _add("cvt.rn.f16x2.f32", _pack(lambda a: a.astype(np.float16).view(np.uint16)), "b32", "f32", "f32")
    _add("cvt.rn.bf16x2.f32", _pack(to_bf16), "b32", "f32", "f32")
    _add("cvt.rna.tf32.f32", _to_tf32, "b32", "f32")


_integers()
_floats()
_conversions()
