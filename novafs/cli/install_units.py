"""`novafs install-units`: what the operating system must find outside of Python's packages.

Units of systemd, the helpers of mount(8) and umount(8), manual pages and shell completion, each with the path of this very novafs in
it. Repeating it, also after an upgrade, brings everything up to date and says what it did. Each file ends with a line that names it as
ours and carries a checksum of the rest: what has no such line, or another content than it says, was put there or changed by somebody, and
is kept beside (`.novafs-saved`) before it is replaced or removed.

mount(8) takes a type that begins with `no` for a pattern: `-t novafs` means every type but `vafs`, and goes through /etc/filesystems, then
/proc/filesystems. So the type needs a line in /etc/filesystems (where there is none, one that goes on with the kernel's list, as without
the file). The type `fuse.novafs` works without it; it is what the kernel calls the mount.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
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


_STAMP: Final = "Installed by novafs install-units; checksum of the lines above: "


class _File(NamedTuple):
    """shared: others have lines in it, so its content is written in any case; none for a file that is to go. Else it ends with a stamp."""

    path: Path
    content: str
    mode: int
    shared: bool = False


class _Outcome(NamedTuple):
    """word: what was done with a file; saved: where what was there and is not ours is kept."""

    word: str
    saved: Path | None = None


def _stamped(content: str, comment: str = "#") -> str:
    return f"{content}{comment} {_STAMP}{_checksum(content)}\n"


def _checksum(content: str) -> str:
    return hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()[:16]


def _is_ours(path: Path) -> bool:
    """Whether the file is as some novafs has left it."""
    if path.is_symlink() or not path.is_file():
        return False
    content, found, checksum = path.read_text(errors="surrogateescape").rpartition(_STAMP)
    above = content[: content.rfind("\n") + 1]
    return bool(found) and checksum.rstrip("\n") == _checksum(above)


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
    saved: list[Path] = []
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
        changed |= outcome.word != "unchanged"
        common.emit(f"{outcome.word:<9} {file.path}")
        if outcome.saved is not None:
            saved.append(outcome.saved)
            common.emit(f"{'':<9} it was not as novafs had left it: that is kept as {outcome.saved}")
    if any(path.name.startswith("novafs") and "@." in path.name for path in saved):
        common.emit(
            "what you change in a unit belongs into a drop-in, which stays: systemctl edit novafs@.service (or novafs@NAME.service)"
        )
    if changed and root == Path("/") and Path("/run/systemd/system").is_dir():
        done = subprocess.run(["systemctl", "daemon-reload"], capture_output=True, text=True, check=False)
        common.emit("systemd has read the units" if done.returncode == 0 else f"systemctl daemon-reload failed: {done.stderr.strip()}")


def _files(prefix: Path, root: Path, program: str | None) -> Iterator[_File]:
    from novafs.cli.manpages import pages

    below = root / prefix.relative_to("/") if prefix.is_absolute() else root / prefix
    words = [program] if program is not None else _program()
    command = " ".join(_unit_word(word) for word in words)
    for source in sorted(_unit_sources()):
        yield _File(below / "lib/systemd/system" / source.name, _stamped(source.read_text().replace(_PACKAGED, command)), 0o644)
    # mount(8) looks for its helpers in /sbin and nowhere else; where that is a link, it is one to /usr/sbin.
    sbin = root / "sbin" if (root / "sbin").is_dir() and not (root / "sbin").is_symlink() else root / "usr/sbin"
    for name in ("mount.novafs", f"mount.{NOVAFS_TYPE}", f"umount.{NOVAFS_TYPE}"):
        call = " ".join(map(shlex.quote, [sys.executable, "-P", "-m", "novafs.cli.mount_helper", name.partition(".")[0]]))
        yield _File(sbin / name, _stamped(f'#!/bin/sh\nexec {call} "$@"\n'), 0o755)
    for page, text in pages().items():
        yield _File(below / f"share/man/man{page[-1]}" / page, _stamped(text, '.\\"'), 0o644)
    for shell, place in _SHELLS.items():
        yield _File(below / place, _stamped(completion(shell).rstrip("\n") + "\n"), 0o644)


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


def _install(file: _File) -> _Outcome:
    exists = os.path.lexists(file.path)
    if not file.content:
        return _remove(file)
    content = file.content.encode(errors="surrogateescape")
    same = file.path.is_file() and not file.path.is_symlink() and file.path.read_bytes() == content
    if same and file.path.stat().st_mode & 0o777 == file.mode:
        return _Outcome("unchanged")
    saved = None if same or not exists else _save(file)
    missing = [part for part in file.path.parents if not part.exists()]
    file.path.parent.mkdir(parents=True, exist_ok=True)
    for part in missing:
        part.chmod(0o755)  # whatever root's umask is: others read manual pages
    temporary = file.path.with_name(f".{file.path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.chmod(file.mode)
    temporary.replace(file.path)
    return _Outcome("replaced" if saved is not None else "updated" if exists else "installed", saved)


def _save(file: _File) -> Path | None:
    """Put aside what is there and is not ours; where."""
    if file.shared or _is_ours(file.path):
        return None
    saved = file.path.with_name(f"{file.path.name}.novafs-saved")
    for number in itertools.count(2):
        if not os.path.lexists(saved):
            break
        saved = file.path.with_name(f"{file.path.name}.novafs-saved.{number}")
    file.path.rename(saved)
    return saved


def _remove(file: _File) -> _Outcome:
    if not os.path.lexists(file.path):
        return _Outcome("unchanged")
    saved = _save(file)
    file.path.unlink(missing_ok=True)
    return _Outcome("removed", saved)
