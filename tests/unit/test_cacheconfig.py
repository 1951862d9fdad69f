"""Every field of CacheConfig does what it says, and what is wrong with one is told in its name."""

from __future__ import annotations

import random
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from novafs import CacheConfig, HierarchicalCache
from novafs.cacheconfig import find_place
from novafs.codec import Codec
from novafs.config import Config
from novafs.errors import BusyError, ConfigError, NovaError, ReadOnlyError, TooLargeError
from novafs.eviction.learned import LearnedPolicy
from novafs.eviction.trees import RATE
from novafs.lease import read_lease
from novafs.statedir import is_locked
from novafs.volume import Volume

RANDOM = random.Random(5).randbytes(1 << 20)
WORDS = b"".join(b"%d words of %d, " % (number, number % 7) for number in range(40_000))


def opened(directory: Path, **given: Any) -> HierarchicalCache:
    given.setdefault("state_dir", directory / "state")
    return HierarchicalCache(directory / "volume", CacheConfig(**given))


def volume_of(cache: HierarchicalCache) -> Volume:
    return cache._portal.value._volume


def loaded(config: CacheConfig) -> Config:
    return config.load(find_place("/srv/nothing/there"))


def read_in_order(cache: HierarchicalCache, times: int = 3) -> None:
    for _ in range(times):
        for number in range(12):
            assert cache.get(f"k{number}") is not None


def fill(cache: HierarchicalCache) -> None:
    cache.set_multi({f"k{number}": random.Random(number).randbytes(70_000) for number in range(12)})


# --- presets ------------------------------------------------------------------------------------------------------


def test_presets_are_those_of_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("novafs.config.memory_bytes", lambda: 1 << 50)
    found = {}
    for make in (CacheConfig.default, CacheConfig.edge, CacheConfig.regional, CacheConfig.global_):
        config = loaded(make())
        found[make.__name__] = (
            config.l1.capacity_bytes,
            config.l2.capacity_bytes,
            config.l3.capacity_bytes,
            config.l1.codec,
            config.l2.codec,
        )
    assert found == {
        "default": (10 * 10**9, 100 * 10**9, 10**12, Codec.LZ4, Codec.SNAPPY),
        "edge": (5 * 10**9, 100 * 10**9, 10**12, Codec.LZ4, Codec.LZ4),
        "regional": (20 * 10**9, 200 * 10**9, 10**12, Codec.SNAPPY, Codec.SNAPPY),
        "global_": (50 * 10**9, 500 * 10**9, 5 * 10**12, Codec.LZ4, Codec.SNAPPY),
    }
    assert loaded(CacheConfig.default()).prefetch.window == 10
    assert loaded(CacheConfig.default()).prefetch.aggression == 0.7
    assert loaded(CacheConfig.edge()).prefetch.aggression == 1.0
    assert loaded(CacheConfig.edge(l1_capacity="1GiB", prefetch_window=3)).l1.capacity_bytes == 1 << 30
    assert CacheConfig.edge().replace(prefetch_window=3).prefetch_window == 3


# --- one field after the other ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["learned", "lru", "2q", "wtinylfu", "s3fifo", "linear8"])
def test_eviction_policy(tmp_path: Path, policy: str) -> None:
    with opened(tmp_path, eviction_policy=policy, l1_capacity="4MiB") as cache:
        assert volume_of(cache).cache.l1.policy.name == policy
        for number in range(8):
            cache.set(f"k{number}", RANDOM[number:])
            assert cache.get(f"k{number}") == RANDOM[number:]
        assert volume_of(cache).cache.l1.statistics().evictions > 0


def test_ml_learning_rate(tmp_path: Path) -> None:
    """What one example changes is so many times as much."""
    moved = {}
    for rate in (0.5, 1.0, 4.0):
        with opened(tmp_path / str(rate), ml_learning_rate=rate) as cache:
            prefetcher = volume_of(cache).prefetcher
            assert prefetcher is not None
            gate = prefetcher.engine.gate
            features = (1, 2, 3, 4, 5, 6, 7, 8)
            gate.learn(features, 0.0, 0, 1.0)
            moved[rate] = gate.score(features)
            policy = volume_of(cache).cache.l1.policy  # the default one; what a rate does there: tests/unit/test_eviction_learned.py
            assert isinstance(policy, LearnedPolicy)
            assert policy._learner.rate == pytest.approx(min(1.0, RATE * rate))
    assert moved[1.0] == pytest.approx(2 * moved[0.5])
    assert moved[4.0] == pytest.approx(4 * moved[1.0])


def test_enable_online(tmp_path: Path) -> None:
    """Without, nothing is learned and nothing saved, and what was saved before is used."""
    with opened(tmp_path, enable_online=False) as cache:
        fill(cache)
        read_in_order(cache)
        assert cache.predict_next("k3") == []
        prefetcher = volume_of(cache).prefetcher
        assert prefetcher is not None
        assert prefetcher.engine.gate.examples == 0
        policy = volume_of(cache).cache.l1.policy
        assert isinstance(policy, LearnedPolicy)
        assert policy._learner.rate == 0.0
        assert len(prefetcher.engine.table) == 0
    assert not (tmp_path / "volume" / "models").exists()
    with opened(tmp_path) as cache:
        read_in_order(cache)
    assert (tmp_path / "volume" / "models" / "keys").exists()
    saved = sorted((tmp_path / "volume" / "models").rglob("*"))
    with opened(tmp_path, enable_online=False) as cache:
        assert cache.predict_next("k3") != []
        cache.drop_cached()
        read_in_order(cache)
    assert sorted((tmp_path / "volume" / "models").rglob("*")) == saved


