"""Fit the rates of `config/estimate.py` to what was timed on an H200: `python -m benchmarks.fit_estimate`.

Rows are the exact, safe forms of `results/h200-2026-11-27.json` that do not spill, and prototypes of the
warp-specialised kernels, timed on the same day and GPU. It prints the rates. Then, for each layer at each batch size,
it fits rates to all other layers, and prints the error of the times that they give (root mean square of the logarithm)
and the form chosen.

The file says with which versions, when, at which commit, and for each shape what was timed: L2-cold, L2-warm for one
image. A form is safe unless the code it was timed with has since been replaced: boxes with several sides, whose
products then read registers that were being overwritten. Other boxes load their filters through a descriptor with its
dimensions in another order now; nothing else of them has changed.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resnet_triton.config import ConvConfig, ConvShape
from resnet_triton.config.estimate import LATENCIES, RATES, Rates, estimate
from resnet_triton.config.targets import KNOWN

H200 = KNOWN[90]
FORMS = Path(__file__).parent / "results" / "h200-2026-11-27.json"


class Row(NamedTuple):
    """One timed form of one layer."""

    layer: str
    shape: ConvShape
    config: ConvConfig
    us: float

    def error(self, rates: Rates) -> float:
        """Logarithm of estimated by measured, all as ordinary launches."""
        ordinary = LATENCIES._replace(launch_ns=rates.launch_ns)
        return math.log(estimate(self.config, self.shape, H200, rates, ordinary) / 1000 / self.us)


def _prototypes() -> list[Row]:
    """Batch 256, fp16: microseconds without and with a residual (H200, driver 580.159.04, Triton 3.6.0, 2026-11-27).

    All are cooperative; ping-pong was not timed.
    """
    layers = {
        "layer1": ConvShape(256, 64, 56, 56, 64, 3, 3, padding=(1, 1)),
        "layer2.0": ConvShape(256, 64, 56, 56, 128, 3, 3, (2, 2), (1, 1)),
        "layer2": ConvShape(256, 128, 28, 28, 128, 3, 3, padding=(1, 1)),
        "layer3.0": ConvShape(256, 128, 28, 28, 256, 3, 3, (2, 2), (1, 1)),
        "layer3": ConvShape(256, 256, 14, 14, 256, 3, 3, padding=(1, 1)),
        "layer4.0": ConvShape(256, 256, 14, 14, 512, 3, 3, (2, 2), (1, 1)),
        "layer4": ConvShape(256, 512, 7, 7, 512, 3, 3, padding=(1, 1)),
    }
    small, large = (
        ConvConfig(128, 128, 64, 4, 5, (1, 1, 128), kernel="hopper_conv"),
        ConvConfig(256, 128, 64, 4, 3, (1, 1, 256), kernel="hopper_conv"),
    )
    narrow, few = replace(large, block_k=64, num_stages=4), replace(small, block_k=64, num_stages=6)
    wide = replace(small, block_k=256, num_stages=3)
    times: dict[str, dict[ConvConfig, tuple[float, ...]]] = {
        "layer1": {narrow: (128.1, 145.6), few: (128.8, 150.9)},
        "layer2.0": {large: (64.7,), small: (57.6,)},
        "layer2": {large: (96.0, 103.0), small: (92.7, 102.2)},
        "layer3.0": {large: (51.0,), wide: (49.2,), small: (48.5,)},
        "layer3": {large: (84.6, 89.5), wide: (82.1, 91.9), small: (83.9, 89.6)},
        "layer4.0": {large: (56.7,), wide: (53.1,), small: (43.1,)},
        "layer4": {large: (100.6, 103.5), wide: (96.3, 103.9), small: (79.0, 90.0)},
    }
    return [
        Row(layer, replace(layers[layer], residual=bool(i)), config, us)
        for layer, forms in times.items()
        for config, both in forms.items()
        for i, us in enumerate(both)
    ]


def rows() -> list[Row]:
    """All that is fitted to."""
    found = []
    data = json.loads(FORMS.read_text(encoding="utf-8"))
    for layer in data["layers"]:
        shape = ConvShape(**_with_tuples(layer["shape"]))
        for values in layer["forms"]:
            form = _with_tuples(dict(zip(data["columns"], values, strict=True)))
            us, exact, safe, spill_bytes = (form.pop(name) for name in ("us", "exact", "safe", "spill_bytes"))
            if exact and safe and not spill_bytes:
                name = f"{shape.c} to {shape.k}, {shape.h}x{shape.w}"
                found.append(Row(name, shape, ConvConfig(**form), us))
    return found + [row._replace(layer=f"{row.layer}, specialised") for row in _prototypes()]


def _with_tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}


def fit(found: list[Row], start: Rates = RATES) -> Rates:
    """The rates with the least error; large errors of single rows count less than squared."""
    from scipy.optimize import minimize

    def loss(logarithms: np.ndarray) -> float:
        rates = Rates(*(np.array(start) * np.exp(logarithms)))
        # Rates that no row depends on stay where they are.
        return float(np.mean([abs(row.error(rates)) ** 1.5 for row in found]) + 1e-3 * np.sum(logarithms**2))

    best = np.zeros(len(start))
    for _ in range(3):
        best = minimize(loss, best, method="Nelder-Mead", options={"maxfev": 1500, "xatol": 1e-3, "fatol": 1e-6}).x
    return Rates(*(float(rate) for rate in np.array(start) * np.exp(best)))


def main() -> None:
    """Print the rates and the errors."""
    found = rows()
    rates = fit(found)
    print({name: float(f"{rate:.3g}") for name, rate in rates._asdict().items()})
    print(
        "| layer left out | batch | forms | error | fastest, us | chosen, us |\n| --- | --- | --- | --- | --- | --- |"
    )
    for layer in dict.fromkeys(row.layer for row in found):
        others = fit([row for row in found if row.layer != layer], rates)
        for shape in dict.fromkeys(row.shape for row in found if row.layer == layer):
            forms = [row for row in found if (row.layer, row.shape) == (layer, shape)]
            error = math.sqrt(float(np.mean([row.error(others) ** 2 for row in forms])))
            fastest = min(row.us for row in forms)
            chosen = min(forms, key=lambda row: estimate(row.config, row.shape, H200, others)).us
            name = layer + ", residual" * shape.residual + ", shortcut" * bool(shape.shortcut_c)
            print(f"| {name} | {shape.n} | {len(forms)} | {error:.2f} | {fastest:.1f} | {chosen:.1f} |")


if __name__ == "__main__":
    main()
