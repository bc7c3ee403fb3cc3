"""Run every gate, each as `make NAME`, one after another; one that fails stops no other. `make verify` calls this."""

from __future__ import annotations

import argparse
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GATES = ("lint", "types", "test", "test-newest", "slow", "zoo", "package", "codegen", "codegen-oldest",
         "codegen-newest", "fuzz", "mutate")  # fmt: skip
SEEDED = ("fuzz", "mutate")


def command(gate: str, seed: int, fuzz_cases: int, mutants: int) -> list[str]:
    """ARGS is always said, or make would pass on what `make verify` was told in it."""
    if gate == "fuzz":
        return ["make", gate, f"FUZZ_CASES={fuzz_cases}", f"FUZZ_SEED={seed}", "ARGS="]
    if gate == "mutate":
        return ["make", gate, f"ARGS=--limit {mutants} --seed {seed} --verify --compiled"]
    return ["make", gate, "ARGS="]


def run(command: list[str], folder: Path) -> tuple[int, str]:
    """Show what the command prints; its exit status and its last line, make's own aside."""
    last = ""
    command = [*command, "--no-print-directory"]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if line.strip() and not line.startswith("make"):
                last = line.strip(" =\n")[:80]
    return process.returncode, last


def main(arguments: list[str] | None = None, folder: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m reliability.verify", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=GATES, default=GATES, metavar="GATE", help=", ".join(GATES))
    parser.add_argument("--seed", type=int, help="of random calls and of the sample of mutants; by default the time")
    parser.add_argument("--fuzz-cases", type=int, default=20_000, metavar="N")
    parser.add_argument("--mutants", type=int, default=400, metavar="N")
    options = parser.parse_args(arguments)
    seed = int(time.time()) if options.seed is None else options.seed
    rows, failed = [("gate", "result", "seconds", "seed", "its last line")], 0
    for gate in (gate for gate in GATES if gate in options.only):
        told = command(gate, seed, options.fuzz_cases, options.mutants)
        print("==", *told, flush=True)
        start = time.monotonic()
        status, last = run(told, folder)
        failed += status != 0
        result, seconds = "FAILED" if status else "passed", f"{time.monotonic() - start:.0f}"
        print(f"== make {gate}: {result} after {seconds} s", flush=True)
        rows.append((gate, result, seconds, str(seed) if gate in SEEDED else "", last))
    print()
    for name, result, seconds, used, last in rows:
        print(f"{name:16}{result:8}{seconds:>7}  {used:12}{last}".rstrip())
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
