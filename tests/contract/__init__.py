"""The contract with PyTorch as one table: every edge case for every operator and for a whole model.

A row names a promise, a call and what is expected of it: PyTorch's own answer to the same call, its error, or, with the
reason, something else. Each case of `CASES` has for each of `SUBJECTS` a row, or in `ABSENT` why there is none.
`tests/kernels/test_contract.py` checks the rows on PyTorch and on the kernels.
"""

from __future__ import annotations

from . import dtypes, modes, norms, shapes, values
from .subjects import SUBJECTS
from .term import Term

_PARTS = (values, norms, shapes, dtypes, modes)
CASES = tuple(case for part in _PARTS for case in part.CASES)
ROWS: list[Term] = [row for part in _PARTS for row in part.ROWS]
ABSENT: dict[tuple[str, str], str] = {
    (case, subject): reason
    for part in _PARTS
    for case, reasons in part.ABSENT.items()
    for reason, subjects in reasons.items()
    for subject in subjects
}
"""Why a case has no row for a subject: it has no meaning there, or a test that is named proves it."""


def ways(row: Term) -> list[str]:
    """On which ways a row is checked: PyTorch, and those of the subject's kernels."""
    kernels = list(SUBJECTS[row.subject].ways)
    if row.refused or row.raises:
        kernels = ["kernels"]  # refused before any path is chosen
    return ["torch", *kernels]
