"""Listings that take longer than one request may: parts, each with a time-out of its own; and `usage`, which needs one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio
import trio.testing

from novafs.config import load_config
from novafs.errors import StoreUnavailableError
from novafs.objectstore import client as client_module
from novafs.objectstore.client import StoreClient
from novafs.objectstore.file import create_root
from novafs.volume import USAGE_AGE_S, init_volume, open_volume
from tests.support.engine import FLAGS
from tests.support.flaky_store import FlakyStore


def test_a_listing_may_take_longer_than_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "LIST_PART", 10)
    create_root(tmp_path / "store")
    store = FlakyStore(tmp_path / "store")
    names = [f"packs/{n:02x}/{n:032x}" for n in range(40)]
    for name in names:
        store.create(name, b"x")
    store.before["list"] = [lambda: time.sleep(0.2) for _ in range(100)]

    async def main() -> None:
        one = StoreClient(store, io_timeout_s=0.5)
        assert [info.name for info in await one.list("packs/")] == names
        assert [info.name for info in await one.list("packs/", limit=25)] == names[:25]
        assert [info.name for info in await one.list("packs/", after=names[19], limit=20)] == names[20:]
        assert [info.name for info in await one.list("packs/", after=names[-1])] == []

    trio.run(main)


def test_usage_answers_what_it_knew_while_the_store_is_away(tmp_path: Path) -> None:
    create_root(tmp_path / "store")
    store = FlakyStore(tmp_path / "store")

    async def main() -> None:
        await init_volume(StoreClient(store))
        given = {**FLAGS, "state_dir": str(tmp_path / "state"), "store.io_timeout": "1s"}
        config = load_config(store.url, flags=given, environ={})
        (tmp_path / "state").mkdir()
        async with open_volume(config, read_only=True, store=store) as volume:
            store.before["list"] = [StoreUnavailableError("away") for _ in range(10_000)]
            with pytest.raises(StoreUnavailableError):
                await volume.usage()
            store.before.clear()
            store.create("packs/ab/" + "ab" * 16, bytes(1000))
            assert (await volume.usage()).used_bytes == 1000
            store.before["list"] = [StoreUnavailableError("away") for _ in range(10_000)]
            volume._usage = (trio.current_time() - USAGE_AGE_S, 1000)
            assert (await volume.usage()).used_bytes == 1000
            calls = store.calls["list"]
            assert (await volume.usage()).used_bytes == 1000
            assert store.calls["list"] == calls
            store.before.clear()

    trio.run(main)
