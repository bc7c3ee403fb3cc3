"""The report says what ran: a failure as a failure, nothing of what did not run, and no name or path of the machine."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from contract.term import EVERY, Term
from reliability import gates, report, run, tables
from reliability.__main__ import main
from reliability.gates import GATES, Gate, Settings
from reliability.mutate import _parser
from synthetic_results import GPU, row

from resnet_triton.bench import results

MAKEFILE = """
FILE = $(patsubst --junitxml=%,%,$(filter --junitxml=%,$(ARGS)))
.PHONY: lint types fuzz slow
lint fuzz:
types:
	exit 3
fuzz:
	cp $(FUZZ_CASES)-$(FUZZ_SEED).xml $(FILE)
slow:
	cp $(notdir $(FILE)) $(FILE) && false
"""
FUZZ = """<testsuites><testsuite name="pytest" hostname="secret">
<testcase classname="tests.test_fuzz" name="a"><properties><property name="cases" value="4"/>
<property name="seed" value="3"/></properties></testcase>
<testcase classname="tests.test_fuzz" name="b"><properties><property name="cases" value="1200"/>
<property name="seed" value="3"/></properties><failure message="wrong">a traceback</failure></testcase>
<testcase classname="tests.test_fuzz" name="c"><skipped type="pytest.skip" message="no CUDA GPU here"/></testcase>
</testsuite></testsuites>"""
PLANTED = "test_planted::test_a_planted_fault_is_caught_by_its_test"
SLOW = """<testsuites><testsuite name="pytest">
<testcase classname="tests.tools.test_planted" name="test_a_planted_fault_has_its_place[one]"/>
<testcase classname="tests.tools.test_planted" name="test_a_planted_fault_is_caught_by_its_test[one]"/>
<testcase classname="tests.tools.test_planted" name="test_a_planted_fault_is_caught_by_its_test[two]">
<failure message="passes with the fault"/></testcase>
</testsuite></testsuites>"""

VERSIONS = {"numpy": "2", "pytest": "9", "hypothesis": "6"}
ENVIRONMENT = {**GPU, **VERSIONS, "cpu": "a CPU", "cores": 8, "machine": "x86_64"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose Makefile stands for ours."""
    (tmp_path / "Makefile").write_text(MAKEFILE)
    (tmp_path / "7-3.xml").write_text(FUZZ)
    (tmp_path / "slow.xml").write_text(SLOW)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    return tmp_path


def verify(folder: Path, *arguments: str) -> tuple[int, str]:
    out = folder / "docs" / "report.md"
    places = ["--records", str(folder / "records"), "--out", str(out)]
    return main([*places, *arguments]), out.read_text()


def row_of(text: str, target: str) -> list[str]:
    """The result and the numbers of a gate."""
    (line,) = (line for line in text.splitlines() if line.startswith((f"| `make {target}`", f"| `make {target} ")))
    return line.strip("| ").split(" | ")[2:]


def test_a_failed_gate_stops_no_other_and_shows(folder):
    status, text = verify(
        folder, "verify", "--only", "types", "lint", "slow", "fuzz", "--fuzz-cases", "7", "--seed", "3"
    )
    assert status == 1
    assert row_of(text, "lint")[0] == "passed"
    assert row_of(text, "types")[0] == "**FAILED**"
    assert row_of(text, "slow")[:3] == ["**FAILED**", "3", "1"]
    assert row_of(text, "test") == ["**not run**", "–", "–", "–", "–"]
    result, cases, mismatches, _, seed = row_of(text, "fuzz FUZZ_CASES=7 FUZZ_SEED=3")
    assert (result, cases, mismatches, seed) == ("passed", "1,204", "1", "3")
    for line in (
        "* `make types`: FAILED.", "* `make test`: not run.", "* 1 of `make fuzz`: skipped, no CUDA GPU here.",
        "**Less than the usual settings**: fuzz cases: 7 instead of 20000.", "1 of 2 were caught",
        f"* **Not caught**: {PLANTED}[two]",
    ):  # fmt: skip
        assert line in text
    for secret in (str(folder), str(gates.ROOT), "secret"):
        assert secret not in text
    assert verify(folder, "report") == (0, text), "the same records, the same report"
    status, text = verify(folder, "verify", "--only", "lint")
    assert status == 0
    assert row_of(text, "types")[0] == "**not run**"
    assert "were caught" not in text, "no record outlives the next run"


