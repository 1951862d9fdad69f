"""What a mount tells about itself: one board, from which the metrics, the status page, the health checks and `novafs top` read.

It is there before the volume is open and after it is closed, so that whoever asks while the daemon opens or ends is told so. All of
it is for the trio thread; nothing here waits but `ready` (within its own time-outs) and `residency`, and no answer grows with the
volume: images, events and cells are bounded.

Ready means that requests are answered: the mount answers through the kernel, and the store does, or nothing has needed it so far.
A store that is away does not make a mount unready by itself, since what L1 and L2 hold is read and what is written goes to the
journal, up to the cap on data at risk: that is "degraded", and said so. It is unready once a request has failed for want of the store,
writers wait at the cap, or every fsync would fail (`durability = "store"`).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import fields
from enum import Enum
from typing import Any, Final, NamedTuple

import trio

import novafs
from novafs.errors import NotFoundError, NovaError
from novafs.events import EventRing
from novafs.image import Image
from novafs.imagereader import ImageTraffic
from novafs.objectstore.client import StoreClient
from novafs.residency import Residency, residency
from novafs.superblock import NAME as SUPERBLOCK_NAME
from novafs.volume import Volume

IMAGES_MAX: Final = 50
RESIDENCY_AGE_S: Final = 2.0
RESIDENCIES_MAX: Final = 4
"""Looks at a time; others wait."""
MOUNT_ANSWERS_S: Final = 2.0
PROBE_S: Final = 15.0
"""A store that nobody has asked for so long is asked, so that it is known whether it is up."""
PROBE_TIMEOUT_S: Final = 5.0


class Phase(Enum):
    OPENING = "opening"
    MOUNTED = "mounted"
    ENDING = "ending"


class Verdict(NamedTuple):
    """ready, and why not, or what is degraded, in words."""

    ready: bool
    reason: str


class Board:
    """See the module. mount: figures of the mount; answers: whether it answers through the kernel; store_failed_s: when a request
    failed last for want of the store, by `time.monotonic`. `answers` may be cancelled, and called again while it is still at work."""

    def __init__(self, source: str) -> None:
        """source: the volume as the user wrote it, without secrets."""
        self.source = source
        self.phase = Phase.OPENING
        self.events = EventRing()
        self.volume: Volume | None = None
        self.mount: Callable[[], dict[str, Any]] = dict
        self.answers: Callable[[], Awaitable[bool]] | None = None
        self.store_failed_s: Callable[[], float] = lambda: -math.inf
        self.url = ""
        """Of the status page, where one is served."""
        self._started_s = time.time()
        self._looks: dict[str, tuple[float, Residency]] = {}
        self._looking = trio.CapacityLimiter(RESIDENCIES_MAX)
        self._asking = trio.CapacityLimiter(1)

    def opened(self, volume: Volume) -> None:
        """The volume is open: from now on its figures are told."""
        self.volume = volume

    def closed(self) -> None:
        """The volume is closed."""
        self.volume = None

    # -- figures ------------------------------------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        """Everything that is counted: the answer of the control socket's `stats`, and what the metrics are made from."""
        mount = {
            "phase": self.phase.value,
            "pid": os.getpid(),
            "version": novafs.__version__,
            "uptime_s": time.time() - self._started_s,
            "status_page": self.url or None,
            **self.mount(),
        }
        if self.volume is None:
            return {"volume": {"url": self.source}, "mount": mount}
        return {**self.volume.statistics(), "mount": mount}

    def histograms(self) -> list[tuple[str, str, list[tuple[str, float]], float]]:
        """Of every latency: subject, operation, cumulative buckets, sum in seconds."""
        if self.volume is None:
            return []
        return [(subject, operation, latency.buckets(), latency.sum_s) for subject, operation, latency in self.volume.latencies]

    def status(self) -> dict[str, Any]:
        """What the status page and `novafs top` show: the document, the images that are open, and what happened lately."""
        images = self.volume.open_images() if self.volume is not None else []
        images.sort(key=lambda image: -(image.traffic.memory_reads + image.traffic.waited_reads + image.traffic.writes))
        return {
            **self.document(),
            "time_s": time.time(),
            "images": [_described(image) for image in images[:IMAGES_MAX]],
            "images_left_out": max(0, len(images) - IMAGES_MAX),
            "happened": self.events.latest(),
        }

    async def residency(self, key: str) -> dict[str, Any]:
        """Where the chunks of an open image are, no older than RESIDENCY_AGE_S. Raises NotFoundError where it is not open."""
        async with self._looking:
            volume = self.volume
            images = {_key(image): image for image in volume.open_images()} if volume is not None else {}
            if volume is None or key not in images:
                raise NotFoundError("no open image has this id")
            for gone in self._looks.keys() - images.keys():
                del self._looks[gone]
            known = self._looks.get(key)
            if known is None or trio.current_time() - known[0] > RESIDENCY_AGE_S:
                found = await residency(volume.cache, images[key], ask=self._asking)
                known = self._looks[key] = (trio.current_time(), found)
            return {"id": key, "name": images[key].name, **known[1].document(), "totals": known[1].totals()}

    # -- health -------------------------------------------------------------------------------------------------

    async def ready(self) -> Verdict:
        """See the module."""
        volume = self.volume
        if self.phase is Phase.OPENING or volume is None:
            return Verdict(False, f"{self.phase.value}: the volume is being {'opened' if self.phase is Phase.OPENING else 'closed'}")
        if self.phase is Phase.ENDING:
            return Verdict(False, "ending: unmounted, and what is left is being committed")
        if not await self._mount_answers():
            return Verdict(False, f"the mount did not answer within {MOUNT_ANSWERS_S:g} s, or its connection to the kernel is gone")
        rules, at_risk, health = volume.writeback.rules, volume.writeback.at_risk, volume.client.health
        if at_risk.bytes >= rules.dirty_max_bytes:
            return Verdict(False, f"writers wait: {at_risk.bytes} bytes are not stored yet, which is the cap")
        since_s = health.failing_since_s
        if since_s is None:
            return Verdict(True, "")
        away = f"the store has not answered for {time.monotonic() - since_s:.0f} s ({health.reason})"
        if rules.durability == "store":
            return Verdict(False, f'{away}; with durability = "store" every fsync fails')
        if self.store_failed_s() >= since_s:
            return Verdict(False, f"{away}, and requests have failed for want of it")
        return Verdict(True, f"degraded: {away}; serving from L1, L2 and the journal")

    async def _mount_answers(self) -> bool:
        if self.answers is None:
            return False
        with trio.move_on_after(MOUNT_ANSWERS_S):
            return await self.answers()
        return False

    async def probe_store(self) -> None:
        """Ask the store now and then where nobody else does. Until cancelled; for as long as the volume is open."""
        volume = self.volume
        if volume is None:
            return
        health = volume.client.health
        client = StoreClient(volume.client.store, io_timeout_s=PROBE_TIMEOUT_S, requests_max=1, health=health)
        while True:
            await trio.sleep(PROBE_S)
            if time.monotonic() - health.answered_s > PROBE_S:
                try:
                    await client.head(SUPERBLOCK_NAME)
                except NovaError:
                    continue  # noted in `health`


_TRAFFIC: Final = tuple(field.name for field in fields(ImageTraffic))


def _key(image: Image) -> str:
    return f"{image.node_id.hex()}@{image.generation}" if image.read_only else image.node_id.hex()


def _described(image: Image) -> dict[str, Any]:
    return {
        "id": _key(image),
        "name": image.name,
        "size": image.size,
        "generation": image.generation,
        "read_only": image.read_only,
        "handles": image.handles,
        "dirty_bytes": image.dirty_bytes,
        "stored_bytes": image.stored_bytes,
        "lease": "held" if image.lease is not None else "leaving" if image.leaving else "none",
        "traffic": {name: getattr(image.traffic, name) for name in _TRAFFIC},
    }
