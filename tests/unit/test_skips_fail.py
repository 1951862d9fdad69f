"""The rule of conftest.py: with CI=true a run in which a test was skipped fails, and says which."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TESTS = """
import pytest

def test_runs():
    pass

@pytest.mark.xfail(reason="known")
def test_is_known_to_fail():
    assert False
"""
SKIPPED = """
@pytest.mark.skipif(True, reason="no such device")
def test_is_skipped():
    pass
"""


@pytest.mark.parametrize(
    ("ci", "skipped", "status"), [("true", True, 1), ("true", False, 0), ("", True, 0)], ids=["CI, skipped", "CI, none skipped", "no CI"]
)
def test_a_skipped_test_fails_the_run_in_ci_alone(tmp_path: Path, ci: str, skipped: bool, status: int) -> None:
    (tmp_path / "test_some.py").write_text(TESTS + (SKIPPED if skipped else ""))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "tests.conftest",
            "-c",
            os.devnull,
            "--rootdir",
            tmp_path,
            "-p",
            "no:cacheprovider",
            tmp_path,
        ],
        env={**os.environ, "CI": ci, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert ("test_is_skipped: Skipped: no such device" in done.stdout) == (status == 1)
    assert "test_is_known_to_fail: " not in done.stdout
