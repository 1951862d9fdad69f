"""L2: chunks in Redis (or Valkey), shared by the hosts of a site. Called from worker threads, many at once.

What is promised: no call raises because of what a server does or is. A server that is away, slow, full, flushed, of the
wrong kind or full of garbage makes reads miss and writes vanish, both counted in `statistics().errors`; the state is logged
when it changes, never once per call. After a failure the tier is down (`up` is False): calls return at once, without
touching the network, until a thread of its own has reached the servers again, trying after 0.5 s and then ever less
often, up to every 10 s.

A value is a header of 16 bytes and the frame's payload, so that garbage is known before it is decoded:

    offset  size  field
         0     2  magic "NV"
         2     1  version, 1
         3     1  codec (`novafs.codec.Codec`)
         4     4  length of the payload, bytes, little endian
         8     8  xxh64 of the payload, seeded with the first 8 bytes of the chunk id, little endian

A value that is anything else is a miss and is deleted. (Whether the content is the chunk's is for `tiered` to verify.)

Chunks lie in `shards` shards by their first id byte modulo that number, a power of two that all hosts of a volume must
agree on; each has its own slot in a Redis Cluster and its own part of the capacity. The scripts in `redis_scripts` insert
and evict on one shard in one step, so writers on any number of hosts never exceed the capacity. Bytes are counted as
length of the value + `ENTRY_BYTES`.

Who leaves: the lowest score in the shard's sorted set, whichever host needs the room. A score is made of the time of an
access and the chance that the chunk is asked for again, where whoever calls knows one (`gain_of`); without, L2 is an LRU. A
read notes its access here, `rate_many` what the model says of it, and a background thread tells the servers in batches: no
read waits for a score.

The alternative, Redis's own allkeys-lru under maxmemory, was turned down: it knows one limit for all
volumes of a server, and no score but its own.
"""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import xxhash
from redis.exceptions import NoScriptError, ResponseError

from novafs.cache.base import Frame, Tier, TierStatistics
from novafs.cache.redis_address import RedisAddress, parse_redis_url
from novafs.cache.redis_link import Command, LinkError, RedisLink
from novafs.cache.redis_scripts import DELETE, GAIN_MAX, GAIN_MIN, PUT, RATE, Script
from novafs.codec import PLAIN_MAX
from novafs.errors import ConfigError, NovaError

log = logging.getLogger(__name__)

ENTRY_BYTES: Final = 320
"""What an entry costs the server beside its value: key, its place in the keyspace and in the index. Measured on Redis 7
over 2,000 entries: 300 to 315, without the allocator's rounding of the value itself (up to a fifth, 9 % on average)."""
GET_KEYS_MAX: Final = 64
"""Keys of one batch of reads: at 64 KiB a chunk an answer of 4 MiB, a few milliseconds of a server that serves others meanwhile."""
GET_BYTES_MAX: Final = 16 << 20
"""What one batch of reads may bring: four times what `tiered` asks for in one step, so it binds only where values are none of ours."""
SCRIPT_BYTES_MAX: Final = 1 << 20
"""Values in one script call: a server runs nothing else while a script runs, and this much takes about a millisecond."""
BATCH_BYTES_MAX: Final = 2 << 20
"""Values in one batch of script calls: what a link of 100 Mbit/s carries within the default time-out."""
TOUCHES_MAX: Final = 8192
"""Accesses noted and not yet told to the servers; beyond it the newest are not noted."""
TOUCHES_WAKE: Final = 1024
FLUSH_S: Final = 1.0
REFRESH_S: Final = 30.0
"""How often an idle tier asks the servers for their use, which also finds out that they are gone."""
PROBE_S_MIN: Final = 0.5
PROBE_S_MAX: Final = 10.0

_HEADER: Final = struct.Struct("<2sBBIQ")
VALUE_BYTES_MAX: Final = _HEADER.size + PLAIN_MAX
"""The longest value there can be: a frame is never longer than its plain content."""
_MAGIC: Final = b"NV"
_VERSION: Final = 1
_SEED: Final = struct.Struct("<Q")


def pack_value(chunk_id: bytes, frame: Frame) -> bytes:
    """The value that holds `frame` under `chunk_id`."""
    digest = xxhash.xxh64_intdigest(frame.payload, _SEED.unpack_from(chunk_id)[0])
    return _HEADER.pack(_MAGIC, _VERSION, frame.codec, len(frame.payload), digest) + frame.payload


