"""Hosts that commit to one catalog all the time: none is shut out. In virtual time, each request 20 ms."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

import novafs.catalog
from novafs.catalog import Catalog, CatalogRecord, catalog_chain, root_entry
from novafs.catalogtree import ROOT_ID, Entry, Kind
from novafs.objectstore.base import ObjectInfo
from novafs.revisions import new_nonce
from tests.support.memory_store import MemoryStore

REQUEST_S = 0.02
RUN_S = 60.0
LIMIT_S = 600.0


class FarClient:
    """A store that answers after `REQUEST_S`; a change takes effect half-way."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    async def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        await trio.sleep(REQUEST_S / 2)
        try:
            return getattr(self._store, name)(*arguments, **options)
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(REQUEST_S / 2)

    async def get(self, name: str) -> bytes:
        found: bytes = await self._call("get", name)
        return found

    async def create(self, name: str, data: bytes) -> None:
        await self._call("create", name, data)

    async def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[ObjectInfo]:
        found: list[ObjectInfo] = await self._call("list", prefix, after=after, limit=limit)
        return found


class NoPacks:
    """The writer of commits whose directories lie in the catalog itself."""

    used: Any

    def __init__(self) -> None:
        self.used = self

    async def finish(self) -> None:
        await trio.lowlevel.checkpoint()

    async def lost(self) -> list[bytes]:
        await trio.lowlevel.checkpoint()
        return []


@asynccontextmanager
async def no_packs() -> AsyncIterator[Any]:
    yield NoPacks()


async def names_made(hosts: int) -> list[int]:
    """How many names each host makes in `RUN_S`, one after the other, all hosts at once."""
    store = MemoryStore()
    first = CatalogRecord(counter=0, nonce=new_nonce(), root=root_entry())
    await catalog_chain(FarClient(store)).commit(None, first)  # type: ignore[arg-type]
    made = [0] * hosts

    async def host(number: int) -> None:
        chain = catalog_chain(FarClient(store))  # type: ignore[arg-type]
        head = await chain.head()
        assert head is not None
        catalog = Catalog(chain, head, fetch=None, pack_writer=no_packs)  # type: ignore[arg-type]
        while trio.current_time() < RUN_S:
            node_id = bytes([number + 1]) + made[number].to_bytes(15, "big")
            name = f"{number}"
            await catalog.create(Entry(name, node_id, Kind.DIRECTORY, 0o755, 0, 0, 0, 0, 0, parent_id=ROOT_ID))
            await catalog.remove(ROOT_ID, name, directory=True)
            made[number] += 1

    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = LIMIT_S
        for number in range(hosts):
            nursery.start_soon(host, number)
    assert trio.current_time() < LIMIT_S, "a host never came to an end"
    return made


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_that_create_names_all_the_time_take_turns(hosts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has just committed needs one round trip for the next commit, who lost several: without turns he is always late."""
    monkeypatch.setattr(novafs.catalog, "boot_time_s", trio.current_time)

    made = trio.run(names_made, hosts, clock=trio.testing.MockClock(autojump_threshold=0))
    assert min(made) > RUN_S / hosts / 10, made
    assert sum(made) > RUN_S, made


def test_a_host_alone_commits_most_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(novafs.catalog, "boot_time_s", trio.current_time)
    made = trio.run(names_made, 1, clock=trio.testing.MockClock(autojump_threshold=0))
    assert 2 * made[0] * REQUEST_S > 0.75 * RUN_S, made
