"""A kernel launch as a value: it can be run, compiled ahead of time for a GPU that is not there, or looked at.

Nothing here needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_PARAMETERS = ("w_", "bias_", "mean_", "var_", "gamma_", "beta_")


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
    own: bool = True
    """Whether its tile is this project's own choice, and not one of a table or of a caller."""
    dependent: bool = False
    """Whether its programs may start while the kernel before still runs: only where that is no edit of what the kernel
    reads before it waits for it (griddepcontrol). Any other launch begins when the one before is done, and that one's
    end is the end of all before it, for no program leaves without having waited.
    """

    @property
    def specialised(self) -> bool:
        """Whether this is a warp-specialised kernel, in Gluon."""
        is_gluon = getattr(self.kernel, "is_gluon", None)  # an interpreted function has no such method
        return is_gluon is not None and is_gluon()

    @property
    def parameters(self) -> frozenset[str]:
        """Names of the arguments that are a layer's own, which no kernel of a forward pass writes."""
        return frozenset(n for n in self.arguments if n.removeprefix("short_").startswith(_PARAMETERS))

    def run(self) -> None:
        """Launch on the current device and stream. Does not wait."""
        self.kernel[self.grid](**self.arguments, **self._options())

    def compile(self) -> Any:
        """The compiled kernel that `run` would launch, from Triton's cache if it is there."""
        return self.kernel.warmup(grid=self.grid, **self.arguments, **self._options())

    def repeat(self, changing: str) -> Callable[[Any], None]:
        """A function that launches this again with another value for the argument `changing`, on the current stream.

        For a value alike in what Triton compiles for: a tensor's dtype and whether its address is a multiple of 16.
        What `run` looks up at each launch has been looked up once, so the same device has to be the current one.
        """
        compiled, names = self.compile(), self.kernel.arg_names
        values = [self.arguments[name] for name in names]
        i = names.index(changing)
        before, behind = values[:i], values[i + 1 :]
        launch = compiled[(*self.grid, 1, 1)[:3]]

        def again(value: Any) -> None:
            launch(*before, value, *behind)

        return again

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        if self.dependent:
            options["launch_pdl"] = True
        return options


def on(base: Any, like: Any) -> Any:
    """A tensor descriptor of `base`, which is aligned to 16 bytes, as `like` is: that was checked once for a layout."""
    desc = object.__new__(type(like))
    vars(desc).update(vars(like), base=base)
    return desc


def rounding(desc: Any, factor: bool) -> Any:
    """`desc`, which as a product's `factor` rounds fp32 to TF32 while it loads: wgmma would cut it."""
    if hasattr(desc, "round_f32_to_tf32"):  # Triton 3.6.0 cannot do that
        desc.round_f32_to_tf32 = factor and desc.base.dtype.itemsize == 4
    return desc


def cdiv(a: int, b: int) -> int:
    """Integer division, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (1 for n = 0)."""
    return 1 << max(n - 1, 0).bit_length()
