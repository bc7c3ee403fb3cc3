"""Each fault of `reliability/planted.py` turns its test red, for its reason; without the fault the test is green."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from reliability.judge import function
from reliability.places import ROOT
from reliability.planted import FAULTS, Fault

Plant = Callable[[Fault], tuple[str, str]]


@pytest.fixture(scope="module")
def plant() -> Iterator[Plant]:
    """A process that has the tests collected, and plants whatever fault it is asked to: see `reliability/plant.py`."""
    env = {**os.environ, "PYTHONPATH": "tests", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    env["OMP_NUM_THREADS"] = "1"  # its children are forks, which hang in threads that only their parent has
    command = [sys.executable, "-m", "reliability.plant"]
    with subprocess.Popen(
        command, env=env, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        ask, answers = process.stdin, process.stdout

        def plant(fault: Fault) -> tuple[str, str]:
            print(json.dumps(fault), file=ask, flush=True)
            answer = answers.readline()
            assert answer, "the process has ended; its last words are above"
            case, end = json.loads(answer)
            return case, end

        yield plant
        ask.close()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_has_its_place(fault: Fault) -> None:
    fault.mutant()  # found there, and once
    file, test = function(fault.test).split("::")
    (path,) = ROOT.glob(f"tests/*/{file}")
    assert f"def {test}(" in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught_by_its_test(plant: Plant, fault: Fault) -> None:
    case, end = plant(fault)
    assert case, end or f"{fault.test} passes with the fault"
    assert re.search(fault.text, end), end


@pytest.mark.slow
def test_what_is_no_fault_or_does_not_compile_is_not_caught(plant: Plant) -> None:
    (fault,) = (fault for fault in FAULTS if fault.name == "an element too many")
    assert plant(fault._replace(new="NUMEL > offs")) == ("", "")
    _, end = plant(fault._replace(new="offs < UNHEARD_OF"))
    assert "UNHEARD_OF" in end
    assert not re.search(fault.text, end)
    assert plant(fault._replace(test="test_exact.py::test_nothing")) == ("", "there is no such test")
