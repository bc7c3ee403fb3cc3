"""The report's tables, each from one kind of record; where there is none, a line says so."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from .gates import GATES, ROOT
from .markdown import bullets, folded, number, table
from .records import Records

HEADROOM = ROOT / "tests" / "headroom.json"
RESULTS = ROOT / "benchmarks" / "results"
VERDICTS = ("killed", "survived", "equivalent", "speed")
NOT_RUN = "Not run."


def planted(records: Records) -> str:
    """From the properties of `test_planted.py`."""
    tests = [case for case in records.tests("slow") if case.name.startswith("test_planted::test_a_planted_fault")]
    if not tests:
        return NOT_RUN
    caught = [case.properties for case in tests if case.verdict == "passed"]
    missed = [case.name for case in tests if case.verdict != "passed"]
    rows = sorted((f"`{p['planted in']}`", p["fault"], f"`{p['caught by']}`") for p in caught)
    text = [
        f"Each fault is planted by an edit of the source, and the test named for it has to fail with the message that "
        f"belongs to it, and pass without: {len(caught)} of {len(tests)} were caught.",
        bullets(*(f"**Not caught**: {name}" for name in missed)),
        folded("every fault, and what caught it", table(("planted in", "fault", "caught by"), rows)),
    ]
    return "\n\n".join(filter(None, text))


def mutants(records: Records) -> str:
    """From `make mutate`."""
    if not (found := records.json("mutate.json")):
        return NOT_RUN
    counts: dict[str, Counter[str]] = {}
    for mutant in found["mutants"]:
        counts.setdefault(mutant["file"], Counter())[mutant["verdict"]] += 1
    counts = dict(sorted(counts.items()))
    total, existing = sum(counts.values(), Counter()), Counter(found["files"])
    rows = [
        (name, *(count[verdict] for verdict in VERDICTS), count.total(), f"{of:,}")
        for name, count, of in (
            *((f"`{name}`", count, existing[name]) for name, count in counts.items()),
            ("all", total, existing.total()),
        )
    ]
    survivors = [
        f"Survived: `{m['file']}:{m['line']}` `{m['before']}` became `{m['after']}`."
        for m in found["mutants"]
        if m["verdict"] == "survived"
    ]
    intro = (
        "A random sample of all small faults (a `<=` for a `<`, a dropped mask or cast, rows for columns). Equivalent "
        "ones compute the same, those of speed the same at another time: `tests/mutation/equivalent.toml` has the "
        "reasons" + (", and they were run, too." if found["verify"] else "; they were not run.")
    )
    headings = ("file", *VERDICTS, "judged", "of")
    return "\n\n".join(filter(None, (intro, table(headings, rows), bullets(*survivors))))


def headroom(records: Records) -> str:
    """From `tests/headroom.json`: not from a gate, but a gate holds fresh calls to it."""
    try:
        entries = json.loads(HEADROOM.read_text(encoding="utf-8"))
    except OSError:
        return "Not measured."
    return "\n\n".join(_headroom(where, entry) for where, entry in entries.items())


def _headroom(where: str, entry: dict[str, Any]) -> str:
    columns = list(dict.fromkeys(_numbers(row) for row in entry["rows"]))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row in entry["rows"]:
        data, most = max(row["needed"].items(), key=lambda item: item[1])
        key = f"`{row['operator']}`, {row['path']}", row["shapes"]
        rows.setdefault(key, {})[_numbers(row)] = f"{most:.2g} ({data})"
    intro = (
        f"On `{where}`, {entry['cases']} calls of each kind of data (seed {entry['seed']}): the largest part of an "
        "element's error bound that was needed beyond the rounding of the result. 1 is a random walk of one fp32 "
        "rounding for each product of the sum; with TF32, one cut of each operand. Path `torch` is PyTorch's."
    )
    cells = [(*key, *(values.get(column, "–") for column in columns)) for key, values in rows.items()]
    return f"{intro}\n\n{table(('operator, path', 'shapes', *columns), cells)}"


def _numbers(row: dict[str, str]) -> str:
    return "TF32" if row["precision"] == "tf32" else row["dtype"]


def contract(records: Records) -> str:
    """From the contract's own rows and what became of their tests."""
    if (summary := _summary("contract")) is None:
        return "There is no table yet."
    of = Counter(row["operator"] for row in summary["rows"])
    deviations: dict[tuple[str, str, str], list[str]] = {}
    for row in summary["deviations"]:
        deviations.setdefault((row["name"], row["expectation"], row["because"]), []).append(f"`{row['operator']}`")
    rows = [(*key[:2], ", ".join(operators), key[2]) for key, operators in deviations.items()]
    text = [
        f"{summary['cases']} edge cases in {len(summary['rows'])} rows, each on every path and dtype that it is for: "
        f"{number(summary['checks'])} checks. {_ran(records, 'test_contract')}",
        "Rows: " + ", ".join(f"`{name}` {count}" for name, count in of.items()) + ".",
        f"Where the answer is on purpose not PyTorch's ({len(summary['deviations'])} rows):" if rows else "",
        table(("case", "what happens", "for", "because"), rows) if rows else "",
    ]
    return "\n\n".join(filter(None, text))


