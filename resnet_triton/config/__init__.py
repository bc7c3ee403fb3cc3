"""How each kernel is tiled: the configuration, what is legal, and where a configuration comes from.

    device, conv (shapes, what is legal) -> estimate (the cost model); hopper (forms in Gluon) -> heuristic
    heuristic -> invariant (one tile for all batch sizes), candidates (what is worth a try); table -> choice (lookups)
    table -> targets (GPUs that need not be here)

Nothing is searched or timed at call time. The cost model is a pure function of shape and device facts; what a lookup
depends on besides (tables, which are read once) is in `state()`, for those who keep its answers.
"""

from ..kernels.values import ConvConfig
from .choice import choose, lookup, state, timed, untuned
from .conv import ConvShape, is_legal, is_run, supports_descriptors, tiles
from .heuristic import (
    DepthwiseTile,
    StemConfig,
    conv_heuristic,
    depthwise_tile,
    grouped_tile,
    head_classes,
    hopper_strip,
    linear_heuristic,
    stem_heuristic,
)
from .invariant import invariant, invariant_stem

__all__ = [
    "ConvConfig",
    "ConvShape",
    "DepthwiseTile",
    "StemConfig",
    "choose",
    "conv_heuristic",
    "depthwise_tile",
    "grouped_tile",
    "head_classes",
    "hopper_strip",
    "invariant",
    "invariant_stem",
    "is_legal",
    "is_run",
    "linear_heuristic",
    "lookup",
    "state",
    "stem_heuristic",
    "supports_descriptors",
    "tiles",
    "timed",
    "untuned",
]
