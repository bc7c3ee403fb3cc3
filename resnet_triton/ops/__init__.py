"""The operators: importing this package registers `torch.ops.resnet_triton`.

Each is a class whose fields are its arguments: what it returns (here calls are validated), what keeps it off our
kernels, the launches that compute it, and its PyTorch form. `operation.py` makes an operator of that.
"""

from ..kernels.values import NONE, RELU, Activation, BatchNorm, Geometry, Shortcut
from .add_relu import AddRelu
from .conv import ConvBnRelu
from .linear import AvgPoolLinear, Linear
from .operation import OPERATORS, Operation
from .pool import GlobalAvgPool, MaxPool2d
from .stem import Stem

__all__ = [
    "NONE",
    "OPERATORS",
    "RELU",
    "Activation",
    "AddRelu",
    "AvgPoolLinear",
    "BatchNorm",
    "ConvBnRelu",
    "Geometry",
    "GlobalAvgPool",
    "Linear",
    "MaxPool2d",
    "Operation",
    "Shortcut",
    "Stem",
]