def test_without_records_nothing_has_run(tmp_path):
    text = report.report(tmp_path)
    assert "**`make verify` has not run here.**" in text
    assert re.findall("^## (.*)", text, re.M)[:3] == ["Wrong answers that the tests let through", "Not tested", "Gates"]
    assert all(row_of(text, gate.name)[0] == "**not run**" for gate in GATES)
    (tmp_path / "verify.json").write_text('{"gates": [')
    assert report.report(tmp_path) == text, "half a record is none"


def test_a_gate_without_its_record_has_no_numbers(tmp_path):
    ran = {"gate": "test", "command": ["make", "test"], "status": 2, "seconds": 1.5}
    (tmp_path / "verify.json").write_text(json.dumps({"gates": [ran]}))
    (tmp_path / "test.xml").write_text("<testsuites><testsuite>")
    assert row_of(report.report(tmp_path), "test") == ["**FAILED**", "–", "–", "2", "–"]


def test_faults_that_fail_nothing_are_named(tmp_path):
    found = {"sm_100": {"spills 8 bytes": 2}, "sm_90": {"spills 4 bytes": 1}}
    targets = [{"arch": arch, "faults": faults} for arch, faults in found.items()]
    (tmp_path / "codegen").mkdir()
    (tmp_path / "codegen" / "codegen.json").write_text(json.dumps({"triton": "3.7.1", "targets": targets}))
    text = report.report(tmp_path)
    assert "because only sm_80 and sm_90 are held" in text
    assert "* `make codegen`, sm_100: spills 8 bytes in 2 launches." in text
    assert "spills 4 bytes" not in text, "that fails the gate"
    assert "Reported, and no failure" not in report.report(tmp_path / "codegen")


def test_mutants_are_counted(tmp_path):
    def mutant(file: str, verdict: str) -> dict[str, Any]:
        return {"file": file, "line": 3, "before": "a < b", "after": "a <= b", "verdict": verdict}

    mutants = [mutant("a.py", "killed"), mutant("a.py", "survived"), mutant("b.py", "speed")]
    found = {"files": {"a.py": 20, "b.py": 1000, "c.py": 1}, "seed": 5, "verify": False, "mutants": mutants}
    (tmp_path / "mutate.json").write_text(json.dumps(found))
    ran = {"gate": "mutate", "command": ["make", "mutate", "ARGS=--limit 3 --seed 5"], "status": 0, "seconds": 60}
    (tmp_path / "verify.json").write_text(json.dumps({"gates": [ran]}))
    text = report.report(tmp_path)
    assert row_of(text, 'mutate ARGS="--limit 3 --seed 5"') == ["passed", "3", "1", "60", "5"]
    assert "| 1 | 1 | 0 | 1 | 3 | 1,021 |\n\n* Survived: `a.py:3` `a < b` became `a <= b`." in text
    assert "were not run" in text