def robustness(records: Records) -> str:
    """From the table of what goes wrong outside, and what became of its tests."""
    rows = (_summary("robustness") or {}).get("rows")
    found = table(list(rows[0]), [list(row.values()) for row in rows]) if rows else "There is no table yet."
    return f"{found}\n\n{_ran(records, 'test_robust')}"


def _ran(records: Records, files: str) -> str:
    ran = Counter(case.verdict for case in records.tests("test") if case.name.startswith(files))
    result = f"{ran['passed']:,} passed, {ran['failed']} failed, {ran['skipped']} were skipped" if ran else "not run"
    return f"Tests: {result}."


def _summary(module: str) -> dict[str, Any] | None:
    """A table of the tests as plain data."""
    try:
        return importlib.import_module(module).summary()
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None


def compiled(records: Records) -> str:
    """What has been compiled for which GPU, against what has run there."""
    from resnet_triton.codegen import target

    found = json.loads((RESULTS / "codegen.json").read_text(encoding="utf-8"))
    ran = runs(RESULTS)
    rows = []
    for entry in found["targets"]:
        name = target(entry["arch"]).facts.name
        counts = (entry[key] for key in ("launches", "configurations", "spill", "faulty"))
        run = sum(count for device, count in ran.items() if name in device)
        rows.append((f"{entry['arch']}, {name}", *counts, run or "none"))
    headings = ("for", "launches compiled", "configurations", "of the launches spill", "have faults", "runs recorded")
    gates = [gate.name for gate in GATES if gate.name.startswith("codegen")]
    versions = [("the table above", found["triton"])]
    versions += [(f"`make {gate}`", records.json(f"{gate}/codegen.json").get("triton", "not run")) for gate in gates]
    compilers = ", ".join(f"{where} {version}" for where, version in versions)
    gpus = ", ".join(f"{device} ({count} rows)" for device, count in ran.items()) or "none"
    run_on = f"**GPUs that any result in `benchmarks/results` comes from: {gpus}.**"
    return f"{table(headings, rows)}\n\nTriton: {compilers}.\n\n{run_on}"


def runs(folder: Path) -> Counter[str]:
    """Right answers of our kernels in the results of a folder, by the GPU that they ran on."""
    from resnet_triton.bench import results

    found: Counter[str] = Counter()
    for path in sorted(folder.glob("**/*.json")):
        try:
            rows = results.load(path).rows
        except ValueError:  # codegen.json, say
            continue
        for row in rows:
            if row.ours and row.correct and row.environment["device_kind"] == "cuda":
                found[row.environment["device"]] += 1
    return found
