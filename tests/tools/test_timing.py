"""The timing routine against known sleeps, its statistics against NumPy's."""

import time

import pytest
import torch

from resnet_triton.support import timing


def test_sleeps_are_timed_in_turns():
    order = []

    def nap(name, seconds):
        order.append(name)
        time.sleep(seconds)

    samples = timing.interleaved({"a": lambda: nap("a", 0.01), "b": lambda: nap("b", 0.05)}, rounds=5, warmup=1)
    assert order == ["a", "b"] * 6
    assert [len(s) for s in samples.values()] == [5, 5]
    assert 0.01 <= timing.spread(samples["a"]).p50 < 0.04  # a busy machine wakes up late
    assert 0.05 <= timing.spread(samples["b"]).p50 < 0.08


def test_rounds_fill_the_time_given():
    counts = dict.fromkeys(("fast", "slow"), 0)

    def nap(name, seconds):
        counts[name] += 1
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    calls = {"fast": lambda: nap("fast", 10e-6), "slow": lambda: nap("slow", 200e-6)}
    samples = timing.interleaved_for(0.03, calls)
    rounds = len(samples["slow"])
    assert 30 < rounds <= 100, "0.3 ms each"
    assert len(samples["fast"]) == rounds
    assert 5 * rounds < counts["fast"] <= 10 * rounds + 5, "about ten calls a sample"
    assert counts["slow"] == rounds + 5
    assert timing.spread(samples["fast"]).p50 == pytest.approx(11e-6, rel=0.5)
    assert timing.spread(samples["slow"]).p50 == pytest.approx(200e-6, rel=0.5)
    assert len(timing.interleaved_for(0.0, calls)["slow"]) == 5, "at least"
    assert len(timing.interleaved_for(1.0, {"nothing": lambda: None})["nothing"]) == 1000, "at most"


def test_launches_take_turns_and_are_counted_singly():
    order = []
    calls = [lambda i=i: order.append(i) for i in range(4)]

    def meter(work, replays):
        work()
        return [12 * s for s in (5.0, 1.0, 3.0, 2.0, 4.0)[:replays]]

    assert timing.graph_seconds(calls * 3, replays=5, meter=meter) == (3.0, pytest.approx(1.8), pytest.approx(4.2))
    assert order == [0, 1, 2, 3] * 3
    order.clear()
    assert timing.graph_seconds(calls, replays=5, meter=meter).p50 == pytest.approx(3.0)
    assert order == [0, 1, 2, 3] * 3, "too few would drown in the clock's resolution, a broken round reuses buffers"


@pytest.mark.gpu
def test_a_graph_times_the_gpu_not_the_host():
    x = torch.rand(64 << 20, device="cuda")

    def copy():
        time.sleep(0.01)  # while the graph is recorded, not when it is replayed
        x.clone()

    spread = timing.graph_seconds([copy], replays=5)
    assert 0 < spread.p20 <= spread.p50 <= spread.p80 < 0.009
