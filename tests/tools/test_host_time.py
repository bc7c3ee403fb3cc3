"""`benchmarks/host_time.py` runs, with what it puts in place of parts of ours."""

import pytest

from benchmarks import host_time

pytest.importorskip("triton")


@pytest.mark.slow
def test_each_kind_of_call_is_timed():
    found = host_time.measure({"here": host_time.ROOT}, rounds=1, forwards=3)["here"]
    assert found["launches"] == 19
    assert found["frozen"] < found["captured"] < found["eager"]
    assert min(found.values()) > 0
