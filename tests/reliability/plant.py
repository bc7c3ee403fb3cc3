"""Faults planted by hand, one at a time, before the tests that `planted.py` names.

`python -m reliability.plant` reads a fault from each line of its input, as JSON, and answers with a line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

from .forks import forked
from .judge import Tests, function, with_tests
from .planted import FAULTS, Fault


def _serve(tests: Tests) -> None:
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # whatever tests print
        for line in sys.stdin:
            print(json.dumps(_plant(tests, Fault(*json.loads(line)))), file=answers, flush=True)


def _plant(tests: Tests, fault: Fault) -> tuple[str, str]:
    """The case of the fault's test that fails with the fault, and not without it, and how its traceback ends.

    Without it only afterwards, and here: what a test keeps (`functools.cache`) would hide the fault.
    """
    names = [name for name in tests.items if fault.test in (name, function(name))]
    if not names:
        return "", "there is no such test"
    mutant = fault.mutant()

    def work(_: Any) -> tuple[str, str]:
        judge = tests.judge_compiled if fault.compiled else tests.judge
        return judge(mutant, names), tests.end

    ((_, ending),) = forked(work, [fault], jobs=1)
    case, end = ending.value or (fault.test, ending.how)
    if case in tests.items:
        tests.check(case)
    return case, end


if __name__ == "__main__":
    with_tests(sorted({function(fault.test) for fault in FAULTS}), _serve)
