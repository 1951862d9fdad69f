"""Reading the configuration again: as a whole or not at all, what is live at once, and the rest by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio

from novafs import reload
from novafs.config import Config, load_config
from novafs.configkeys import KEYS
from novafs.errors import ConfigError
from novafs.reload import Reloaded, Reloader
from tests.support.engine import make_volume, opened


def loaded(path: Path, text: str) -> Config:
    path.write_text(f'volume = "file:///srv/volume"\n{text}')
    return load_config("web", environ={"HOME": "/"}, file=path)


def test_live_keys_apply_and_the_others_are_named(tmp_path: Path) -> None:
    running = loaded(tmp_path / "web.toml", '[l2]\nurl = "redis://:one@host"\n')
    wanted = loaded(
        tmp_path / "web.toml",
        'durability = "store"\n[l1]\ncapacity = "64MiB"\n[l2]\nurl = "redis://:two@host"\n[prefetch]\naggression = 0.5\n',
    )
    merged, outcome = reload.merge(running, wanted)
    assert outcome == Reloaded(["l1.capacity", "prefetch.aggression"], ["durability", "l2.url"])
    assert str(outcome) == "changed l1.capacity, prefetch.aggression; takes effect at the next mount: durability, l2.url"
    assert (merged.l1.capacity_bytes, merged.prefetch.aggression) == (64 << 20, 0.5)
    assert (merged.durability, merged.l2.url.reveal()) == ("journal", "redis://:one@host")
    assert reload.merge(merged, wanted)[1] == Reloaded([], ["durability", "l2.url"]), "what waits is named again"


def test_nothing_that_differs_is_nothing_to_do(tmp_path: Path) -> None:
    running = loaded(tmp_path / "web.toml", "")
    assert str(reload.merge(running, running)[1]) == "no setting that can change now has changed"


def test_a_configuration_that_is_wrong_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "web.toml"
    running = loaded(path, "")
    told: list[Config] = []

    async def main() -> None:
        reloader = Reloader(running, lambda: loaded(path, '[l1]\ncapacity = "64MiB"\n[log]\nlevel = "loud"\n'), told.append)
        with pytest.raises(ConfigError, match=r"web\.toml line 5: log\.level: 'loud' is not one of"):
            await reloader.reload()
        reloader = Reloader(running, lambda: loaded(path, '[log]\nlevel = "debug"\n'), told.append)
        assert await reloader.reload() == Reloaded(["log.level"], [])
        assert await reloader.reload() == Reloaded([], [])

    trio.run(main)
    assert [config.log.level for config in told] == ["debug", "debug"]


LIVE = {
    "l1": {"capacity_bytes": 5 << 20},
    "l3": {"capacity_bytes": 1 << 30, "delta": False},
    "store": {"io_timeout_s": 7.0},
    "lease": {"wait_s": 3.0},
    "writeback": {"dirty_max_bytes": 8 << 20, "interval_s": 2.0},
    "prefetch": {
        "window": 3,
        "window_bytes": 1 << 20,
        "accuracy_target": 0.5,
        "aggression": 0.25,
        "traffic_max": 2.0,
        "read_around_bytes": 1 << 18,
    },
}


def test_an_open_volume_works_with_what_is_live(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(await make_volume(f"file://{tmp_path}/store", delta=True), tmp_path / "state", prefetch=True) as volume:
            assert volume.deltas.enabled
            entry = await volume.create(bytes(16), "a.raw")
            image = await volume.open_image(entry.node_id)
            await image.write(0, b"x" * (6 << 20))
            await image.commit()
            await image.read(0, 6 << 20)
            config = volume.config
            for section, values in LIVE.items():
                config = replace(config, **{section: replace(getattr(config, section), **values)})
            await reload.apply(volume, config)
            assert volume.cache.l1.capacity_bytes == 5 << 20 >= volume.cache.l1.used_bytes
            assert not volume.deltas.enabled
            assert (volume.client.io_timeout_s, volume.writeback.flush_timeout_s) == (7.0, 7.0)
            assert (volume.writeback.rules.dirty_max_bytes, volume.writeback.rules.interval_s) == (8 << 20, 2.0)
            assert volume.writeback.leases is not None and volume.writeback.leases.rules.wait_s == 3.0
            assert (await volume.usage()).capacity_bytes <= 1 << 30
            assert volume.prefetcher is not None
            settings = volume.prefetcher.engine.settings
            assert (settings.prefetch_window, settings.prefetch_window_bytes, settings.prefetch_traffic_max) == (3, 1 << 20, 2.0)
            assert settings.read_around_bytes == 1 << 18
            assert await image.read(0, 6 << 20) == b"x" * (6 << 20)
            await reload.apply(volume, replace(config, l1=replace(config.l1, capacity_bytes=256 << 20)))
            assert volume.cache.l1.capacity_bytes == 256 << 20
            await volume.close_image(image)

    trio.run(main)


def test_every_live_key_is_one_that_this_page_tries() -> None:
    tried = {f"{section}.{name}" for section, values in LIVE.items() for name in values}
    # Read at each commit, and by the log itself; told to the kernel by the mount (`mount/test_kernel_settings.py`).
    elsewhere = {"l3.codec", "l3.codec_level", "log.level", "kernel.read_ahead_bytes", "kernel.background_max"}
    assert {key.field for key in KEYS if key.live} == tried | elsewhere
