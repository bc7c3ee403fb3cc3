"""ResNet-18, ours against torchvision's: `python -m benchmarks.model [--batches 1,16] [--rounds 15] [--json]`.

All alternatives take turns in one process on the same random images in NCHW memory, as a caller holds them. Answers are
compared before anything is timed, and nothing is printed if they differ. Medians of wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from typing import Any

import torch

import resnet_triton
from resnet_triton import timing, vision

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2}


def compare(batch: int, rounds: int, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row per alternative: median and 20th/80th percentile in ms, images/s and speed-up over torchvision eager."""
    torch.manual_seed(0)
    eager = vision.torchvision().models.resnet18().eval().to(device, dtype)
    channels_last = vision.torchvision().models.resnet18().eval().to(device, dtype)
    channels_last.load_state_dict(eager.state_dict())
    channels_last = channels_last.to(memory_format=torch.channels_last)
    ours = resnet_triton.resnet18().eval().to(device, dtype)
    ours.load_state_dict(eager.state_dict())
    images = torch.rand(batch, 3, 224, 224, dtype=dtype, device=device)
    alternatives = {
        "torchvision eager": lambda: eager(images),
        "torchvision channels_last": lambda: channels_last(images.contiguous(memory_format=torch.channels_last)),
        "resnet_triton": lambda: ours(images),
    }
    with torch.inference_mode():
        expected = alternatives["torchvision eager"]()
        for name, call in alternatives.items():
            if (error := (call() - expected).abs().max().item()) > TOLERANCE[dtype]:
                raise SystemExit(f"{name} differs from torchvision by {error:.2g} at batch {batch}; not timed")
        samples = timing.interleaved(alternatives, rounds=rounds)
    base = timing.spread(samples["torchvision eager"]).p50
    return [_row(name, batch, seconds, base) for name, seconds in samples.items()]


def _row(name: str, batch: int, seconds: list[float], base: float) -> dict[str, Any]:
    p20, p50, p80 = (float(torch.quantile(torch.tensor(seconds), q)) for q in (0.2, 0.5, 0.8))
    return {
        "alternative": name, "batch": batch, "ms": p50 * 1e3, "p20_ms": p20 * 1e3, "p80_ms": p80 * 1e3,
        "images_per_s": batch / p50, "speedup": base / p50,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Time every batch size and print a table, or one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__)
    parser.add_argument("--batches", default="1,16", help="batch sizes, comma-separated")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each alternative")
    parser.add_argument("--dtype", choices=["float32", "float16"], help="default: float16 on a GPU, float32 on a CPU")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype or ("float16" if device.type == "cuda" else "float32"))
    rows = []
    for batch in map(int, arguments.batches.split(",")):
        print(f"batch {batch} ...", file=sys.stderr)
        rows += compare(batch, arguments.rounds, device, dtype)
    where = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(), "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__,
    }  # fmt: skip
    if arguments.json:
        print(json.dumps({**where, "rows": rows}, indent=1))
        return 0
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(f"{'batch':>5}  {'':26}{'ms':>8}{'p20':>8}{'p80':>8}{'images/s':>10}{'speed-up':>10}")
    for row in rows:
        numbers = f"{row['ms']:8.1f}{row['p20_ms']:8.1f}{row['p80_ms']:8.1f}{row['images_per_s']:10.1f}"
        print(f"{row['batch']:5}  {row['alternative']:26}{numbers}{row['speedup']:9.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
