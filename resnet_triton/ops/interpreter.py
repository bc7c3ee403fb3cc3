"""Triton's interpreter, repaired, with a check that doubles its time left out.

`TRITON_INTERPRET=1` runs kernels on CPU tensors, program by program, in NumPy. Upstream (seen in 3.6.0 to 3.9.0) keeps
bfloat16 as raw uint16: `tl.dot` multiplies those integers, 3.9.0's `tl.maximum` compares them, casts from fp32 truncate
instead of rounding, and casts to fp32 garble denormals. All of it is silently wrong, so `repair()` replaces it before
the first interpreted launch. With NumPy 2.4 or newer, 3.6.0 refuses loops up to an argument: that goes with 3.6.0.
`tests/kernels/test_interpreter.py` fails on the day upstream is right and this file can go.

NumPy's own products differ by machine: on some CPUs a row's sum depends on where it stands in its tile. So the
interpreter cannot keep the promise of `batch_invariant=True`; the tests of it multiply otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
from contextlib import AbstractContextManager
from typing import Any

from ..support import locks


@functools.cache
def active() -> bool:
    """Whether kernels are interpreted. Triton reads the variable when a kernel is defined, so this asks the kernel."""
    try:
        from ..kernels.add_relu import add_relu_kernel
    except ImportError:  # no Triton here
        return False
    return type(add_relu_kernel).__name__ == "InterpretedFunction"


_lock = locks.lock()


def ready() -> AbstractContextManager[object]:
    """The interpreter, repaired and kept to this thread: it holds the running program's index in a global."""
    repair()
    return _lock


@functools.cache
def repair() -> None:
    """Repair the interpreter of this process. Calling it again does nothing."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    handle = interpreter.TensorHandle
    maximum = interpreter.InterpreterBuilder.create_maximumf
    patch_tensor = interpreter._patch_lang_tensor

    def widen(h: Any) -> Any:
        if h.dtype.scalar == tl.bfloat16:
            return (np.ascontiguousarray(h.data).astype(np.uint32) << 16).view(np.float32)
        return h.data.astype(np.float32) if h.data.dtype == np.float16 else h.data

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        product = np.matmul(widen(a), widen(b)).astype(d.data.dtype, copy=False)
        return handle(product + d.data, d.dtype.scalar)

    def create_maximumf(self: Any, a: Any, b: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return maximum(self, a, b)
        bits = np.maximum(widen(a), widen(b)).view(np.uint32)
        return handle((bits >> 16).astype(np.uint16), a.dtype.scalar)

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.bfloat16 and target == tl.float32:
            return np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16
        to_nearest = rounding is None or rounding == interpreter._ir.ROUNDING_MODE.RTNE
        if source == tl.float32 and target == tl.bfloat16 and to_nearest:
            data = np.ascontiguousarray(data)
            bits = data.view(np.uint32).astype(np.uint64)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)
        return convert(data, source, target, rounding)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.create_maximumf = create_maximumf
    interpreter._convert_float = convert_float
    interpreter._patch_lang_tensor = patch_lang_tensor
    options = interpreter.interpreter_builder.options
    if not options.debug:  # the check only reports in debug mode, yet costs half the run time
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
