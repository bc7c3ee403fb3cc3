"""Run the gates and write the report, or only write the report."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import report, run
from .gates import GATES, RECORDS, ROOT, USUAL, Settings

REPORT = ROOT / "docs" / "reliability.md"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reliability", description=__doc__)
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--out", type=Path, default=REPORT, help="the report")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="write the report from the records that are there")
    verify = commands.add_parser("verify", help="run the gates; exit status 1 if one fails")
    names = [gate.name for gate in GATES]
    verify.add_argument("--only", nargs="+", choices=names, default=names, metavar="GATE", help=", ".join(names))
    verify.add_argument("--seed", type=int, help="of random calls and of the sample of mutants; by default the time")
    verify.add_argument("--fuzz-cases", type=int, default=USUAL.fuzz_cases, metavar="N")
    verify.add_argument("--mutants", type=int, default=USUAL.mutants, metavar="N")
    verify.add_argument("--tests", default=USUAL.tests, metavar="FILES", help="of `make test` and `make slow`, not all")
    options = parser.parse_args(arguments)
    failed: list[str] = []
    if options.command == "verify":
        seed = run.seed_of_the_day() if options.seed is None else options.seed
        settings = Settings(seed, options.fuzz_cases, options.mutants, options.tests)
        failed = run.run([gate for gate in GATES if gate.name in options.only], settings, options.records)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(report.report(options.records), encoding="utf-8")
    print(f"{options.out.name} is written" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
