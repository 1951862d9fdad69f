"""The options of a mount: what `-o` may say, in one table.

What is promised: a text either means one set of options or raises ConfigError that names the option and the nearest
known one; nothing unknown reaches the kernel. No import of pyfuse3, so that the command line can parse before it forks.

`-o` takes four sorts of words: those of the mount itself (`MountOptions`); any configuration key in the form
`l1_capacity=8G` (returned as settings for `load_config`); `nonempty`, which only the command looks at; and the words
that mount(8), fstab and systemd put there for themselves (`_netdev`, `noauto`, `x-…`), which mean nothing here.
"""

from __future__ import annotations

import grp
import pwd
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from novafs.config import nearest
from novafs.configkeys import BY_OPTION, Duration
from novafs.errors import ConfigError


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How the file system presents itself.

    uid, gid: shown as the owner of everything, None: as stored. umask: permission bits withheld from everything, None: none.
    fsname: the source in /proc/mounts, None: the volume as the user wrote it. debug: libfuse logs every request.
    busy_timeout_s: how long a SIGTERM lets open files go on before they are cut off.
    """

    allow_other: bool = False
    read_only: bool = False
    uid: int | None = None
    gid: int | None = None
    umask: int | None = None
    fsname: str | None = None
    debug: bool = False
    busy_timeout_s: float = 10.0


class ParsedOptions(NamedTuple):
    """options: of the mount. settings: configuration keys by name, as text. nonempty: mount over a directory with entries."""

    options: MountOptions
    settings: dict[str, str]
    nonempty: bool


_SWITCHES: Final = {
    "allow_other": ("allow_other", True),
    "ro": ("read_only", True),
    "rw": ("read_only", False),
    "debug": ("debug", True),
    "nonempty": ("nonempty", True),
}
_WITH_VALUE: Final = ("uid", "gid", "umask", "fsname", "busy_timeout")
_IGNORED: Final = re.compile(
    r"defaults|(no)?(auto|user|dev|exec|suid|atime|diratime|relatime|lazytime|iversion|symfollow)|users|owner|group|nofail|_netdev|async|"
    r"strictatime|silent|loud|[xX]-.*|comment|helper|uhelper"
)
_ID_MAX: Final = (1 << 32) - 2
"""2**32 - 1 is (uid_t) -1, which chown(2) reads as "leave it"."""


def known_option(word: str) -> bool:
    """Whether `word`, `option` or `option=value`, is one of those that `parse_mount_options` understands or passes over."""
    option = word.strip().partition("=")[0]
    return option in _SWITCHES or option in _WITH_VALUE or option in BY_OPTION or _IGNORED.fullmatch(option) is not None


def parse_mount_options(texts: Iterable[str]) -> ParsedOptions:
    """Read `-o` texts, each a list with commas; later words win. Raises ConfigError that names the option.

    A comma inside a value is written `\\,`, as in fstab.
    """
    fields: dict[str, Any] = {}
    settings: dict[str, str] = {}
    for text in texts:
        for word in re.split(r"(?<!\\),", text):
            option, equals, value = word.strip().replace("\\,", ",").partition("=")
            if (not option and not equals) or _IGNORED.fullmatch(option):
                continue
            if option == "remount":
                raise ConfigError("-o remount: a mount's options can not be changed: unmount it, then mount it with the others")
            if option in _SWITCHES:
                if equals:
                    raise ConfigError(f"-o {option}: takes no value, found {value!r}")
                name, switch = _SWITCHES[option]
                fields[name] = switch
            elif option in _WITH_VALUE or option in BY_OPTION:
                if not value:
                    raise ConfigError(f"-o {option}: needs a value, as in {option}=…")
                if option in BY_OPTION:
                    settings[BY_OPTION[option].name] = value
                elif option == "busy_timeout":
                    fields["busy_timeout_s"] = _busy_timeout(value)
                else:
                    fields[option] = _value(option, value)
            else:
                raise ConfigError(f"-o {option}: unknown mount option{nearest(option, [*_SWITCHES, *_WITH_VALUE, *BY_OPTION])}")
    nonempty = fields.pop("nonempty", False)
    return ParsedOptions(MountOptions(**fields), settings, nonempty)


def _busy_timeout(text: str) -> float:
    kind = Duration(maximum=3600)
    try:
        return kind.read(text)
    except ConfigError as error:
        raise ConfigError(f"-o busy_timeout: {error}; allowed: {kind.allowed}") from error


def _value(option: str, text: str) -> int | str:
    if option == "fsname":
        if not text.isprintable():
            raise ConfigError(f"-o fsname: found {text!r}; allowed: printable text")
        return text
    if option == "umask":
        if not re.fullmatch("[0-7]{1,4}", text) or int(text, 8) > 0o777:
            raise ConfigError(f"-o umask: found {text!r}; allowed: an octal number from 0 to 777, such as 022")
        return int(text, 8)
    if re.fullmatch("[0-9]{1,10}", text) and int(text) <= _ID_MAX:
        return int(text)
    try:
        return pwd.getpwnam(text).pw_uid if option == "uid" else grp.getgrnam(text).gr_gid
    except (KeyError, ValueError) as error:
        who = "user" if option == "uid" else "group"
        raise ConfigError(f"-o {option}: found {text!r}; allowed: a number from 0 to {_ID_MAX} or the name of a {who}") from error
