"""The report's tables, each from one kind of record; where there is none, a line says so."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import contract as the_contract
from robustness import ROBUST
from sums import CUTS, LAM

from .gates import GATES, ROOT
from .markdown import bullets, number, table
from .records import Records

HEADROOM = ROOT / "tests" / "headroom.json"
RESULTS = ROOT / "benchmarks" / "results"
VERDICTS = ("killed", "survived", "equivalent", "speed")
NOT_RUN = "Not run."
PLANTED = "test_planted::test_a_planted_fault_is_caught"


def planted(records: Records) -> str:
    """From `test_planted.py`."""
    tests = [case for case in records.tests("slow") if case.name.startswith(PLANTED)]
    if not tests:
        return NOT_RUN
    missed = [case.name for case in tests if case.verdict != "passed"]
    text = (
        "`tests/reliability/planted.py` lists faults and the test that has to catch each. The fault is planted in the "
        "source; the test has to fail with the fault's message, and to pass without the fault. "
        f"{len(tests) - len(missed)} of {len(tests)} were caught."
    )
    return "\n\n".join(filter(None, (text, bullets(*(f"**Not caught**: {name}" for name in missed)))))


def mutants(records: Records) -> str:
    """From `make mutate`."""
    if not (found := records.json("mutate.json")):
        return NOT_RUN
    count = Counter(mutant["verdict"] for mutant in found["mutants"])
    row = (*(count[verdict] for verdict in VERDICTS), count.total(), f"{sum(found['files'].values()):,}")
    survivors = [
        f"Survived: `{m['file']}:{m['line']}` `{m['before']}` became `{m['after']}`."
        for m in found["mutants"]
        if m["verdict"] == "survived"
    ]
    intro = (
        "A random sample of small faults in kernels and launchers (a `<=` for a `<`, a dropped mask or cast, rows for "
        "columns). An equivalent mutant computes the same; one of speed does, too, but takes another time. "
        "`tests/reliability/equivalent.toml` gives the reason for each; these mutants were "
        + ("run, too." if found["verify"] else "not run.")
    )
    return "\n\n".join(filter(None, (intro, table((*VERDICTS, "judged", "of"), [row]), bullets(*survivors))))


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
        f"On `{where}`, {entry['cases']} calls of each kind of data (seed {entry['seed']}): how much of its error "
        "bound an element needed at most, beyond the rounding of the result, and with which data. 1 is a random walk "
        "of one fp32 rounding for each product of the sum; with TF32, one cut of each operand. The tests allow "
        f"the kernels {LAM:g}, and {CUTS:g} with TF32. Path `torch` is PyTorch's own."
    )
    cells = [(*key, *(values.get(column, "–") for column in columns)) for key, values in rows.items()]
    return f"{intro}\n\n{table(('operator, path', 'shapes', *columns), cells)}"


def _numbers(row: dict[str, str]) -> str:
    return "TF32" if row["precision"] == "tf32" else row["dtype"]


def contract(records: Records) -> str:
    """From the contract's own rows, and from what their tests say that they checked."""
    deviating = [row for row in the_contract.ROWS if row.because]
    deviations: dict[tuple[str, str, str], list[str]] = {}
    for row in deviating:
        key = f"{row.case}: {row.promise}", row.expectation, row.because
        deviations.setdefault(key, []).append(f"`{row.subject}`")
    rows = [(name, what, ", ".join(subjects), why) for (name, what, why), subjects in deviations.items()]
    parts = (
        f"{len(the_contract.CASES)} edge cases in {len(the_contract.ROWS)} rows. {_checks(records)}"
        f"{_ran(records, 'test_contract')}",
        f"The answer differs from PyTorch's on purpose in {len(deviating)} rows:",
        table(("case", "what happens", "for", "because"), rows),
    )
    return "\n\n".join(parts)


def _checks(records: Records) -> str:
    """How many ran, on which path; a row's test ends with its path and names the dtypes that it took."""
    ran: Counter[str] = Counter()
    for case in records.tests("test"):
        if case.verdict != "skipped" and "dtypes" in case.properties:
            ran[case.name.rpartition(": ")[2].removesuffix("]")] += len(case.properties["dtypes"].split())
    if not ran:
        return ""
    declared = sum(len(the_contract.ways(row)) * len(row.dtypes) for row in the_contract.ROWS)
    ways = ", ".join(f"{way} {number(count)}" for way, count in ran.most_common())
    turns = "Without a GPU, each row tries one of its dtypes on each path of the kernels. "
    return (
        f"A check is a row on one path in one dtype: {number(ran.total())} of the {number(declared)} that the table "
        f"declares ran ({ways}). {'' if records.on_gpu else turns}"
    )


def robustness(records: Records) -> str:
    """From the table of what goes wrong outside, and what became of its tests."""
    intro = "`tests/robustness.py` names the test of each row."
    rows = [(row.trouble, row.outcome) for row in ROBUST]
    return f"{intro} {_ran(records, 'test_robust')}\n\n{table(('trouble', 'outcome'), rows)}"


def _ran(records: Records, files: str) -> str:
    cases = [case for case in records.tests("test") if case.name.startswith(files)]
    if not cases:
        return "Tests: not run."
    ran = Counter(case.verdict for case in cases)
    why = Counter(case.reason for case in cases if case.verdict == "skipped").most_common()
    reasons = f" ({'; '.join(f'{count} {reason}' for reason, count in why)})" if why else ""
    return f"Tests: {ran['passed']:,} passed, {ran['failed']} failed, {ran['skipped']} were skipped{reasons}."


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
    headings = ("for", "launches compiled", "configurations", "launches that spill", "with faults", "runs recorded")
    gates = [gate.name for gate in GATES if gate.name.startswith("codegen")]
    versions = [("for this table", found["triton"])]
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
