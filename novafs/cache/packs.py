"""Frames out of packs: neighbours joined into one range request, several requests at once.

A request to an object store costs a round trip of tens of milliseconds, in which a link carries megabytes; so a gap of
up to `GAP_MAX` between two wanted frames is read and thrown away rather than asked around. (At 20 ms and 2 Gbit/s a round
trip is worth 5 MB; the limit is far lower because frames that nobody asked for also cost the host memory and the store egress.)
A joined range is at most `RUN_MAX` long, so that a long run of frames arrives over several connections at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from novafs.asynctools import open_nursery
from novafs.chunk import PackId, Reference
from novafs.pack import pack_name

GAP_MAX: Final = 128 << 10
RUN_MAX: Final = 8 << 20


class RangeReader(Protocol):
    """The one call of `StoreClient` that reading frames needs."""

    async def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """See `ObjectStore.get`."""
        ...


class Run(NamedTuple):
    """One range request: `length` bytes of a pack from `start`. members: which of the references asked for lie in it."""

    pack_id: PackId
    start: int
    length: int
    members: list[int]


@dataclass(frozen=True, slots=True)
class PackStatistics:
    """requests: range requests. read_bytes: what they brought. payload_bytes: what of it was asked for. frames: how many payloads."""

    requests: int
    read_bytes: int
    payload_bytes: int
    frames: int


def plan_runs(references: Sequence[Reference], *, gap_max: int = GAP_MAX, run_max: int = RUN_MAX) -> list[Run]:
    """The range requests that bring these frames, in the order of packs and offsets.

    Every reference lies whole in exactly one run; a run is longer than `run_max` only where a single frame is.
    """
    order = sorted(range(len(references)), key=lambda at: (references[at].pack_id, references[at].offset))
    runs: list[Run] = []
    for at in order:
        reference = references[at]
        end = reference.offset + reference.length
        if runs:
            last = runs[-1]
            last_end = last.start + last.length
            joined = max(end, last_end) - last.start
            if last.pack_id == reference.pack_id and reference.offset - last_end <= gap_max and (joined <= run_max or end <= last_end):
                last.members.append(at)
                runs[-1] = last._replace(length=joined)
                continue
        runs.append(Run(reference.pack_id, reference.offset, reference.length, [at]))
    return runs


class PackSource:
    """The `FrameSource` over a volume's packs. Used from the trio thread."""

    def __init__(self, client: RangeReader, *, gap_max: int = GAP_MAX, run_max: int = RUN_MAX) -> None:
        self._client = client
        self._gap_max = gap_max
        self._run_max = run_max
        self._requests = 0
        self._read_bytes = 0
        self._payload_bytes = 0
        self._frames = 0

    async def read_frames(self, references: Sequence[Reference]) -> list[bytes]:
        """The payloads, in the order asked. One that reaches past the end of its pack comes short; nothing here is verified.

        All range requests go out at once; how many the store sees is the client's to limit. Raises what
        `StoreClient.get` raises, ObjectNotFoundError for a pack that is gone among them, for the first that fails.
        """
        runs = plan_runs(references, gap_max=self._gap_max, run_max=self._run_max)
        payloads: list[bytes] = [b""] * len(references)

        async def read(run: Run) -> None:
            self._requests += 1
            data = await self._client.get(pack_name(run.pack_id), run.start, run.length)
            self._read_bytes += len(data)
            for at in run.members:
                start = references[at].offset - run.start
                payloads[at] = data[start : start + references[at].length]

        if len(runs) == 1:
            await read(runs[0])
        elif runs:
            async with open_nursery() as nursery:
                for run in runs:
                    nursery.start_soon(read, run)
        self._frames += len(references)
        self._payload_bytes += sum(map(len, payloads))
        return payloads

    def statistics(self) -> PackStatistics:
        """Counts since the source was made."""
        return PackStatistics(self._requests, self._read_bytes, self._payload_bytes, self._frames)
