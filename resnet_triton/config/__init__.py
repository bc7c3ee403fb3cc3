"""How each kernel is tiled: the configuration, what is legal, and where a configuration comes from.

Lookup order: the GPU's table (`<gpu>.json` in this folder), then the heuristic. Both are pure functions of shape and
device facts; nothing searches or times anything at call time.
"""

from .conv import ConvConfig, ConvShape, is_flat, is_legal, supports_descriptors, tiles
from .heuristic import StemConfig, conv_heuristic, linear_heuristic, stem_heuristic
from .table import lookup

__all__ = [
    "ConvConfig",
    "ConvShape",
    "StemConfig",
    "conv_heuristic",
    "is_flat",
    "is_legal",
    "linear_heuristic",
    "lookup",
    "stem_heuristic",
    "supports_descriptors",
    "tiles",
]
