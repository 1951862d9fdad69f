"""The library on real servers: Ceph RGW as the store, Redis as L2, two processes' worth of caches."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from novafs import CacheConfig, HierarchicalCache, PrefetchRequest
from novafs.errors import BucketMissingError
from tests.support.ceph import Ceph

pytestmark = [pytest.mark.s3, pytest.mark.redis]

BIG = random.Random(2).randbytes((4 << 20) + 5)


def test_two_hosts_share_values_through_the_store_and_chunks_through_redis(s3_url: str, redis_server: Any, tmp_path: Path) -> None:
    def config(name: str) -> CacheConfig:
        return CacheConfig(state_dir=tmp_path / name, l2_url=redis_server.url, fresh_s=0.0)

    with HierarchicalCache(s3_url, config("one")) as one, HierarchicalCache(s3_url, config("two")) as two:
        one.set("vm-001-disk", BIG)
        one.set_multi({f"web/{number}": b"%d" % number * 1000 for number in range(20)})
        one._portal.call(one._portal.value._volume.cache.wait_idle)
        assert two.get("vm-001-disk") == BIG
        tiers = two.stats().tiers
        assert tiers["l2"].hits > 0
        assert len(two.get_multi(two.keys("web/"))) == 20
        with two.open("vm-001-disk", "wb") as file:
            file.write(BIG[::-1])
        assert one.get("vm-001-disk") == BIG[::-1]
        assert one.delete("web/3")
        assert "web/3" not in two
        two.drop_cached()
        assert two.prefetch(PrefetchRequest(["vm-001-disk"])).wait(60).failed == 0
        assert two.get("vm-001-disk") == BIG[::-1]


def test_a_bucket_that_is_missing_is_not_made(ceph_rgw: Ceph, tmp_path: Path) -> None:
    with pytest.raises(BucketMissingError):
        HierarchicalCache(ceph_rgw.volume_url("no-such-bucket", "v"), CacheConfig(state_dir=tmp_path / "state"))
