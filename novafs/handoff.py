"""Handoff: a host that gives an image up tells the next one what is hot in it, so that it is there before the machine asks.

    source                                            target
    puts handoffs/<target>/<image id>: what is hot
                                                      sees it within POLL_S, deletes it (that is the answer),
    sees that it is gone                              and brings the hot chunks into its caches, the hottest first
    commits, gives the lease back

The right to write does not move with it: it is taken by the first write, as ever, and that finds it free. Where nobody answers within
the time, the source takes the offer back and nothing has changed. An offer is worth nothing but time: one that is damaged, of an image
that is gone, or left behind by a source that died is deleted by its target or a collection; what it names is looked up in the image's map.

An offer is made by itself, too, when another host asks for a lease (`wants/`), or has opened the image for reading past its page cache
while it is written here, as an emulator does that waits for a machine (a name with `lease.CURIOUS`): then nobody waits for the answer.

    handoffs/<target>/<image id>    a sealed record of kind HAND. target: a host's name, or the id of its journal

What is hot: chunks of the image that were read here last and are in L1, at most `HOT_MAX`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np
import trio

from novafs.catalogtree import Entry
from novafs.chunk import HOLE_BYTES
from novafs.errors import BusyError, ConfigError, NotFoundError, NovaError, ObjectCorruptError, ObjectNotFoundError, RetryableError
from novafs.generation import HOST
from novafs.image import Image
from novafs.lease import CURIOUS, want_name
from novafs.lease import HANDOFFS_PREFIX as PREFIX
from novafs.prefetch.base import INDEX_MASK
from novafs.record import seal, unseal
from novafs.revisions import new_nonce
from novafs.warming import cut, spans_of, warm_chunks

if TYPE_CHECKING:
    from novafs.volume import Volume

log = logging.getLogger(__name__)

KIND: Final = b"HAND"
VERSION: Final = 1
HOT_MAX: Final = 8192
"""Chunks in an offer: 512 MiB of 64 KiB, in 64 KiB of record."""
POLL_S: Final = 1.0
"""How often a mount looks for offers: one listing each time."""
ANSWER_POLL_S: Final = 0.1
WITHDRAW_S: Final = 5.0
CURIOUS_S: Final = 15.0
"""How long a request for what is hot stands."""
WARM_CHUNKS: Final = 256
BYTES_MAX: Final = 1 << 20
RELEASE_TRIES: Final = 5
_TARGET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


class OfferRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a host gives to another. indexes: of chunks, 8 bytes each, little-endian, the one used last first. host: who offers."""

    image_id: bytes
    host: str = HOST
    nonce: bytes
    indexes: bytes


def offer_name(target: str, image_id: bytes) -> str:
    """The object of an offer. Raises ConfigError for what can be no host's name."""
    if not _TARGET.fullmatch(target):
        raise ConfigError(f"host {target!r}: expected a host's name as `hostname` prints it there, or the id of its journal")
    return f"{PREFIX}{target}/{image_id.hex()}"


async def hot_chunks(volume: Volume, image: Image) -> list[int]:
    """Indexes of the committed chunks that were read here last and are in L1, the last one first. Raises what reading the map raises."""
    if volume.prefetcher is None:
        return []
    chunks = (image.head.size + image.chunk_size - 1) // image.chunk_size
    indexes = [index for index in volume.prefetcher.read_last(image, HOT_MAX) if index < chunks]
    await image.load_entries(indexes)
    found = []
    for index in indexes:
        raw = image.entry_nowait(index)
        if raw is not None and raw != HOLE_BYTES and volume.cache.l1.contains(raw[:32]):
            found.append(index)
    return found


async def offer(volume: Volume, image: Image, target: str) -> tuple[str, int]:
    """Tell `target` what is hot in an image: the offer's name and how many chunks. Raises what the store raises."""
    hot = await hot_chunks(volume, image)
    name = offer_name(target, image.node_id)
    record = OfferRecord(image_id=image.node_id, nonce=new_nonce(), indexes=np.array(hot, dtype="<u8").tobytes())
    await volume.client.put(name, seal(KIND, VERSION, record))
    return name, len(hot)


async def hand_off(volume: Volume, entry: Entry, target: str, *, timeout_s: float = 30.0) -> dict[str, object]:
    """Give an image up to another host: see the module. What was done, as JSON can hold it.

    Raises ConfigError (no host's name, or this host), RetryableError (nobody answers: nothing has changed), BusyError (it is written
    all the time), and what committing raises.
    """
    volume.check_writable()
    if target in own_names(volume):
        raise ConfigError(f"host {target!r} is this host: name the one that is to have the image")
    image = await volume.open_image(entry.node_id)
    try:
        await image.commit()  # what was written last is as hot as anything
        name, hot = await offer(volume, image, target)
        if not await _answered(volume, name, timeout_s):
            raise RetryableError(
                f"{image.name}: host {target} did not answer within {timeout_s:g} s, so the image stays here; is the volume mounted there "
                f"(with prefetch), and is that what `hostname` prints on it?"
            )
        for _ in range(RELEASE_TRIES):
            if image.lease is not None:
                await image.lease.settled()
            await image.commit()
            await image.release_lease()
            if image.lease is None:
                break
        else:
            raise BusyError(f"{image.name}: is written all the time, so it can not be given up; pause the machine first")
        volume.follow_again()
    except NovaError as error:
        volume.tally.handoffs.given_failed += not isinstance(error, ConfigError)
        raise
    else:
        volume.tally.handoffs.given += 1
        return {"image": image.name, "to": target, "hot_chunks": hot, "generation": image.generation}
    finally:
        await volume.close_image(image)


