"""What prefetch has learned, shared by the hosts of a volume: `models/<name>/<rev>` in the store, and a copy in L2.

L2's copy is written every `SHARE_S`, so that what one guest's boot taught is known to the hosts of a site a minute later; the
store's every `SAVE_S` and when the volume is closed. Both are joined with what is there first (`merge_models` is
idempotent), so any number of hosts may save in any order.

Promised: a model that is damaged, too large, or of another version or chunk size costs one warning and is learned anew; one of a
newer NovaFS is left alone. Nothing here fails a mount, an unmount or a read. A save creates the next number and deletes all but the
two newest of that model: a reader that meets a deleted one lists again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import trio

from novafs.asynctools import open_nursery
from novafs.cache.base import Frame, Tier
from novafs.codec import PLAIN_MAX, Codec
from novafs.errors import NewerFormatError, NovaError, ObjectCorruptError, ObjectExistsError, ObjectNotFoundError
from novafs.eviction.base import EvictionPolicy
from novafs.eviction.state import check_older
from novafs.objectstore.base import ObjectInfo
from novafs.objectstore.client import StoreClient
from novafs.prefetch.blob import BLOB_MAX
from novafs.prefetch.engine import PrefetchEngine
from novafs.prefetch.model import NAMES, dump_models, load_models, merge_models, reset_models
from novafs.prefetcher import harmless
from novafs.revisions import counter_of, revision_name

log = logging.getLogger(__name__)

PREFIX: Final = "models/"
SHARE_S: Final = 60.0
SAVE_S: Final = 600.0
LEARNED_MIN: Final = 50
"""Accesses that are worth a save."""
TRIES_MAX: Final = 4
KEPT: Final = 2
COUNTER_MAX: Final = 1 << 62
EVICTION: Final = "eviction"
"""What the policy behind L1 has learned; the others are the prefetch engine's."""


def model_prefix(name: str) -> str:
    """Where a model's revisions lie."""
    return f"{PREFIX}{name}/"


def model_key(volume_id: str, name: str) -> bytes:
    """What L2 holds a model under: an id that no chunk has."""
    return hashlib.sha256(f"novafs model {volume_id} {name}".encode()).digest()


async def load_saved(client: StoreClient, name: str) -> bytes | None:
    """A model as it was saved last; None where none was. Not checked. Raises what the store raises."""
    newest = await newest_model(client, name)
    return newest[1] if newest is not None else None


async def model_revisions(client: StoreClient, name: str, *, newest: bool = False) -> list[ObjectInfo]:
    """A model's revisions, newest first; of the `newest` that one alone, by a short listing where nothing foreign lies before it."""
    if newest:
        infos = await client.list(model_prefix(name), limit=1)
        if not infos or _is_revision(infos[0].name):
            return infos
    infos = [info for info in await client.list(model_prefix(name)) if _is_revision(info.name)]
    return infos[:1] if newest else infos


def _is_revision(name: str) -> bool:
    # Somebody may have put anything there; a number near the last there can be would leave no next one.
    counter = counter_of(name)
    return counter is not None and counter < COUNTER_MAX


async def newest_model(client: StoreClient, name: str) -> tuple[int, bytes] | None:
    """Number and bytes of a model's newest revision; no bytes where it has more than a model can have."""
    for _ in range(TRIES_MAX):
        infos = await model_revisions(client, name, newest=True)
        if not infos or (counter := counter_of(infos[0].name)) is None:
            return None
        if infos[0].size > BLOB_MAX:
            return counter, b""
        try:
            return counter, await client.get(infos[0].name)
        except ObjectNotFoundError:
            continue  # deleted since: there is a newer one
    return None


