"""Faults planted in the source of our kernels, to see that a check finds them."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock


@contextlib.contextmanager
def planted(file: str, old: str, new: str, *users: ModuleType) -> Iterator[None]:
    """A kernels' file with this change takes the file's own place, for the package and for `users`."""
    original = importlib.import_module(f"resnet_triton.kernels.{file}")
    source = Path(original.__file__ or "").read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {file}.py, expected once"
    package = [module for name, module in sys.modules.items() if name.startswith("resnet_triton.")]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = Path(folder, "planted.py")  # a file, because Triton reads the source of a function from it
        path.write_text(source.replace(old, new), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"resnet_triton.kernels.planted_{file}", path)
        assert spec is not None
        assert spec.loader is not None
        changed = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(changed)
        for name, value in list(vars(changed).items()):
            before = getattr(original, name)
            if callable(value) and value is not before:
                for user in (*package, *users):
                    for alias in [alias for alias, held in vars(user).items() if held is before]:
                        stack.enter_context(mock.patch.object(user, alias, value))
        yield
