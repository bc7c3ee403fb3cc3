"""The tests that judge a mutant, collected by pytest once and run against it in a forked process."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .forks import allow
from .places import ROOT, Mutant
from .planting import install, write_package

PATIENCE = 5.0  # seconds of a processor that a test may take beyond twenty times what it took before


class Tests:
    """Collected tests by their names."""

    def __init__(self, items: list[pytest.Item]) -> None:
        self.items = {item.nodeid.removeprefix("tests/").partition("/")[2]: item for item in items}
        self.sound: set[str] = set()
        self.seconds: dict[str, float] = {}
        self.end = ""
        """Of the traceback of the last test, from the line that failed; empty if it passed."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.end = "File " + report.longreprtext.rpartition("File ")[2]

    def passes(self, name: str) -> bool:
        self.end = ""
        item = self.items[name]
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        return not self.end

    def measure(self, names: list[str]) -> list[str]:
        """These tests, the first case of each function first, cheap functions before others.

        What the first cases load and cache in this process, forks need not.
        """
        cases: dict[str, int] = {}
        rank = {}
        for name in names:
            test = function(name)
            if test not in self.seconds:
                start = time.perf_counter()
                self.check(name)
                self.seconds[test] = time.perf_counter() - start
            cases[test] = cases.get(test, 0) + 1
            rank[name] = (cases[test], self.seconds[test])
        return sorted(names, key=rank.__getitem__)

    def check(self, name: str) -> None:
        """A test that accuses a mutant has to pass without one."""
        if name not in self.sound:
            if not self.passes(name):
                raise AssertionError(f"{name} fails without a fault; expected to pass: run it with pytest")
            self.sound.add(name)

    def judge(self, mutant: Mutant, names: list[str]) -> str:
        """In a forked process: put the mutant in its function's place; the test that fails first, or ""."""
        allow(10)
        try:
            install(mutant)
        except Exception as error:  # the decorator refuses the function
            return type(error).__name__
        for name in names:
            allow(PATIENCE + 20 * self.seconds.get(function(name), 5.0))
            if not self.passes(name):
                return name
        return ""

    def judge_compiled(self, mutant: Mutant, names: list[str]) -> str:
        """In a forked process: the same for tests that compile in other processes, from a copy of the package."""
        with tempfile.TemporaryDirectory() as folder:
            write_package(mutant, Path(folder))
            os.chdir(folder)
            os.environ["TRITON_CACHE_DIR"] = str(Path(folder, "cache"))
            for name in names:
                allow(600)
                if not self.passes(name):
                    return name
        return ""


def _in_its_wing(pattern: str) -> str:
    file, _, test = pattern.partition("::")
    (path,) = ROOT.joinpath("tests").glob(f"*/{file}")
    return f"{path}::{test}" if test else str(path)


def function(test: str) -> str:
    """A test's name without its parameters."""
    return test.partition("[")[0]


def with_tests(patterns: list[str], body: Callable[[Tests], Any]) -> Any:
    """Call `body` inside a pytest session with these tests (`FILE::FUNCTION` with every parameter)."""
    host = _Host(body)
    options = ["-s", "--assert=plain", "--override-ini=addopts=", f"--rootdir={ROOT}", f"-c{ROOT / 'pyproject.toml'}"]
    for plugin in ("terminal", "cacheprovider", "faulthandler"):
        options += ["-p", f"no:{plugin}"]
    status = pytest.main([*options, *map(_in_its_wing, patterns)], plugins=[host])
    if host.error is not None:
        raise host.error
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest cannot collect the tests: {host.collection_error or status}")
    return host.result


class _Host:
    """A pytest plugin: it runs `body` where pytest would run the tests."""

    def __init__(self, body: Callable[[Tests], Any]) -> None:
        self.body = body
        self.result: Any = None
        self.error: BaseException | None = None
        self.collection_error = ""

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.collection_error = str(report.longrepr)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            return True
        session.config.option.tbstyle = "native"  # nobody reads them, and pytest's own parse the whole file
        tests = Tests(session.items)
        session.config.pluginmanager.register(tests)
        try:
            self.result = self.body(tests)
        except BaseException as error:
            self.error = error
        return True