def test_enable_prefetch(tmp_path: Path) -> None:
    for enabled in (False, True):
        with opened(tmp_path, enable_prefetch=enabled) as cache:
            fill(cache)
            cache.set("long", RANDOM * 4)
            read_in_order(cache)
            deadline_s = time.monotonic() + 60
            while True:
                cache.drop_cached()
                with cache.open("long") as file:
                    while file.read1(65536):
                        pass
                read_in_order(cache, 1)
                found = cache.stats().prefetch
                # In the background: it may need another pass.
                if not enabled or (found.issued and found.keys_issued) or time.monotonic() > deadline_s:
                    break
            assert bool(found.issued) == bool(found.keys_issued) == enabled
            assert cache.predict_next("k3") != []


def test_prefetch_window(tmp_path: Path) -> None:
    for window in (0, 3, 10):
        with opened(tmp_path, prefetch_window=window) as cache:
            fill(cache)
            read_in_order(cache)
            keys = cache._portal.value._keys
            assert len(cache._portal.call(_observed, keys, "k3")) == window
            assert volume_of(cache).config.prefetch.window == window


async def _observed(keys: Any, key: str) -> list[str]:
    found: list[str] = keys.observe(key, 77)
    return found


def test_prefetch_aggression(tmp_path: Path) -> None:
    """What follows in six of ten cases is fetched by the eager, and not by the careful."""
    fetched = {}
    for aggression in (0.0, 1.0):
        with opened(tmp_path / str(aggression), prefetch_aggression=aggression) as cache:
            fill(cache)
            keys = cache._portal.value._keys
            for turn in range(10):
                for key in ("k0", "k1" if turn % 5 < 3 else "k2"):
                    keys.model.observe(key, 1)
                keys.model.observe("k9", 1)
            fetched[aggression] = cache._portal.call(_observed, keys, "k0")
            assert volume_of(cache).config.prefetch.aggression == aggression
    assert "k1" not in fetched[0.0]
    assert "k1" in fetched[1.0]


