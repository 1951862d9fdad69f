"""A volume: what is at a URL, opened. Puts store, tiers, catalog and images together; everything above uses this.

    async with open_volume(config) as volume:
        entry = await volume.catalog.resolve("web-01.raw")
        image = await volume.open_image(entry.node_id)

Write order, everywhere: pack, generation, catalog. An image exists once its catalog entry does, so a crash between
leaves objects that nothing names, never a name without an image.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec
import trio

from novafs import durable, pack, statedir
from novafs.asynctools import open_nursery
from novafs.cache.base import Tier
from novafs.cache.memory import MemoryTier
from novafs.cache.packs import PackSource
from novafs.cache.tiered import ChunkCache
from novafs.catalog import Catalog, CatalogRecord, catalog_chain, root_entry
from novafs.catalogtree import ROOT_ID, XATTR_BYTES_MAX, XATTR_NAME_BYTES_MAX, Entry, Kind, check_name
from novafs.chunk import CHUNK_SIZE_DEFAULT
from novafs.config import Config
from novafs.dedup import DedupIndex, Deduplicator
from novafs.delta import Deltas
from novafs.durable import FileOps
from novafs.errors import (
    ConfigError,
    CorruptionError,
    ExistsError,
    InvalidNameError,
    IsDirectoryError,
    NoAttributeError,
    NotFoundError,
    NovaError,
    NoVolumeError,
    ReadOnlyError,
    RetryableError,
    StoreUnavailableError,
    TooLargeError,
)
from novafs.events import EventRing
from novafs.eviction.base import EvictionPolicy, make_policy
from novafs.eviction.learned import LearnedPolicy
from novafs.follow import Follower
from novafs.generation import Generation, generation_chain
from novafs.image import Image, mistake
from novafs.imagereader import ImageTraffic
from novafs.journal import Journal
from novafs.journalfile import Segment
from novafs.latency import LatencyBook
from novafs.lease import LeaseManager, LeaseRules
from novafs.modelstore import ModelStore
from novafs.objectstore.base import ObjectStore
from novafs.objectstore.client import StoreClient
from novafs.objectstore.url import StoreOptions, open_store
from novafs.packwriter import PackWriter, WriteCounts, open_pack_writer
from novafs.pins import Pins
from novafs.prefetch.account import Settings
from novafs.prefetcher import Prefetcher
from novafs.recovery import recover
from novafs.revisions import Chain, ConflictError, Head, boot_time_s, new_nonce
from novafs.seen import Seen
from novafs.superblock import Superblock, create_superblock, read_superblock
from novafs.tally import Tally
from novafs.writeback import COMMITS_MAX, WritebackController, WritebackRules

if TYPE_CHECKING:
    from novafs.handoff import Receiver

log = logging.getLogger(__name__)

ATTRIBUTES_AGE_S: Final = 1.0
"""How long the size and times of an image that is not open here may lag behind another host's commits."""
OPEN_UNDONE_S: Final = 60.0
"""For closing an image whose opening failed after all."""
HINT_INTERVAL_S: Final = 1.0
USAGE_AGE_S: Final = 30.0
USAGE_PACKS_MAX: Final = 20_000
"""Beyond so many, which take 20 requests, not every host lists them all: of a petabyte there are a hundred million."""
HEADS_MAX: Final = 4096
MAP_SHARE: Final = 8
"""Loaded map nodes may take one part in MAP_SHARE of L1's capacity."""
DIRTY_SHARE: Final = 2
"""Dirty data counts against L1's capacity, up to one part in so many of it."""
HEADS_BYTES_MAX: Final = 16 << 20
"""Of what those hold: a patch, or the top of a large map, may have a quarter of a mebibyte."""
SNAPSHOTS_NAME: Final = ".snapshots"
"""Where a mount shows snapshots (`novafs.namespace`): no image or directory of the root has this name."""
CLOSE_TIMEOUT_S: Final = 60.0
POLICY_CPU_SHARE: Final = 0.035
POLICY_CPU_SHARE_BESIDE: Final = 0.02
"""Of the process's time: what L1's policy may spend, alone and beside prefetch, which has its own (`novafs.prefetch.throttle`)."""
POLICY_PAUSE_S: Final = 0.002
"""Between two slices of learning, of about half a millisecond each."""
MODELS_TIMEOUT_S: Final = 10.0
"""What the end of a volume waits for what prefetch has learned: it is only worth time."""
BEATS_MAX: Final = 4
"""Requests for heartbeats at a time."""


@dataclass(frozen=True, slots=True)
class Attributes:
    """What `stat` tells of a node. Bytes and nanoseconds; generation is -1 for a directory."""

    size: int
    stored_bytes: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    generation: int


@dataclass(frozen=True, slots=True)
class VolumeUsage:
    """capacity_bytes: the smaller of the L3 capacity setting and what the store has room for; used_bytes: of all packs."""

    capacity_bytes: int
    used_bytes: int
    images: int


async def init_volume(client: StoreClient, *, chunk_size: int = CHUNK_SIZE_DEFAULT, delta: bool = False) -> Superblock:
    """Make an empty volume, its root directory the caller's. delta: one that may hold delta frames (`novafs.delta`).

    Raises VolumeExistsError, ConfigError (a store without create-only writes).
    """
    await check_create_only(client)
    # The catalog first: a superblock without one would look like a volume that lost its names. A catalog that an
    # interrupted `init` left is as empty as the one this would make.
    record = CatalogRecord(counter=0, nonce=new_nonce(), root=root_entry(uid=os.getuid(), gid=os.getgid()), written_ns=time.time_ns())
    chain = catalog_chain(client)
    if await chain.head_counter() is None:
        try:
            await chain.commit(None, record)
        except NovaError:
            if await chain.head_counter() is None:
                raise
    return await create_superblock(client, chunk_size=chunk_size, delta=delta)


