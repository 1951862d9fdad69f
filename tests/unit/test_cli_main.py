"""The frame of all commands: exit status, one line for what goes wrong, options made from the table of keys."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

import novafs
from novafs import cli
from novafs.cli import common
from novafs.configkeys import KEYS
from novafs.errors import BugError, ConfigError, InvalidNameError, NotFoundError, StoreUnavailableError
from tests.support.cli_fixtures import Cli, LocalVolume

COMMANDS = ["init", "mount", "umount", "import", "export", "ls", "info", "rm", "stats"]
WITH_VOLUME = [name for name in COMMANDS if name != "umount"]


def test_help_lists_every_command(command: Cli) -> None:
    text = command("--help")
    for name in COMMANDS:
        assert f"  {name} " in text
    assert command("-h") == text


def test_the_version_is_that_of_the_package(command: Cli) -> None:
    assert command("--version") == f"novafs {novafs.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(command: Cli, name: str) -> None:
    assert command(name, "--help").startswith("Usage: novafs " + name)


@pytest.mark.parametrize("name", WITH_VOLUME)
def test_every_command_with_a_volume_has_the_options_of_the_table(command: Cli, name: str) -> None:
    text = command(name, "--help")
    for key in KEYS:
        assert (f"{key.flag_name} " in text) == key.flag
    for option in ("--config FILE", "--set KEY=VALUE", "--verbose"):
        assert option in text


def test_help_loads_none_of_the_heavy_libraries() -> None:
    code = """
import sys
from novafs.cli import main
main(["mount", "--help"])
heavy = {"boto3", "numpy", "trio", "redis", "rich", "lz4", "pyfuse3"}
sys.exit(", ".join(sorted(heavy & set(sys.modules))) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lss"], "No such command"),
        (["ls"], "Missing argument 'VOLUME'"),
        (["ls", "file:///x", "--jason"], "No such option"),
        (["ls", "file:///x", "a", "b"], "unexpected extra argument"),
        (["import", "file:///x", "-"], "IMAGE is needed: standard input has no name"),
        (["import", "file:///x", "y", "--workers", "0"], "0 is not in the range"),
        (["rm", "file:///x"], "Missing argument 'IMAGE...'"),
    ],
)
def test_wrong_usage_has_status_two(command: Cli, arguments: list[str], said: str) -> None:
    result = command.run(*arguments)
    assert result.status == 2
    assert said in result.err
    assert result.out == ""


def test_a_setting_without_a_value_is_wrong_usage(command: Cli) -> None:
    assert "--set l1.codec: expected KEY=VALUE" in command.fails("ls", "file:///x", "--set", "l1.codec", status=2)
    assert "unknown key 'l1.codex'; did you mean 'l1.codec'?" in command.fails("ls", "file:///x", "--set", "l1.codex=x", status=2)


def test_settings_of_every_kind_reach_the_configuration(command: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.toml"
    file.write_text('[l2]\ncodec = "gzip"\nurl = "redis://:hunter2@h"\n')
    monkeypatch.setenv("NOVAFS_L2_TIMEOUT", "2s")
    options = ("--config", file, "--l1-capacity", "5M", "--set", "store.requests_max=3", "--set", "l1.codec=zstd", "--settings")
    found = command.json("info", "file:///x", *options)
    assert found["l1.capacity"] == {"value": "5.0 MiB", "origin": "--l1-capacity"}
    assert found["l2.codec"] == {"value": "gzip", "origin": f"{file} line 2"}
    assert found["l2.timeout"] == {"value": "2.0 s", "origin": "the environment variable NOVAFS_L2_TIMEOUT"}
    assert found["store.requests_max"] == {"value": "3", "origin": "the setting store.requests_max"}
    assert found["l2.url"]["value"] == "redis://***@h"
    text = command("info", "file:///x", *options)
    assert "hunter2" not in text
    assert "l1.codec " in text


# --- errors ---------------------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    @click.command("fail")
    @common.volume_options
    def fail(settings: common.Settings) -> None:
        raise error

    monkeypatch.setitem(cli.group.commands, "fail", fail)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotFoundError("a.raw: no such image"), 1),
        (StoreUnavailableError("the store is away"), 1),
        (ConfigError("a key"), 2),
        (InvalidNameError("a name"), 2),
        (OSError(28, "No space left on device", "/x"), 1),
        (ExceptionGroup("g", [ValueError("x"), ExceptionGroup("h", [NotFoundError("deep")])]), 1),
    ],
)
def test_an_error_is_one_line_and_a_status(command: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int) -> None:
    failing(monkeypatch, error)
    line = command.fails("fail", status=status)
    assert line == ("deep" if isinstance(error, ExceptionGroup) else str(error))


def test_an_error_has_its_traceback_when_asked_for(command: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, NotFoundError("a.raw"))
    result = command.run("fail", "-vv")
    assert result.status == 1
    assert "Traceback" in result.err
    assert result.err.endswith("novafs: a.raw\n")
    assert "Traceback" not in command.run("fail", "-v").err


@pytest.mark.parametrize(
    "error", [BugError("the map is empty"), ZeroDivisionError("division by zero"), ExceptionGroup("g", [KeyError("x")])]
)
def test_a_bug_shows_its_traceback_and_asks_to_be_reported(command: Cli, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    failing(monkeypatch, error)
    result = command.run("fail")
    assert result.status == 1
    assert "Traceback" in result.err
    assert f"novafs: this is a bug in NovaFS {novafs.__version__}, please report it with the lines above" in result.err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BaseExceptionGroup("g", [KeyboardInterrupt(), ValueError("x")])])
def test_an_interruption_says_that_nothing_is_half_done(command: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    failing(monkeypatch, error)
    result = command.run("fail")
    assert result.status == 130
    assert result.err.strip() == "novafs: interrupted; nothing half done is visible, run again"


def test_a_message_of_several_lines_or_with_control_characters_is_made_one_line(command: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, NotFoundError("a\nb\t\x1b[31mred\udcff"))
    assert command.fails("fail") == "a b \\x1b[31mred\\udcff"


def test_a_reader_that_goes_away_is_no_error(local_volume: LocalVolume) -> None:
    code = "import sys; from novafs.cli import main; sys.exit(main(sys.argv[1:]))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code, "info", local_volume.url, *local_volume.options], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_ctrl_c_ends_a_command_with_its_own_status(local_volume: LocalVolume) -> None:
    command = [sys.executable, "-m", "novafs.cli", "import", local_volume.url, "-", "image.raw", *local_volume.options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write("\0" * (9 << 20))  # more than the import reads at once: it has begun
        process.stdin.flush()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read().strip() == "novafs: interrupted; nothing half done is visible, run again"
    assert local_volume.names() == []


def test_what_stderr_is_does_not_matter(command: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, _text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    dup2: Callable[..., None] = lambda *_: None  # noqa: E731
    monkeypatch.setattr(os, "dup2", dup2)
    monkeypatch.setattr(sys, "stderr", Gone())
    common.say("to nobody")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_does_not_matter(local_volume: LocalVolume, closed: str) -> None:
    command = [sys.executable, "-m", "novafs.cli", "info", local_volume.url, *local_volume.options]
    result = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *command], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
