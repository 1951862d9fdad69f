"""The command line: `novafs COMMAND …`, one module per command.

What always holds: exit status 0 means done, 1 failed, 2 wrong usage, 3 that this host lacks what a mount needs, 130 interrupted; what goes
wrong is one line on stderr that begins with `novafs: `; a traceback is shown for a bug, or with `-vv`. Results go to stdout, all else to
stderr. (A service manager starts a mount again after a 1, and not after a 2 or 3.)

A command's module is imported when it is called, and imports what is light; boto3, numpy, trio and rich are imported by the command
that needs them, when it runs, so that `novafs --help` and a wrong word answer at once.
"""

from __future__ import annotations

import atexit
import contextlib
import gc as gc_  # beside the command
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Final

import click

import novafs
from novafs import logs
from novafs.cli import common
from novafs.cli.hidden import hide_arguments
from novafs.errors import BugError, ConfigError, InvalidNameError, NotInstalledError, NovaError

INTERRUPTED: Final = 130
NOT_INSTALLED: Final = 3
_USAGE_ERRORS: Final = (ConfigError, InvalidNameError)
GARBAGE_AFTER: Final = (10_000, 10, 10)
"""What a command imports is a hundred thousand objects that stay, and Python looks through the youngest after each 700 of them: that was
a seventh of a command's start."""
COMMANDS: Final = (
    "init",
    "mount",
    "umount",
    "reload",
    "import",
    "export",
    "ls",
    "info",
    "rm",
    "clone",
    "snapshot",
    "snapshots",
    "rollback",
    "gc",
    "fsck",
    "lease",
    "stats",
    "top",
    "bench",
    "simulate",
    "warm",
    "model",
    "handoff",
    "install-units",
)
"""Each is in the module of its name, under its name."""


class _Group(click.Group):
    """Imports the module of a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's
        return sorted({*COMMANDS, *self.commands})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            name = "import_" if cmd_name == "import" else cmd_name.replace("-", "_")
            self.add_command(getattr(importlib.import_module(f"novafs.cli.{name}"), name))
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(novafs.__version__, prog_name="novafs", message="%(prog)s %(version)s")
def group() -> None:
    """A directory of virtual-machine disk images whose bytes live once, compressed, in an object store.

    VOLUME is a URL (file:///var/lib/novafs/v, s3://bucket/prefix?endpoint=http://127.0.0.1:7480&region=us-east-1) or the
    NAME of a file /etc/novafs/NAME.toml. IMAGE is a path inside the volume.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. The console script's entry point."""
    _complete_streams()
    if arguments is None:
        gc_.set_threshold(*GARBAGE_AFTER)
        # Nothing that is left at the end is looked through for cycles: that would take a fifth of what a short command takes.
        atexit.register(gc_.freeze)
        hide_arguments()
    try:
        status = group.main(args=None if arguments is None else list(arguments), prog_name="novafs", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except SystemExit as error:  # click's way out when stdout has been closed
        return error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        return _failed(error)


def _complete_streams() -> None:
    """What was closed by the caller (`>&-`) becomes /dev/null: a file that is opened next must not get its number."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w" if fd else "r", encoding="utf-8", closefd=False))  # noqa: SIM115  # for good


def _failed(error: BaseException) -> int:
    cause = plain(error)
    if isinstance(cause, (KeyboardInterrupt, click.Abort)):
        common.say("interrupted; nothing half done is visible, run again")
        return INTERRUPTED
    if isinstance(cause, BrokenPipeError):
        # Whoever read our output has gone. The interpreter flushes stdout once more at its end, which must not fail again.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    ours = isinstance(cause, (NovaError, OSError)) and not isinstance(cause, BugError)
    if not ours or common.verbosity() >= 2:
        sys.stderr.write(logs.scrubbed("".join(traceback.format_exception(error))))
    if ours:
        common.say(error_line(cause), error=True)
    else:
        common.say(
            f"this is a bug in NovaFS {novafs.__version__}, please report it with the lines above and the command: {error_line(cause)}",
            error=True,
        )
    return exit_status(cause)


def exit_status(error: BaseException) -> int:
    """2 for a command that was wrong as it was written, 3 for what is to be installed first, else 1."""
    if isinstance(error, _USAGE_ERRORS):
        return 2
    return NOT_INSTALLED if isinstance(error, NotInstalledError) else 1


def error_line(error: BaseException) -> str:
    """The error as one line, without control characters that a name in it might smuggle into the terminal."""
    text = str(error) if isinstance(error, (NovaError, OSError)) else f"{type(error).__name__}: {error}"
    return logs.scrubbed(common.printable(" ".join(text.split()))) or type(error).__name__


def plain(error: BaseException) -> BaseException:
    """The one error to show of a group: an interruption, else the first of ours, else the first that is no cancellation."""
    leaves = list(_leaves(error))
    for kind in (KeyboardInterrupt, NovaError, BrokenPipeError):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    return next((leaf for leaf in leaves if type(leaf).__name__ != "Cancelled"), error)


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for child in error.exceptions for leaf in _leaves(child)]
    return [error]