async def check_create_only(client: StoreClient) -> None:
    """Refuse a store that replaces objects when told not to: two writers would silently overwrite each other."""
    if not await client.probe_create_only():
        raise ConfigError(
            f"{client.store.url}: the store ignores 'If-None-Match: *', so commits of two hosts could overwrite each other; "
            f"use a store that honours it (AWS S3, Ceph RGW, MinIO, a local directory), or mount read-only"
        )


@asynccontextmanager
async def open_volume(
    config: Config,
    *,
    read_only: bool = False,
    owns_state: bool = False,
    prefetch: bool = False,
    store: ObjectStore | None = None,
    ops: FileOps = durable.SYSTEM,
    events: EventRing | None = None,
) -> AsyncIterator[Volume]:
    """The volume that `config` names. On leaving, dirty images are committed and leases given back.

    owns_state: the caller holds the state directory's lock, so this process may use its journal, and with it write
    images; what a crash left in the journal is replayed before this returns.
    prefetch: fetch ahead of readers and learn from them, where the configuration allows it: for whoever serves guests.
    store: instead of the one that the configuration names, and ops: below everything that has to be durable on this
    host; the seams for crash tests. events: where commits and leases are told of.
    Raises NoVolumeError, NewerFormatError, ConfigError, StoreDeniedError, BucketMissingError, StoreUnavailableError.
    """
    if store is None:
        options = StoreOptions(pool_size=config.store.requests_max)
        store = await trio.to_thread.run_sync(lambda: open_store(str(config.volume_url), options=options))
    latencies = LatencyBook()
    client = StoreClient(store, io_timeout_s=config.store.io_timeout_s, requests_max=config.store.requests_max, latencies=latencies)
    async with AsyncExitStack() as stack:
        stack.callback(client.store.close)
        superblock, head = await _read_start(client, probe=not read_only)
        await trio.to_thread.run_sync(lambda: statedir.prepare(config.state_dir, ops=ops))
        l1 = MemoryTier(
            capacity_bytes=config.l1.capacity_bytes,
            codec=config.l1.codec,
            decoded_share=config.l1.decoded_share,
            policy=_policy(config),
        )
        stack.callback(l1.close)
        l2 = await trio.to_thread.run_sync(_open_l2, config, superblock.volume_id)
        if l2 is not None:
            # In a thread: it may wait for other users of an embedded server.
            stack.push_async_callback(_close_l2, l2)
        index = await trio.to_thread.run_sync(DedupIndex, config.state_dir / f"dedup-{superblock.volume_id[:16]}.sqlite")
        stack.callback(index.close)
        dedup = Deduplicator(index, client, enabled=config.dedup, grace_s=config.gc.grace_s)
        cache = ChunkCache(
            l1=l1,
            l2=l2,
            l3=PackSource(client),
            chunk_size=superblock.chunk_size,
            l2_codec=config.l2.codec,
            l2_timeout_s=2 * config.l2.timeout_s,
            relocate=dedup.forwards.relocate,
            latencies=latencies,
        )
        journal: Journal | None = None
        segments: list[Segment] = []
        if owns_state and not read_only:
            opened = await trio.to_thread.run_sync(lambda: Journal.open(config.state_dir / "journal", ops=ops))
            journal, segments = opened
            stack.callback(opened[0].close)
            journal.sync_latency = latencies.of("journal", "sync")
        await stack.enter_async_context(cache.running())
        nursery = await stack.enter_async_context(open_nursery())
        prefetcher = _prefetcher(config, cache, superblock.chunk_size) if prefetch and config.prefetch.enabled else None
        if prefetcher is not None:
            l1.policy.set_patterns(prefetcher.engine.pattern)
        volume = Volume(
            config,
            superblock,
            client,
            cache,
            dedup,
            head,
            journal=journal,
            read_only=read_only,
            prefetcher=prefetcher,
            ops=ops,
            events=events,
        )
        await volume.start(nursery)
        try:
            if journal is not None:
                await recover(volume, journal, segments)
            if volume.models is not None:
                with trio.move_on_after(MODELS_TIMEOUT_S):
                    await volume.models.load()
            yield volume
        finally:
            with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True) as closing:
                async with open_nursery() as ending:
                    ending.start_soon(_put_off, volume, closing)
                    await volume.close()
                    ending.cancel_scope.cancel()
            if closing.cancelled_caught:
                raise StoreUnavailableError(
                    f'{client.url}: nothing more could be stored for {CLOSE_TIMEOUT_S:.0f} s at the end; with durability = "journal" '
                    f"it is in the journal under {config.state_dir}, and the next mount on this host commits it"
                )
            # Apart: everything is committed, and this being cut short is no reason to say that it was not.
            with trio.move_on_after(MODELS_TIMEOUT_S, shield=True):
                await volume.save_models()
        nursery.cancel_scope.cancel()


async def _put_off(volume: Volume, end: trio.CancelScope) -> None:
    """Put the end off for as long as something gets stored: an upload may be long, as long as it is one."""
    before = volume.stored_so_far
    while True:
        await trio.sleep(CLOSE_TIMEOUT_S / 60)
        now = volume.stored_so_far
        if now != before:
            before = now
            end.deadline = trio.current_time() + CLOSE_TIMEOUT_S


def _open_l2(config: Config, volume_id: str) -> Tier | None:
    if config.l2.url == "none":
        return None
    from novafs.cache.redis import open_l2  # loads the client of Redis: a seventh of what a command without L2 takes to begin

    return open_l2(
        config.l2.url.reveal(),
        capacity_bytes=config.l2.capacity_bytes,
        volume_id=volume_id,
        state_dir=config.state_dir,
        timeout_s=config.l2.timeout_s,
    )


async def _close_l2(l2: Tier) -> None:
    with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
        await trio.to_thread.run_sync(l2.close)


async def _read_start(client: StoreClient, *, probe: bool) -> tuple[Superblock, Head[CatalogRecord]]:
    """Superblock and catalog head, and the probe, at the same time: a cold mount counts its round trips."""
    found: dict[str, Any] = {}

    async def superblock() -> None:
        found["superblock"] = await read_superblock(client)

    async def head() -> None:
        found["head"] = await catalog_chain(client).head()

    async with open_nursery() as nursery:
        nursery.start_soon(superblock)
        nursery.start_soon(head)
    if probe:
        await check_create_only(client)
    if found["head"] is None:
        raise NoVolumeError(
            f"{client.store.url}: the volume has no catalog; an interrupted 'novafs init' can be run again, else see 'novafs fsck'"
        )
    return found["superblock"], found["head"]


