"""From preset, TOML file, environment and command line to one frozen `Config`, validated once.

What always holds: flag beats environment beats file beats preset beats default; a key that is not declared in
`novafs.configkeys` and a value that its key does not allow raise ConfigError that names key, place, what was found
and what is allowed; nothing downstream checks a setting again. Passwords are never shown: `repr`, `describe()` and
every message redact them.

`python -m novafs.config --markdown` prints `docs/configuration.md`.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from novafs.configkeys import BY_NAME, KEYS, PRESETS, Directory, Key, Secret, memory_bytes, redact
from novafs.errors import ConfigError

if TYPE_CHECKING:
    from novafs.codec import Codec

CONFIG_DIR: Final = Path("/etc/novafs")
CONFIG_DIR_VARIABLE: Final = "NOVAFS_CONFIG_DIR"
"""Where NAME.toml is looked for instead of /etc/novafs: for users without root, and for tests."""

HOST_SETTINGS_FILE: Final = "settings.toml"
"""In the state directory: what `novafs init --preset` chose for this volume on this host."""

_ARGUMENT: Final = "the command line"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class L1Config:
    """L1: memory of this process."""

    capacity_bytes: int
    codec: Codec
    decoded_share: float
    policy: str


@dataclass(frozen=True, slots=True)
class L2Config:
    """L2: Redis. url is "none", "embedded" or a URL; it prints redacted, see `Secret`."""

    url: Secret
    capacity_bytes: int
    codec: Codec
    timeout_s: float


@dataclass(frozen=True, slots=True)
class L3Config:
    """L3: the object store. codec_level None: the codec's own default; delta: see `novafs.delta`."""

    capacity_bytes: int
    codec: Codec
    codec_level: int | None
    delta: bool


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """How the object store is spoken to."""

    requests_max: int
    io_timeout_s: float


@dataclass(frozen=True, slots=True)
class WritebackConfig:
    """When written data is committed."""

    dirty_max_bytes: int
    interval_s: float


@dataclass(frozen=True, slots=True)
class LeaseConfig:
    """The right to write an image, between hosts."""

    ttl_s: float
    wait_s: float
    takeover: str


@dataclass(frozen=True, slots=True)
class GcConfig:
    """Collection: what is deleted, and when."""

    grace_s: float


@dataclass(frozen=True, slots=True)
class LogConfig:
    """level: "error", "warning", "info" or "debug". format: see the key."""

    level: str
    format: str


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """What the kernel is told of a mount where this process may: `novafs_mount.host`."""

    read_ahead_bytes: int
    background_max: int


@dataclass(frozen=True, slots=True)
class LearningConfig:
    """What all models share. rate: a multiple; 0: nothing is learned."""

    rate: float


@dataclass(frozen=True, slots=True)
class PrefetchConfig:
    """window: chunks; window_bytes: what it grows to. accuracy_target, aggression: 0 to 1.

    traffic_max: a multiple of the traffic without prefetch. read_around_bytes: of a region; 0 for none.
    """

    enabled: bool
    window: int
    window_bytes: int
    accuracy_target: float
    aggression: float
    traffic_max: float
    read_around_bytes: int


