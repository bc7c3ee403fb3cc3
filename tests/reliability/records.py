"""What the gates have left, read back: pytest's JUnit files, `codegen.json`, the verdicts on mutants."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from .gates import Gate
from .run import FILE


class Case(NamedTuple):
    """One test of a JUnit file."""

    name: str
    verdict: str  # "passed", "failed" or "skipped"
    reason: str
    properties: dict[str, str]


class Outcome(NamedTuple):
    """What became of a gate; None where nothing is known."""

    command: str
    status: int | None = None
    seconds: float | None = None
    cases: int | None = None
    mismatches: int | None = None
    seed: str | None = None

    @property
    def verdict(self) -> str:
        if self.status is None:
            return "not run"
        return "passed" if self.status == 0 else "FAILED"


class Records:
    """A folder of records. What is not there is empty."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run: dict[str, Any] = self.json(FILE)
        self._gates = {gate["gate"]: gate for gate in self.run.get("gates", [])}

    def json(self, name: str) -> Any:
        """{} if there is no such file, or only a part of one."""
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def tests(self, gate: str) -> list[Case]:
        """[] if there is no such file, or only a part of one."""
        try:
            tree = ElementTree.parse(self.folder / f"{gate}.xml")
        except (OSError, ElementTree.ParseError):
            return []
        return [_case(element) for element in tree.iter("testcase")]

    def outcome(self, gate: Gate) -> Outcome:
        if gate.name not in self._gates:
            return Outcome(f"make {gate.name}")
        ran = self._gates[gate.name]
        known = Outcome(_shown(ran["command"]), ran["status"], ran["seconds"])
        if "--junitxml" in gate.record:
            return known._replace(**_counts(self.tests(gate.name)))
        if gate.name == "mutate" and (mutants := self.json("mutate.json")):
            verdicts = Counter(mutant["verdict"] for mutant in mutants["mutants"])
            return known._replace(cases=verdicts.total(), mismatches=verdicts["survived"], seed=str(mutants["seed"]))
        if gate.name.startswith("codegen") and (compiled := self.json(f"{gate.name}/codegen.json")):
            cases, mismatches = (sum(t[key] for t in compiled["targets"]) for key in ("launches", "faulty"))
            return known._replace(cases=cases, mismatches=mismatches)
        return known


def _case(element: ElementTree.Element) -> Case:
    properties = {p.attrib["name"]: p.attrib["value"] for p in element.iter("property")}
    verdict, reason = "passed", ""
    for child in element:
        if child.tag in ("failure", "error"):
            verdict = "failed"
        elif child.tag == "skipped" and verdict == "passed":
            verdict, reason = "skipped", child.attrib.get("message", "")
    name = f"{element.attrib['classname'].removeprefix('tests.')}::{element.attrib['name']}"
    return Case(name, verdict, reason, properties)


def _counts(tests: list[Case]) -> dict[str, Any]:
    """Of random calls where the tests have counted them, else of tests."""
    if not tests:
        return {}
    ran = [test for test in tests if test.verdict != "skipped"]
    seeds = {test.properties["seed"] for test in ran if "seed" in test.properties}
    return {
        "cases": sum(int(test.properties.get("cases", 1)) for test in ran),
        "mismatches": sum(test.verdict == "failed" for test in ran),
        "seed": ", ".join(sorted(seeds)) or None,
    }


def _shown(command: list[str]) -> str:
    return " ".join(re.sub(r"^ARGS=(.* .*)$", r'ARGS="\1"', word) for word in command)