def _head_bytes(head: Head[Generation]) -> int:
    return len(head.record.top) + sum(len(data) for _, data in head.record.patch)


def _policy(config: Config) -> EvictionPolicy:
    policy = make_policy(config.l1.policy)
    if isinstance(policy, LearnedPolicy):
        policy.limit_cpu(POLICY_CPU_SHARE_BESIDE if config.prefetch.enabled else POLICY_CPU_SHARE)
    policy.set_learning_rate(config.learning.rate)
    return policy


def _prefetcher(config: Config, cache: ChunkCache, chunk_size: int) -> Prefetcher:
    return Prefetcher(cache, _prefetch_settings(config, chunk_size), requests_max=config.store.requests_max)


def _prefetch_settings(config: Config, chunk_size: int) -> Settings:
    return Settings(
        prefetch_window=config.prefetch.window,
        prefetch_window_bytes=config.prefetch.window_bytes,
        prefetch_accuracy_target=config.prefetch.accuracy_target,
        prefetch_aggression=config.prefetch.aggression,
        prefetch_traffic_max=config.prefetch.traffic_max,
        read_around_bytes=config.prefetch.read_around_bytes,
        learning_rate=config.learning.rate,
        chunk_size=chunk_size,
    )


def _writeback_rules(config: Config) -> WritebackRules:
    return WritebackRules(
        durability=config.durability,
        dirty_max_bytes=config.writeback.dirty_max_bytes,
        interval_s=config.writeback.interval_s,
        flush_timeout_s=config.store.io_timeout_s,
    )


def _lease_rules(config: Config) -> LeaseRules:
    return LeaseRules(config.durability, config.lease.takeover, config.lease.ttl_s, config.lease.wait_s, config.gc.grace_s)


