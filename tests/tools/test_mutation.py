"""The mutation tester itself: it makes the faults it should, finds them again, and is fooled by no weak test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from reliability import judge, ledger, suites
from reliability.forks import allow, forked
from reliability.mutants import mutants
from reliability.mutate import all_mutants
from reliability.places import ROOT, Source, source_of
from reliability.planting import planted
from reliability.revisions import changed

from resnet_triton.kernels import launch
from resnet_triton.kernels.launch import cdiv

KERNEL = '''
@triton.jit
def kernel(x_ptr, y_ptr, H, W, RELU: tl.constexpr):
    """Not code: 1 + 1."""
    offs = tl.arange(0, 16).to(tl.int64)
    mask = (offs >= 0) & (offs < H * W)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    if RELU:
        x = tl.where(x < 0, 0.0, relu(x))
    tl.store(y_ptr + offs, x.to(tl.float16), mask=mask)
'''
EXPECTED = """
    tl.arange(0, 16) -> tl.arange(1, 16)
    16 -> 17
    tl.arange(0, 16).to(tl.int64) -> tl.arange(0, 16)
    (offs >= 0) & (offs < H * W) -> offs >= 0
    (offs >= 0) & (offs < H * W) -> offs < H * W
    (offs >= 0) & (offs < H * W) -> (offs >= 0) | (offs < H * W)
    offs >= 0 -> offs > 0
    offs >= 0 -> offs < 0
    offs >= 0 -> offs >= 1
    offs < H * W -> offs <= H * W
    offs < H * W -> offs >= H * W
    H * W -> H + W
    H -> W
    W -> H
    tl.load(x_ptr + offs, mask=mask, other=0.0) -> tl.load(x_ptr + offs, mask=mask, other=float('nan'))
    x_ptr + offs -> x_ptr - offs
    RELU -> not RELU
    x = tl.where(x < 0, 0.0, relu(x)) -> pass
    tl.where(x < 0, 0.0, relu(x)) -> tl.where(x < 0, relu(x), 0.0)
    tl.where(x < 0, 0.0, relu(x)) -> tl.where(x < 0, 1.0, relu(x))
    x < 0 -> x <= 0
    x < 0 -> x >= 0
    x < 0 -> x < 1
    relu(x) -> x
    tl.store(y_ptr + offs, x.to(tl.float16), mask=mask) -> pass
    y_ptr + offs -> y_ptr - offs
"""
OTHERWISE = """
# Another line, other names, another layout: the places are those of KERNEL.
@triton.jit
def kernel(x_ptr, y_ptr, H, W, RELU: tl.constexpr, SLOPE: tl.constexpr):
    offsets = tl.arange(0, 32).to(tl.int64)
    inside = (
        (offsets >= 0)  # and not before the first
        & (offsets < H * W)
    )
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    if RELU: x = tl.where(x<0, 0.0, relu(x, SLOPE))
    tl.store(
        y_ptr + offsets,
        x.to(tl.float16), mask=inside,
    )
