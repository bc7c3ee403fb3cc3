"""Benchmark results made up for tests: every time in them is invented."""

from __future__ import annotations

from typing import Any

from resnet_triton.bench.results import Results, Row

CPU = {
    "device": "Synthetic CPU 9000", "device_kind": "cpu", "threads": 2, "clocks": "unknown", "driver": "none",
    "os": "Linux", "python": "3.11", "torch": "2.13.0", "triton": "3.7.1", "torchvision": "0.28.0", "cudnn": "none",
    "resnet_triton": "0.1.0", "commit": "0123456", "date": "2026-01-02T03:04:05+00:00",
}  # fmt: skip
GPU = {**CPU, "device": "Synthetic GPU", "device_kind": "cuda", "driver": "580.1", "clocks": "1980 MHz, locked"}

LAYERS = [f"layer{i}.{j}.conv{k}" for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)] + ["stem", "maxpool", "head"]


def row(alternative: str = "resnet_triton", batch: int = 1, ms: float = 1.0, **other: Any) -> Row:
    """A right row of the model suite whose samples are `ms` less a tenth, `ms`, and `ms` and a fifth."""
    base: dict[str, Any] = {
        "suite": "model", "model": "resnet18", "layer": None, "image": 224,
        "ours": alternative.startswith("resnet_triton"), "dtype": "float32", "clock": "wall",
        "l2": "uncontrolled", "environment": CPU, "correct": True, "error_before": 1e-6, "error_after": 1e-6,
        "error_limit": 1e-4, "samples_s": [0.9e-3 * ms, 1e-3 * ms, 1.2e-3 * ms], "p20_s": 0.9e-3 * ms,
        "p50_s": 1e-3 * ms, "p80_s": 1.2e-3 * ms,
    }  # fmt: skip
    return Row(**{**base, "alternative": alternative, "batch": batch, **other})


def failed(alternative: str, batch: int, reason: str, **other: Any) -> Row:
    """A row without times."""
    nothing = dict.fromkeys(("p20_s", "p50_s", "p80_s", "correct", "error_before", "error_after", "error_limit"))
    return row(alternative, batch, samples_s=[], failure=reason, **{**nothing, **other})


def ceilings(dtype: str, bytes_per_s: float, flops_per_s: float) -> list[dict[str, Any]]:
    return [
        {"name": "copy", "bytes_per_s": bytes_per_s, "flops_per_s": None, "dtype": None},
        {"name": "matrix product", "bytes_per_s": None, "flops_per_s": flops_per_s, "dtype": dtype},
    ]


