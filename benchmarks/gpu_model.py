"""ResNet-18 as a whole, ours and PyTorch's in turns: the model suite's race, one step for each batch size."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import resnet_triton
from resnet_triton.bench import worker
from resnet_triton.bench.alternatives import Alternative, Model, alternatives
from resnet_triton.bench.model import Race
from resnet_triton.bench.worker import Spec
from resnet_triton.config import table

from .gpu_steps import Setting, Steps

SECONDS = 12.0  # of timing, for each batch size


def spec(setting: Setting, dtype: str) -> Spec:
    """The model; in a rehearsal its first stages only, on small images."""
    return Spec(dtype=dtype, device=str(setting.device), image=setting.image, tiny=setting.rehearse)


def network(setting: Setting) -> nn.Module:
    """The model of this setting, in fp32."""
    return worker.network(spec(setting, "float32"))


def steps(setting: Setting) -> Steps:
    """A step for each batch size. Its row holds the suite's rows."""
    dtype = setting.options["dtype"]
    with Race(spec(setting, dtype), list(_chosen(setting)), partial(print, flush=True)) as race:
        batches = setting.batches[:1] if setting.rehearse else setting.batches  # interpreted models take their time
        for i, batch in enumerate(batches):
            yield f"{dtype} {batch}", partial(_measure, race, batch, len(batches) - i, setting)


def _measure(race: Race, batch: int, shares: int, setting: Setting) -> dict[str, Any]:
    now = time.monotonic()
    deadline = now + max(setting.deadline - now, 0) / shares
    rows = race.measure(batch, 1 if setting.rehearse else SECONDS, deadline)
    return {"rows": [asdict(row) for row in rows]}


def _chosen(setting: Setting) -> Iterable[Alternative]:
    """The alternatives by name, ours with the tables of this folder if they are to be tuned."""
    known = alternatives(setting.device)
    for name in setting.options["alternatives"]:
        kind, _, rest = name.partition(" ")
        if kind == "ours":
            label = setting.options.get("label", "")
            build = partial(ours, str(setting.out) if setting.options.get("tuned") else None, rest, setting.rehearse)
            yield Alternative(name + label, build, ours=True, cold=True)
        elif not setting.rehearse:
            yield known[name]
        else:  # what a CPU has instead
            yield known["compile default" if kind == "compile" else "folded" if kind == "folded" else "eager"]


def ours(tables: str | None, how: str, interpret: bool, model: nn.Module, images: Tensor) -> Model:
    """Our model; in a rehearsal interpreted."""
    if tables is not None:
        table.FOLDER = Path(tables)
    graph, invariant = "graph" in how and not interpret, "invariant" in how
    return resnet_triton.optimize(model, kernels="triton", cuda_graph=graph, batch_invariant=invariant)