"""


def test_faults_are_those_that_people_make():
    found = list(mutants(Source("planted.py", KERNEL)))
    assert sorted(f"{m.before} -> {m.after}" for m in found) == sorted(textwrap.dedent(EXPECTED).split("\n")[1:-1])
    for m in found:
        assert m.source != KERNEL
        assert (m.file, m.function, m.nth) == ("planted.py", "kernel", 0)
        compile(m.source, m.file, "exec")


@pytest.mark.parametrize(
    ("old", "new", "after"),
    [
        ("x < 0", "x <= 0", "x <= 0"),
        ("... < H * W", "... <= H * W", "{offs} <= H * W"),
        ("tl.load(..., mask=..., other=0.0)", "tl.load(..., mask=...)", "tl.load(x_ptr + {offs}, mask={mask})"),
        ("tl.store(..., ..., mask=...)", "pass", "pass"),
        ("x = tl.where(..., 0.0, ...)", "x = tl.where(..., ..., 0.0)", None),
    ],
)
def test_a_place_outlives_what_is_written_otherwise_around_it(old, new, after):
    for text, names in ((KERNEL, ("offs", "mask")), (OTHERWISE, ("offsets", "inside"))):
        mutant = Source("a.py", text).change("kernel", old, new)
        assert after is None or mutant.after == after.format(offs=names[0], mask=names[1])
        assert text.splitlines()[mutant.line - 1] != mutant.source.splitlines()[mutant.line - 1]


def test_a_place_that_is_gone_or_not_the_only_one_is_named():
    source = Source("a.py", KERNEL)
    for place, words in (
        (("kernel", "x > 0", "x < 0"), "a.py: 'x > 0' stands 0 times in kernel, expected once"),
        (("kernel", "mask", "None"), "a.py: 'mask' stands 3 times in kernel, expected once"),
        (("kernel", "mask", "None", 4), "a.py: 'mask' stands 3 times in kernel, expected at least 4 times"),
        (("colonel", "x > 0", "x < 0"), "a.py has no function colonel"),
    ):
        with pytest.raises(ValueError, match=words):
            source.change(*place)
    third = source.change("kernel", "mask", "None", 3)
    assert "tl.store(y_ptr + offs, x.to(tl.float16), mask=None)" in third.source


@pytest.mark.parametrize("file", ["launch.py", "max_pool.py", "tiles.py"])
def test_what_a_report_says_of_a_mutant_finds_it_again(file):
    source = source_of(file)
    for mutant in mutants(source):
        assert source.change(mutant.function, mutant.before, mutant.after, mutant.nth).source == mutant.source


def test_a_function_with_a_fault_is_itself_again_afterwards():
    """Nor does it matter how the function came to be known: here it was imported by name."""
    with planted("launch.py", "cdiv", "-(-a // b)", "a // b"):
        assert (cdiv(7, 2), launch.cdiv(7, 2)) == (3, 3)
    assert cdiv(7, 2) == 4


def test_every_kernel_file_has_its_tests():
    assert set(suites.INTERPRETED) == {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert set(suites.COMPILED) <= {m.where for m in all_mutants()}
    texts = {path.name: path.read_text() for path in ROOT.glob("tests/*/test_*.py")}
    for pattern in {p for table in (suites.INTERPRETED, suites.COMPILED) for ps in table.values() for p in ps}:
        file, _, test = pattern.partition("::")
        assert f"def {test.partition('[')[0]}" in texts[file], pattern


def test_every_entry_of_the_ledger_has_its_mutant():
    _, stale = ledger.match(ledger.read(), all_mutants())
    assert not stale, "\n".join(stale)


ENTRY = """
[[equivalent]]
reason = "planted"
mutants = [
    ["launch.py:cdiv", "-(-a // b)", "-a // b"],
    ["launch.py:cdiv", "-a // b", "a + b"],
    ["launch.py:cdiv", "a / b", "a"],
]
"""


def test_an_entry_without_its_mutant_is_stale(tmp_path):
    path = tmp_path / "ledger.toml"
    path.write_text(ENTRY)
    known, stale = ledger.match(ledger.read(path), mutants(source_of("launch.py")))
    assert [entry.before for entry in known.values() if str(entry) not in "".join(stale)] == ["-(-a // b)"]
    assert [line.partition(": ")[2].rpartition(": ")[0] for line in stale] == [
        "launch.py:cdiv: '-a // b' -> 'a + b': there is no such mutant",
        "launch.py:cdiv: 'a / b' -> 'a': launch.py: 'a / b' stands 0 times in cdiv, expected once",
    ]
    path.write_text(ENTRY.replace("reason", "excuse"))
    with pytest.raises(ValueError, match=r"expected reason and mutants"):
        ledger.read(path)


def test_a_fork_that_does_not_end_is_ended():
    def work(task: str) -> str:
        if task == "loop":
            allow(0.2)
            while True:
                pass
        if task == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "memory":
            bytearray(64 << 30)
        return task.upper()

    endings = dict(forked(work, ["loop", "crash", "memory", "good", ""], jobs=2))
    assert {task: (ending.value, ending.how) for task, ending in endings.items()} == {
        "loop": (None, "time limit"), "crash": (None, "crash"), "memory": (None, "crash"), "good": ("GOOD", ""),
        "": ("", ""),
    }  # fmt: skip


@pytest.mark.slow
def test_a_mutant_is_not_left_in_an_endless_loop(monkeypatch):
    class Endless(judge.Tests):
        def passes(self, name: str) -> bool:
            while cdiv(7, 2) != 4:
                pass
            return True

    monkeypatch.setattr(judge, "PATIENCE", 0.3)
    tests = Endless([])
    tests.seconds["endless"] = 0.0
    some = [m for m in mutants(source_of("launch.py")) if m.function in ("cdiv", "next_power_of_2")]
    endings = list(forked(lambda m: tests.judge(m, ["endless"]), some, jobs=2))
    assert {ending.how for m, ending in endings if m.function == "cdiv"} == {"time limit"}
    assert {ending.value for m, ending in endings if m.function != "cdiv"} == {""}
    assert cdiv(7, 2) == 4, "the parent keeps its functions"


def git(folder: Path, *command: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], cwd=folder, check=True)


def test_changed_is_what_a_branch_or_the_last_commit_has_changed(tmp_path):
    there, clone, shallow = (tmp_path / name for name in ("there", "clone", "shallow"))
    (there / "kernels").mkdir(parents=True)
    git(there, "init", "-q", "-b", "main")
    for name in ("a", "b", "c"):  # a commit each
        (there / "kernels" / f"{name}.py").touch()
        git(there, "add", ".")
        git(there, "commit", "-q", "-m", name)
    git(tmp_path, "clone", "-q", str(there), "clone")
    assert changed("origin/main", clone) == {"c.py"}, "HEAD is main: what its last commit changed"
    assert changed("origin/elsewhere", clone) == {"c.py"}
    git(clone, "checkout", "-q", "-b", "branch", "HEAD~1")
    (clone / "README").touch()
    git(clone, "add", ".")
    git(clone, "commit", "-q", "-m", "no kernel")
    assert changed("origin/main", clone) == set()
    (clone / "kernels" / "b.py").write_text("not committed")
    assert changed("origin/main", clone) == changed("HEAD", clone) == {"b.py"}, "c.py has changed on main, not here"
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{there}", "shallow")
    assert changed("origin/main", shallow) is None
    assert changed("main", tmp_path) is None, "no checkout"


SESSION = """
import sys
from pathlib import Path
from reliability import ledger, mutate, suites

