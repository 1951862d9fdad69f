"""The manual pages, made from the commands themselves: novafs(1), and mount.novafs(8).

`python -m novafs.cli.manpages DIRECTORY` writes both; `docs/man` holds them, and a test checks that they are current.
`novafs install-units` installs what this makes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

import click

import novafs
from novafs.configkeys import BY_OPTION, KEYS

_COMMON: Final = ("--set", "--config", "--verbose", *(key.flag_name for key in KEYS if key.flag))


def pages() -> dict[str, str]:
    """The text of each page by its file's name."""
    return {"novafs.1": _novafs(), "mount.novafs.8": _mount_novafs()}


def _novafs() -> str:
    from novafs.cli import group

    context = click.Context(group, info_name="novafs")
    lines = [
        _title("NOVAFS", 1),
        _section("NAME", "novafs - a directory of virtual-machine disk images in an object store"),
        ".SH SYNOPSIS\n.B novafs\n.I COMMAND\n[\\fIOPTIONS\\fR] \\fIARGUMENTS\\fR",
        _section("DESCRIPTION", group.help or ""),
        ".SH COMMANDS",
    ]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is not None and not command.hidden:
            lines += _command(command, f"novafs {name}", context)
    common = group.get_command(context, "info")
    lines.append(_section("COMMON OPTIONS", "Commands that use a volume take these, too."))
    for parameter in common.params if common is not None else ():
        record = parameter.get_help_record(context)
        if record is not None and parameter.opts[-1] in _COMMON:
            lines.append(_item(*record))
    lines += [
        _section(
            "EXIT STATUS",
            "0 when it is done, 1 when it failed, 2 for wrong usage or a mistake in the configuration, 3 where the host lacks what a mount "
            "needs (/dev/fuse, fusermount3), 130 when it was interrupted. What goes wrong is one line on standard error.",
        ),
        ".SH ENVIRONMENT",
        _item("NOVAFS_CONFIG_DIR", "Where NAME.toml is looked for instead of /etc/novafs."),
        _item("NOVAFS_L1_CAPACITY, …", "Each setting has a variable of its own; docs/configuration.md lists them."),
        _item("AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, …", "Credentials of an S3 store, by the usual AWS chain."),
        ".SH FILES",
        _item("/etc/novafs/NAME.toml", "What NAME means as a VOLUME: its URL and settings."),
        _item("/etc/novafs/NAME.env", "Environment of novafs@NAME.service, for credentials; mode 0600."),
        _item(
            "/var/lib/novafs/state", "Journal, lock, control socket, log and dedup index of each volume, unless state_dir says otherwise."
        ),
        ".SH SEE ALSO\n.BR mount.novafs (8),\n.BR systemctl (1)",
    ]
    return "\n".join(lines) + "\n"


def _command(command: click.Command, title: str, parent: click.Context) -> list[str]:
    context = click.Context(command, info_name=title.split()[-1], parent=parent)
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [f".SS {_escape(title)} {_escape(usage)}", _paragraphs(command.help or "")]
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if isinstance(parameter, click.Option) and record is not None and parameter.opts[-1] not in (*_COMMON, "--help"):
            lines.append(_item(*record))
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None:
                lines += _command(inner, f"{title} {name}", context)
    return lines


_MOUNT_OPTIONS: Final = (
    ("ro", "Read-only."),
    ("allow_other", "Users other than the one who mounted it may use it, as a hypervisor that runs as its own user has to."),
    ("uid=USER, gid=GROUP", "Show everything as owned by them."),
    ("umask=BITS", "Withhold these permission bits from everything, as in umask=022."),
    ("fsname=TEXT", "The source that mount(8) and df(1) show; the volume otherwise."),
    ("busy_timeout=DURATION", "How long a SIGTERM lets open files go on before they are cut off. Default 10s."),
    ("nonempty", "Mount over a directory that has entries."),
    ("debug", "Log every request of the kernel."),
    (
        "_netdev, nofail, noauto, x-systemd.automount, …",
        "What fstab(5) and systemd take for themselves is passed over here. Users of _netdev and x-systemd.automount need no other.",
    ),
)


def _mount_novafs() -> str:
    settings = ", ".join(sorted(BY_OPTION))
    return (
        "\n".join(
            [
                _title("MOUNT.NOVAFS", 8),
                _section("NAME", "mount.novafs - mount a NovaFS volume"),
                ".SH SYNOPSIS\n.B mount -t novafs\n.I VOLUME DIR\n[\\fB-o\\fR \\fIOPTIONS\\fR]",
                _section(
                    "DESCRIPTION",
                    "What mount(8) calls for the type novafs. VOLUME is the NAME of /etc/novafs/NAME.toml, or a URL. It returns when "
                    "the mount answers; a daemon in the background serves it. umount(8) returns when everything that was written is "
                    "stored.\n\n"
                    "It is installed by novafs install-units.",
                ),
                ".SH OPTIONS",
                *(_item(*option) for option in _MOUNT_OPTIONS),
                _item("SETTING=VALUE", f"Any setting of novafs, as in l1_capacity=8GiB: {settings}. A comma in a value is written as \\,."),
                ".SH EXAMPLES",
                "A line of /etc/fstab that mounts the volume web at its first use:\n.PP\n.nf",
                _escape("web  /images/web  novafs  _netdev,nofail,x-systemd.automount,allow_other  0  0"),
                ".fi",
                _section(
                    "EXIT STATUS",
                    "That of mount(8): 0 when it is mounted, 1 for wrong options or usage, 4 for a bug, 8 when interrupted, 32 when "
                    "the mount failed.",
                ),
                ".SH SEE ALSO\n.BR novafs (1),\n.BR mount (8),\n.BR fstab (5),\n.BR systemd.mount (5)",
            ]
        )
        + "\n"
    )


# --- roff -------------------------------------------------------------------------------------------------------


def _title(name: str, section: int) -> str:
    return f'.TH {name} {section} "" "NovaFS {novafs.__version__}"\n.nh\n.ad l'


def _section(name: str, text: str) -> str:
    return f".SH {name}\n{_paragraphs(text)}"


def _paragraphs(text: str) -> str:
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text.replace("\b", "").strip())]
    return "\n.PP\n".join(_escape(part) for part in parts)


def _item(term: str, text: str) -> str:
    return f".TP\n.B {_escape(term)}\n{_escape(' '.join(text.split()))}"


def _escape(text: str) -> str:
    """Text that roff takes for nothing else."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "...")
    return "\\&" + text if text.startswith((".", "'")) else text


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m novafs.cli.manpages DIRECTORY")
    for file, content in pages().items():
        Path(sys.argv[1], file).write_text(content)
