"""`resnet-triton report`: the kernels that each layer of a model gets, on this GPU or on one that need not be here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import config, models
from ..bench.cases import MODELS
from ..codegen.rows import DTYPES
from ..config.device import DeviceFacts
from ..config.targets import target
from ..ops import gluon
from ..ops.precision import fp32_precision
from ..ops.trace import Call, trace
from ..support.names import check_known
from ..support.terminal import table

Json = dict[str, Any]


def run(arch: str | None, names: Sequence[str], batches: Sequence[int], dtypes: Sequence[str]) -> Json:
    """What `show` prints, as plain data: a row for each layer, batch size and dtype. Nothing is compiled.

    Without `arch`, for this machine's GPU, or for sm_90 if it has none. ValueError names what is unknown.
    """
    check_known("model", names, MODELS)
    check_known("dtype", dtypes, DTYPES)
    facts = _facts(arch)
    rows = []
    for name in names:
        model = getattr(models, name)().eval()
        for dtype in dtypes:
            torch_dtype, precision = DTYPES[dtype]
            with fp32_precision(precision):
                for batch in batches:
                    calls = trace(model, (batch, 3, 224, 224), torch_dtype)
                    about = {"model": name, "dtype": dtype, "batch": batch}
                    rows += [{**about, **_row(call, facts)} for call in calls if call.operation is not None]
    return {
        "gpu": facts.name, "capability": f"{facts.arch / 10}", "sms": facts.sm_count, "rows": rows,
        "untuned": config.untuned(facts),
    }  # fmt: skip


def _facts(arch: str | None) -> DeviceFacts:
    if arch is None and torch.cuda.is_available():
        return gluon.facts(torch.device("cuda"))
    return target(arch or "sm_90").facts


def _row(call: Call, facts: DeviceFacts) -> Json:
    row: Json = {
        "layer": call.name, "operator": call.operator, "tile": "", "split_k": 1,
        "kernels": call.kernels(facts), "programs": [launch.grid[0] for launch in call.launches(facts)],
    }  # fmt: skip
    if (tile := call.tile(facts)) is not None:
        timed = call.tiled and config.timed(call.shape, facts)
        row |= {"tile": f"{tile.block_m}x{tile.block_k}", "split_k": tile.split_k, "timed": timed}
    return row


def show(found: Json) -> None:
    """Print a table for each model and dtype, with a column for each batch size."""
    tables: dict[tuple[str, str], dict[tuple[str, str], Json]] = {}
    for row in found["rows"]:
        layers = tables.setdefault((row["model"], row["dtype"]), {})
        layers.setdefault((row["layer"], row["operator"]), {})[row["batch"]] = _cell(row)
    where = f"{found['gpu']}, {found['sms']} SMs"
    for (model, dtype), layers in tables.items():
        batches = list(next(iter(layers.values())))
        columns = ["layer", "operator", *(f"batch {batch}" for batch in batches)]
        rows = [(*names, *(cells[batch] for batch in batches)) for names, cells in layers.items()]
        table(f"{model}, {dtype}, on {where}", columns, rows)
    print("A tile is pixels x filters / programs that share it.")
    print(found["untuned"] or _timed(found))


def _timed(found: Json) -> str:
    timed = [row["timed"] for row in found["rows"] if row["tile"]]
    return f"{sum(timed)} of these {len(timed)} tiles were timed on {found['gpu']}; a cost model chose the others."


def _cell(row: Json) -> str:
    shared = f"/{row['split_k']}" if row["split_k"] > 1 else ""
    return f"{' + '.join(row['kernels'])} {row['tile']}{shared}".rstrip()