async def save_merged(
    client: StoreClient, name: str, mine: bytes, merge: Callable[[bytes, bytes], bytes], *, contained: bytes | None = None
) -> bytes | None:
    """Save a model joined with what is there; what is there then, None where it is a newer NovaFS's and stays.

    Raises what the store raises. merge: of mine and theirs, in a worker thread; raises ObjectCorruptError where theirs is no good,
    NewerFormatError where it must stay. contained: mine has all of this, so it need not be joined where it is what is there.
    """
    for _ in range(TRIES_MAX):
        newest = await newest_model(client, name)
        counter, blob = 0, mine
        if newest is not None:
            counter = newest[0] + 1
            try:
                blob = mine if newest[1] == contained else await trio.to_thread.run_sync(merge, mine, newest[1])
            except NewerFormatError:
                return None
            except ObjectCorruptError as error:
                log.warning("a saved model is replaced: %s", error)
            if blob == newest[1]:
                return blob
        if await create_model(client, name, counter, blob):
            return blob
        # Another host was faster: join with its.
    return None


async def create_model(client: StoreClient, name: str, counter: int, blob: bytes) -> bool:
    """Create a model's next revision, and delete all but the two newest; False where another host was faster."""
    try:
        await client.create(revision_name(model_prefix(name), counter), blob)
    except ObjectExistsError:
        return False
    old = await model_revisions(client, name)
    await client.delete_many([info.name for info in old[KEPT:]])
    return True


