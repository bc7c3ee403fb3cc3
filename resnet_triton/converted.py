"""What `optimize` makes of torchvision's classes: `ResNet`, `BasicBlock` and `Bottleneck`, each torchvision's and ours.

They need torchvision, so each is made when it is first asked for; a pickle asks for `resnet_triton.converted.ResNet`.
A class is ours first, except for code of torchvision's that somebody has replaced since it was written: then that runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from . import models
from .fusion import refuse_modules
from .ops import original
from .support import vision

OURS: dict[str, type[nn.Module]] = {
    "ResNet": models.ResNet, "BasicBlock": models.BasicBlock, "Bottleneck": models.Bottleneck,
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in OURS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    theirs = getattr(vision.torchvision().models.resnet, name)
    return globals().setdefault(name, _joined(OURS[name], theirs))  # another thread may have been faster


def is_torchvision(module: nn.Module) -> bool:
    """Exactly one of torchvision's own ResNet classes; a subclass may have overridden anything."""
    cls = type(module)
    return cls.__module__ == "torchvision.models.resnet" and cls.__name__ in OURS


def is_derived(module: nn.Module) -> bool:
    """A subclass of torchvision's ResNet, with code of its own around the blocks."""
    bases = ((cls.__module__, cls.__name__) for cls in type(module).__mro__[1:])
    return not isinstance(module, models.ResNet) and ("torchvision.models.resnet", "ResNet") in bases


def _joined(ours: Any, theirs: Any) -> type[nn.Module]:
    original.remember(theirs)
    code = {name: _either(name, ours, theirs) for name in ("forward", "_forward_impl") if hasattr(theirs, name)}
    members = {"__module__": __name__, "__init__": theirs.__init__, "written_class": theirs, **code}
    made = type(theirs.__name__, (ours, theirs), members)
    original.remember(made)
    models.STATELESS.add(made)
    if theirs.__name__ != "ResNet":
        models.BLOCKS.add(made)
    return made


def _either(name: str, ours: Any, theirs: Any) -> Callable[[Any, Tensor], Tensor]:
    """The method `name`: ours, or torchvision's where that was replaced or `self` is disabled."""
    written = original.written(theirs, name)
    comes_back = name == "forward" and hasattr(theirs, "_forward_impl")  # which is ours again

    def method(self: Any, x: Tensor) -> Tensor:
        code = getattr(theirs, name)
        if not isinstance(self, ours):  # reverted, but somebody has kept the bound method
            return code(self, x)
        if original.anywhere and original.is_disabled(self):
            return code(self, self._floats(x))
        if code is written:
            return getattr(ours, name)(self, x)
        if not comes_back:
            refuse_modules(self.modes, original.replaced(self) or "")
        return code(self, self._floats(x))

    method.__name__, method.__qualname__ = name, f"{theirs.__name__}.{name}"
    return method
