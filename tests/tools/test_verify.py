"""`make verify` runs every gate, shows a failure as a failure, and repeats none of its own arguments to another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from reliability import mutate, verify

MAKEFILE = """
.PHONY: lint types fuzz
lint:
	@echo 'said [$(ARGS)]'
types:
	@echo '== 1 failed, 2 passed in 3s =='
	@exit 3
fuzz:
	@echo $(FUZZ_CASES) cases from $(FUZZ_SEED) on
"""
OPTIONS = {"seed": 3, "fuzz_cases": 7, "mutants": 5}


def test_a_failed_gate_stops_no_other(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Makefile").write_text(MAKEFILE)
    monkeypatch.setenv("MAKEFLAGS", " -- ARGS=--only")  # as make sets it for `make verify ARGS=--only ...`
    options = ["--fuzz-cases", "7", "--seed", "3"]
    assert verify.main(["--only", "fuzz", "types", "lint", *options], tmp_path) == 1
    printed, table = capfd.readouterr().out.split("\n\n")
    assert "== make types: FAILED after 0 s" in printed
    assert [re.split("  +", line) for line in table.splitlines()[1:]] == [
        ["lint", "passed", "0", "said []"],
        ["types", "FAILED", "0", "1 failed, 2 passed in 3s"],
        ["fuzz", "passed", "0", "3", "7 cases from 3 on"],
    ]
    assert verify.main(["--only", "lint"], tmp_path) == 0


def test_every_gate_is_a_target_and_a_row_of_the_page() -> None:
    makefile = (verify.ROOT / "Makefile").read_text(encoding="utf-8")
    page = (verify.ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for gate in verify.GATES:
        assert re.search(rf"^{gate}: ", makefile, re.M), gate
        assert re.search(rf"^\| `make {gate}[ `]", page, re.M), gate


def test_mutate_takes_what_it_is_told() -> None:
    (told,) = (word.removeprefix("ARGS=") for word in verify.command("mutate", **OPTIONS) if word.startswith("ARGS="))
    options = mutate._parser().parse_args(told.split())
    assert (options.limit, options.seed, options.verify, options.compiled) == (5, 3, True, True)
