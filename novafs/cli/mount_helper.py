"""`mount.novafs` and `umount.fuse.novafs`: what mount(8) and umount(8) call, and with them fstab and systemd's mount units.

    mount.novafs VOLUME DIR [-fnrsvw] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]
    umount.fuse.novafs DIR [-flnrv] [-N NAMESPACE] [-t TYPE]

Under mount(8) a mount is what `novafs mount` makes, and umount(8) returns when everything is stored, as with a disk. Exit statuses are
mount(8)'s: 1 wrong usage or options, or not allowed; 4 a bug of ours; 8 interrupted; 32 the mount failed. What goes wrong is one line.
"""

from __future__ import annotations

import contextlib
import getopt
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from novafs import logs
from novafs.cli import common, error_line, plain
from novafs.cli.common import Settings
from novafs.cli.hidden import hide_arguments
from novafs.cli.mount import mount_volume
from novafs.cli.umount import unmount
from novafs.errors import AccessDeniedError, BugError, ConfigError, InvalidNameError, NovaError, UserError
from novafs.mountoptions import known_option
from novafs.mounttable import NOVAFS_TYPE

USAGE: Final = 1
SYSTEM: Final = 2
BUG: Final = 4
INTERRUPTED: Final = 8
FAILED: Final = 32

_WRONG: Final = (ConfigError, InvalidNameError, AccessDeniedError)


class _Call(NamedTuple):
    """flags: letters of those that were given."""

    flags: frozenset[str]
    namespace: str
    options: tuple[str, ...]
    operands: tuple[str, ...]


def _parse(arguments: Sequence[str], letters: str, usage: str) -> _Call:
    try:
        found, operands = getopt.gnu_getopt(list(arguments), letters)
    except getopt.GetoptError as error:
        raise ConfigError(f"{error.msg}; usage: {usage}") from error
    values: dict[str, list[str]] = {}
    for letter, value in found:
        values.setdefault(letter[1:], []).append(value)
    return _Call(frozenset(values), values.get("N", [""])[-1], tuple(values.get("o", [])), tuple(operands))


def _mount(arguments: Sequence[str]) -> int:
    usage = "mount -t novafs VOLUME DIR [-o OPTIONS]"
    call = _parse(arguments, "fnrsvwhN:o:t:", usage)
    if "h" in call.flags or len(call.operands) != 2:
        raise ConfigError(f"expected a volume and a directory, found {len(call.operands)} operands; usage: {usage}")
    _enter(call, "mount")
    verbose = int("v" in call.flags)
    common.configure_logging(verbose)
    volume, directory = call.operands
    # mount(8) says rw wherever nobody says ro: it is no wish that could stand against the volume's own mount_options.
    words = [word for option in call.options for word in _words(option) if word != "rw"] + (["ro"] if "r" in call.flags else [])
    if "s" in call.flags:
        words = [word for word in words if known_option(word)]
    return mount_volume(volume, directory, words, Settings({}, None, verbose), pretend="f" in call.flags, quiet=not verbose)


def _words(options: str) -> list[str]:
    """The words of one `-o`, each with its escaped commas."""
    words, start = [], 0
    for end, character in enumerate(options + ","):
        if character == "," and (end == 0 or options[end - 1] != "\\"):
            words.append(options[start:end])
            start = end + 1
    return [word for word in words if word.strip()]


def _umount(arguments: Sequence[str]) -> int:
    usage = "umount DIR [-l] [-f]"
    call = _parse(arguments, "flnrvhN:o:t:", usage)
    if "h" in call.flags or len(call.operands) != 1:
        raise ConfigError(f"expected a directory, found {len(call.operands)} operands; usage: {usage}")
    _enter(call, "umount")
    common.configure_logging(int("v" in call.flags))
    directory = call.operands[0]
    if "f" in call.flags:
        # The kernel aborts the connection: for a daemon that hangs. What it had not stored is in its journal.
        program = shutil.which("umount", path="/bin:/usr/bin:/sbin:/usr/sbin")
        if program is None:
            raise ConfigError("umount is not installed")
        os.execv(program, [program, "-i", "-f", *(["-l"] if "l" in call.flags else []), directory])  # noqa: S606  # no shell on purpose
    unmount(directory, lazy="l" in call.flags)
    return 0


def _enter(call: _Call, name: str) -> None:
    """Go on as the helper `name` in the mount name space that `-N` names; mount(8) calls its helpers in its own."""
    namespace = call.namespace
    if not namespace:
        return
    program = shutil.which("nsenter", path="/usr/bin:/bin:/usr/sbin:/sbin")
    if program is None:
        raise ConfigError(f"-N {namespace}: nsenter is not installed: install the package util-linux")
    flags = [f"-{flag}" for flag in sorted(call.flags - {"N", "o", "t"})]
    options = [word for option in call.options for word in ("-o", option)]
    command = [sys.executable, "-P", "-m", "novafs.cli.mount_helper", name, *flags, *options, "--", *call.operands]
    path = namespace if "/" in namespace else f"/proc/{namespace}/ns/mnt"
    os.execv(program, [program, f"--mount={path}", "--", *command])  # noqa: S606  # no shell on purpose


def _run(work: Callable[[Sequence[str]], int], name: str, arguments: Sequence[str]) -> int:
    try:
        status = work(arguments)
    except BaseException as error:
        cause = plain(error)
        if isinstance(cause, KeyboardInterrupt):
            return INTERRUPTED
        if not isinstance(cause, (NovaError, OSError)) or isinstance(cause, BugError):
            sys.stderr.write(logs.scrubbed("".join(traceback.format_exception(error))))
            return BUG
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{name}: {error_line(cause)}\n")
        return USAGE if isinstance(cause, _WRONG) else FAILED if isinstance(cause, UserError | NovaError) else SYSTEM
    return FAILED if status else 0


def main(arguments: Sequence[str]) -> int:
    """`mount` or `umount`, and the arguments of the helper of that name; the exit status."""
    name, *rest = arguments
    return _run(_umount, f"umount.{NOVAFS_TYPE}", rest) if name == "umount" else _run(_mount, "mount.novafs", rest)


if __name__ == "__main__":
    hide_arguments()
    sys.exit(main(sys.argv[1:]))
