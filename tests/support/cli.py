"""The `novafs` command in a process of its own, as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def novafs(*arguments: object, environ: Mapping[str, str] | None = None, timeout_s: float = 600, status: int = 0) -> str:
    """Runs the command and returns what it printed. Raises AssertionError with its errors where its exit status is not `status`."""
    command = [sys.executable, "-m", "novafs.cli", *map(str, arguments)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env={**os.environ, **(environ or {})}, timeout=timeout_s
    )
    assert done.returncode == status, (
        f"novafs {' '.join(map(str, arguments))} ended with status {done.returncode}:\n{done.stdout}{done.stderr}"
    )
    return done.stdout


def novafs_json(*arguments: object, environ: Mapping[str, str] | None = None, status: int = 0) -> Any:
    """The same with ``--json``: what it printed, decoded."""
    return json.loads(novafs(*arguments, "--json", environ=environ, status=status))