CONTRACT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.kernels.test_contract" name="test_row[linear: NaN: kept: torch]">
<properties><property name="dtypes" value="float32 float16"/></properties></testcase>
<testcase classname="tests.kernels.test_contract" name="test_row[linear: NaN: kept: pointer]">
<properties><property name="dtypes" value="float16"/></properties><failure message="wrong"/></testcase>
<testcase classname="tests.kernels.test_contract" name="test_row[linear: streams: its own: pointer]">
<skipped type="pytest.skip" message="no CUDA GPU here"/></testcase>
<testcase classname="tests.kernels.test_contract" name="test_the_table_as_data"/>
<testcase classname="tests.tools.test_robust_files" name="test_a_full_disk"/>
</testsuite></testsuites>"""


def test_checks_of_the_contract_are_those_that_ran(tmp_path, monkeypatch):
    nan = Term("NaN", "linear", "kept", expected=dict, because="better", dtypes=EVERY)
    rows = [nan, dataclasses.replace(nan, subject="model"), Term("streams", "linear", "its own")]
    monkeypatch.setattr(tables.the_contract, "ROWS", rows)
    assert "edge cases in 3 rows. Tests: not run." in report.report(tmp_path)
    (tmp_path / "test.xml").write_text(CONTRACT)
    text = report.report(tmp_path)
    assert "3 of the 17 that the table declares ran (torch 2, pointer 1). Without a GPU, each row" in text
    assert "Tests: 2 passed, 1 failed, 1 were skipped (1 no CUDA GPU here).\n\nThe answer differs" in text
    assert "| NaN: kept | an answer of its own | `linear`, `model` | better |" in text
    assert "of each row. Tests: 1 passed, 0 failed, 0 were skipped." in text
    (tmp_path / "verify.json").write_text(json.dumps({"environment": {**ENVIRONMENT, "device_kind": "cuda"}}))
    assert "(torch 2, pointer 1). Tests: 2" in report.report(tmp_path), "on a GPU, every dtype"


def test_headroom_is_the_most_that_was_needed(tmp_path, monkeypatch):
    needed = {"operator": "linear", "path": "pointer", "precision": "ieee", "shapes": "ResNet-18"}
    rows = [
        {**needed, "dtype": "float16", "needed": {"normal": 0.25, "tails": 0.125}},
        {**needed, "dtype": "float32", "precision": "tf32", "needed": {"normal": 2.0}},
    ]
    monkeypatch.setattr(tables, "HEADROOM", tmp_path / "headroom.json")
    tables.HEADROOM.write_text(json.dumps({"interpreted": {"cases": 50, "seed": 0, "rows": rows}}))
    text = report.report(tmp_path)
    assert "| operator, path | shapes | float16 | TF32 |" in text
    assert "| `linear`, pointer | ResNet-18 | 0.25 (normal) | 2 (normal) |" in text


def test_runs_on_a_gpu_are_told_from_compilations(tmp_path, monkeypatch):
    compiled = (tables.RESULTS / "codegen.json").read_text()
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "codegen.json").write_text(compiled)
    assert "comes from: none.**" in report.report(tmp_path)
    on_gpu = {**GPU, "device": "NVIDIA H200 NVL"}
    rows = [row(environment=on_gpu), row(batch=2, environment=on_gpu, correct=False), row("eager", environment=on_gpu)]
    rows.append(row(batch=3))
    results.save(results.Results(rows), tmp_path / "results.json")
    text = report.report(tmp_path)
    assert "comes from: NVIDIA H200 NVL (1 rows).**" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| sm_90, NVIDIA H200"))
    assert line.endswith("| 1 |")


def test_on_a_gpu_the_report_names_it(tmp_path):
    (tmp_path / "verify.json").write_text(json.dumps({"environment": ENVIRONMENT, "gates": []}))
    text = report.report(tmp_path)
    assert "* Kernels ran **on Synthetic GPU (driver 580.1)**." in text
    assert "Nothing in this report ran on a GPU" not in text
    assert "Speed is no part of this report" in text
    (tmp_path / "verify.json").write_text(json.dumps({"environment": run.environment(), "gates": []}))
    assert ("Nothing in this report ran on a GPU" in report.report(tmp_path)) == (
        run.environment()["device_kind"] == "cpu"
    )


def told(gate: Gate) -> list[str]:
    return [word.removeprefix("ARGS=") for word in gate.command(Settings(seed=3), "records") if "ARGS" in word]


def test_every_gate_is_a_target_that_takes_what_it_is_told():
    makefile = (gates.ROOT / "Makefile").read_text()
    for gate in GATES:
        assert re.search(rf"^{gate.name}: (.*\$\(STAMP\)|{gate.name.split('-')[0]}-\$\()", makefile, re.M), gate.name
        assert len(told(gate)) == 1, "or what make verify was told in ARGS would be passed on"
    (mutate,) = (gate for gate in GATES if gate.name == "mutate")
    options = _parser().parse_args(told(mutate)[0].split())
    assert (options.limit, options.seed, options.json) == (Settings().mutants, 3, "records/mutate.json")
