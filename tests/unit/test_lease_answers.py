"""A waiting host that sleeps with the store's answer in hand must not take what it read before it slept for news: the holder lives,
and acknowledges fsyncs from its journal."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from novafs.errors import LeaseHeldError
from novafs.lease import PREFIX, LeaseManager, LeaseRules
from novafs.objectstore.client import StoreClient
from novafs.objectstore.url import create_root, open_store


class Sleeper(StoreClient):
    nap = None

    async def get(self, name, start=0, length=None):
        data = await super().get(name, start, length)
        if self.nap is not None and name.startswith(PREFIX):
            await self.nap()
        return data


def test_a_host_that_slept_over_an_answer_does_not_take_a_live_lease(tmp_path: Path) -> None:
    async def main() -> None:
        url = f"file://{tmp_path / 's'}"
        create_root(url)
        now = [1000.0]

        def clock() -> float:
            return now[0]

        rules = LeaseRules(takeover="auto", ttl_s=30.0, wait_s=5.0)
        image = b"i" * 16
        a = await LeaseManager(StoreClient(open_store(url)), b"a" * 16, rules, clock_s=clock).acquire(image, "x")
        client = Sleeper(open_store(url))
        b = LeaseManager(client, b"b" * 16, rules, clock_s=clock, poll_s=0)
        reads = 0

        async def nap() -> None:
            nonlocal reads
            reads += 1
            if reads == 2:  # the host sleeps for a minute; the holder goes on
                for _ in range(6):
                    now[0] += 10
                    await a.heartbeat()
            elif reads > 2:
                now[0] += 1

        client.nap = nap
        with pytest.raises(LeaseHeldError):
            await b.acquire(image, "x")
        a.check()

    trio.run(main)
