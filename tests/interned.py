"""Types of Triton's interpreter, computed once.

A third of the time of an interpreted kernel goes into shapes and types of its values, which are few, and computed for
each value anew. Nothing here has a part in the values themselves.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache  # `make mutate` sets a session's fixtures up again for each test
def install() -> None:
    """For all kernels of this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    numpy_types: dict[str, Any] = {}
    of_numpy = interpreter._get_np_dtype

    def numpy_type(of: Any) -> Any:
        name = of.scalar.name
        if name not in numpy_types:
            numpy_types[name] = of_numpy(of)
        return numpy_types[name]

    blocks: dict[Any, dict[str, Any]] = {}
    of_block = tl.block_type.__init__

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in blocks:
            of_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key], element_ty=element_ty)

    tensors: dict[Any, dict[str, Any]] = {}
    of_tensor = tl.tensor.__init__

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            of_tensor(self, handle, type)
            tensors[type.name] = {**vars(self), "handle": None}
        vars(self).update(tensors[type.name], handle=handle, type=type, dtype=type.scalar)

    interpreter._get_np_dtype = numpy_type
    tl.block_type.__init__ = block
    tl.tensor.__init__ = tensor
