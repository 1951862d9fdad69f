"""`novafs install-units`: what the operating system must find outside of Python's packages.

Units of systemd, the helpers of mount(8) and umount(8), manual pages and shell completion, each with the path of this very novafs in
it. Repeating it, also after an upgrade, brings everything up to date and says what it did.

mount(8) takes a type that begins with `no` for a pattern: `-t novafs` means every type but `vafs`, and goes through /etc/filesystems, then
/proc/filesystems. So the type needs a line in /etc/filesystems (where there is none, one that goes on with the kernel's list, as without
the file). The type `fuse.novafs` works without it; it is what the kernel calls the mount.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import click

import novafs
from novafs.cli import common
from novafs.errors import AccessDeniedError, NotFoundError
from novafs.mounttable import NOVAFS_TYPE

_PACKAGED: Final = "/usr/bin/novafs"
"""What the units in the tree call."""
_SHELLS: Final = {
    "bash": "share/bash-completion/completions/novafs",
    "zsh": "share/zsh/site-functions/_novafs",
    "fish": "share/fish/vendor_completions.d/novafs.fish",
}


class _File(NamedTuple):
    """shared: others have lines in it, so its content is written in any case; none for a file that is to go."""

    path: Path
    content: str
    mode: int
    shared: bool = False


@click.command("install-units")
@click.option("--prefix", type=click.Path(path_type=Path), default=Path("/usr/local"), metavar="DIR", help="Default: /usr/local.")
@click.option("--root", type=click.Path(path_type=Path), default=Path("/"), metavar="DIR", help="Install below DIR, for packaging.")
@click.option("--novafs", "program", metavar="PATH", help="The novafs that the units call; default: this one.")
@click.option("--remove", is_flag=True, help="Take all of it away again.")
def install_units(prefix: Path, root: Path, program: str | None, remove: bool) -> None:
    """Install systemd units, the mount helper, manual pages and shell completion.

    Run it as root after installing or upgrading NovaFS. Nothing is started or enabled: 'systemctl enable --now novafs@NAME' does that
    for the volume of /etc/novafs/NAME.toml.
    """
    changed = False
    files = list(_files(prefix, root, program))
    if root == Path("/"):  # it belongs to no package
        files.append(_filesystems(Path("/etc/filesystems"), remove=remove))
    for file in files:
        try:
            outcome = _remove(file) if remove and not file.shared else _install(file)
        except OSError as error:
            raise AccessDeniedError(
                f"{file.path}: {error.strerror}; run as root, or choose other places with --prefix and --root"
            ) from error
        changed |= outcome != "unchanged"
        common.emit(f"{outcome:<9} {file.path}")
    if changed and root == Path("/") and Path("/run/systemd/system").is_dir():
        done = subprocess.run(["systemctl", "daemon-reload"], capture_output=True, text=True, check=False)
        common.emit("systemd has read the units" if done.returncode == 0 else f"systemctl daemon-reload failed: {done.stderr.strip()}")


def _files(prefix: Path, root: Path, program: str | None) -> Iterator[_File]:
    from novafs.cli.manpages import pages

    below = root / prefix.relative_to("/") if prefix.is_absolute() else root / prefix
    words = [program] if program is not None else _program()
    command = " ".join(_unit_word(word) for word in words)
    for source in sorted(_unit_sources()):
        yield _File(below / "lib/systemd/system" / source.name, source.read_text().replace(_PACKAGED, command), 0o644)
    # mount(8) looks for its helpers in /sbin and nowhere else; where that is a link, it is one to /usr/sbin.
    sbin = root / "sbin" if (root / "sbin").is_dir() and not (root / "sbin").is_symlink() else root / "usr/sbin"
    for name in ("mount.novafs", f"mount.{NOVAFS_TYPE}", f"umount.{NOVAFS_TYPE}"):
        call = " ".join(map(shlex.quote, [sys.executable, "-P", "-m", "novafs.cli.mount_helper", name.partition(".")[0]]))
        yield _File(sbin / name, f'#!/bin/sh\n# Installed by novafs install-units.\nexec {call} "$@"\n', 0o755)
    for page, text in pages().items():
        yield _File(below / f"share/man/man{page[-1]}" / page, text, 0o644)
    for shell, place in _SHELLS.items():
        yield _File(below / place, completion(shell), 0o644)


def _filesystems(path: Path, *, remove: bool) -> _File:
    """/etc/filesystems with or without our line; empty where nothing is left to say."""
    text = path.read_text(errors="surrogateescape") if path.is_file() else "*"
    lines = [line for line in text.splitlines() if line.strip() != "novafs"]
    if not remove:
        # A last line `*` goes on with what the kernel knows.
        lines.insert(len(lines) - (lines[-1:] == ["*"]), "novafs")
    return _File(path, "" if lines in ([], ["*"]) else "\n".join(lines) + "\n", 0o644, shared=True)


def _program() -> list[str]:
    """This novafs, as words of a command."""
    called = Path(sys.argv[0])
    for script in (called, Path(sysconfig.get_path("scripts"), "novafs")):
        if script.name == "novafs" and script.is_file() and os.access(script, os.X_OK):
            return [str(script.absolute())]
    return [sys.executable, "-P", "-m", "novafs.cli"]


def _unit_word(word: str) -> str:
    """A word of ExecStart= (systemd.service(5)): no specifier, no variable, one word."""
    text = word.replace("%", "%%").replace("$", "$$")
    return text if re.fullmatch(r"[A-Za-z0-9_./%$+@:-]+", text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _unit_sources() -> list[Path]:
    """The units: in the tree, or where the wheel has put them. Raises NotFoundError."""
    tree = Path(novafs.__file__).parents[1] / "systemd"
    found = list(tree.glob("novafs*@.*"))
    if not found:
        files = importlib.metadata.files("novafs") or []
        found = [Path(str(file.locate())) for file in files if file.match("share/novafs/systemd/novafs*@.*")]
    if not found:
        raise NotFoundError("the units are missing in this installation of NovaFS: install it anew with pip")
    return found


def completion(shell: str) -> str:
    """The completion of `novafs` for bash, zsh or fish: a script that asks novafs itself."""
    from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

    from novafs.cli import group

    kinds: dict[str, type[ShellComplete]] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}
    # Not BashComplete.source: it starts bash to look at its version.
    return ShellComplete.source(kinds[shell](group, {}, "novafs", "_NOVAFS_COMPLETE"))


def _install(file: _File) -> str:
    exists = file.path.is_file()
    if not file.content:
        return _remove(file)
    content = file.content.encode(errors="surrogateescape")
    if exists and file.path.read_bytes() == content and file.path.stat().st_mode & 0o777 == file.mode:
        return "unchanged"
    missing = [part for part in file.path.parents if not part.exists()]
    file.path.parent.mkdir(parents=True, exist_ok=True)
    for part in missing:
        part.chmod(0o755)  # whatever root's umask is: others read manual pages
    temporary = file.path.with_name(f".{file.path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.chmod(file.mode)
    temporary.replace(file.path)
    return "updated" if exists else "installed"


def _remove(file: _File) -> str:
    if not file.path.is_file():
        return "unchanged"
    file.path.unlink()
    return "removed"
