"""The operators: importing this package registers `torch.ops.resnet_triton`.

Each is four functions in a row and a schema: its result's shape and dtype (here calls are validated), what keeps it off
our kernels, the launches planned for it, and its PyTorch form. `registry.register` makes an operator of them.
"""

from . import add_relu, conv, linear, pool, stem
from .conv import NO_SHORTCUT, ConvCall
from .registry import OPERATORS, call

__all__ = ["NO_SHORTCUT", "OPERATORS", "ConvCall", "add_relu", "call", "conv", "linear", "pool", "stem"]
