"""`CacheConfig`: what a program says about a cache of the library; and where that cache lies.

Each field is one key of `docs/configuration.md` under a name that a program expects (`FIELDS` has both), or belongs to the library alone.
A field that is None says nothing: then the preset decides, or the TOML file where the volume is given by name, or the environment.
Checked when the cache is opened: whatever is out of range is a ConfigError that names the field, what was found and what is allowed.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from novafs.config import Config, is_url, load_config
from novafs.configkeys import CODEC_NAMES, POLICY_NAMES
from novafs.errors import ConfigError
from novafs.units import parse_size

FIELDS: Final[Mapping[str, str]] = {
    "preset": "preset",
    "enable_prefetch": "prefetch.enabled",
    "prefetch_window": "prefetch.window",
    "prefetch_aggression": "prefetch.aggression",
    "enable_dedup": "dedup",
    "compression": "l3.codec",
    "compression_level": "l3.codec_level",
    "l1_capacity": "l1.capacity",
    "l2_capacity": "l2.capacity",
    "l3_capacity": "l3.capacity",
    "l2_url": "l2.url",
    "durability": "durability",
}
"""Field → key. `ml_learning_rate` and `enable_online` share the key learning.rate; `eviction_policy` is l1.policy."""

VALUE_MAX: Final = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The settings of a cache. `default()`, `edge()`, `regional()` and `global_()` begin with a preset.

    eviction_policy: who leaves L1: `learned`, `lru`, `2q`, `wtinylfu`, `s3fifo`, `linear8`, or a scorer that `register_model` knows.
    predictor: which key comes next: `markov`, or a predictor that `register_model` knows.
    ml_learning_rate: how fast the models learn, as a multiple of the measured best, 0 to 10.
    enable_online: whether they learn at all from what is read; without, they are used as they were saved.
    enable_prefetch: fetch ahead of readers. prefetch_window: chunks that a sequential reader, and keys that a predictor, may be ahead.
    prefetch_aggression: 0 fetches only what is nearly sure to be read, 1 whatever is likely enough to be worth the traffic.
    enable_dedup: a chunk that the volume holds already is stored once. chunk_size: bytes, of a new volume (4, 64 or 1024 KiB; 64 where
    None); an existing one must have it. compression: `zstd`, `lz4`, `snappy`, `gzip` or `none`, of what is stored; compression_level:
    the codec's.
    l1_capacity, l2_capacity, l3_capacity: bytes, or a text such as "2GiB". l2_url: `none`, `embedded`, or the URL of a Redis server.
    durability: "journal" or "store", what this host's leases promise to others, as with a mount. What `set` stores is in the store when
    it returns, whichever.
    state_dir: local state, one for each process that has the volume open; None: the same that a mount on this host would use.
    create: make the volume where there is none. read_only: every change raises ReadOnlyError.
    value_max: bytes of the largest value that `set` takes and `get` gives whole; `open` has no limit.
    fresh_s: how old the view of what other processes and hosts have changed may be. Their changes are seen at once at 0, which costs
    a round trip to the store for each call.
    settings: any other key of docs/configuration.md, as text: {"store.io_timeout": "10s"}.
    """

    preset: str = "default"
    eviction_policy: str = "learned"
    predictor: str = "markov"
    ml_learning_rate: float = 1.0
    enable_online: bool = True
    enable_prefetch: bool = True
    prefetch_window: int = 10
    prefetch_aggression: float = 0.7
    enable_dedup: bool = True
    chunk_size: int | str | None = None
    compression: str = "zstd"
    compression_level: int | None = None
    l1_capacity: int | str | None = None
    l2_capacity: int | str | None = None
    l3_capacity: int | str | None = None
    l2_url: str = "none"
    durability: str = "journal"
    state_dir: str | os.PathLike[str] | None = None
    create: bool = True
    read_only: bool = False
    value_max: int = VALUE_MAX
    fresh_s: float = 1.0
    settings: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def default(cls, **changes: Any) -> CacheConfig:
        """A cache on one machine."""
        return cls(**changes)

    @classmethod
    def edge(cls, **changes: Any) -> CacheConfig:
        """A small site far from its store: L1 of 5 GB, fast codecs, eager prefetch."""
        return cls(**{"preset": "edge", "prefetch_aggression": 1.0, **changes})

    @classmethod
    def regional(cls, **changes: Any) -> CacheConfig:
        """A site with its own L2: L1 of 20 GB, L2 of 200 GB."""
        return cls(**{"preset": "regional", **changes})

    @classmethod
    def global_(cls, **changes: Any) -> CacheConfig:
        """The largest: L1 of 50 GB, L2 of 500 GB, L3 of 5 TB, deduplicated."""
        return cls(**{"preset": "global", **changes})

    def replace(self, **changes: Any) -> CacheConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def chunk_size_bytes(self) -> int | None:
        """`chunk_size` as a number. Raises ConfigError."""
        from novafs.superblock import check_chunk_size

        return None if self.chunk_size is None else check_chunk_size(parse_size(str(self.chunk_size)))

    @property
    def learning_rate(self) -> float:
        """What `ml_learning_rate` and `enable_online` say together."""
        return self.ml_learning_rate if self.enable_online else 0.0

    def load(self, place: Place) -> Config:
        """The engine's configuration of the volume at `place`. Raises ConfigError."""
        _check_numbers(self)
        flags: dict[str, str] = {"learning.rate": f"{self.learning_rate:f}"}
        names: dict[str, str] = {"learning.rate": "ml_learning_rate", "state_dir": "state_dir", "l1.policy": "eviction_policy"}
        for name, key in FIELDS.items():
            value = getattr(self, name)
            if value is not None:
                flags[key] = _text(value)
                names[key] = name
        state_dir = self.state_dir if self.state_dir is not None else place.state_dir
        if state_dir is not None:
            flags["state_dir"] = os.fspath(state_dir)
        flags["l1.policy"] = self.eviction_policy if self.eviction_policy in POLICY_NAMES else "lru"
        owned = names | {key: name for name, key in FIELDS.items()}
        for key in self.settings:
            if key in owned:
                raise ConfigError(f"CacheConfig: settings: {key} has a field of its own, {owned[key]}: use that")
        try:
            config = load_config(place.volume, flags={**self.settings, **flags})
        except ConfigError as error:
            raise ConfigError(f"CacheConfig: {_in_fields(str(error), names)}") from error
        if self.eviction_policy not in POLICY_NAMES:
            # A registered one: `make_policy` knows it, or says which there are.
            config = dataclasses.replace(config, l1=dataclasses.replace(config.l1, policy=self.eviction_policy))
        return config


