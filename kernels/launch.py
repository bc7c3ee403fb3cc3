"""A kernel launch as a value: it can be run, compiled ahead of time for a GPU that is not there, or looked at.

Nothing here needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_PARAMETERS = {"w_ptr", "w_desc", "bias_ptr", "mean_ptr", "var_ptr", "bn_weight_ptr", "bn_bias_ptr"}


@dataclass(eq=False, slots=True)
class Launch:
    """One launch of one `@triton.jit` kernel, complete: nothing is left to choose when it runs.

    `arguments` holds every kernel parameter by name, constants included. The same value is what a GPU runs, what the
    interpreter runs and what ahead-of-time compilation reads its signature from, so the three cannot drift apart.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    trusted: bool = True
    """Whether its tile is this project's own choice, and not one of a table or of a caller."""
    dependent: bool = False
    """Launch with programmatic dependent launch: it may start before the kernel before it has finished.

    Allowed only where that kernel writes none of what this one reads before `griddepcontrol.wait`, its `parameters`: so
    only inside a graph of our model. Every program waits, so all earlier kernels are done when one has finished.
    """

    @property
    def name(self) -> str:
        """The kernel's name, without the "_kernel" at its end."""
        return str(self.kernel.__name__).removesuffix("_kernel")

    @property
    def is_gluon(self) -> bool:
        """Whether the kernel is in Gluon: a compiler's or driver's failure then has other kernels run in its place."""
        is_gluon = getattr(self.kernel, "is_gluon", None)  # an interpreted function has no such method
        return is_gluon is not None and is_gluon()

    @property
    def parameters(self) -> frozenset[str]:
        """Names of the arguments that are parameters of a layer, which no kernel of a forward pass writes."""
        return frozenset(filter(is_parameter, self.arguments))

    def run(self) -> Any:
        """Launch on the current device and stream. Does not wait. Returns the compiled kernel, None if interpreted."""
        return self.kernel[self.grid](**self.arguments, **self._options())

    def compile(self) -> Any:
        """The compiled kernel that `run` would launch, from Triton's cache if it is there."""
        return self.kernel.warmup(grid=self.grid, **self.arguments, **self._options())

    def repeat(self, changing: str) -> Callable[[Any], None]:
        """A function that launches this again with another value for the argument `changing`, on the current stream.

        The new value must have the same dtype and alignment, and the same device must be current. Tensors are passed by
        address: Triton would ask tensor and driver for each.
        """
        compiled, names = self.compile(), self.kernel.arg_names
        values = [_address(self.arguments[name]) for name in names]
        i = names.index(changing)
        before, behind = values[:i], values[i + 1 :]
        launch = compiled[(*self.grid, 1, 1)[:3]]

        def again(value: Any) -> None:
            launch(*before, _address(value), *behind)

        again.keeps = [value for name, value in self.arguments.items() if name != changing]  # what is at the addresses
        return again

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        if self.dependent:
            options["launch_pdl"] = True
        return options


def _address(value: Any) -> Any:
    """Of a tensor; anything else as it is."""
    return value.data_ptr() if isinstance(value, Tensor) else value


def is_parameter(name: str) -> bool:
    """Whether a kernel's argument of this name is a parameter of a layer."""
    return name.removeprefix("short_") in _PARAMETERS


def with_base(desc: Any, tensor: Any) -> Any:
    """A copy of `desc` for another tensor of the same layout, aligned to 16 bytes, without Triton's checks (3 us)."""
    copy = object.__new__(type(desc))
    vars(copy).update(vars(desc), base=tensor)
    return copy


def round_to_tf32(desc: Any) -> None:
    """Have fp32 rounded to TF32 where `desc` loads it, for an operand of a product: wgmma truncates.

    Changes nothing for other types, nor in Triton 3.6.0, which has no such descriptors.
    """
    if hasattr(desc, "round_f32_to_tf32"):
        desc.round_f32_to_tf32 = desc.base.dtype.itemsize == 4


def cdiv(a: int, b: int) -> int:
    """Integer division, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (1 for n = 0)."""
    return 1 << max(n - 1, 0).bit_length()
