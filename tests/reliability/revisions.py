"""What of `kernels/` has changed, as far as a clone can tell."""

from __future__ import annotations

import subprocess
from pathlib import Path


def changed(revision: str, root: Path) -> set[str] | None:
    """Names of the kernels' files that differ from where HEAD left `revision`; None where nothing tells.

    Where that is no news (`revision` holds HEAD, as after a push, or is unknown here), from the commit before HEAD. A
    clone of one commit knows none before it.
    """
    head, left = _git(root, "rev-parse", "HEAD"), _git(root, "merge-base", revision, "HEAD")
    differing = _git(root, "diff", "--name-only", left, "--", "kernels") if left else None
    if not differing and left in (None, head):
        differing = _git(root, "diff", "--name-only", "HEAD~1", "--", "kernels")
    return None if differing is None else {Path(name).name for name in differing.split()}


def _git(root: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], cwd=root, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
