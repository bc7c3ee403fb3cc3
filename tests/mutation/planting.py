"""Faults planted by hand, one at a time, before the tests that `planted_faults.py` names.

`python -m mutation.planting` reads a fault from each line of its input, as JSON, and answers with a line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

from planted_faults import FAULTS, Fault

from .forks import forked
from .hosts import Tests, function, with_tests


def plant(tests: Tests, fault: Fault) -> tuple[str, str]:
    """The case of the fault's test that fails with the fault, and not without it, and how its traceback ends."""
    names = [name for name in tests.items if fault.test in (name, function(name))]
    if not names:
        return "", "there is no such test"
    mutant, names = fault.mutant(), tests.measure(names)

    def work(_: Any) -> tuple[str, str]:
        judge = tests.judge_compiled if fault.compiled else tests.judge
        return judge(mutant, names), tests.end

    ((_, ending),) = forked(work, [fault], jobs=1)
    case, end = ending.value or (fault.test, ending.how)
    if case in tests.items:
        tests.check(case)
    return case, end


def serve(tests: Tests) -> None:
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # whatever tests print
        for line in sys.stdin:
            print(json.dumps(plant(tests, Fault(*json.loads(line)))), file=answers, flush=True)


if __name__ == "__main__":
    with_tests(sorted({function(fault.test) for fault in FAULTS}), serve)