class ModelStore:
    """Loads and saves an engine's models. On the trio thread; what takes long runs in workers."""

    def __init__(
        self, engine: PrefetchEngine, policy: EvictionPolicy, client: StoreClient, l2: Tier | None, volume_id: str, *, read_only: bool
    ) -> None:
        """policy: who evicts from L1; what it has learned is kept as well, the latest of all hosts."""
        self._engine = engine
        self._policy = policy
        self._client = client
        self._l2 = l2
        self._volume_id = volume_id
        self._read_only = read_only
        self._l2_threads = trio.CapacityLimiter(1)
        self._seen = 0
        """Accesses that the engine had seen at the last save."""
        self._saved: dict[str, bytes] = {}
        """As they are in the store, as far as known here."""
        self._contained: dict[str, bytes] = {}
        """Revisions in the store that hold nothing which is not known here: read at the start, or written with nobody else's in them. As
        long as no other host saves there is nothing to join, which for full tables takes half a second and 60 MB for a moment."""
        self._lock = trio.Lock()
        self.saves = 0
        self.loaded: list[str] = []

    async def load(self) -> None:
        """Teach the engine what other hosts know."""
        with harmless():
            await self._load()

    async def _load(self) -> None:
        shared = await self._from_l2()
        try:
            self._saved = await self._from_store()
        except NovaError as error:
            log.warning("prefetch starts without what was learned before: %s", error)
        for blobs in (self._saved, shared):
            known = load_models(self._engine, blobs)
            self.loaded += [name for name in known if name not in self.loaded]
            if blobs is self._saved:
                self._contained = {name: blobs[name] for name in known}
        blob = shared.get(EVICTION) or self._saved.get(EVICTION)
        if blob is not None and self._policy.quality() is not None:
            try:
                self._policy.load(blob, PREFIX + EVICTION)
            except (ObjectCorruptError, NewerFormatError) as error:
                log.warning("eviction starts without a saved model: %s", error)
            else:
                self.loaded.append(EVICTION)

    async def changed(self, names: Sequence[str], *, reset: bool) -> list[str]:
        """An operator has reset models in the store, or put others there: forget them here, or learn what they say. Those that this was
        done for: what the eviction policy knows stays until the next mount.
        """
        async with self._lock:
            self._contained.clear()
            mine = [name for name in names if name in NAMES]
            if reset:
                reset_models(self._engine, mine)
                for name in names:
                    self._saved.pop(name, None)
                if self._l2 is not None and self._l2.up:
                    keys = [self._key(name) for name in names]
                    await trio.to_thread.run_sync(self._l2.delete_many, keys, limiter=self._l2_threads)
                return mine
            blobs = {name: blob for name in mine if (blob := await load_saved(self._client, name)) is not None}
            return load_models(self._engine, blobs)

    async def run(self) -> None:
        """Save now and then, until cancelled."""
        save_at_s = trio.current_time() + SAVE_S
        while True:
            await trio.sleep(SHARE_S)
            if trio.current_time() >= save_at_s:
                await self.save()
                save_at_s = trio.current_time() + SAVE_S
            elif self._learned():
                await self.share()

    async def share(self) -> None:
        """Bring L2's copy up to date, where there is an L2 that answers."""
        if self._l2 is None or not self._l2.up or self._read_only:
            return
        with harmless():
            await self._share()

    async def _share(self) -> None:
        async with self._lock:
            theirs = await self._from_l2()
            await self._to_l2(await trio.to_thread.run_sync(_joined, await self._dumped(), theirs))

    async def save(self) -> None:
        """Bring L2 and the store up to date, where there is something to tell. Raises nothing that the store raises."""
        if self._learned() and not self._read_only:
            with harmless():
                await self._save_all()

    async def _save_all(self) -> None:
        async with self._lock:
            seen = self._engine.statistics().accesses
            blobs = await self._dumped()
            try:
                for name, blob in blobs.items():
                    await self._save(name, blob)
            except NovaError as error:
                log.warning("what prefetch has learned is not saved yet: %s", error)
            else:
                self._seen = seen
                self.saves += 1
            await self._to_l2(await trio.to_thread.run_sync(_joined, dict(self._saved), await self._from_l2()))

    def _learned(self) -> bool:
        if not self._engine.settings.learning_rate:
            return False
        return self._engine.statistics().accesses - self._seen >= LEARNED_MIN

    async def _dumped(self) -> dict[str, bytes]:
        learned = self._policy.save()
        blobs = await trio.to_thread.run_sync(dump_models, self._engine)
        return blobs | ({EVICTION: learned} if learned is not None else {})

    # -- the store ----------------------------------------------------------------------------------------------

    async def _from_store(self) -> dict[str, bytes]:
        found: dict[str, bytes] = {}

        async def look(name: str) -> None:
            newest = await newest_model(self._client, name)
            if newest is not None:
                found[name] = newest[1]

        # One listing for a volume that has none.
        if await self._client.list(PREFIX, limit=1):
            async with open_nursery() as nursery:
                for name in (*NAMES, EVICTION):
                    nursery.start_soon(look, name)
        return found

    async def _save(self, name: str, mine: bytes) -> None:
        contained = self._contained.get(name)
        saved = await save_merged(self._client, name, mine, lambda one, other: merge_saved(name, one, other), contained=contained)
        if saved is not None:
            self._saved[name] = saved
            if saved == mine:
                self._contained[name] = mine

    # -- L2 -----------------------------------------------------------------------------------------------------

    def _key(self, name: str) -> bytes:
        return model_key(self._volume_id, name)

    async def _from_l2(self) -> Mapping[str, bytes]:
        l2 = self._l2
        if l2 is None or not l2.up:
            return {}
        names = (*NAMES, EVICTION)
        keys: Sequence[bytes] = [self._key(name) for name in names]
        found: dict[bytes, Frame] = {}
        with trio.move_on_after(1.0):
            found = await trio.to_thread.run_sync(l2.get_many, keys, limiter=self._l2_threads, abandon_on_cancel=True)
        return {name: found[self._key(name)].payload for name in names if self._key(name) in found}

    async def _to_l2(self, blobs: Mapping[str, bytes]) -> None:
        l2 = self._l2
        if l2 is None or not l2.up or self._read_only:
            return
        frames = {self._key(name): Frame(Codec.NONE, blob) for name, blob in blobs.items() if len(blob) <= PLAIN_MAX}
        await trio.to_thread.run_sync(l2.put_many, frames, limiter=self._l2_threads)


def merge_saved(name: str, mine: bytes, theirs: bytes) -> bytes:
    """What both know, of any model that `ModelStore` keeps. Raises what `merge_models` raises."""
    if name != EVICTION:
        return merge_models(name, mine, theirs)
    check_older(theirs, PREFIX + name)  # what a newer NovaFS has learned stays
    return mine


def _joined(mine: Mapping[str, bytes], theirs: Mapping[str, bytes]) -> dict[str, bytes]:
    """What both know; mine where theirs is no good."""
    joined = dict(mine)
    for name, blob in theirs.items():
        if name in joined:
            try:
                joined[name] = merge_saved(name, joined[name], blob)
            except NewerFormatError:
                del joined[name]
            except ObjectCorruptError:
                continue
    return joined
