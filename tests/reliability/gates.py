"""What there is to run, what it proves, and where it leaves what it found."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "build" / "verify"


class Settings(NamedTuple):
    """What of the gates may be made smaller, and the seed."""

    seed: int = 0
    fuzz_cases: int = 20_000
    mutants: int = 400
    tests: str = ""


USUAL = Settings()


class Gate(NamedTuple):
    """`name` is make's target, `arguments` what it is told in ARGS, `variables` what else; `record` makes it leave one.

    In all of them {seed} and so on stand for the settings, and {records} for the folder.
    """

    name: str
    proves: str
    arguments: str = ""
    variables: str = ""
    record: str = ""

    def command(self, settings: Settings, records: str = "") -> list[str]:
        """For make; without a folder of records, as a reader would type it."""
        ours = " ".join(filter(None, (self.arguments, self.record if records else "")))
        variables = self.variables.format(**settings._asdict()).split()
        text = ours.format(**settings._asdict(), records=records).strip()
        # Always said, or what `make verify` was told in ARGS would be passed on.
        return ["make", self.name, *variables, *([f"ARGS={text}"] if text or records else [])]


def _of_pytest(name: str, proves: str, arguments: str = "", variables: str = "") -> Gate:
    return Gate(name, proves, arguments, variables, f"--junitxml={{records}}/{name}.xml")


GATES = (
    Gate("lint", "the rules and format of ruff"),
    Gate("types", "annotations hold (mypy, strict)"),
    _of_pytest("test", "kernels: bit for bit or within bounds of fp64, no access outside, no race; models and tools",
               "{tests}"),
    _of_pytest("test-newest", "those of kernels and of machine code, slow ones too, with the newest Triton"),
    _of_pytest("slow", "machine code within its budget; every planted fault is caught by the test named for it",
               "{tests}"),
    _of_pytest("zoo", "other people's models give their own answers, and each row of docs/models.md holds"),
    _of_pytest("package", "wheel and sdist build, install, import and hold what they should"),
    Gate("codegen", "machine code: tensor cores used, no register of a running product touched, no spills, atomics "
         "ordered, NaN kept, nothing approximate",
         record="--out {records}/codegen"),
    Gate("codegen-oldest", "the same, by the oldest Triton supported", record="--out {records}/codegen-oldest"),
    Gate("codegen-newest", "the same, by the newest Triton", record="--out {records}/codegen-newest"),
    _of_pytest("fuzz", "random calls of every operator, bit for bit against fp64",
               variables="FUZZ_CASES={fuzz_cases} FUZZ_SEED={seed}"),
    Gate("mutate", "tests notice small faults in kernels and launchers",
         "--limit {mutants} --seed {seed} --verify --compiled", record="--json {records}/mutate.json"),
)  # fmt: skip
