"""What L2 takes of a Redis server's memory for a chunk: value, key, index, and what the allocator rounds up.

    python -m tests.bench.redis_memory [--chunks 20000] [--codec snappy] [--image FILE] [--json]

A real server (or valkey-server), filled by the tier itself with chunks of an image (without --image: of the tests' guest,
over and over under other ids). What the tier counts against `l2.capacity` stands beside what the server says: `MEMORY USAGE` of each value,
of the index, `used_memory` and `used_memory_rss` of `INFO memory`, each less what an empty server has.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from novafs.cache.base import Frame
from novafs.cache.redis import ENTRY_BYTES, RedisTier, open_l2
from novafs.codec import encode, parse_codec
from tests.bench.images import data_ranges
from tests.support.guest import guest_image
from tests.support.redis_servers import RedisServer

CHUNK = 64 << 10
BATCH = 64
DIFFERENT_MAX = 4096


def chunks(image: Path) -> Iterator[bytes]:
    """Those of a sparse image that are not all zeros."""
    with image.open("rb") as file:
        for start, length in data_ranges(image):
            file.seek(start)
            for _ in range(0, length, CHUNK):
                chunk = file.read(CHUNK)
                if len(chunk) == CHUNK and any(chunk):
                    yield chunk


def different(image: Path, codec: str) -> list[Frame]:
    """Frames of chunks from all over an image."""
    every = list(chunks(image))
    step = max(1, len(every) // DIFFERENT_MAX)
    return [encode(chunk, parse_codec(codec)) for chunk in every[::step]]


def measure(image: Path, count: int, codec: str) -> dict[str, float]:
    """Bytes for each of so many chunks."""
    frames = different(image, codec)
    with tempfile.TemporaryDirectory() as directory, RedisServer(Path(directory)) as server, server.client() as client:
        tier = open_l2(server.url, capacity_bytes=1 << 40, volume_id="bench", state_dir=Path(directory), timeout_s=10)
        assert isinstance(tier, RedisTier)
        tier.put_many({os.urandom(32): frames[0]})  # scripts and shards are there
        empty = _memory(client)
        payload_bytes = 0
        for start in range(0, count, BATCH):
            batch = {os.urandom(32): frames[at % len(frames)] for at in range(start, min(start + BATCH, count))}
            payload_bytes += sum(len(frame.payload) for frame in batch.values())
            tier.put_many(batch)
        held = tier.statistics().entries - 1
        full = _memory(client)
        values = sum(client.memory_usage(key) for key in client.scan_iter("*:d:*", count=1000))
        index = sum(client.memory_usage(key, samples=0) for key in client.scan_iter("*:i", count=1000))
        tier.close()
    return {
        "chunks": held,
        "frame": payload_bytes / held,
        "counted": payload_bytes / held + 16 + ENTRY_BYTES,
        "values": values / held,
        "index": index / held,
        "used_memory": (full["used_memory"] - empty["used_memory"]) / held,
        "used_memory_rss": (full["used_memory_rss"] - empty["used_memory_rss"]) / held,
        "maxmemory for 1 GB counted": (full["used_memory"] - empty["used_memory"]) / held / (payload_bytes / held + 16 + ENTRY_BYTES),
    }


def _memory(client: Any) -> dict[str, int]:
    return {name: int(value) for name, value in client.info("memory").items() if name in ("used_memory", "used_memory_rss")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=20_000)
    parser.add_argument("--codec", default="snappy", help="of L2, `l2.codec`")
    parser.add_argument("--image", type=Path, help="a sparse raw image")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.image or guest_image().disk, options.chunks, options.codec)
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:<28} {value:>12,.2f}" if value < 100 else f"{name:<28} {value:>12,.0f}")


if __name__ == "__main__":
    main()