def layers(names: dict[str, float], batch: int, flops_per_s: float, **other: Any) -> list[Row]:
    """Kernel rows; `names` says what share of the ceiling each alternative reaches, about."""
    found = []
    for i, layer in enumerate(LAYERS):
        flops = 0 if layer == "maxpool" else batch * (230_000_000 if layer[:5] == "layer" else 118_000_000)
        size = other.get("size", 2)
        traffic = size * (batch * 401_408 // 2 ** (i // 4) + 36_864 * 4 ** (i // 4))
        if layer == "head":
            flops, traffic = batch * 1_024_000, size * (512_000 + batch * 25_000)
        least = max(flops / flops_per_s, traffic / (flops_per_s / 200))
        for j, (name, share) in enumerate(names.items()):
            ms = least / share * 1e3 * (1 + ((i * 7 + j * 5) % 11) / 12)
            rest = {key: value for key, value in other.items() if key != "size"}
            found.append(row(name, batch, ms, suite="kernel", layer=layer, flops=flops, bytes=traffic, **rest))
    return found


def cpu() -> Results:
    """Five alternatives at four batch sizes, and every layer."""
    names = {
        "resnet_triton": 1.0,
        "eager NCHW": 1.28,
        "eager channels_last": 1.07,
        "torch.compile": 1.12,
        "torch.compile max-autotune": 1.1,
    }
    rows = [
        row(
            name, batch, 25 * batch**0.87 * (factor if batch > 1 else 2.1 - factor),
            first_call_cold_s=0.3 if "compile" not in name else 24.0 if "max" in name else 8.1,
            first_call_warm_s=0.2 if "compile" not in name else 3.1,
        )
        for batch in (1, 4, 16, 32) for name, factor in names.items()
    ]  # fmt: skip
    rows += layers({"resnet_triton": 0.8, "eager channels_last": 0.7, "eager NCHW": 0.5}, 4, 1.2e11, size=4)
    return Results(rows, ceilings("float32", 1.9e10, 1.2e11), [prediction()])


def prediction(**other: Any) -> dict[str, Any]:
    return {
        "device": "sm_90", "batch": 1, "dtype": "float16", "layer": "stem", "kernel": "stem", "registers": 128,
        "shared_bytes": 65536, "spill_bytes": 0, "flops": 236_027_904, "bytes": 702_464, "floor_s": 3.1e-7,
        **other,
    }  # fmt: skip


MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def gpu() -> Results:
    """Twelve alternatives, nine batch sizes, three ways to time; slower than the best at the smallest and at 256."""
    names = {"resnet_triton": (0.062, 0.0068), "eager NCHW": (1.9, 0.0150), "eager channels_last": (1.85, 0.0112),
             "eager, batch norm folded": (1.2, 0.0098), "cudnn_convolution_relu + CUDA graph": (0.098, 0.0085),
             **{f"torch.compile {mode}": (0.1 + 0.11 * i, 0.0081 + 0.0004 * i) for i, mode in enumerate(MODES)},
             "torch.compile max-autotune, frozen": (0.092, 0.0080),
             "TensorRT 10.3": (0.055, 0.0072), "JAX/XLA": (0.21, 0.0094)}  # fmt: skip
    rows = []
    for clock, l2, more in (("wall", "uncontrolled", 0.012), ("gpu", "warm", 0.0), ("gpu", "cold", 0.004)):
        for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            for i, (name, (fixed, each)) in enumerate(names.items()):
                ms = more + fixed + each * batch * (1.13 if batch == 256 and i == 0 else 1)
                rows.append(row(name, batch, ms, clock=clock, l2=l2, dtype="float16", environment=GPU,
                                peak_bytes=(4 + i) * 3_000_000 * batch + 9_000_000,
                                first_call_cold_s=1.2 + 3 * i if batch == 1 else None,
                                first_call_warm_s=0.4 + 0.3 * i if batch == 1 else None))  # fmt: skip
    shares = {"resnet_triton": 0.72, "cuDNN": 0.62, "torch.compile max-autotune": 0.55}
    for batch in (1, 64):
        rows += layers(shares, batch, 7.9e14, clock="gpu", l2="cold", dtype="float16", environment=GPU)
    return Results(rows, ceilings("float16", 4.1e12, 7.9e14), [prediction()])


NASTY = '<b>&"evil\x1b[31m|\n$x^2$`*</b>'


def wrong() -> Results:
    """Ours wrong at batch 4, an alternative wrong at batch 1 although fastest, failures, names to be escaped."""
    return Results([
        row("resnet_triton", 1, 2.0), row("eager", 1, 3.0), row("compiled", 1, 0.5, correct=False, error_after=0.25),
        row("resnet_triton", 4, 2.0, correct=False, error_before=None), row("eager", 4, 9.0),
        failed("resnet_triton", 8, "CUDA out of memory"), row("eager", 8, 12.0),
        row("resnet_triton", 16, 5.0), failed(NASTY, 16, NASTY),
        row("resnet_triton", 32, 9.0, peak_bytes=0), row(NASTY, 32, 8.0),
        row("resnet_triton", 64, 20.0), row("eager", 64, 19.0, correct=None),
    ])  # fmt: skip
