"""The policies behind L1 on an open volume: each keeps within the cap, and the learned one learns, tells and remembers."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import trio

from novafs.catalogtree import ROOT_ID
from novafs.config import load_config
from novafs.configkeys import POLICY_NAMES
from novafs.errors import ConfigError
from novafs.eviction.base import policy_names
from novafs.eviction.learned import LearnedPolicy
from novafs.image import Image
from novafs.modelstore import model_prefix
from novafs.volume import Volume
from tests.support.engine import make_volume, opened
from tests.support.redis_servers import RedisServer

CHUNK = 64 << 10
CHUNKS = 400


async def image_of(volume: Volume) -> Image:
    return await volume.open_image((await volume.catalog.lookup(ROOT_ID, "disk.raw")).node_id)


async def reads(volume: Volume, image: Image, count: int, seed: int) -> None:
    """A hot set under a scan, with slices of learning between."""
    rng = random.Random(seed)
    for number in range(count):
        index = rng.randrange(60) if rng.random() < 0.6 else 60 + number % (CHUNKS - 60)
        if image.read_nowait(index * CHUNK, 4096) is None:
            await image.read(index * CHUNK, 4096)
        assert volume.cache.l1.used_bytes <= volume.cache.l1.capacity_bytes
        if number % 50 == 0:
            while volume.cache.l1.work():
                await trio.lowlevel.checkpoint()


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A volume with an image that is far larger than the L1 of these tests."""

    async def make() -> str:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "setup") as volume:
            image = await volume.open_image((await volume.create(ROOT_ID, "disk.raw")).node_id)
            for at in range(0, CHUNKS, 50):
                await image.write(at * CHUNK, os.urandom(50 * CHUNK))
            await volume.close_image(image)
        return url

    return trio.run(make)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_each_policy_keeps_within_the_cap(tmp_path: Path, url: str, policy: str) -> None:
    async def main() -> None:
        async with opened(url, tmp_path / "a", prefetch=True, l1__capacity="16MiB", l1__policy=policy) as volume:
            image = await image_of(volume)
            await reads(volume, image, 1500, 1)
            statistics = volume.cache.statistics()
            assert statistics.l1.evictions > 0
            assert volume.statistics()["eviction"]["policy"] == policy
            await volume.close_image(image)

    trio.run(main)


def test_the_learned_policy_tells_what_it_does_and_remembers_it(tmp_path: Path, url: str) -> None:
    async def main() -> None:
        flags = {"l1__capacity": "16MiB"}  # it is the default
        async with opened(url, tmp_path / "a", prefetch=True, **flags) as volume:
            policy = volume.cache.l1.policy
            assert isinstance(policy, LearnedPolicy)
            assert policy._allowance.limited
            policy.limit_cpu(0.0)  # what it decides must not depend on this machine
            image = await image_of(volume)
            await reads(volume, image, 12_000, 2)
            told = volume.statistics()["eviction"]
            assert told["trainings"] >= 1
            assert told["predictions"] > 0
            assert "decides" in told["words"]
            await volume.close_image(image)
        assert list((tmp_path / "store" / model_prefix("eviction")).iterdir())
        async with opened(url, tmp_path / "b", prefetch=True, **flags) as volume:
            assert volume.models is not None
            assert "eviction" in volume.models.loaded

    trio.run(main)


@pytest.mark.redis
def test_what_moves_between_the_tiers_is_counted_and_l2_keeps_its_capacity(tmp_path: Path, url: str, redis_plain: RedisServer) -> None:
    async def main() -> None:
        flags = {"l1__capacity": "16MiB", "l2__capacity": "16MiB", "l1__policy": "learned", "l2__url": redis_plain.url}
        async with opened(url, tmp_path / "a", prefetch=False, **flags) as volume:
            policy = volume.cache.l1.policy
            assert isinstance(policy, LearnedPolicy)
            policy.limit_cpu(0.0)  # what it decides must not depend on this machine
            image = await image_of(volume)
            await reads(volume, image, 8000, 2)
            await volume.cache.wait_idle()
            told = volume.statistics()
            fill, traffic = told["cache"]["fill"], told["cache"]["l2_traffic"]
            assert told["eviction"]["trainings"] >= 1
            assert fill["l2_promotions"] == traffic["hits"] > 0
            assert fill["l3_promotions"] == told["cache"]["l3_traffic"]["hits"]
            assert fill["admissions"] + fill["one_offs"] + fill["dropped"] >= fill["l3_promotions"]
            assert told["cache"]["l2"]["used_bytes"] <= 16 << 20
            assert told["cache"]["l2"]["errors"] == 0
            await volume.close_image(image)

    trio.run(main)


def test_a_policy_that_there_is_not_is_refused_by_name() -> None:
    assert sorted(POLICY_NAMES) == policy_names()
    with pytest.raises(ConfigError, match=r"l1.policy.*'lfru'"):
        load_config("file:///nowhere", flags={"l1.policy": "lfru"}, environ={})
