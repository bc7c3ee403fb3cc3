"""A backend of torch.compile: `torch.compile(model, backend="resnet_triton")`.

layouts (where memory formats show) -> overlap (of inputs), rewrite (patterns), inductor (the rest)
-> compile, which torch.compile calls
"""

from .compile import resnet_triton

__all__ = ["resnet_triton"]