class Setting(NamedTuple):
    """One row of `Config.describe()`: key, value for people (redacted), and where it comes from."""

    name: str
    value: str
    origin: str


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that can be set, for one volume on one host.

    volume: what the user wrote, NAME or URL. config_file: the TOML file that was read, if any.
    """

    volume: str
    volume_url: str
    preset: str
    state_dir: Path
    durability: str
    dedup: bool
    metrics: str
    mountpoint: Path | None
    mount_options: str
    log: LogConfig
    l1: L1Config
    l2: L2Config
    l3: L3Config
    store: StoreConfig
    writeback: WritebackConfig
    lease: LeaseConfig
    gc: GcConfig
    prefetch: PrefetchConfig
    learning: LearningConfig
    kernel: KernelConfig
    config_file: Path | None = None
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def describe(self) -> list[Setting]:
        """Every key with its value and origin, in the order of `KEYS`; secrets redacted."""
        rows = []
        for key in KEYS:
            value: object = self
            for part in key.field.split("."):
                value = getattr(value, part)
            shown = key.default_doc or "not set" if value is None else redact(key.kind.show(value))
            rows.append(Setting(key.name, shown, self.origins.get(key.name, "default")))
        return rows


class _Raw(NamedTuple):
    """A value as a layer gave it, and where, for messages: "/etc/novafs/a.toml line 3", "--l1-capacity"."""

    value: object
    where: str


def load_config(
    volume: str,
    *,
    flags: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
    config_dir: Path | None = None,
) -> Config:
    """The settings for `volume`, a URL or the NAME of `<config_dir>/NAME.toml`.

    flags: key name (`l1.capacity`) to text, from the command line. environ: default `os.environ`. file: a TOML
    file that is read instead of NAME.toml; its `volume` says what NAME means, and is ignored where a URL is given.
    Raises ConfigError.
    """
    environ = os.environ if environ is None else environ
    if config_dir is None:
        config_dir = Path(environ.get(CONFIG_DIR_VARIABLE) or CONFIG_DIR)
    file = _find_file(volume, file, config_dir)

    layers = [_read_file(file) if file else {}, _read_environment(environ), _read_flags(flags or {})]
    given: dict[str, _Raw] = {}
    for layer in layers:
        given.update(layer)

    if is_url(volume):
        given["volume"] = _Raw(volume, _ARGUMENT)
    elif "volume" not in given:
        raise ConfigError(f"{file} has no key 'volume', so {volume!r} means nothing: add a line  volume = \"s3://…\"")
    elif str(given["volume"].value).startswith("."):
        raise ConfigError(
            f"{given['volume'].where}: volume: found a relative path, {given['volume'].value!r}; allowed here: an absolute one, or a URL"
        )
    values: dict[str, Any] = {"volume": _parse(BY_NAME["volume"], given["volume"])}
    if "state_dir" in given:
        values["state_dir"] = _parse(BY_NAME["state_dir"], given["state_dir"])
    else:
        values["state_dir"] = default_state_dir(values["volume"], environ)

    # What `init --preset` wrote is weaker than anything that somebody says now, but says which preset.
    for name, raw in _read_host_settings(values["state_dir"]).items():
        given.setdefault(name, raw)
    values["preset"] = _parse(BY_NAME["preset"], given["preset"]) if "preset" in given else "default"
    preset = PRESETS[values["preset"]]

    origins = {name: raw.where for name, raw in given.items()}
    for key in KEYS:
        if key.name in values:
            continue
        if key.name in given:
            values[key.name] = _parse(key, given[key.name])
        elif key.name in preset:
            values[key.name] = key.kind.parse(preset[key.name])
            origins[key.name] = f"preset {values['preset']}"
        else:
            default = key.default() if callable(key.default) else key.default
            values[key.name] = None if default is None else key.kind.parse(default)
    _fit_to_memory(values, given, origins)
    _check_together(values, given)
    return _build(values, volume=volume, config_file=file, origins=origins)


def is_url(volume: str) -> bool:
    """Whether VOLUME says itself where it is (a URL, or a path that can be nothing else), and is no NAME."""
    return "://" in volume or volume in (".", "..") or volume.startswith(("/", "./", "../"))


def default_state_dir(volume_url: str, environ: Mapping[str, str]) -> Path:
    """Where the local state of this volume is unless told: one directory for each normalised URL."""
    digest = hashlib.sha256(volume_url.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    if os.geteuid() == 0:
        return Path("/var/lib/novafs/state") / digest
    home = environ.get("XDG_STATE_HOME", "")
    base = Path(home) if home.startswith("/") else Path(environ.get("HOME") or Path.home()) / ".local" / "state"
    return base / "novafs" / digest


def nearest(word: str, known: Iterator[str] | list[str]) -> str:
    """`; did you mean 'x'?` for the known word that is nearest to `word`, or nothing."""
    found = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


# --- layers ---------------------------------------------------------------------------------------------------


def file_of_name(name: str, *, environ: Mapping[str, str] | None = None) -> Path:
    """The file that a NAME stands for, be it there or not."""
    environ = os.environ if environ is None else environ
    return Path(environ.get(CONFIG_DIR_VARIABLE) or CONFIG_DIR) / f"{name}.toml"


def _find_file(volume: str, file: Path | None, config_dir: Path) -> Path | None:
    if is_url(volume):
        return file
    if not _NAME.fullmatch(volume):
        hint = f"; for a local directory write ./{volume}" if "/" in volume else ""
        raise ConfigError(f"{volume!r} is neither a URL (file:///…, s3://…) nor the name of a file in {config_dir}{hint}")
    if file is not None:
        return file
    path = config_dir / f"{volume}.toml"
    if not path.exists():
        names = sorted(entry.stem for entry in config_dir.glob("*.toml")) if config_dir.is_dir() else []
        raise ConfigError(
            f"no file {path} gives {volume!r} a meaning{nearest(volume, names)}: write the volume's URL instead, "
            f'or make that file with a line  volume = "s3://…"'
        )
    return path


def _read_file(path: Path) -> dict[str, _Raw]:
    """The keys of a TOML file under their dotted names."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no TOML file: {error}") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, a number of thousands of digits, tables without end
        raise ConfigError(f"{path} is no TOML file: {error}") from error
    lines = _lines_of_keys(text)
    found: dict[str, _Raw] = {}

    def visit(table: Mapping[str, object], prefix: str) -> None:
        for word, value in table.items():
            name = prefix + word
            line = lines.get(name)
            where = f"{path} line {line}" if line else str(path)
            if name in BY_NAME:
                found[name] = _Raw(value, where)
            elif isinstance(value, dict) and any(key.startswith(name + ".") for key in BY_NAME):
                visit(value, name + ".")
            else:
                hint = nearest(name, sorted({key.partition(".")[0] for key in BY_NAME})) if isinstance(value, dict) else _nearest_key(name)
                raise ConfigError(f"{where}: unknown key {name!r}{hint}")

    visit(tree, "")
    return found


