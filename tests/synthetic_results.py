"""Benchmark results made up for tests: every time in them is invented."""

from __future__ import annotations

from typing import Any

from resnet_triton.bench.results import Ceiling, Measurement, Results

CPU = {
    "device": "Synthetic CPU 9000", "device_kind": "cpu", "threads": 2, "clocks": "unknown", "driver": "none",
    "os": "Linux", "python": "3.11", "torch": "2.13.0", "triton": "3.7.1", "torchvision": "0.28.0", "cudnn": "none",
    "resnet_triton": "0.1.0", "commit": "0123456", "date": "2026-01-02T03:04:05+00:00",
}  # fmt: skip
GPU = {**CPU, "device": "Synthetic GPU", "device_kind": "cuda", "driver": "580.1", "clocks": "1980 MHz, locked"}


def row(alternative: str = "resnet_triton", batch: int = 1, ms: float = 1.0, **other: Any) -> Measurement:
    """A right row of the model suite whose samples are `ms` less a tenth, `ms`, and `ms` and a fifth."""
    base: dict[str, Any] = {
        "suite": "model", "model": "resnet18", "layer": None, "image": 224,
        "ours": alternative.startswith("resnet_triton"), "dtype": "float32", "clock": "wall",
        "l2": "uncontrolled", "environment": CPU, "correct": True, "error_before": 1e-6, "error_after": 1e-6,
        "error_limit": 1e-4, "samples_s": [0.9e-3 * ms, 1e-3 * ms, 1.2e-3 * ms], "p20_s": 0.9e-3 * ms,
        "p50_s": 1e-3 * ms, "p80_s": 1.2e-3 * ms,
    }  # fmt: skip
    return Measurement(**{**base, "alternative": alternative, "batch": batch, **other})


def failed(alternative: str, batch: int, reason: str, **other: Any) -> Measurement:
    """A row without times."""
    nothing = dict.fromkeys(("p20_s", "p50_s", "p80_s", "correct", "error_before", "error_after", "error_limit"))
    return row(alternative, batch, samples_s=[], failure=reason, **{**nothing, **other})


def ceilings(dtype: str, bytes_per_s: float, flops_per_s: float) -> list[Ceiling]:
    return [Ceiling("copy", bytes_per_s=bytes_per_s), Ceiling("matmul", dtype, flops_per_s=flops_per_s)]


def gpu() -> Results:
    """Three alternatives in three ways to time, slower than the best at batch 256; three layers, one without FLOPs."""
    names = {"resnet_triton": (0.06, 0.0068), "eager": (1.9, 0.0150), "TensorRT": (0.1, 0.0072)}
    rows = []
    for clock, l2, more in (("wall", "warm", 0.012), ("gpu", "warm", 0.0), ("gpu", "cold", 0.004)):
        for batch in (1, 8, 256):
            for name, (fixed, each) in names.items():
                ms = more + fixed + each * batch * (1.13 if batch == 256 and name == "resnet_triton" else 1)
                first = {"first_call_s": 24.0} if batch == 1 else {}
                rows.append(row(name, batch, ms, clock=clock, l2=l2, dtype="float16", environment=GPU,
                                peak_bytes=3_000_000 * batch, **first))  # fmt: skip
    for layer, flops in (("conv1", 236_000_000), ("layer1.0.conv1", 231_000_000), ("maxpool", 0)):
        for name, ms in (("resnet_triton", 0.002), ("cudnn fused", 0.003)):
            rows.append(row(name, 1, ms, suite="kernel", layer=layer, flops=flops, bytes=900_000, clock="gpu",
                            l2="cold", dtype="float16", environment=GPU))  # fmt: skip
    return Results(rows, ceilings("float16", 4.1e12, 7.9e14))


NASTY = '<b>&"evil\x1b[31m|\n$x^2$`*</b>'


def wrong() -> Results:
    """Ours wrong at batch 4, an alternative wrong at batch 1 although fastest, failures, one to be escaped."""
    return Results([
        row("resnet_triton", 1, 2.0), row("eager", 1, 3.0), row("compiled", 1, 0.5, correct=False, error_after=0.25),
        row("resnet_triton", 4, 2.0, correct=False, error_before=None), row("eager", 4, 9.0),
        failed("resnet_triton", 8, "CUDA out of memory"), row("eager", 8, 12.0),
        row("resnet_triton", 16, 5.0), failed("compiled", 16, NASTY),
        row("resnet_triton", 32, 9.0, peak_bytes=0), row("compiled", 32, 8.0),
        row("resnet_triton", 64, 20.0), row("eager", 64, 19.0, correct=None),
    ])  # fmt: skip
