"""Measure how much of the error bound of `sums.py` every operator needs, and keep it in `headroom.json`.

    PYTHONPATH=. python tests/headroom.py

runs each operator, dtype and path on random calls of every kind of data, on the GPU if there is one, else interpreted,
and replaces that device's entry. `needed` is the largest `lam` of all calls, by kind of data; `bound` is the most that
may be needed (null: PyTorch rounds as it likes). With TF32 both are numbers of `cuts`; the interpreter does not know
TF32, so there the factors are cut for it. `test_accuracy.py` holds fresh calls to the bound and to these figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported

import real_cases  # noqa: E402
import roundings  # noqa: E402
import sums  # noqa: E402
from exact import DTYPES, dtype_id  # noqa: E402
from real_cases import Series  # noqa: E402

from resnet_triton.config.device import facts  # noqa: E402

FILE = Path(__file__).with_name("headroom.json")
TF32 = (torch.float32, "tf32")

ROWS = [
    *(Series("conv_bn_relu", "descriptor", *number) for number in ((torch.float16,), (torch.bfloat16,), TF32)),
    *(
        Series(operator, "pointer", *number)
        for operator in ("conv_bn_relu", "linear")
        for number in (*((dtype,) for dtype in DTYPES), TF32)
    ),
    *(Series("conv_bn_relu", "pointer", dtype, shapes=real_cases.EIGHT_CHANNELS) for dtype in DTYPES),
    *(
        Series("conv_bn_relu", "pointer", *number, shapes=real_cases.GROUPS_OF_4)
        for number in (*((dtype,) for dtype in DTYPES), TF32)
    ),
    *(Series("stem", "descriptor", dtype) for dtype in DTYPES[1:]),
    *(
        Series(operator, "pointer", dtype)
        for operator in ("avg_pool_linear", "global_avg_pool", "add_relu")
        for dtype in DTYPES
    ),
    *(Series(operator, "torch", dtype) for operator in real_cases.MAKERS for dtype in DTYPES),
]


def rows(device: torch.device) -> list[Series]:
    """Those that this device can run."""
    return [row for row in ROWS if row.path != "descriptor" or facts(device).has_descriptors]


def entry_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreted"


def needed(row: Series, data: str, seed: int, device: torch.device) -> float:
    """What one call needs."""
    case = real_cases.case(row, data, seed, device)
    emulated = row.precision == "tf32" and device.type == "cpu"
    with roundings.rounding("create_dot", roundings.as_tf32) if emulated else contextlib.nullcontext():
        y = case.run()
    return sums.OF[row.operator](case.call).needed(y, row.precision)


def limit(row: Series, device: torch.device) -> float | None:
    """The most that the row may need; None where PyTorch rounds as it likes."""
    if row.path == "torch":  # in 16 bits, convolution and batch norm round by themselves
        return 2 * sums.LAM if row.dtype == torch.float32 and device.type == "cpu" else None
    if row.precision == "tf32":
        return sums.CUTS
    return sums.LAM if device.type == "cpu" else 4 * sums.LAM  # NumPy's summation is known; a tensor core's is not


def record(row: Series) -> dict[str, str]:
    """The row as it stands in the file."""
    return {**row._asdict(), "dtype": dtype_id(row.dtype)}


def committed(device: torch.device) -> dict[str, Any] | None:
    """This device's entry."""
    return json.loads(FILE.read_text(encoding="utf-8")).get(entry_name(device)) if FILE.exists() else None


def measure(device: torch.device, cases: int, seed: int) -> dict[str, Any]:
    import numpy
    import triton

    measured = []
    for row in rows(device):
        most = {data: max(needed(row, data, seed + i, device) for i in range(cases)) for data in real_cases.DATA}
        print(f"{row!s:40}", *(f"{value:9.3g}" for value in most.values()), file=sys.stderr, flush=True)
        needs = {data: float(f"{value:.3g}") for data, value in most.items()}
        measured.append({**record(row), "bound": limit(row, device), "needed": needs})
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
                "numpy": numpy.__version__}  # fmt: skip
    cpu = torch.backends.cpu.get_cpu_capability()
    return {"versions": versions, "cpu": cpu, "cases": cases, "seed": seed, "rows": measured}


def write(entries: dict[str, Any]) -> None:
    """JSON with a line for each row."""
    texts = []
    for name, entry in entries.items():
        *about, rows = entry.items()
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows[1])
        texts.append(f' {json.dumps(name)}: {{{json.dumps(dict(about))[1:-1]}, "rows": [\n{lines}\n ]}}')
    FILE.write_text("{\n" + ",\n".join(texts) + "\n}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="measure how much of the error bound is needed")
    parser.add_argument("--cases", type=int, default=40, help="calls of each row and kind of data")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the next ones follow")
    options = parser.parse_args()
    device = torch.device("cuda" if HAS_GPU else "cpu")
    print(" " * 40, *(f"{data[:9]:>9}" for data in real_cases.DATA), file=sys.stderr)
    entries = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    entries[entry_name(device)] = measure(device, options.cases, options.seed)
    write(entries)


if __name__ == "__main__":
    main()
