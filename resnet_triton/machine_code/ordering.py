"""What has to come between two memory operations of a kernel, which neither the interpreter nor a result shows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from .flow import Flow
from .groups import TOGETHER


class Rule(NamedTuple):
    """Every path from a `start` to an `end` must pass a `guard`: regular expressions, each for a line of assembly.

    With `own`, an end from which all paths lead to another start first is that one's, and none of this one.
    """

    broken: str
    start: str
    end: str
    guard: str
    own: bool = False


NO_BARRIER_BEFORE_ATOMIC = "no barrier between a store and the atomic after it"
NO_BARRIER_AFTER_ATOMIC = "no barrier between an atomic and the load after it"
WEAK_ATOMIC = "an atomic that is not acq_rel at GPU scope"
UNFINISHED_BULK_STORE = "no full wait between a bulk store and the atomic after it"
UNFENCED_BULK_STORE = "no proxy fence between a store to shared memory and the bulk store after it"
NO_BARRIER_BEFORE_BULK_STORE = "no barrier between a store to shared memory and the bulk store after it"
UNREAD_BULK_STORE = "shared memory given back or stored to before a bulk store has read it"
NO_BARRIER_AFTER_WAIT = "no barrier between the wait for a bulk store and the store to shared memory after it"
UNFINISHED_COPY = "no wait between a copy to shared memory and the load after it"
NO_BARRIER_AFTER_COPY = "no barrier between the wait for a copy to shared memory and the load after it"
NO_BARRIER_BEFORE_COPY = "no barrier between a load of shared memory and the copy after it"
NO_BARRIER_AFTER_PRODUCT = "no barrier between the wait for a matrix product and the copy to shared memory after it"
NO_BARRIER_BEFORE_HANDOVER = "no barrier between a use of shared memory and the arrival after it"

_STORE = r"\bst\.[\w.:]*global"
_LOAD = r"\bld\.[\w.:]*global|\bcp\.async\.[\w.:]*shared[\w.:]*\.global"
_ATOMIC = r"(?<![\w.])(?:atom|red)\.(?![\w.:]*shared)"
# PTX's defaults are relaxed order and the scope of the GPU.
_WEAK_ATOMIC = rf"{_ATOMIC}(?:(?![\w.:]*acq_rel)|(?=[\w.:]*\.(?:cta|cluster)\b))"
_ANYWHERE, _NEVER = "", r"(?!)"
_BARRIER = rf"\s*{re.escape(TOGETHER)}"
_SHARED_STORE = r"\bst\.[\w.:]*shared|\bstmatrix\."
_BULK_STORE = r"\bcp\.(?:reduce\.)?async\.bulk\.[\w.:]*global\.shared"
_COPY = r"\bcp\.async\.c[ag]\."
_BULK_LOAD = r"\bcp\.async\.bulk\.tensor\.[\w.:]*shared::\w+\.global"
_ARRIVAL = r"\bmbarrier\.arrive\.(?!expect_tx)"  # that one announces a load
_SHARED_LOAD = r"\bldmatrix\.|\bwgmma\.mma_async\."
_COPIED = r"\s*cp\.async\.wait_(?:group|all)\b"
_USE = rf"\bwgmma\.wait_group\.|\bcp\.async\.bulk\.wait_group|\bld\.[\w.:]*shared|\bldmatrix\.|{_SHARED_STORE}"
_LEAVE = r"^\s*(?:@\S+\s+)?(?:ret|exit)\b"
# Of `.read`, the buffer may be used again, but what was stored need not be there yet.
_WRITTEN = r"\s*cp\.async\.bulk\.wait_group\s+0\b"
_READ = r"\s*cp\.async\.bulk\.wait_group(?:\.read)?\s+0\b"

AFTER_PRODUCT = Rule(NO_BARRIER_AFTER_PRODUCT, r"\bwgmma\.wait_group\.", rf"{_BULK_LOAD}|{_COPY}", _BARRIER)
RULES = (
    Rule(WEAK_ATOMIC, _ANYWHERE, _WEAK_ATOMIC, _NEVER),
    Rule(NO_BARRIER_BEFORE_ATOMIC, _STORE, _ATOMIC, _BARRIER),
    Rule(NO_BARRIER_AFTER_ATOMIC, _ATOMIC, _LOAD, _BARRIER),
    # An atomic says that what was stored last is there: if that went through pointers, not what the bulk store wrote.
    Rule(UNFINISHED_BULK_STORE, _BULK_STORE, _ATOMIC, rf"{_WRITTEN}|\s*{_STORE}"),
    Rule(UNFENCED_BULK_STORE, _SHARED_STORE, _BULK_STORE, r"\s*fence\.proxy\.async"),
    Rule(NO_BARRIER_BEFORE_BULK_STORE, _SHARED_STORE, _BULK_STORE, _BARRIER),
    # What is stored before another bulk store is for that one: whether it really goes elsewhere is not seen.
    Rule(UNREAD_BULK_STORE, _BULK_STORE, rf"{_SHARED_STORE}|{_LEAVE}", _READ, own=True),
    Rule(NO_BARRIER_AFTER_WAIT, _READ, _SHARED_STORE, _BARRIER),
    # Which slot of a ring is loaded is not followed: whether the wait or the barrier is for this one is not seen.
    Rule(UNFINISHED_COPY, _COPY, _SHARED_LOAD, _COPIED),
    Rule(NO_BARRIER_AFTER_COPY, _COPIED, _SHARED_LOAD, _BARRIER),
    Rule(NO_BARRIER_BEFORE_COPY, r"\bldmatrix\.", _COPY, _BARRIER),
    AFTER_PRODUCT,
    # One thread arrives for its group, which hands shared memory over to others.
    Rule(NO_BARRIER_BEFORE_HANDOVER, _USE, _ARRIVAL, _BARRIER),
)


def broken(flow: Flow, rules: Iterable[Rule] = RULES) -> tuple[str, ...]:
    """What the rules say of those that some path breaks."""
    return tuple(rule.broken for rule in rules if flow.meets(*rule[1:]))
