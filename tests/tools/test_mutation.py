"""The mutation tester itself: it makes the faults it should, and neither a weak test nor an endless loop fools it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from mutation import hosts, ledger, suites
from mutation.faults import Mutant, mutants
from mutation.forks import allow, forked
from mutation.hosts import ROOT
from mutation.revisions import changed

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
    tl.arange(1, 16).to(tl.int64)
    tl.arange(0, 17).to(tl.int64)
    tl.arange(0, 16)
    mask = (offs >= 0)
    mask = (offs < H * W)
    mask = (offs >= 0) | (offs < H * W)
    mask = (offs > 0) & (offs < H * W)
    mask = (offs < 0) & (offs < H * W)
    mask = (offs >= 1) & (offs < H * W)
    mask = (offs >= 0) & (offs <= H * W)
    mask = (offs >= 0) & (offs >= H * W)
    mask = (offs >= 0) & (offs < H + W)
    mask = (offs >= 0) & (offs < W * W)
    mask = (offs >= 0) & (offs < H * H)
    x = tl.load(x_ptr - offs, mask=mask, other=0.0)
    x = tl.load(x_ptr + offs, mask=mask, other=float("nan"))
    if not RELU:
    pass
    x = tl.where(x < 0, relu(x), 0.0)
    x = tl.where(x <= 0, 0.0, relu(x))
    x = tl.where(x >= 0, 0.0, relu(x))
    x = tl.where(x < 1, 0.0, relu(x))
    x = tl.where(x < 0, 1.0, relu(x))
    x = tl.where(x < 0, 0.0, x)
    pass
    tl.store(y_ptr - offs, x.to(tl.float16), mask=mask)
"""


def test_faults_are_those_that_people_make(tmp_path):
    path = tmp_path / "planted.py"
    path.write_text(KERNEL)
    found = mutants(path)
    assert sorted(m.after.removeprefix("offs = ") for m in found) == sorted(textwrap.dedent(EXPECTED).split("\n")[1:-1])
    for m in found:
        assert m.source != KERNEL
        assert (m.file, m.function) == ("planted.py", "kernel")
        assert m.before in " ".join(KERNEL.split())


def test_every_kernel_file_has_its_tests():
    paths = list((ROOT / "kernels").glob("*.py"))
    assert set(suites.INTERPRETED) == {path.name for path in paths}
    assert set(suites.COMPILED) <= {m.where for path in paths for m in mutants(path)}
    files = {path.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert all(p.partition("::")[0] in files for ps in suites.INTERPRETED.values() for p in ps)


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


ENTRY = """
[[mutant]]
function = "launch.py:cdiv"
before = "return -(-a // b)"
after = ["return (-a // b)", "return -(-a + b)"]
kind = "equivalent"
reason = "planted"
"""


def test_an_entry_without_its_mutant_is_stale(tmp_path):
    path = tmp_path / "ledger.toml"
    path.write_text(ENTRY)
    entries = ledger.read(path)
    existing = mutants(ROOT / "kernels" / "launch.py")
    assert [entry.after for entry in ledger.stale(entries, existing)] == ["return -(-a + b)"]
    path.write_text(ENTRY.replace("planted", "").replace("reason", "excuse"))
    with pytest.raises(ValueError, match=r"expected function, before, after, reason and kind"):
        ledger.read(path)


SESSION = """
import sys
from pathlib import Path
from mutation import command, suites

command.LEDGER = Path(sys.argv[1])
suites.INTERPRETED["launch.py"] = sys.argv[2].split()
raise SystemExit(command.main(["launch.py", "--jobs", "1", *sys.argv[3:]]))
"""


def session(tests: str, ledger_text: str, folder: Path, *options: str) -> tuple[int, str, list[dict[str, str]]]:
    """Mutate launch.py against these tests: exit status, what was printed, the verdicts."""
    (folder / "ledger.toml").write_text(ledger_text)
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
    return done.returncode, done.stdout, json.loads(found.read_text())["mutants"]


def verdicts(found: list[dict[str, str]]) -> dict[str, set[str]]:
    functions: dict[str, set[str]] = {}
    for row in found:
        functions.setdefault(row["function"], set()).add(row["verdict"])
    return functions


def test_weak_tests_let_mutants_live_and_strong_ones_kill_them(tmp_path):
    status, printed, found = session("test_launch.py::test_rounding_up", "mutant = []", tmp_path)
    assert status == 1
    rounding, launch = {"cdiv": {"killed"}, "next_power_of_2": {"killed"}}, ("Launch.run", "Launch._options")
    assert verdicts(found) == {**rounding, **{key: {"survived"} for key in launch}}
    assert "+ if not PDL:" in printed
    status, printed, found = session("test_launch.py", "mutant = []", tmp_path)
    assert status == 0
    assert verdicts(found) == {**rounding, **{key: {"killed"} for key in launch}}
    assert {row["by"] for row in found if row["function"] == "cdiv"} == {"test_launch.py::test_rounding_up"}


def test_a_ledger_that_is_wrong_fails(tmp_path):
    """One entry has lost its mutant; the other claims what a test refutes."""
    status, printed, found = session("test_launch.py", ENTRY, tmp_path, "--verify")
    assert status == 1
    assert "launch.py:cdiv has no mutant 'return -(-a // b)' -> 'return -(-a + b)': delete the entry" in printed
    assert "test_rounding_up kills a mutant, expected none to" in printed
    assert {row["verdict"] for row in found} == {"killed"}


def test_a_mutant_is_not_left_in_an_endless_loop(monkeypatch):
    """Nor does it matter how the function came to be known: here it was imported by name."""

    class Endless(hosts.Tests):
        def passes(self, name: str) -> bool:
            while cdiv(7, 2) != 4:
                pass
            return True

    monkeypatch.setattr(hosts, "PATIENCE", 0.3)
    tests = Endless([])
    tests.seconds["endless"] = 0.0
    planted = [m for m in mutants(ROOT / "kernels" / "launch.py") if m.function in ("cdiv", "next_power_of_2")]
    endings = list(forked(lambda m: tests.judge(m, ["endless"]), planted, jobs=2))
    assert {ending.how for m, ending in endings if m.function == "cdiv"} == {"time limit"}
    assert {ending.value for m, ending in endings if m.function != "cdiv"} == {""}
    assert cdiv(7, 2) == 4, "the parent keeps its functions"


def test_a_mutant_has_one_line_before_and_after():
    mutant = Mutant("a.py", "f", 3, "operator", "x < y", "x <= y", "")
    assert str(mutant) == "a.py:3 f [operator]\n  - x < y\n  + x <= y"
    assert ledger.key(mutant) == ("a.py:f", "x < y", "x <= y")