def unpack_value(chunk_id: bytes, value: object) -> Frame | None:
    """The frame in a value, or None where it is not whole, not this chunk's, or no value of ours at all."""
    if not isinstance(value, bytes) or not _HEADER.size <= len(value) <= VALUE_BYTES_MAX:
        return None
    magic, version, codec, length, digest = _HEADER.unpack_from(value)
    payload = value[_HEADER.size :]
    if magic != _MAGIC or version != _VERSION or length != len(payload):
        return None
    if xxhash.xxh64_intdigest(payload, _SEED.unpack_from(chunk_id)[0]) != digest:
        return None
    return Frame(codec, payload)


def gain_of(chance: float | None) -> float:
    """How much longer than the time of access alone says a chunk stays, in spans of its shard (`redis_scripts`); 0: nothing is known."""
    if chance is None or not 0.0 <= chance <= 1.0:
        return 0.0
    return GAIN_MIN + (GAIN_MAX - GAIN_MIN) * chance


def open_l2(
    url: str,
    *,
    capacity_bytes: int,
    volume_id: str | bytes,
    state_dir: Path,
    timeout_s: float = 0.25,
) -> Tier | None:
    """The tier at `url` (`redis_address` lists the forms), or None for `none`. Blocking: tries once to reach the servers.

    volume_id: in every key, so that volumes share a server. state_dir: where an `embedded` server lives. timeout_s: for one
    read or write on a socket. A server that does not answer is no error: the tier starts down and comes up by itself.
    Raises ConfigError for a URL that is none, and where `embedded` is asked for and not installed.
    """
    url = url.strip()
    if url == "none":
        return None
    name = volume_id.hex() if isinstance(volume_id, bytes) else volume_id
    if url == "embedded":
        from novafs.cache.embedded import open_embedded

        return open_embedded(capacity_bytes=capacity_bytes, volume_id=name, state_dir=state_dir, timeout_s=timeout_s)
    return RedisTier(parse_redis_url(url), capacity_bytes=capacity_bytes, volume_id=name, timeout_s=timeout_s)