entries = ledger.read(Path(sys.argv[1]))
ledger.read = lambda: entries
suites.INTERPRETED["launch.py"] = sys.argv[2].split()
raise SystemExit(mutate.main(["launch.py", "--jobs", "1", *sys.argv[3:]]))
"""


def session(tests: str, entries: str, folder: Path, *options: str) -> tuple[int, str, list[dict[str, str]]]:
    """Mutate launch.py against these tests: exit status, what was printed, the verdicts."""
    (folder / "ledger.toml").write_text(entries)
    found = folder / "found.json"
    done = subprocess.run(
        [sys.executable, "-c", SESSION, str(folder / "ledger.toml"), tests, "--json", str(found), *options],
        env={**os.environ, "PYTHONPATH": "tests", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.exists(), done.stderr
    return done.returncode, done.stdout, json.loads(found.read_text())


def verdicts(found: list[dict[str, str]]) -> dict[str, set[str]]:
    functions: dict[str, set[str]] = {}
    for row in found:
        functions.setdefault(row["function"], set()).add(row["verdict"])
    return functions


@pytest.mark.slow
def test_weak_tests_let_mutants_live_and_strong_ones_kill_them(tmp_path):
    status, printed, found = session("test_launch.py::test_rounding_up", "", tmp_path)
    assert status == 1
    rounding, launches = ("cdiv", "next_power_of_2"), ("Launch.repeat", "Launch._options")
    weak = verdicts(found)
    assert [weak[key] for key in (*rounding, *launches)] == [{"killed"}] * 2 + [{"survived"}] * 2
    assert "+ not self.dependent" in printed
    status, printed, found = session("test_launch.py", "", tmp_path)
    assert status == 0
    assert set().union(*verdicts(found).values()) == {"killed"}
    assert {row["by"] for row in found if row["function"] == "cdiv"} == {"test_launch.py::test_rounding_up"}


@pytest.mark.slow
def test_a_ledger_that_is_wrong_fails(tmp_path):
    """One entry claims what a test refutes; the others have no mutants."""
    status, printed, found = session("test_launch.py", ENTRY, tmp_path, "--verify")
    assert status == 1
    assert "launch.py:cdiv: 'a / b' -> 'a': launch.py: 'a / b' stands 0 times in cdiv, expected once" in printed
    assert "'-(-a // b)' -> '-a // b': test_launch.py::test_rounding_up kills it, expected none to" in printed
    assert {row["verdict"] for row in found} == {"killed"}
