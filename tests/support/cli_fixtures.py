"""The command line within the test's own process: fast, and what it prints is captured; a pytest plugin.

`tests.support.cli` runs it in a process of its own, which is what a user has, and needed where stdin or stdout matter.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from novafs import cli
from novafs.cli import common
from novafs.logs import OURS


class Result(NamedTuple):
    """What a command left: exit status, stdout, stderr."""

    status: int
    out: str
    err: str


class Cli:
    """Runs commands."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def run(self, *arguments: object) -> Result:
        """One command, whatever comes of it."""
        self._capture.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        out, err = self._capture.readouterr()
        return Result(status, out, err)

    def __call__(self, *arguments: object) -> str:
        """What a command printed, which must succeed."""
        result = self.run(*arguments)
        assert result.status == 0, f"{arguments} ended with status {result.status}: {result.err}"
        return result.out

    def json(self, *arguments: object) -> Any:
        """The document that a command printed with --json."""
        return json.loads(self(*arguments, "--json"))

    def fails(self, *arguments: object, status: int = 1) -> str:
        """The one line on stderr of a command that must fail with this status, without its `novafs: `."""
        result = self.run(*arguments)
        lines = result.err.splitlines()
        assert result.status == status, f"{arguments} ended with status {result.status}: {result.err}"
        assert "Traceback" not in result.err, result.err
        assert lines, "nothing was said"
        assert lines[-1].startswith("novafs: "), result.err
        assert len(lines) == 1, result.err
        return lines[-1].removeprefix("novafs: ")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """What a test sets up for logging in this process is undone after it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    levels = {name: logging.getLogger(name).level for name in OURS}
    yield
    root.handlers[:] = [handler for handler in root.handlers if handler in handlers]
    root.handlers += [handler for handler in handlers if handler not in root.handlers]
    root.setLevel(level)
    for name, old in levels.items():
        logging.getLogger(name).setLevel(old)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """The command line; what it sets up in this process is undone."""
    yield Cli(capsys)
    common._verbosity = 0


class LocalVolume:
    """A new, empty volume in a directory. options: to be given with every command."""

    def __init__(self, command: Cli, directory: Path, *more: str) -> None:
        self.command = command
        self.root = directory / "store"
        self.url = f"file://{self.root}"
        self.state = directory / "state"
        self.options = ("--l2-url", "none", "--state-dir", str(self.state))
        command("init", self.url, *self.options, *more)

    def __call__(self, name: str, *arguments: object) -> str:
        """`novafs NAME VOLUME ARGUMENTS…`, which must succeed."""
        return self.command(name, self.url, *arguments, *self.options)

    def json(self, name: str, *arguments: object) -> Any:
        """The same with --json."""
        return self.command.json(name, self.url, *arguments, *self.options)

    def fails(self, name: str, *arguments: object, status: int = 1) -> str:
        """The same where it must fail: what it says."""
        return self.command.fails(name, self.url, *arguments, *self.options, status=status)

    def names(self, path: str = "") -> list[str]:
        """Names in a directory of the volume."""
        return [row["name"] for row in self.json("ls", path)]


@pytest.fixture
def local_volume(command: Cli, tmp_path: Path) -> LocalVolume:
    """A new, empty volume in a directory."""
    return LocalVolume(command, tmp_path)