class RedisTier:
    """The tier. Every method may be called from any thread."""

    name = "l2"

    def __init__(
        self,
        address: RedisAddress,
        *,
        capacity_bytes: int,
        volume_id: str,
        timeout_s: float = 0.25,
        before_probe: Callable[[], None] | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """before_probe: called in the tier's own thread before it tries servers that were away. on_close: called at the end of `close`."""
        if capacity_bytes <= 0:
            raise ConfigError(f"l2 capacity: expected more than 0 bytes, found {capacity_bytes}")
        self.address = address
        self.capacity_bytes = capacity_bytes
        self._link = RedisLink(address, timeout_s=timeout_s)
        self._shards = [_Shard(volume_id, number) for number in range(address.shards)]
        self._shard_capacity = capacity_bytes // address.shards
        self._pattern = f"novafs:{{{volume_id}:*".encode()
        self._before_probe = before_probe
        self._last_wrong = ""
        """What `before_probe` last said, so that the log has it once."""
        self._on_close = on_close

        self._lock = threading.Lock()
        """Guards what follows. Never held while a server is spoken to."""
        self._touches: dict[bytes, float] = {}
        """Chunk id to gain (`gain_of`), oldest access first."""
        self._hits = 0
        self._misses = 0
        self._insertions = 0
        self._evictions = 0
        self._errors = 0
        self._refused: set[str] = set()
        """What servers that answer have last refused, `reads` or `writes`: for the log, once per change."""
        self._up = False
        self._closing = threading.Event()
        self._came_up = threading.Event()
        self._wake = threading.Event()
        """Set by readers when many touches wait, by `_failed` and by `close`; cleared by the tier's own thread."""

        wrong = self._probe()
        if wrong is not None:
            log.warning("L2 at %s can not be reached (%s): starting without it, it is tried again in the background", address.text, wrong)
        self._thread = threading.Thread(target=self._keep, name="novafs-l2", daemon=True)
        self._thread.start()

    # --- Tier -------------------------------------------------------------------------------------------------

    @property
    def up(self) -> bool:
        """Whether the servers answered when they were last spoken to."""
        return self._up

    def get_many(self, chunk_ids: Sequence[bytes]) -> dict[bytes, Frame]:
        """The frames it holds of those asked for; counts a hit or a miss for each and notes the access."""
        found: dict[bytes, Frame] = {}
        bad: list[bytes] = []
        for start in range(0, len(chunk_ids), GET_KEYS_MAX):
            asked = chunk_ids[start : start + GET_KEYS_MAX]
            most = min(VALUE_BYTES_MAX, GET_BYTES_MAX // len(asked))
            for chunk_id, part in zip(asked, self._read(asked, most), strict=False):
                # One that is longer than its share of the batch: rare where it is ours, so it is read anew by itself.
                value = part if len(part) <= most or most == VALUE_BYTES_MAX else b"".join(self._read([chunk_id], VALUE_BYTES_MAX))
                if not value:
                    continue  # not there, or of another type
                frame = unpack_value(chunk_id, value)
                if frame is None:
                    bad.append(chunk_id)
                else:
                    found[chunk_id] = frame
        if bad:
            self._count_error(len(bad))
            log.warning("L2 at %s holds %d values that are none of ours, such as %s: deleted", self.address.text, len(bad), bad[0].hex())
            self.delete_many(bad)
        with self._lock:
            self._hits += len(found)
            self._misses += len(chunk_ids) - len(found)
        self._note_accesses(dict.fromkeys(found, 0.0))
        return found

    def rate_many(self, chances: Mapping[bytes, float | None]) -> None:
        """Note what is known of chunks that were read, or that L1 gives up; told to the servers with the accesses. Touches no network."""
        self._note_accesses({chunk_id: gain_of(chance) for chunk_id, chance in chances.items()})

    def _note_accesses(self, gains: Mapping[bytes, float]) -> None:
        with self._lock:
            for chunk_id, gain in gains.items():
                self._touches.pop(chunk_id, None)
                if len(self._touches) < TOUCHES_MAX:
                    self._touches[chunk_id] = gain
            many = len(self._touches) >= TOUCHES_WAKE
        if many:
            self._wake.set()

    def put_many(self, frames: Mapping[bytes, Frame], chances: Mapping[bytes, float | None] = MappingProxyType({})) -> None:
        """Insert or replace, evicting others to stay within capacity; a frame larger than a shard's part of it is not kept.

        chances: that the chunk is asked for again, 0 to 1, where it is known.
        """
        for batch in self._put_batches(frames, chances):
            answers = self._execute_scripts(PUT, [(shard, [0, *values]) for shard, values in batch])
            again: list[tuple[_Shard, list[Any]]] = []
            for (shard, values), answer in zip(batch, answers, strict=False):
                if isinstance(answer, ResponseError) and _out_of_memory(answer):
                    # The server has less memory than our capacity and evicts nothing itself (noeviction): we do, twice what we need.
                    again.append((shard, [2 * sum(map(len, values[2::3])), *values]))
                else:
                    self._note_put(shard, values, answer)
            for (shard, values), answer in zip(again, self._execute_scripts(PUT, again), strict=False):
                self._note_put(shard, values[1:], answer)

    def contains_many(self, chunk_ids: Sequence[bytes]) -> set[bytes]:
        """Those it holds. Counts nothing, notes no access."""
        answers = self._execute([Command(self._key(chunk_id), ("STRLEN", self._key(chunk_id))) for chunk_id in chunk_ids])
        possible = range(_HEADER.size, VALUE_BYTES_MAX + 1)
        return {chunk_id for chunk_id, answer in zip(chunk_ids, answers, strict=False) if isinstance(answer, int) and answer in possible}

    def delete_many(self, chunk_ids: Iterable[bytes]) -> None:
        """Drop them; no error for those that are not there."""
        calls: dict[_Shard, list[Any]] = {}
        for chunk_id in chunk_ids:
            calls.setdefault(self._shard(chunk_id), []).append(chunk_id)
        with self._lock:
            for ids in calls.values():
                for chunk_id in ids:
                    self._touches.pop(chunk_id, None)
        for (shard, _), answer in zip(calls.items(), self._execute_scripts(DELETE, list(calls.items())), strict=False):
            self._note_use(shard, answer)

    def clear(self) -> None:
        """Drop everything of this volume, whatever the indexes say."""
        with self._lock:
            self._touches.clear()
        if not self._up:
            return
        try:
            for keys in self._link.scan(self._pattern):
                self._execute([Command(key, ("UNLINK", key)) for key in keys])
        except LinkError as error:
            self._failed(error)
            return
        for shard in self._shards:
            shard.bytes = shard.count = 0

    def statistics(self) -> TierStatistics:
        """A snapshot of the counters. Entries and bytes are of all hosts together, as the servers last told this one."""
        with self._lock:
            return TierStatistics(
                name=self.name,
                entries=sum(shard.count for shard in self._shards),
                used_bytes=sum(shard.bytes for shard in self._shards),
                capacity_bytes=self.capacity_bytes,
                hits=self._hits,
                misses=self._misses,
                insertions=self._insertions,
                evictions=self._evictions,
                errors=self._errors,
                up=self._up,
            )

    def close(self) -> None:
        """Tell the servers of the last accesses, give back connections and the thread. Calls after it miss."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._wake.set()
        self._thread.join()
        self._up = False
        self._link.close()
        if self._on_close is not None:
            self._on_close()

    # --- beyond the contract ------------------------------------------------------------------------------------

    def wait_up(self, timeout_s: float) -> bool:
        """Wait until the servers answer; whether they do."""
        return self._came_up.wait(timeout_s)

    def flush(self) -> None:
        """Tell the servers now of the accesses noted so far."""
        if not self._up:
            return  # kept until it is: what was read lately is worth keeping
        with self._lock:
            touches, self._touches = self._touches, {}
        calls: dict[_Shard, list[Any]] = {}
        for chunk_id, gain in touches.items():
            calls.setdefault(self._shard(chunk_id), []).extend((chunk_id, gain))
        if calls:
            for (shard, _), answer in zip(calls.items(), self._execute_scripts(RATE, list(calls.items())), strict=False):
                self._note_use(shard, answer)

    # --- talking to the servers ---------------------------------------------------------------------------------

    def _read(self, chunk_ids: Sequence[bytes], most: int) -> list[bytes]:
        """The values, none of more than `most` + 1 bytes, whatever somebody has put there (an MGET would bring it all); empty where
        there is none. Nothing at all where the tier is down."""
        keys = [self._key(chunk_id) for chunk_id in chunk_ids]
        answers = self._execute([Command(key, ("GETRANGE", key, 0, most)) for key in keys])
        refused = [answer for answer in answers if not isinstance(answer, bytes) and not _wrong_type(answer)]
        if answers:
            self._note_refusal("reads", bool(refused), refused[0] if refused else None)
        if refused:
            self._count_error()
        return [answer if isinstance(answer, bytes) else b"" for answer in answers]

    def _execute(self, commands: Sequence[Command]) -> list[Any]:
        """The answers, or nothing at all where the tier is down or goes down."""
        if not self._up or not commands:
            return []
        try:
            return self._link.execute(commands)
        except LinkError as error:
            self._failed(error)
            return []

    def _execute_scripts(self, script: Script, calls: Sequence[tuple[_Shard, Sequence[Any]]]) -> list[Any]:
        """One script on some shards; the text is sent where a server does not know it yet."""

        def command(name: str, what: str, shard: _Shard, rest: Sequence[Any]) -> Command:
            return Command(shard.index, (name, what, 2, shard.index, shard.use, shard.prefix, self._shard_capacity, ENTRY_BYTES, *rest))

        answers = self._execute([command("EVALSHA", script.sha, shard, rest) for shard, rest in calls])
        unknown = [at for at, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if unknown:
            second = self._execute([command("EVAL", script.text, *calls[at]) for at in unknown])
            if not second:
                return []
            for at, answer in zip(unknown, second, strict=True):
                answers[at] = answer
        return answers

    def _failed(self, error: LinkError) -> None:
        with self._lock:
            self._errors += 1
            was_up, self._up = self._up, False
            self._came_up.clear()
        if was_up and not self._closing.is_set():
            log.warning("L2 at %s does not answer (%s): reads go on without it until it does", self.address.text, error)
            self._wake.set()

    def _probe(self) -> str | None:
        """Ask the servers for every shard's use; None where all answered, else what is wrong."""
        try:
            answers = self._link.execute([Command(shard.use, ("HMGET", shard.use, "bytes", "count")) for shard in self._shards])
        except LinkError as error:
            self._link.reset()
            return str(error)
        for shard, answer in zip(self._shards, answers, strict=True):
            shard.told_us = 0  # another server may answer now, by another clock
            try:
                shard.bytes, shard.count = (int(part or 0) for part in answer)
            except (TypeError, ValueError):  # of another type, or not ours: the next script there puts it right
                shard.bytes = shard.count = 0
        with self._lock:
            self._up = True
            self._came_up.set()
        return None

    def _keep(self) -> None:
        """The tier's own thread: tells the servers of accesses while they answer, looks for them while they do not."""
        delay_s = PROBE_S_MIN
        refreshed_s = time.monotonic()
        while not self._closing.is_set():
            if self._up:
                delay_s = PROBE_S_MIN
                self._wake.wait(FLUSH_S)
                self._wake.clear()
                self.flush()
                if self._up and time.monotonic() - refreshed_s > REFRESH_S:
                    refreshed_s = time.monotonic()
                    wrong = self._probe()
                    if wrong is not None:
                        self._failed(LinkError(wrong))
            else:
                self._closing.wait(delay_s)
                delay_s = min(2 * delay_s, PROBE_S_MAX)
                if not self._closing.is_set():
                    self._look_again()

    def _look_again(self) -> None:
        if self._before_probe is not None:
            try:
                self._before_probe()
            except NovaError as error:
                if str(error) != self._last_wrong:
                    self._last_wrong = str(error)
                    log.warning("L2 at %s: %s", self.address.text, error)
                return
        if self._probe() is None:
            self._last_wrong = ""
            log.info("L2 at %s answers again", self.address.text)

    # --- inside -----------------------------------------------------------------------------------------------

    def _shard(self, chunk_id: bytes) -> _Shard:
        return self._shards[chunk_id[0] & (len(self._shards) - 1)]

    def _key(self, chunk_id: bytes) -> bytes:
        return self._shard(chunk_id).prefix + chunk_id

    def _put_batches(
        self, frames: Mapping[bytes, Frame], chances: Mapping[bytes, float | None]
    ) -> Iterator[list[tuple[_Shard, list[Any]]]]:
        """Batches of script calls: a shard, and id, gain, value, id, gain, value, …"""
        open_calls: dict[_Shard, tuple[list[Any], int]] = {}
        batch: list[tuple[_Shard, list[Any]]] = []
        total = 0
        for chunk_id, frame in frames.items():
            shard = self._shard(chunk_id)
            size = _HEADER.size + len(frame.payload)
            if size + ENTRY_BYTES > self._shard_capacity:
                continue
            values, filled = open_calls.get(shard, ([], 0))
            if values and filled + size > SCRIPT_BYTES_MAX:
                batch.append((shard, values))
                values, filled = [], 0
            values += (chunk_id, gain_of(chances.get(chunk_id)), pack_value(chunk_id, frame))
            open_calls[shard] = (values, filled + size)
            total += size
            if total >= BATCH_BYTES_MAX:
                yield [*batch, *((one, values) for one, (values, _) in open_calls.items() if values)]
                open_calls, batch, total = {}, [], 0
        if open_calls:
            yield [*batch, *((one, values) for one, (values, _) in open_calls.items() if values)]

    def _note_put(self, shard: _Shard, values: Sequence[Any], answer: object) -> None:
        stored = self._note_use(shard, answer)
        wanted = len(values) // 3
        with self._lock:
            self._insertions += stored
            self._errors += wanted - stored
        self._note_refusal("writes", stored < wanted, answer)

    def _note_refusal(self, what: str, refused: bool, answer: object) -> None:
        with self._lock:
            if refused == (what in self._refused):
                return
            (self._refused.add if refused else self._refused.discard)(what)
        if refused:
            reason = self.address.scrub(str(answer)) if isinstance(answer, Exception) else "not all of it was done"
            log.warning("L2 at %s refuses %s (%s): going on without them", self.address.text, what, reason)
        else:
            log.info("L2 at %s takes %s again", self.address.text, what)

    def _note_use(self, shard: _Shard, answer: object) -> int:
        """Remember what a script said of its shard; how many it says it did."""
        if not isinstance(answer, list) or len(answer) != 5 or not all(isinstance(part, int) for part in answer):
            self._count_error()
            return 0
        with self._lock:
            if answer[4] >= shard.told_us:  # answers of calls at the same time come in any order
                shard.bytes, shard.count, shard.told_us = answer[0], answer[1], answer[4]
            self._evictions += answer[2]
        return int(answer[3])

    def _count_error(self, count: int = 1) -> None:
        with self._lock:
            self._errors += count


class _Shard:
    """The key names of one shard, and its use as the servers last told it (bytes, entries)."""

    __slots__ = ("bytes", "count", "index", "prefix", "told_us", "use")

    def __init__(self, volume_id: str, number: int) -> None:
        tag = f"novafs:{{{volume_id}:{number}}}:".encode()
        self.prefix = tag + b"d:"
        self.index = tag + b"i"
        self.use = tag + b"u"
        self.bytes = 0
        self.count = 0
        self.told_us = 0


def _wrong_type(answer: object) -> bool:
    return isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE")


def _out_of_memory(error: ResponseError) -> bool:
    # redis-py takes the code off the message where it has a class for it, and not all versions have one.
    return type(error).__name__ == "OutOfMemoryError" or "maxmemory" in str(error)