async def _answered(volume: Volume, name: str, timeout_s: float) -> bool:
    """Wait until the offer is taken; where that takes too long, or the wait is cancelled, it is taken back."""
    answered = False
    try:
        deadline_s = trio.current_time() + timeout_s
        while not answered and trio.current_time() < deadline_s:
            answered = not await volume.client.list(name, limit=1)
            if not answered:
                await trio.sleep(ANSWER_POLL_S)
    finally:
        if not answered:
            with trio.move_on_after(WITHDRAW_S, shield=True):
                await _withdraw(volume, name)
    return answered


async def _withdraw(volume: Volume, name: str) -> None:
    try:
        await volume.client.delete(name)
    except NovaError as error:
        log.warning("the offer %s stays behind until a collection: %s", name, error)


def own_names(volume: Volume) -> set[str]:
    """What offers to this mount may be called."""
    return {HOST, volume.pins.host_id.hex()}


class Receiver:
    """Takes what others offer; the background of a mount."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._names = own_names(volume)
        self._asked: set[bytes] = set()
        self._counts = volume.tally.handoffs

    @property
    def taken(self) -> int:
        """Offers that were taken."""
        return self._counts.taken

    @property
    def warmed(self) -> int:
        """Chunks that offers have brought."""
        return self._counts.chunks

    async def run(self) -> None:
        """Look for offers for as long as the volume is open."""
        while True:
            await trio.sleep(POLL_S)
            try:
                await self.look()
            except NovaError as error:
                log.debug("offers of other hosts can not be read: %s", error)
            except Exception:  # a mistake here must not end the volume
                log.exception("an offer of another host: a mistake in NovaFS; please report it")

    async def look(self) -> None:
        """Take what is offered to this host now. Raises what the store raises."""
        for info in await self._volume.client.list(PREFIX):
            target = info.name.removeprefix(PREFIX).partition("/")[0]
            if target in self._names:
                await self._take(info.name)

    async def _take(self, name: str) -> None:
        client = self._volume.client
        try:
            record = unseal(KIND, VERSION, (await client.get(name))[:BYTES_MAX], OfferRecord, name)
        except ObjectNotFoundError:
            return  # withdrawn
        except NovaError as error:
            self._counts.taken_failed += 1
            log.warning("an offer is no good, and deleted: %s", error)
            await client.delete(name)
            return
        await client.delete(name)
        self._counts.taken += 1
        log.info(
            "host %s gives up image %s, and %d chunks that are hot in it", record.host, record.image_id.hex(), len(record.indexes) // 8
        )
        try:
            warmed = await self._warm(record)
            self._counts.chunks += warmed
        except (NotFoundError, ObjectCorruptError) as error:
            self._counts.taken_failed += 1
            log.warning("what host %s gave up is not warmed: %s", record.host, error)

    async def _warm(self, record: OfferRecord) -> int:
        volume = self._volume
        if len(record.indexes) % 8 or len(record.indexes) > 8 * HOT_MAX:
            raise ObjectCorruptError(f"an offer of host {record.host} names {len(record.indexes)} bytes of chunks")
        indexes = np.frombuffer(record.indexes, dtype="<u8")
        image = await volume.open_image_by_id(record.image_id)
        try:
            chunks = (image.size + volume.chunk_size - 1) // volume.chunk_size
            wanted = [int(index) for index in indexes if index < min(chunks, INDEX_MASK)]
            done = 0
            for part in cut(spans_of(wanted), WARM_CHUNKS):
                done += (await warm_chunks(volume, image, part)).fetched
            return done
        finally:
            await volume.close_image(image)

    async def ask(self, image: Image) -> None:
        """An image was opened for reading that is perhaps written elsewhere: ask its writer for what is hot. Raises nothing."""
        client, leases = self._volume.client, self._volume.writeback.leases
        if leases is None or image.node_id in self._asked:
            return
        self._asked.add(image.node_id)
        try:
            if await leases.holder(image.node_id) is None:
                return
            name = want_name(image.node_id, leases.journal_id) + CURIOUS
            try:
                await client.put(name, leases.request(image.node_id))
                await trio.sleep(CURIOUS_S)
            finally:
                with trio.move_on_after(WITHDRAW_S, shield=True):
                    await _withdraw(self._volume, name)
        except Exception as error:  # it costs time, nothing else
            log.debug("%s: its writer is not asked what is hot: %s", image.name, error)
        finally:
            self._asked.discard(image.node_id)

    async def wanted(self, image: Image, journal_ids: Sequence[bytes]) -> None:
        """Other hosts ask for the lease of an image, or for what is hot in it: offer it to them. Raises nothing."""
        for journal_id in journal_ids:
            try:
                _, hot = await offer(self._volume, image, journal_id.hex())
                log.info("%s: %d chunks that are hot are offered to the mount %s", image.name, hot, journal_id.hex())
                await self._volume.client.delete(want_name(image.node_id, journal_id) + CURIOUS)
            except Exception as error:
                log.debug("%s: who asks for its lease is not told what is hot in it: %s", image.name, error)
