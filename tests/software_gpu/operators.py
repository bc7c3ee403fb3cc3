"""PyTorch's operators on the GPU in software: those for the CPU, on the same memory, when their turn comes.

The shapes of results come from PyTorch's meta kernels. Operators without one wait for the stream, as `nonzero` does on
a GPU, too.
"""

from __future__ import annotations

import ctypes
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from . import failures, launch

_OWN = re.compile(
    "(empty|as_strided|view|_reshape_alias|unfold$|resize_|set_|record_stream|_local_scalar|_pin|is_|_has_|_conj|_neg|real"
    "|imag|_efficientzero|_copy_from|_to_cpu|_cudnn|cudnn|miopen|_fused|_scaled|_flash|_thnn|_nested|_jagged|.*quant"
    "|.*sparse|.*mkldnn)"
)
"""Operators that make tensors or look at them, which do the same on every device, and those that CPUs have not."""
_library = torch.library.Library("aten", "IMPL")


def install() -> None:
    """Put the CPU's operators in place of those for CUDA."""
    names = [name.removeprefix("aten::") for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
             if name.startswith("aten::")]  # fmt: skip
    special = {"copy_": _copy, "equal": _equal, "_local_scalar_dense": _item, "cudnn_batch_norm": _batch_norm}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in {*names, "convolution"} - set(special):
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
            if operator is not None and not _OWN.match(name):
                _library.impl(name, partial(_run, operator), "CUDA", allow_override=True)
        for name, function in special.items():
            _library.impl(name, function, "CUDA", allow_override=True)


def _on_cpu(t: Tensor) -> Tensor:
    """A tensor of the CPU on the memory of one of the GPU."""
    with torch.inference_mode(False):
        size = t.untyped_storage().nbytes()
        if size == 0:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
        memory = (ctypes.c_char * size).from_address(t.untyped_storage().data_ptr())
        storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
        return torch.empty(0, dtype=t.dtype).set_(storage, t.storage_offset(), t.shape, t.stride())


def _meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _elsewhere(values: Any, tensor: Callable[[Tensor], Tensor], device: str) -> Any:
    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tensor(value) if value.is_cuda else value
        return torch.device(device) if isinstance(value, torch.device) else value

    return tree_map(moved, values)


def _launch(work: Callable[[], object]) -> None:
    if launch(torch.cuda.current_stream().cuda_stream, work):
        raise RuntimeError("\n".join(["CUDA error: unspecified launch failure", *failures]))


def _wait() -> None:
    torch.cuda.current_stream().synchronize()  # raises in a capture


def _run(operator: Any, *args: Any, **kwargs: Any) -> Any:
    arguments, returns = operator._schema.arguments, operator._schema.returns
    named = dict(zip([a.name for a in arguments], args, strict=False)) | kwargs
    written = [named[a.name] for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    tensors = [t for t in tree_flatten(named)[0] if isinstance(t, Tensor) and t.is_cuda]
    device = tensors[0].device if tensors else torch.device("cuda", torch.cuda.current_device())
    if any(a.name == "generator" for a in arguments):
        kwargs = kwargs | {"generator": _seeded(named.get("generator"), device)}
    with torch.cuda.device(device):
        if written:
            if any(isinstance(t, Tensor) and t.numel() == 0 for t in written):  # to be resized by what writes it
                values, named_values = _elsewhere((args, kwargs), _meta, "meta")
                operator(*values, **named_values)
                shaped = dict(zip([a.name for a in arguments], values, strict=False)) | named_values
                for name, like in shaped.items():
                    if any(named[name] is t for t in written):
                        named[name].resize_(like.shape).as_strided_(like.shape, like.stride())
            values, named_values = _elsewhere((args, kwargs), _on_cpu, "cpu")
            _launch(lambda: operator(*values, **named_values))
            return tuple(written) if len(returns) > 1 else written[0] if returns else None
        values, named_values = _elsewhere((args, kwargs), _on_cpu, "cpu")
        try:
            meta, named_meta = _elsewhere((args, kwargs), _meta, "meta")
            flat, spec = tree_flatten(operator(*meta, **named_meta))
            results = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) for t in flat]
        except (NotImplementedError, RuntimeError, AttributeError):
            _wait()
            found = operator(*values, **named_values)
            return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, found)
        places = [_on_cpu(t) for t in results]

        def work() -> None:
            for place, result in zip(places, tree_flatten(operator(*values, **named_values))[0], strict=True):
                if place.shape == result.shape:  # statistics of a batch norm that has some are empty on CPUs
                    place.copy_(result)

        _launch(work)
        return tree_unflatten(results, spec)


def _seeded(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    known = generator or torch.cuda.default_generators[device.index]
    known.set_offset(known.get_offset() + 4)
    return torch.Generator().manual_seed((known.initial_seed() * 1_000_003 + known.get_offset()) % 2**63)


def _copy(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if self.numel() == 0:
        return self
    device = self.device if self.is_cuda else source.device
    with torch.cuda.device(device), torch.inference_mode(False):
        if not source.is_cuda and not (non_blocking and source.is_pinned()):
            given = torch.empty_like(source).copy_(source)
        else:
            given = _on_cpu(source)
        if self.is_cuda and source.is_cuda and source.device != device:
            torch.cuda.current_stream(source.device).synchronize()
        target = _on_cpu(self)
        _launch(lambda: target.copy_(given))
        if not self.is_cuda and not (non_blocking and self.is_pinned()):
            _wait()
    return self


def _equal(a: Tensor, b: Tensor) -> bool:
    with torch.cuda.device(a.device), torch.inference_mode(False):
        _wait()
        return torch.equal(_on_cpu(a), _on_cpu(b))


def _item(t: Tensor) -> Any:
    with torch.cuda.device(t.device), torch.inference_mode(False):
        _wait()
        return _on_cpu(t).item()


def _batch_norm(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return (*torch.native_batch_norm(x, *rest), torch.empty(0, dtype=torch.uint8, device=x.device))