def _nearest_key(name: str) -> str:
    """Nearest declared key; `l1_capacity` and `L1.Capacity` are near to `l1.capacity`."""
    return nearest(name.lower().replace("_", ".") if name.replace("_", ".").lower() in BY_NAME else name, list(BY_NAME))


def _lines_of_keys(text: str) -> dict[str, int]:
    """Line number of each key and table, by dotted name. Only for messages: unusual TOML may lack a number."""
    lines: dict[str, int] = {}
    prefix = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
            prefix = _plain(header[1]) + "."
            lines.setdefault(prefix[:-1], number)
        elif pair := re.match(r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""", line):
            name = prefix + _plain(pair[1])
            lines.setdefault(name, number)
            for word in re.findall(r"[{,]\s*([A-Za-z0-9_-]+)\s*=", line):  # l1 = { capacity = "1G" }
                lines.setdefault(f"{name}.{word}", number)
            while "." in (name := name.rpartition(".")[0]):
                lines.setdefault(name, number)
    return lines


def _plain(dotted: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in dotted.split("."))


def _read_environment(environ: Mapping[str, str]) -> dict[str, _Raw]:
    """Keys from NOVAFS_… variables.

    Other programs may use the prefix too, so a variable that resembles no key is left alone; one that nearly is a
    key is a typing error, which must not pass in silence.
    """
    known = {key.variable: key for key in KEYS if not key.file_only}
    found: dict[str, _Raw] = {}
    for variable, text in environ.items():
        if not variable.startswith("NOVAFS_") or variable == CONFIG_DIR_VARIABLE:
            continue
        if variable in known:
            if text:  # empty: as good as unset, so that a unit file can clear one
                found[known[variable].name] = _Raw(text, f"the environment variable {variable}")
        elif close := difflib.get_close_matches(variable, known, n=1, cutoff=0.85):
            raise ConfigError(f"the environment variable {variable} is no setting; did you mean {close[0]!r}?")
    return found


def _read_flags(flags: Mapping[str, str]) -> dict[str, _Raw]:
    found = {}
    for name, text in flags.items():
        key = BY_NAME.get(name)
        if key is None or key.file_only:
            raise ConfigError(f"unknown key {name!r}{_nearest_key(name)}")
        if isinstance(key.kind, Directory) and text and "\0" not in text:
            text = os.path.abspath(text)  # noqa: PTH100  # relative to where the user stands, links kept
        found[name] = _Raw(text, key.flag_name if key.flag else f"the setting {name}")
    return found


def _read_host_settings(state_dir: Path) -> dict[str, _Raw]:
    path = state_dir / HOST_SETTINGS_FILE
    try:
        return _read_file(path) if path.exists() else {}
    except PermissionError:  # another user's state directory; opening it will say so where it matters
        return {}


# --- values ---------------------------------------------------------------------------------------------------


def _parse(key: Key, raw: _Raw) -> object:
    try:
        return key.kind.parse(raw.value)
    except ConfigError as error:
        if raw.where == _ARGUMENT:  # VOLUME itself: the error says all
            raise
        # An option or a variable names its key already.
        place = raw.where if raw.where.startswith(("-", "the ")) else f"{raw.where}: {key.name}"
        raise ConfigError(f"{place}: {error}; allowed: {key.kind.allowed}") from error


def _fit_to_memory(values: dict[str, Any], given: Mapping[str, _Raw], origins: dict[str, str]) -> None:
    """Defaults and presets never take more than a quarter of the machine's memory; what a user set is obeyed."""
    quarter = memory_bytes() // 4
    in_memory = ["l1.capacity"] + (["l2.capacity"] if values["l2.url"] == "embedded" else [])
    for name in in_memory:
        if name not in given and values[name] > quarter:
            values[name] = max(quarter, 4 << 20)
            origins[name] = f"{origins.get(name, 'default')}, cut to a quarter of the memory"


def _check_together(values: Mapping[str, Any], given: Mapping[str, _Raw]) -> None:
    """What no single key can know."""
    from novafs.codec import LEVEL_MAX

    level, codec = values["l3.codec_level"], values["l3.codec"].name.lower()
    if level is not None and level > LEVEL_MAX.get(codec, 0):
        allowed = f"1 to {LEVEL_MAX[codec]}" if codec in LEVEL_MAX else f"none, for {codec} has no levels"
        raise ConfigError(f"{given['l3.codec_level'].where}: l3.codec_level: found {level}; allowed with {codec}: {allowed}")


def _build(values: Mapping[str, Any], **rest: Any) -> Config:
    parts: dict[str, dict[str, Any]] = {"": {}}
    for key in KEYS:
        section, _, name = key.field.rpartition(".")
        parts.setdefault(section, {})[name] = values[key.name]
    return Config(
        **parts[""],
        log=LogConfig(**parts["log"]),
        l1=L1Config(**parts["l1"]),
        l2=L2Config(**parts["l2"]),
        l3=L3Config(**parts["l3"]),
        store=StoreConfig(**parts["store"]),
        writeback=WritebackConfig(**parts["writeback"]),
        lease=LeaseConfig(**parts["lease"]),
        gc=GcConfig(**parts["gc"]),
        prefetch=PrefetchConfig(**parts["prefetch"]),
        learning=LearningConfig(**parts["learning"]),
        kernel=KernelConfig(**parts["kernel"]),
        **rest,
    )


if __name__ == "__main__":
    from novafs.configdoc import markdown

    if sys.argv[1:] != ["--markdown"]:
        sys.exit("usage: python -m novafs.config --markdown")
    sys.stdout.write(markdown())
