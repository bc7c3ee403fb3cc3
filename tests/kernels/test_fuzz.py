"""Random calls of every operator, bit for bit against fp64, under shadow memory.

A few of each by default, always the same. `make fuzz` runs 20,000 with a seed of its own; Hypothesis reduces what fails
to a small case and prints how to repeat it.
"""

from __future__ import annotations

import os
import random

import pytest
import random_cases
import torch
from exact import DTYPES, dtype_id, without_box
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st

from resnet_triton.config import ConvConfig, ConvShape, is_legal
from resnet_triton.config.targets import KNOWN

CASES = int(os.environ.get("FUZZ_CASES", "100"))
SEED = os.environ.get("FUZZ_SEED", "0")
SHARES = {"conv_bn_relu": 10}
"""Of all cases; other operators have one."""
TOTAL = len(DTYPES) * sum(SHARES.get(name, 1) for name in random_cases.CHECKS)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", random_cases.CHECKS)
def test_random_calls(device: torch.device, name: str, dtype: torch.dtype) -> None:
    @seed(f"{SEED} {name} {dtype}")  # one for all would give every dtype the same shapes
    @settings(
        max_examples=-(-CASES * SHARES.get(name, 1) // TOTAL), deadline=None, database=None, print_blob=True,
        phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(rng=st.randoms(use_true_random=False))
    def check(rng: random.Random) -> None:
        note(f"FUZZ_CASES={CASES} FUZZ_SEED={SEED}")
        random_cases.CHECKS[name](rng, device, dtype)

    check()


def test_a_box_that_is_dropped_leaves_a_legal_split() -> None:
    """Eight channels fill one slab of a box's loop, and a part of the pointer path's, which then cannot be split."""
    shape = ConvShape(1, 8, 1, 1, 8, 3, 3, padding=(1, 1), shortcut_c=8, shortcut_h=1, shortcut_w=2)
    chosen = ConvConfig(16, 16, 16, 4, 1, (1, 1, 16), split_k=3)
    assert is_legal(chosen, shape, KNOWN[90])
    assert is_legal(without_box(chosen, shape, KNOWN[90]), shape, KNOWN[90])