def _check_numbers(config: CacheConfig) -> None:
    if isinstance(config.value_max, bool) or not isinstance(config.value_max, int) or config.value_max < 1:
        raise ConfigError(f"CacheConfig: value_max: found {config.value_max!r}; allowed: a number of bytes, at least 1")
    for name, most in (("fresh_s", 3600.0), ("ml_learning_rate", 10.0)):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not 0 <= value <= most:
            raise ConfigError(f"CacheConfig: {name}: found {value!r}; allowed: a number from 0 to {most:g}")
    if config.compression not in CODEC_NAMES:
        raise ConfigError(f"CacheConfig: compression: found {config.compression!r}; allowed: one of {', '.join(CODEC_NAMES)}")


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:f}" if isinstance(value, float) else str(value)


def _in_fields(message: str, names: Mapping[str, str]) -> str:
    """An error of the configuration in the words of whoever wrote a CacheConfig."""
    for key, name in names.items():
        for said in (f"the setting {key}", "--" + key.replace(".", "-").replace("_", "-")):
            if message.startswith(said + ":"):
                return f"{name}{message[len(said) :]}"
    return message


@dataclass(frozen=True, slots=True)
class Place:
    """Where a cache lies. volume: URL or NAME. state_dir: None: as the configuration says. temporary: removed at the end."""

    volume: str
    state_dir: Path | None = None
    temporary: Path | None = None


def find_place(volume: str | os.PathLike[str] | None) -> Place:
    """What the first argument of a cache means: nothing (a temporary directory), a directory, a URL, or the NAME of a configured volume."""
    if volume is None:
        directory = Path(tempfile.mkdtemp(prefix="novafs-"))
        return Place(_file_url(directory / "volume"), directory / "state", directory)
    if isinstance(volume, str):
        if not volume:
            raise ConfigError("volume: found an empty text; expected a directory, a URL, or the NAME of a volume in /etc/novafs")
        return Place(volume if not is_url(volume) or "://" in volume else _file_url(Path(volume).absolute()))
    return Place(_file_url(Path(os.path.abspath(os.fspath(volume)))))  # noqa: PTH100 - links are kept


def _file_url(path: Path) -> str:
    return "file://" + quote(os.fspath(path))
