"""Run the gates one after another; a gate that fails stops no other."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from .gates import ROOT, Gate, Settings

FILE = "verify.json"


def seed_of_the_day() -> int:
    return int(time.time())


def run(gates: list[Gate], settings: Settings, records: Path) -> list[str]:
    """Run them and leave records in this folder, in place of those that were there; the names of those that failed."""
    shutil.rmtree(records, ignore_errors=True)
    records.mkdir(parents=True)
    done: list[dict[str, Any]] = []
    found = {"environment": environment(), "settings": settings._asdict(), "gates": done}
    for gate in gates:
        shown = gate.command(settings)
        print("==", *shown, flush=True)
        start = time.monotonic()
        command = [*gate.command(settings, str(records.resolve())), "--no-print-directory"]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        seconds = time.monotonic() - start
        print(f"== make {gate.name}: {'passed' if status == 0 else 'FAILED'} after {seconds:.0f} s", flush=True)
        done.append({"gate": gate.name, "command": shown, "status": status, "seconds": round(seconds, 1)})
        (records / FILE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return [each["gate"] for each in done if each["status"] != 0]


def environment() -> dict[str, Any]:
    """Where, when and with what; no name or path of the machine."""
    import torch

    from resnet_triton.bench.environment import environment
    from resnet_triton.support.processes import cores

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = {name: metadata.version(name) for name in ("numpy", "pytest", "hypothesis")}
    cpu = environment(torch.device("cpu"))["device"]
    return {**environment(device), **versions, "machine": platform.machine(), "cpu": cpu, "cores": cores()}