class Volume:
    """An open volume. Everything here runs on the trio thread."""

    def __init__(
        self,
        config: Config,
        superblock: Superblock,
        client: StoreClient,
        cache: ChunkCache,
        dedup: Deduplicator,
        head: Head[CatalogRecord],
        *,
        journal: Journal | None,
        read_only: bool,
        prefetcher: Prefetcher | None = None,
        ops: FileOps = durable.SYSTEM,
        events: EventRing | None = None,
    ) -> None:
        self.config = config
        self.superblock = superblock
        self.client = client
        self.cache = cache
        self.dedup = dedup
        self.read_only = read_only
        self.chunk_size = superblock.chunk_size
        self.grace_s = config.gc.grace_s
        self.catalog = Catalog(catalog_chain(client, grace_s=self.grace_s), head, fetch=cache.fetch, pack_writer=self.pack_writer)
        # Heartbeats have requests of their own: those of commits and reads may all hang.
        beats = StoreClient(
            client.store, io_timeout_s=min(client.io_timeout_s, config.lease.ttl_s / 3), requests_max=BEATS_MAX, health=client.health
        )
        self.latencies = client.latencies
        self.events = events if events is not None else EventRing()
        self.writeback = WritebackController(
            _writeback_rules(config),
            journal=journal,
            leases=LeaseManager(client, journal.journal_id, _lease_rules(config), beats=beats) if journal is not None else None,
            state_dir=config.state_dir,
            images=lambda: self._images.values(),
            pack_writer=self.pack_writer,
            ops=ops,
            events=self.events,
            latencies=self.latencies,
            held=self._hold_dirty,
        )
        self.deltas = Deltas(enabled=config.l3.delta and superblock.delta)
        cache.on_delta_read = self.deltas.note_read
        self.writes = WriteCounts()
        """What commits of this process have stored."""
        self._past_traffic = ImageTraffic()
        """Of images and views that were closed."""
        self.prefetcher = prefetcher
        self.models: ModelStore | None = None
        self.receiver: Receiver | None = None
        """Of what other hosts give up, where this one serves guests."""
        if self.prefetcher is not None:
            self.models = ModelStore(self.prefetcher.engine, cache.l1.policy, client, cache.l2, superblock.volume_id, read_only=read_only)
        self._workers = trio.CapacityLimiter(2)
        self.warm_threads: trio.CapacityLimiter | None = None
        """Of `novafs.warming`."""
        self.tally = Tally()
        self._images: dict[bytes, Image] = {}
        self._followers: dict[bytes, Follower] = {}
        """The last one of each image, until its request is taken back."""
        self._writers: dict[bytes, Callable[[], None]] = {}
        """Images that are open for writing, and what is called when another host has changed them (`follow`)."""
        self._let_go: set[bytes] = set()
        """Images whose lease is to be given back although readers have them open."""
        self._views: set[Image] = set()
        host_id = journal.journal_id if journal is not None else secrets.token_bytes(16)
        self.pins = Pins(client, host_id, opened=self._opened, grace_s=self.grace_s)
        self._unlinked: set[bytes] = set()
        self._heads: OrderedDict[bytes, Head[Generation]] = OrderedDict()
        self._heads_bytes = 0
        self._hints: dict[bytes, Attributes] = {}
        self._usage: tuple[float, int] | None = None
        """Trio time up to which it holds, and bytes of all packs."""
        self._usage_lock = trio.Lock()

    # -- writing to L3 ------------------------------------------------------------------------------------------

    def pack_writer(self, *, cache: bool = True, workers: trio.CapacityLimiter | None = None) -> AbstractAsyncContextManager[PackWriter]:
        """A writer for one commit; `cache`: what it stores goes into L1 and L2 as well. workers: threads of its own."""
        return open_pack_writer(
            self.client,
            self.dedup,
            codec=self.config.l3.codec,
            codec_level=self.config.l3.codec_level,
            workers=workers if workers is not None else self._workers,
            cache=self.cache if cache else None,
            totals=self.writes,
            deltas=self.deltas,
        )

    async def start(self, nursery: trio.Nursery) -> None:
        """Start what runs in the background for as long as the volume is open."""
        await self.writeback.run(nursery)
        nursery.start_soon(self._run_background)
        nursery.start_soon(self._run_learning)
        if self.prefetcher is not None and self.models is not None:
            nursery.start_soon(self.prefetcher.run, nursery)
            nursery.start_soon(self.models.run)
            if self.writeback.journal is not None:
                from novafs.handoff import Receiver  # it imports this module

                self.receiver = Receiver(self)
                self.writeback.on_wanted = self.receiver.wanted
                nursery.start_soon(self.receiver.run)
        nursery.start_soon(self.pins.run)

    @property
    def stored_so_far(self) -> tuple[int, int]:
        """What changes with whatever is stored: bytes that were sent to the store, and bytes that are still to be committed."""
        sent = sum(figures.written_bytes for figures in self.client.statistics().by_operation.values())
        return sent, self.writeback.at_risk.bytes

    def set_config(self, config: Config) -> None:
        """Work with the live keys of `config` (`novafs.reload`) from now on; L1's capacity is the caller's matter: it takes time."""
        self.config = config
        self.client.io_timeout_s = config.store.io_timeout_s
        self.deltas.enabled = config.l3.delta and self.superblock.delta
        self.writeback.set_rules(_writeback_rules(config))
        if self.writeback.leases is not None:
            self.writeback.leases.rules = _lease_rules(config)
        if self.prefetcher is not None:
            self.prefetcher.retune(_prefetch_settings(config, self.chunk_size))

    def _opened(self) -> list[tuple[bytes, int]]:
        """The generations whose content handles here may read."""
        return [(image.head.image_id, image.generation) for image in (*self._images.values(), *self._views)]

    def overdue(self, since_s: float) -> bool:
        """Whether so much time has passed since a boot time that a collection may have taken what was read then."""
        return boot_time_s() - since_s > self.dedup.guard_s

    async def _run_background(self) -> None:
        """Hints, and the bound on map nodes."""
        while True:
            await trio.sleep(HINT_INTERVAL_S)
            self._trim_maps()
            self.follow_again()
            self.latencies.tick(trio.current_time())
            self.cache.l1.weigh()
            try:
                await self._forget_idle_images()
                await self._flush_hints()
            except NovaError as error:
                log.warning("sizes in the catalog lag behind: %s", error)
            except Exception:  # a mistake here must not end the volume
                log.exception("sizes in the catalog lag behind")

    async def _run_learning(self) -> None:
        """L1's policy learns, a slice at a time: it stops by itself where it has spent what it may."""
        while True:
            await trio.sleep(HINT_INTERVAL_S)
            try:
                while True:
                    await trio.sleep(POLICY_PAUSE_S)
                    if not self.cache.l1.work():
                        break
            except Exception:  # a mistake here must not end the volume; it costs hits
                log.exception("eviction: a mistake in NovaFS; please report it. L1 goes on with what was learned")
                return

    def _trim_maps(self) -> None:
        budget = self.config.l1.capacity_bytes // MAP_SHARE
        images = [*self._images.values(), *self._views]
        used = sum(image.map_bytes for image in images)
        if used > budget:
            for image in images:
                image.trim_map(keep_leaves=max(16, budget // 2 // len(images) // (16 << 10)))
            used = sum(image.map_bytes for image in images)
        self.cache.l1.set_reserved("maps", used)

    def _hold_dirty(self, size: int) -> None:
        """Dirty data counts against L1, where its chunks are going, up to a part: written bytes must not drive out all that is read,
        in a tiny L1 either, of which others have taken much."""
        l1 = self.cache.l1
        others = sum(taken for name, taken in l1.statistics().reserved_bytes.items() if name not in ("dirty", "fetch"))
        l1.set_reserved("dirty", min(size, l1.capacity_bytes // DIRTY_SHARE, l1.capacity_bytes - l1.capacity_bytes // 8 - others))

    async def close(self) -> None:
        """Commit every dirty image and the hints. Raises the first error, after trying them all."""
        images = [image for image in self._images.values() if image.node_id not in self._unlinked]
        # What fsync would have kept, and more: where a commit fails or takes too long, the next mount replays it.
        for image in images:
            try:
                await image.keep()
            except NovaError as error:
                log.error("image %s: what was written last could not be put into the journal: %s", image.name, error)
        failed: list[NovaError] = []
        slots = trio.CapacityLimiter(COMMITS_MAX)

        async def close(image: Image) -> None:
            async with slots:
                try:
                    await image.commit()
                    self._note_hint(image)
                except Exception as error:  # whatever it is, the other images are committed
                    failed.append(error if isinstance(error, NovaError) else mistake(image, error))
                    log.error("image %s: %d dirty bytes could not be committed: %s", image.name, image.dirty_bytes, error)
                    return
                try:
                    await image.release_lease()
                except NovaError as error:
                    log.warning("image %s: its lease is given back by the next mount: %s", image.name, error)

        async with open_nursery() as nursery:
            for image in images:
                nursery.start_soon(close, image)
        try:
            await self._flush_hints()
        except NovaError as error:
            log.warning("sizes in the catalog lag behind: %s", error)
        if failed:
            raise failed[0]
        await self.pins.remove()

    async def save_models(self) -> None:
        """Keep what prefetch has learned. Raises nothing that the store raises."""
        if self.prefetcher is not None and self.models is not None:
            self.prefetcher.finish()
            await self.models.save()

    # -- the namespace ------------------------------------------------------------------------------------------

    def check_writable(self) -> None:
        if self.read_only:
            raise ReadOnlyError(f"{self.client.store.url}: opened read-only")

    def _check_new_name(self, parent_id: bytes, name: str) -> None:
        self.check_writable()
        check_name(name)
        if parent_id == ROOT_ID and name == SNAPSHOTS_NAME:
            raise InvalidNameError(f"{name}: is where a mount shows snapshots; choose another name")

    async def create(
        self,
        parent_id: bytes,
        name: str,
        *,
        mode: int = 0o644,
        uid: int = 0,
        gid: int = 0,
        generation: Generation | None = None,
        replace: bool = False,
        xattrs: Mapping[str, bytes] = MappingProxyType({}),
        expires_s: float | None = None,
        confirm: Callable[[], Awaitable[None]] | None = None,
    ) -> Entry:
        """A new image, empty or with the content of `generation` (whose packs are stored). Raises what `Catalog.create` raises.

        confirm: called when the generation is there and has no name yet; raises where what it refers to was collected meanwhile.
        """
        self._check_new_name(parent_id, name)
        if not replace:  # before an object is made for nothing; the commit looks again
            try:
                await self.catalog.lookup(parent_id, name)
            except NotFoundError:
                pass
            else:
                raise ExistsError(f"{name}: exists already")
        now = time.time_ns()
        first = generation or Generation(
            image_id=secrets.token_bytes(16), counter=0, nonce=new_nonce(), mtime_ns=now, ctime_ns=now, committed_ns=now
        )
        chain, began_s = self._generations(first.image_id), boot_time_s()
        head = await chain.commit(None, first)
        if confirm is not None:
            await confirm()
        self.remember_head(head)
        entry = Entry(
            name,
            first.image_id,
            Kind.IMAGE,
            mode,
            uid,
            gid,
            now,
            first.mtime_ns,
            now,
            first.size,
            first.held_bytes,
            xattrs=dict(xattrs),
            expires_s=expires_s,
            parent_id=parent_id,
        )
        entry = await self.catalog.create(entry, replace=replace)
        if self.overdue(began_s):
            # A collection that saw no name yet may be deleting the generation: one more it has not seen. (Who opened the image
            # meanwhile and wrote to it has made one.)
            with contextlib.suppress(ConflictError):
                self.remember_head(await chain.commit(head, head.record.successor()))
        return entry

    async def mkdir(self, parent_id: bytes, name: str, *, mode: int = 0o755, uid: int = 0, gid: int = 0) -> Entry:
        """A new directory. Raises what `Catalog.create` raises."""
        self._check_new_name(parent_id, name)
        now = time.time_ns()
        return await self.catalog.create(
            Entry(name, secrets.token_bytes(16), Kind.DIRECTORY, mode, uid, gid, now, now, now, parent_id=parent_id)
        )

    async def unlink(self, parent_id: bytes, name: str) -> Entry:
        """Remove an image's name; handles that are open go on. Raises what `Catalog.remove` raises."""
        self.check_writable()
        entry = await self.catalog.remove(parent_id, name, directory=False)
        self._note_unlinked(entry)
        return entry

    async def rmdir(self, parent_id: bytes, name: str) -> Entry:
        """Remove an empty directory. Raises what `Catalog.remove` raises."""
        self.check_writable()
        return await self.catalog.remove(parent_id, name, directory=True)

    async def rename(self, parent_id: bytes, name: str, new_parent_id: bytes, new_name: str, *, replace: bool = True) -> Entry | None:
        """Move a name, atomically; the entry it replaced. Raises what `Catalog.rename` raises."""
        self._check_new_name(new_parent_id, new_name)
        replaced = await self.catalog.rename(parent_id, name, new_parent_id, new_name, replace=replace)
        if replaced is not None:
            self._note_unlinked(replaced)
        return replaced

    def _note_unlinked(self, entry: Entry) -> None:
        self._hints.pop(entry.node_id, None)
        self._forget_head(entry.node_id)
        image = self._images.get(entry.node_id)
        if image is not None:
            self._unlinked.add(entry.node_id)
            self._stop_following(image)
            image.note_unlinked()

    async def set_attributes(
        self,
        node_id: bytes,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
    ) -> Entry:
        """Change mode (permission bits), owner or times. Raises NotFoundError, ReadOnlyError."""
        self.check_writable()
        if mtime_ns is not None and (await self.catalog.get(node_id)).kind is Kind.IMAGE:
            image = await self.open_image(node_id)
            try:
                await image.set_mtime(mtime_ns)
                if node_id not in self._writers:
                    await self.let_go(image)  # readers may keep it open for long
            finally:
                await self.close_image(image)
        changes: dict[str, object] = {
            name: value
            for name, value in (("mode", mode), ("uid", uid), ("gid", gid), ("atime_ns", atime_ns), ("mtime_ns", mtime_ns))
            if value is not None
        }

        def edit(entry: Entry) -> Entry:
            return msgspec.structs.replace(entry, ctime_ns=time.time_ns(), **changes)

        return await self.catalog.update(node_id, edit)

    async def set_xattr(self, node_id: bytes, name: str, value: bytes, *, create: bool = False, replace: bool = False) -> None:
        """Set an extended attribute. Raises ExistsError (`create`), NoAttributeError (`replace`), TooLargeError."""
        self.check_writable()
        if not name or "\0" in name or len(name.encode()) > XATTR_NAME_BYTES_MAX:
            raise InvalidNameError(f"attribute name {name[:80]!a}: must have 1 to {XATTR_NAME_BYTES_MAX} bytes, none of them NUL")

        def edit(entry: Entry) -> Entry:
            if create and name in entry.xattrs:
                raise ExistsError(f"{entry.name}: has an attribute {name} already")
            if replace and name not in entry.xattrs:
                raise NoAttributeError(f"{entry.name}: has no attribute {name}")
            xattrs = {**entry.xattrs, name: bytes(value)}
            if sum(len(k) + len(v) for k, v in xattrs.items()) > XATTR_BYTES_MAX:
                raise TooLargeError(f"{entry.name}: its attributes would take more than {XATTR_BYTES_MAX} bytes")
            return msgspec.structs.replace(entry, xattrs=xattrs, ctime_ns=time.time_ns())

        await self.catalog.update(node_id, edit)

    async def remove_xattr(self, node_id: bytes, name: str) -> None:
        """Remove an extended attribute. Raises NoAttributeError."""
        self.check_writable()

        def edit(entry: Entry) -> Entry:
            if name not in entry.xattrs:
                raise NoAttributeError(f"{entry.name}: has no attribute {name}")
            return msgspec.structs.replace(entry, xattrs={k: v for k, v in entry.xattrs.items() if k != name}, ctime_ns=time.time_ns())

        await self.catalog.update(node_id, edit)

    # -- images -------------------------------------------------------------------------------------------------

    async def open_image(self, node_id: bytes) -> Image:
        """The image, with one more handle; it sees the newest generation. Raises NotFoundError, IsDirectoryError, StaleError."""
        if node_id not in self._images:
            entry = await self.catalog.get(node_id)
            if entry.kind is Kind.DIRECTORY:
                raise IsDirectoryError(f"{self.catalog.path_of(entry)}: is a directory")
            return await self.open_image_by_id(node_id, name=self.catalog.path_of(entry))
        return await self.open_image_by_id(node_id)

    async def open_image_by_id(self, node_id: bytes, *, name: str = "") -> Image:
        """`open_image` for an image that may have no name (any more). Raises NotFoundError where the store has no generation of it."""
        image = self._images.get(node_id)
        name = name or f"image {node_id.hex()}"
        if image is None:
            chain = self._generations(node_id)
            head = await chain.head(self._heads.get(node_id))
            if head is None:
                raise NotFoundError(f"{name}: has no generation in the store; run 'novafs fsck'")
            image = self._images.get(node_id)  # another open may have been faster
            if image is None:
                image = Image(
                    node_id=node_id,
                    name=name,
                    chunk_size=self.chunk_size,
                    head=head,
                    chain=chain,
                    cache=self.cache,
                    writeback=self.writeback,
                    read_only=self.read_only,
                    watcher=self.prefetcher,
                )
                self._images[node_id] = image
                image.handles += 1
                if self.prefetcher is not None:
                    self.prefetcher.opened(image, node_id)
                return image
        image.handles += 1
        try:
            if image.lease is None and node_id not in self._unlinked:
                await image.refresh()
        except BaseException:
            image.handles -= 1
            await self._forget_idle(image)
            raise
        return image

    async def close_image(self, image: Image) -> None:
        """Give a handle back; the last one commits and gives the lease back. After an error the image stays, its dirty
        data and its lease with it, and the commit is tried again in the background."""
        if self._images.get(image.node_id) is not image:  # a view of a snapshot, or forgotten at the end
            image.handles -= 1
            self._views.discard(image)
            self._forgotten(image)
            return
        try:
            if image.handles == 1 and image.dirty and image.node_id not in self._unlinked:
                await image.commit()
        finally:
            image.handles -= 1
            self._note_hint(image)
            await self._forget_idle(image)

    async def open_to_write(self, node_id: bytes) -> tuple[Image, bool]:
        """`open_image`, and whether another host holds the lease; to be followed (`follow`)."""
        known, leases = self._images.get(node_id), self.writeback.leases
        if leases is None or self.read_only or (known is not None and known.lease is not None):
            return await self.open_image(node_id), False
        image: Image | None = None
        held = False

        async def look() -> None:
            nonlocal held
            held = await leases.holder(node_id) is not None

        try:
            async with open_nursery() as nursery:
                nursery.start_soon(look)
                image = await self.open_image(node_id)
        except BaseException:
            if image is not None:
                with trio.move_on_after(OPEN_UNDONE_S, shield=True):
                    await self.close_image(image)
            raise
        return image, held

    def look_ahead(self, image: Image) -> None:
        """An image was opened for reading past the page cache, perhaps by an emulator that waits for a machine: in the background, ask who
        writes it for what is hot."""
        if self.receiver is not None and image.lease is None and not image.read_only:
            self.writeback.start(partial(self.receiver.ask, image))

    async def follow(self, image: Image, changed: Callable[[], None], *, held: bool) -> None:
        """An image was opened for writing: from now on, and until `let_go`, look before reads for what other hosts commit, whenever its
        lease is not this host's. See `novafs.follow`. held: another host has the lease, so wait for its answer (at most `lease.wait`).

        changed: called whenever the content has become another by that.
        """
        if self.writeback.leases is None or image.read_only or image.node_id in self._unlinked:
            return
        self._writers[image.node_id] = changed
        if image.lease is None and image.follower is None:
            # What handles that may only read have read does not matter: the kernel's pages are noted by `note_kept`.
            self._start_follower(image, Seen(), held=held)
        if held and image.follower is not None:
            await image.follower.answered()
        await image.settle_handles()

    def may_keep(self, image: Image) -> bool:
        """Whether a handle that is being opened for writing may read what the kernel has of before: nobody notes what it reads."""
        if image.follower is not None:
            if image.follower.moved:
                return False
            image.follower.seen.everything = True
        return True

    def _start_follower(self, image: Image, seen: Seen, *, held: bool = False) -> None:
        leases, changed = self.writeback.leases, self._writers[image.node_id]
        if leases is None:
            return
        after = self._followers.get(image.node_id)
        follower = Follower(image, leases, changed=changed, seen=seen, after=after, held=held)
        image.follower = self._followers[image.node_id] = follower
        self.writeback.start(partial(self._run_follower, follower, image.node_id))

    async def _run_follower(self, follower: Follower, node_id: bytes) -> None:
        try:
            await follower.run()
        except Exception:  # a mistake here must not end the volume
            log.exception("following an image of another host: a mistake in NovaFS; please report it. It is tried again")
        finally:
            if follower.failed:
                self._writers.pop(node_id, None)
            if (image := self._images.get(node_id)) is not None:
                image.unfollow(follower)  # `follow_again` begins anew
            if self._followers.get(node_id) is follower:
                del self._followers[node_id]

    def follow_again(self) -> None:
        """Images that are open for writing here, and whose lease was given up or lost all the same: whatever was read of them is old."""
        for node_id in list(self._writers):
            image = self._images.get(node_id)
            if image is None or node_id in self._unlinked:
                del self._writers[node_id]
            elif image.lease is None and image.follower is None:
                self._start_follower(image, Seen(everything=True))

    def _stop_following(self, image: Image) -> None:
        self._writers.pop(image.node_id, None)
        if image.follower is not None:
            image.follower.stop()
            image.follower = None

    async def let_go(self, image: Image) -> None:
        """Nobody here has the image open for writing any more: commit, and give the lease back, although readers keep it open.

        The next host need not wait for those: the emulator that a machine was migrated away from keeps its disk open. What
        fails is tried again in the background.
        """
        if image.node_id in self._unlinked or self._images.get(image.node_id) is not image:
            return
        self._stop_following(image)
        if image.lease is None and not image.leaving:
            return
        self._let_go.add(image.node_id)
        if image.handles == 1:
            return  # its close does the rest, and where a reader comes meanwhile, or it fails, the background
        try:
            await image.commit()
            await self._release_let_go(image)
        except NovaError as error:
            log.warning("%s: its lease is given back later: %s", image.name, error)

    def keep_lease(self, image: Image) -> None:
        """A handle was opened that may write: what `let_go` has not given back yet is kept."""
        self._let_go.discard(image.node_id)

    async def _release_let_go(self, image: Image) -> None:
        if image.lease is not None:
            await image.lease.settled()  # an fsync that comes after the close finds it
        if image.node_id in self._let_go and not image.dirty:
            await image.release_lease()
            if image.lease is None and not image.leaving:
                self._let_go.discard(image.node_id)

    async def _forget_idle(self, image: Image) -> None:
        """Give back the lease of an image that nobody has open and that is clean, and forget it."""
        if not image.handles:
            self._stop_following(image)
        unlinked = image.node_id in self._unlinked
        if image.handles or (image.dirty and not unlinked):
            return
        try:
            if unlinked and not await image.discard():
                return  # opened again meanwhile
            if not unlinked and image.lease is not None and image.lease.settles_s is not None:
                await image.lease.settled()
                if image.handles or image.dirty:
                    return
            await image.release_lease()
        except NovaError as error:
            log.warning("%s: its lease is given back later: %s", image.name, error)
            return
        if image.handles or image.dirty or image.lease is not None or image.leaving:
            return  # opened again while the lease was given back
        self._images.pop(image.node_id, None)
        self._forgotten(image)
        self._unlinked.discard(image.node_id)
        if not unlinked:
            self.remember_head(Head(image.head, boot_time_s() - ATTRIBUTES_AGE_S / 2))

    def _forgotten(self, image: Image) -> None:
        self._past_traffic.add(image.traffic)
        image.traffic = ImageTraffic()  # a handle that is still open counts on
        if self.prefetcher is not None and not image.handles:
            self.prefetcher.closed(image)

    async def _forget_idle_images(self) -> None:
        """Images that were closed while the store was away, and are committed now."""
        for image in list(self._images.values()):
            try:
                if not image.handles and not image.dirty:
                    await self._forget_idle(image)
                elif image.node_id in self._let_go:
                    await self._release_let_go(image)
            except NovaError as error:  # of this one: the others are given back all the same
                log.warning("%s: its lease is given back later: %s", image.name, error)
        self._let_go &= self._images.keys()

    async def open_snapshot(self, node_id: bytes, counter: int, *, name: str) -> Image:
        """A read-only view of one retained generation, with one handle; it is not shared. Raises ObjectNotFoundError."""
        head = Head(await generation_chain(self.client, node_id).read(counter), boot_time_s())
        return self.open_view(head, name=name, watched_as=node_id + counter.to_bytes(8, "little"))

    def open_view(self, head: Head[Generation], *, name: str, watched_as: bytes) -> Image:
        """A read-only view of the generation `head`, with one handle; `close_image` ends it.

        watched_as: what the prefetcher knows it by: the same for all generations of what is read alike.
        """
        node_id = head.record.image_id
        view = Image(
            node_id=node_id,
            name=name,
            chunk_size=self.chunk_size,
            head=head,
            chain=self._generations(node_id),
            cache=self.cache,
            writeback=self.writeback,
            read_only=True,
            watcher=self.prefetcher,
        )
        view.handles = 1
        self._views.add(view)
        if self.prefetcher is not None:
            self.prefetcher.opened(view, watched_as)
        return view

    def _generations(self, image_id: bytes) -> Chain[Generation]:
        return generation_chain(self.client, image_id, grace_s=self.grace_s)

    def open_images(self) -> list[Image]:
        """The images and views of snapshots that are open here."""
        return [*self._images.values(), *self._views]

    def image(self, node_id: bytes) -> Image | None:
        """The open image of a node, if any; no handle is counted."""
        return self._images.get(node_id)

    def known_head(self, image_id: bytes) -> Head[Generation] | None:
        """The newest generation of an image that was seen here, if it is still remembered, and when it was read."""
        return self._heads.get(image_id)

    def remember_head(self, head: Head[Generation]) -> None:
        """Note the newest generation of an image."""
        known = self._heads.get(head.record.image_id)
        if known is not None and known.record.counter > head.record.counter:
            return  # of a look that began earlier and was slow
        self._forget_head(head.record.image_id)
        self._heads[head.record.image_id] = head
        self._heads_bytes += _head_bytes(head)
        while len(self._heads) > HEADS_MAX or self._heads_bytes > HEADS_BYTES_MAX:
            self._forget_head(next(iter(self._heads)))

    def _forget_head(self, image_id: bytes) -> None:
        head = self._heads.pop(image_id, None)
        if head is not None:
            self._heads_bytes -= _head_bytes(head)

    async def attributes(self, entry: Entry, *, hint: bool = False) -> Attributes:
        """Size and times. `hint`: what the catalog says will do (listings). Raises NotFoundError, StoreUnavailableError."""
        if entry.kind is Kind.DIRECTORY:
            return Attributes(4096, 0, entry.atime_ns, entry.mtime_ns, entry.ctime_ns, -1)
        image = self._images.get(entry.node_id)
        if image is not None:
            return Attributes(
                # What is dirty, too: programs take a file without blocks for one of zeros (GNU tar --sparse).
                image.size,
                image.stored_bytes + image.dirty_bytes,
                entry.atime_ns,
                image.mtime_ns,
                max(image.ctime_ns, entry.ctime_ns),
                image.generation,
            )
        if hint:
            known = self._hints.get(entry.node_id)
            if known is not None:
                return known
            return Attributes(entry.size, entry.stored_bytes, entry.atime_ns, entry.mtime_ns, entry.ctime_ns, -1)
        head = self._heads.get(entry.node_id)
        if head is None or boot_time_s() - head.read_s > ATTRIBUTES_AGE_S:
            head = await generation_chain(self.client, entry.node_id).head(head)
            if head is None:
                raise NotFoundError(f"{self.catalog.path_of(entry)}: the image has no generation in the store; run 'novafs fsck'")
            self.remember_head(head)
        record = head.record
        return Attributes(
            record.size, record.held_bytes, entry.atime_ns, record.mtime_ns, max(record.ctime_ns, entry.ctime_ns), record.counter
        )

    # -- hints and figures --------------------------------------------------------------------------------------

    def _note_hint(self, image: Image) -> None:
        if self.read_only or image.read_only or image.node_id in self._unlinked:
            return
        head = image.head
        self._hints[image.node_id] = Attributes(head.size, head.held_bytes, head.mtime_ns, head.mtime_ns, head.ctime_ns, head.counter)

    async def _flush_hints(self) -> None:
        """Bring sizes and times in the catalog up to date, all in one commit."""
        if not self._hints:
            return
        hints = dict(self._hints)

        async def operation(changes: Any) -> None:
            for node_id, hint in hints.items():
                try:
                    entry = await changes.get(node_id)
                except (NotFoundError, CorruptionError):  # damaged: the hints of other directories go on
                    continue
                edited = msgspec.structs.replace(
                    entry,
                    size=hint.size,
                    stored_bytes=hint.stored_bytes,
                    mtime_ns=hint.mtime_ns,
                    ctime_ns=max(hint.ctime_ns, entry.ctime_ns),
                )
                if edited != entry:
                    changes.set(edited)

        await self.catalog.change(operation)
        # Only now: after a failure they are brought with the next commit, and until then listings show them from here.
        for node_id, hint in hints.items():
            if self._hints.get(node_id) is hint:
                del self._hints[node_id]

    async def usage(self) -> VolumeUsage:
        """Capacity and use of the volume, from a listing of the packs: of the last USAGE_AGE_S, or 20 times as long as the listing
        took where that is more; where there are more than USAGE_PACKS_MAX packs, as the last collection left it. What was known last,
        while the store is away."""
        async with self._usage_lock:
            began_s = trio.current_time()
            if self._usage is None or began_s >= self._usage[0]:
                used = self._usage[1] if self._usage is not None else 0
                try:
                    used = await self._used_bytes()
                except RetryableError:
                    if self._usage is None:
                        raise
                now_s = trio.current_time()
                self._usage = (now_s + max(USAGE_AGE_S, 20 * (now_s - began_s)), used)
            used = self._usage[1]
        room = await self.client.usage()
        free = math.inf if room.free_bytes is None else room.free_bytes
        capacity = int(min(self.config.l3.capacity_bytes, used + free))
        return VolumeUsage(max(capacity, used), used, len(self._images))

    async def _used_bytes(self) -> int:
        infos = await self.client.list(pack.PREFIX, limit=USAGE_PACKS_MAX)
        if len(infos) < USAGE_PACKS_MAX:
            return sum(info.size for info in infos)
        await self.dedup.condemned.refresh()
        summary = self.dedup.condemned.current.summary
        if "stored_bytes" not in summary:
            return sum(info.size for info in await self.client.list(pack.PREFIX))
        return int(summary["stored_bytes"] - summary.get("freed_bytes", 0))

    def _traffic(self) -> ImageTraffic:
        found = ImageTraffic()
        for part in (self._past_traffic, *(image.traffic for image in self.open_images())):
            found.add(part)
        return found

    def _eviction(self) -> dict[str, Any]:
        policy = self.cache.l1.policy
        quality = policy.quality()
        return {"policy": policy.name, **(asdict(quality) | {"words": quality.in_words()} if quality is not None else {})}

    def statistics(self) -> dict[str, Any]:
        """A JSON-able document of what this process has done: the control socket's and `novafs stats`'s answer."""
        return {
            "volume": {
                "url": self.client.store.url,
                "id": self.superblock.volume_id,
                "chunk_size": self.chunk_size,
                "read_only": self.read_only,
                "host_id": self.pins.host_id.hex(),
            },
            "handoffs": asdict(self.tally.handoffs),
            "warmed": asdict(self.tally.warmed),
            "catalog_revision": self.catalog.revision,
            "images_open": len(self._images),
            "data_at_risk": asdict(self.writeback.at_risk),
            "dirty_max_bytes": self.writeback.rules.dirty_max_bytes,
            "lease_ttl_s": self.config.lease.ttl_s,
            "l3_capacity_bytes": self.config.l3.capacity_bytes,
            "commits": self.writeback.commits,
            "commit_errors": self.writeback.commit_errors,
            "journal": asdict(self.writeback.journal.statistics()) if self.writeback.journal is not None else None,
            "leases": asdict(self.writeback.lease_statistics()),
            "traffic": asdict(self._traffic()),
            "written": asdict(self.writes),
            "delta": asdict(self.deltas.statistics()),
            "latency": {s: {o: asdict(f) for o, f in found.items()} for s, found in self.latencies.figures().items()},
            "events": dict(self.events.counts),
            "collection": dict(self.dedup.condemned.current.summary),
            "map_bytes": sum(image.map_bytes for image in (*self._images.values(), *self._views)),
            "cache": asdict(self.cache.statistics()),
            "eviction": self._eviction(),
            "prefetch": self.prefetcher.statistics() if self.prefetcher is not None else None,
            "store": asdict(self.client.statistics()),
        }
