"""The report: what ran, what it found, and what nobody has tested."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from resnet_triton.codegen.budget import HELD

from . import tables
from .gates import GATES, USUAL, Settings
from .markdown import bullets, number, table
from .records import Records

UNTESTED = Path(__file__).with_name("untested.md")
"""By hand: what needs a GPU, an empty line, and what nobody tests anywhere."""
WRONG = Path(__file__).with_name("wrong.md")
"""By hand: wrong answers that these checks had let through, and which of them would find them now."""
PYTEST = [gate.name for gate in GATES if "--junitxml" in gate.record]

SECTIONS: dict[str, Callable[[Records], str]] = {
    "Planted faults": tables.planted,
    "Mutants": tables.mutants,
    "Headroom": tables.headroom,
    "Contract with PyTorch": tables.contract,
    "Robustness": tables.robustness,
    "Compiled, and run": tables.compiled,
}


def report(folder: Path) -> str:
    """As Markdown, from the records in this folder."""
    records = Records(folder)
    parts = [
        "# Reliability",
        "Written by `make verify` from what ran; `make reliability` writes it again from the same records.",
        _environment(records),
        "## Wrong answers that the tests let through",
        WRONG.read_text(encoding="utf-8").strip(),
        "## Not tested",
        _untested(records),
        "## Gates",
        _gates(records),
        _reported(records),
        _settings(records),
    ]
    for title, section in SECTIONS.items():
        parts += [f"## {title}", section(records)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _environment(records: Records) -> str:
    if not (found := records.run.get("environment")):
        return "**`make verify` has not run here.**"
    gpu = f"on {found['device']} (driver {found['driver']})"
    where = gpu if records.on_gpu else "in Triton's interpreter; no GPU was there"
    names = ("python", "torch", "triton", "torchvision", "numpy", "pytest", "hypothesis")
    commit = found["commit"].removesuffix("+")
    dirty = ", with changes that are not committed" if found["commit"].endswith("+") else ""
    return bullets(
        f"Kernels ran **{where}**.",
        f"Commit `{commit[:12]}`{dirty}, {found['date'][:10]}.",
        f"{found['cpu']}, {found['cores']} cores, {found['os'].split()[0]} {found['machine']}.",
        ", ".join(f"{name} {found[name]}" for name in names) + ".",
    )


def _gates(records: Records) -> str:
    rows = []
    for gate in GATES:
        o = records.outcome(gate)
        verdict = o.verdict if o.verdict == "passed" else f"**{o.verdict}**"
        seconds = number(None if o.seconds is None else round(o.seconds))
        numbers = (number(o.cases), number(o.mismatches), seconds, o.seed or "–")
        rows.append((f"`{o.command}`", gate.proves, verdict, *numbers))
    return table(("command", "proves", "result", "cases", "mismatches", "seconds", "seed"), rows)


def _reported(records: Records) -> str:
    """Faults in machine code that fail no gate."""
    lines = []
    for gate in GATES:
        targets = records.json(f"{gate.name}/codegen.json").get("targets", [])
        found = [(t["arch"], fault, n) for t in targets if t["arch"] not in HELD for fault, n in t["faults"].items()]
        lines += [f"`make {gate.name}`, {arch}: {fault} in {n} launches." for arch, fault, n in found]
    title = f"Reported, and no failure, because only {' and '.join(HELD)} are held to a budget:"
    return f"{title}\n\n{bullets(*lines)}" if lines else ""


def _settings(records: Records) -> str:
    """What was less than `make verify` has by itself."""
    settings = Settings(**records.run.get("settings", {}))
    less = [
        f"{name.replace('_', ' ')}: {getattr(settings, name)} instead of {getattr(USUAL, name)}"
        for name in ("fuzz_cases", "mutants")
        if getattr(settings, name) < getattr(USUAL, name)
    ]
    less += [f"tests: {settings.tests} instead of all"] * (settings.tests != USUAL.tests)
    return f"**Less than the usual settings**: {'; '.join(less)}." if less else ""


def _untested(records: Records) -> str:
    found = [(gate, records.outcome(gate).verdict) for gate in GATES]
    gates = [f"`make {gate.name}`: {verdict}." for gate, verdict in found if verdict != "passed"]
    skipped = Counter(
        (gate, case.reason) for gate in PYTEST for case in records.tests(gate) if case.verdict == "skipped"
    )
    skips = [f"{n} of `make {gate}`: skipped, {reason}." for (gate, reason), n in skipped.most_common()]
    no_gpu, anywhere = UNTESTED.read_text(encoding="utf-8").strip().split("\n\n")
    return "\n".join(filter(None, (bullets(*gates), "" if records.on_gpu else no_gpu, anywhere, bullets(*skips))))
