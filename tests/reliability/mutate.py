"""The command line: which mutants, their verdicts, the report and the gate."""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import ledger, suites
from .forks import forked
from .judge import Tests, with_tests
from .mutants import mutants
from .places import ROOT, Mutant, source_of
from .revisions import changed

GATE = 0.95
VERDICTS = ("killed", "survived", *ledger.KINDS)


@dataclass(frozen=True)
class Judged:
    """A mutant, one of VERDICTS, and the test that killed it or what else ended it."""

    mutant: Mutant
    verdict: str
    by: str = ""
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        mutant = asdict(self.mutant)
        del mutant["source"]
        return {**mutant, "verdict": self.verdict, "by": self.by, "seconds": round(self.seconds, 3)}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    everything = all_mutants()
    wanted = _wanted(options, everything)
    if options.list:
        print(*wanted, sep="\n")
        return 0
    known, stale = ledger.match(ledger.read(), everything)
    judged = judge(wanted, known, options)
    if options.json:
        text = json.dumps([j.record() for j in judged], indent=1)
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    rate = report(judged)
    wrong = [j for j in judged if j.verdict == "killed" and ledger.key(j.mutant) in known]
    print(*stale, sep="\n", end="\n" * bool(stale))
    for j in wrong:
        print(f"{known[ledger.key(j.mutant)]}: {j.by} kills it, expected none to: delete the entry")
    return 0 if rate >= GATE and not stale and not wrong else 1


@functools.cache
def all_mutants() -> list[Mutant]:
    return [m for path in sorted((ROOT / "kernels").glob("*.py")) for m in mutants(source_of(path.name))]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m reliability.mutate", description="Mutation testing of kernels/.")
    parser.add_argument("only", nargs="*", help="files (max_pool.py) or functions (stem_kernel); all by default")
    parser.add_argument("--changed", metavar="REVISION", help="only files changed since HEAD left this git revision")
    parser.add_argument("--limit", type=int, metavar="N", help="a random sample of so many mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="mutants at a time")
    parser.add_argument("--json", metavar="FILE", help="write every mutant and its verdict")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--verify", action="store_true", help="run those that the ledger explains as well")
    parser.add_argument("--compiled", action="store_true", help="show survivors to the tests of machine code: slow")
    return parser


def _wanted(options: argparse.Namespace, everything: list[Mutant]) -> list[Mutant]:
    wanted = everything
    if options.only:
        names = {Path(name).name for name in options.only}
        unknown = names - {m.file for m in everything} - {m.function for m in everything}
        if unknown:
            raise SystemExit(f"no file or function of kernels/ is named {', '.join(sorted(unknown))}; see --list")
        wanted = [m for m in wanted if names & {m.file, m.function}]
    if options.changed and (names := changed(options.changed, ROOT)) is not None:
        wanted = [m for m in wanted if m.file in names]
    if options.limit is not None and options.limit < len(wanted):
        wanted = random.Random(options.seed).sample(wanted, options.limit)
    return wanted


def judge(wanted: list[Mutant], known: dict[ledger.Key, ledger.Entry], options: argparse.Namespace) -> list[Judged]:
    """The verdict on each mutant; those that `known` explains are not run unless the options say so."""
    run = [m for m in wanted if options.verify or ledger.key(m) not in known]
    judged = [Judged(m, known[ledger.key(m)].kind) for m in wanted if m not in run]
    if run:
        patterns = sorted({p.partition("[")[0] for m in run for p in suites.INTERPRETED[m.file]})
        judged += with_tests(patterns, lambda tests: list(_interpret(tests, run, options.jobs)))
    left = [j.mutant for j in judged if j.verdict == "survived" and j.mutant.where in suites.COMPILED]
    left = [m for m in left if ledger.key(m) not in known]
    if options.compiled and left:
        patterns = sorted({p for m in left for p in suites.COMPILED[m.where]})
        again = with_tests(patterns, lambda tests: list(_compile(tests, left, options.jobs)))
        judged = [j for j in judged if j.mutant not in left] + again
    return sorted((_explained(j, known) for j in judged), key=lambda j: (j.mutant.file, j.mutant.line))


def _explained(judged: Judged, known: dict[ledger.Key, ledger.Entry]) -> Judged:
    entry = known.get(ledger.key(judged.mutant))
    return Judged(judged.mutant, entry.kind) if entry and judged.verdict == "survived" else judged


def _interpret(tests: Tests, wanted: list[Mutant], jobs: int) -> Iterator[Judged]:
    """Cheap tests first, and before them the one that has killed the mutant before: neighbours fail alike."""
    collected = list(tests.items)
    orders: dict[str, list[str]] = {}
    for mutant in wanted:
        if mutant.where not in orders:
            orders[mutant.where] = tests.measure(suites.chosen(mutant.file, collected))
    endings = forked(lambda mutant: tests.judge(mutant, orders[mutant.where]), wanted, jobs)
    for done, (mutant, (accused, how, seconds)) in enumerate(endings, start=1):
        if accused == "":
            print(f"{done} of {len(wanted)}: survived: {mutant}", file=sys.stderr, flush=True)
        elif accused in tests.items:
            tests.check(accused)
            orders[mutant.where].remove(accused)
            orders[mutant.where].insert(0, accused)
        yield Judged(mutant, "survived" if accused == "" else "killed", accused or how, seconds)


def _compile(tests: Tests, wanted: list[Mutant], jobs: int) -> Iterator[Judged]:
    def work(mutant: Mutant) -> str:
        return tests.judge_compiled(mutant, [n for n in tests.items if suites.reads_code_of(mutant.where, n)])

    for mutant, (accused, how, seconds) in forked(work, wanted, jobs):
        yield Judged(mutant, "survived" if accused == "" else "killed", accused or how, seconds)


def report(judged: list[Judged]) -> float:
    """Print the table and every survivor; returns the share of those killed that could be."""
    counts: dict[str, Counter[str]] = {}
    for j in judged:
        counts.setdefault(j.mutant.where, Counter())[j.verdict] += 1
    print(f"{'function':44}" + "".join(f"{verdict:>12}" for verdict in VERDICTS))
    for name, count in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        print(f"{name:44}" + "".join(f"{count[verdict]:12}" for verdict in VERDICTS))
    for j in judged:
        if j.verdict == "survived":
            print(f"\n{j.mutant}")
    killed, survived = (sum(j.verdict == verdict for j in judged) for verdict in VERDICTS[:2])
    rate = killed / (killed + survived) if killed + survived else 1.0
    print(f"\n{killed} of {killed + survived} killed ({rate:.1%}); expected at least {GATE:.0%}")
    return rate


if __name__ == "__main__":
    raise SystemExit(main())