def test_enable_dedup(tmp_path: Path) -> None:
    for enabled in (True, False):
        with opened(tmp_path / str(enabled), enable_dedup=enabled) as cache:
            cache.set("a", RANDOM)
            cache.set("b", RANDOM)
            found = cache.stats()
            assert (found.saved_bytes > len(RANDOM) // 2) == enabled
            assert (found.dedup_ratio > 1.5) == enabled
            assert cache.get("b") == RANDOM


def test_chunk_size(tmp_path: Path) -> None:
    for size, given in ((4096, 4096), (65536, None), (1 << 20, "1MiB")):
        with opened(tmp_path / str(size), chunk_size=given) as cache:
            assert volume_of(cache).chunk_size == size
            cache.set("a", RANDOM)
            cache.drop_cached()
            assert cache.get("a") == RANDOM
        opened(tmp_path / str(size)).close()
    with pytest.raises(ConfigError, match=r"chunk_size: found 65536, but .* chunks of 4096"):
        opened(tmp_path / "4096", chunk_size="64K")
    with pytest.raises(ConfigError):
        opened(tmp_path / "odd", chunk_size=5000)
    assert not (tmp_path / "odd" / "volume").exists()


@pytest.mark.parametrize("name", ["zstd", "lz4", "snappy", "gzip", "none"])
def test_compression(tmp_path: Path, name: str) -> None:
    with opened(tmp_path, compression=name) as cache:
        cache.set("a", WORDS)
        assert (cache.stats().compression_ratio > 2) == (name != "none")
        cache.drop_cached()
        assert cache.get("a") == WORDS


def test_compression_level(tmp_path: Path) -> None:
    stored = {}
    for level in (1, 19):
        with opened(tmp_path / str(level), compression_level=level) as cache:
            cache.set("a", WORDS)
            stored[level] = volume_of(cache).writes.stored_bytes
    assert stored[19] < stored[1]
    with pytest.raises(ConfigError, match="compression_level"):
        opened(tmp_path, compression="snappy", compression_level=3)


def test_l1_capacity(tmp_path: Path) -> None:
    for given in (8 << 20, "8MiB"):
        with opened(tmp_path, l1_capacity=given) as cache:
            for number in range(12):
                cache.set(f"k{number}", RANDOM[number:])
                cache.get(f"k{number}")
                assert cache.stats().tiers["l1"].used_bytes <= 8 << 20
            assert cache.stats().tiers["l1"].capacity_bytes == 8 << 20


def test_l2_url_and_l2_capacity(tmp_path: Path, redis_server: Any) -> None:
    with opened(tmp_path, l2_url=redis_server.url, l2_capacity="64MiB") as cache:
        cache.set("a", RANDOM)
        cache._portal.call(volume_of(cache).cache.wait_idle)
        volume_of(cache).cache.l1.clear()
        assert cache.get("a") == RANDOM
        found = cache.stats().tiers["l2"]
        assert found.hits > 0
        assert found.capacity_bytes == 64 << 20
    with opened(tmp_path) as cache:
        assert "l2" not in cache.stats().tiers


def test_l3_capacity(tmp_path: Path) -> None:
    with opened(tmp_path, l3_capacity="100MiB") as cache:
        assert cache._portal.call(volume_of(cache).usage).capacity_bytes == 100 << 20


def test_durability(tmp_path: Path) -> None:
    for durability in ("journal", "store"):
        with opened(tmp_path / durability, durability=durability) as cache:
            cache.set("a", b"1")
            found = cache._portal.call(_lease_of, volume_of(cache), "a")
            assert found.durability == durability


async def _lease_of(volume: Volume, key: str) -> Any:
    entry = await volume.catalog.resolve(key)
    image = await volume.open_image(entry.node_id)
    await image.take_lease()
    try:
        return await read_lease(volume.client, entry.node_id)
    finally:
        await volume.close_image(image)


def test_state_dir(tmp_path: Path) -> None:
    with opened(tmp_path, state_dir=tmp_path / "here"):
        assert is_locked(tmp_path / "here")
        with pytest.raises(BusyError):
            opened(tmp_path, state_dir=tmp_path / "here")


def test_create_and_read_only(tmp_path: Path) -> None:
    with pytest.raises(NovaError):
        opened(tmp_path, create=False)
    opened(tmp_path).close()
    with opened(tmp_path, create=False, read_only=True) as cache, pytest.raises(ReadOnlyError):
        cache.set("a", b"")


def test_value_max(tmp_path: Path) -> None:
    with opened(tmp_path, value_max=10) as cache, pytest.raises(TooLargeError):
        cache.set("a", bytes(11))


def test_fresh_s(tmp_path: Path) -> None:
    with opened(tmp_path) as one, opened(tmp_path, state_dir=tmp_path / "a", fresh_s=3600) as late:
        one.set("a", b"1")
        with opened(tmp_path, state_dir=tmp_path / "b", fresh_s=0) as at_once:
            one.set("b", b"2")
            assert at_once.keys() == ["a", "b"]
        assert late.keys() == []


def test_predictor(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model"):
        opened(tmp_path, predictor="nobody_registered_this")
    with pytest.raises(ConfigError, match="no eviction policy"):
        opened(tmp_path, eviction_policy="nobody_registered_this")


def test_settings_reach_every_other_key(tmp_path: Path) -> None:
    with opened(tmp_path, settings={"store.io_timeout": "7s", "l1.codec": "zstd"}) as cache:
        config = volume_of(cache).config
        assert (config.store.io_timeout_s, config.l1.codec) == (7.0, Codec.ZSTD)


def test_each_field_is_tested_here() -> None:
    named = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    said = " ".join(named) + " presets preset settings"
    assert [field.name for field in fields(CacheConfig) if field.name not in said] == []


# --- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prefetch_window": -1}, "prefetch_window: .*'-1'.*allowed: .* 0 to 1024"),
        ({"prefetch_aggression": 1.5}, "prefetch_aggression: .*allowed: a share"),
        ({"ml_learning_rate": -0.1}, "ml_learning_rate: found -0.1; allowed: a number from 0 to 10"),
        ({"ml_learning_rate": "fast"}, "ml_learning_rate"),
        ({"compression": "rar"}, "compression: found 'rar'; allowed: one of .*zstd"),
        ({"l1_capacity": "much"}, "l1_capacity: .*'much'.*allowed: a size"),
        ({"l1_capacity": 5}, "l1_capacity: .*at least"),
        ({"l2_url": "http://x"}, "l2_url: "),
        ({"durability": "never"}, "durability: .*journal, store"),
        ({"preset": "huge"}, "preset: .*edge"),
        ({"enable_dedup": "perhaps"}, "enable_dedup: .*true or false"),
        ({"value_max": 0}, "value_max: found 0"),
        ({"fresh_s": -1}, "fresh_s: found -1"),
        ({"settings": {"l1.capacity": "1GiB"}}, "l1.capacity has a field of its own, l1_capacity"),
        ({"settings": {"l1.capasity": "1GiB"}}, "unknown key 'l1.capasity'; did you mean"),
        ({"chunk_size": "3K"}, "chunk"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        opened(tmp_path, **given)
    assert not (tmp_path / "volume").exists()


def test_where_a_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_place("/srv/a b").volume == "file:///srv/a%20b"
    assert find_place("./v").volume == f"file://{tmp_path}/v"
    assert find_place(Path("v")).volume == f"file://{tmp_path}/v"
    assert find_place("s3://bucket/prefix").volume == "s3://bucket/prefix"
    assert find_place("name").volume == "name"
    with pytest.raises(ConfigError):
        find_place("")
    with pytest.raises(ConfigError, match="no file"):
        HierarchicalCache("no_such_name")
