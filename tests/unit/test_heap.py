"""What keeps the daemon's memory near what it holds: one arena, free pages given back near the promise, dirty data counted against L1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from novafs import heap
from novafs.catalogtree import ROOT_ID
from novafs.heap import NEAR_BYTES, WORTH_BYTES, Trimmer
from tests.support.engine import fresh_volume

CAPACITY = 64 << 20
NEAR = int(CAPACITY * heap.NEAR_FACTOR) + NEAR_BYTES
CHUNK = 64 << 10

FREED = """
import sys, threading
from novafs import heap
if {one}: assert heap.one_arena()
kept, barrier = [], threading.Barrier(8)
def work():
    barrier.wait()  # all at once, so that arenas are taken where there may be several
    made = [bytes(40_000) for _ in range(200)]
    kept.append(made[::4])
    barrier.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
before = heap.resident_bytes()
heap.trim()
print(before - heap.resident_bytes(), open("/proc/self/smaps").read().count("rw-p 00000000 00:00 0 \\n"))
"""
glibc = pytest.mark.skipif(not hasattr(__import__("ctypes").CDLL(None), "malloc_trim"), reason="malloc is not glibc's")


def run_freed(one: bool) -> int:
    """How many bytes were given back by a process that has freed three of four of 64 MB, in eight threads."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "COVERAGE_"))}
    done = subprocess.run([sys.executable, "-c", FREED.format(one=one)], env=environ, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


@glibc
def test_what_is_free_between_what_is_held_is_given_back() -> None:
    assert run_freed(True) > 30_000_000


def test_memory_is_given_back_near_the_promise_and_when_it_has_grown_again() -> None:
    resident, trims = [NEAR], []

    def trim() -> None:
        trims.append(resident[0])
        resident[0] -= 30 << 20

    async def main() -> None:
        trimmer = Trimmer(lambda: CAPACITY, resident=lambda: resident[0], trim=trim)
        await trimmer.look()
        assert not trims  # not above it
        resident[0] = NEAR + 1
        await trimmer.look()
        assert len(trims) == 1
        resident[0] = NEAR + WORTH_BYTES  # what could not be given back is in use
        for _ in range(3):
            await trimmer.look()
        assert len(trims) == 2 == trimmer.trims
        resident[0] = trims[-1] - (30 << 20) + WORTH_BYTES - 1
        await trimmer.look()
        assert len(trims) == 2  # too little has come since

    trio.run(main)


def test_a_large_l1_is_looked_through_for_more() -> None:
    capacity, trims = 64 << 30, []
    resident = [int(capacity * heap.NEAR_FACTOR) + NEAR_BYTES + 1]

    async def main() -> None:
        trimmer = Trimmer(lambda: capacity, resident=lambda: resident[0], trim=lambda: trims.append(1))
        for _ in range(40):
            await trimmer.look()
            resident[0] += WORTH_BYTES

    trio.run(main)
    assert len(trims) == 1
    # What may come between two is a small part of what lies between near and the promise.
    assert capacity // heap.WORTH_SHARE + WORTH_BYTES < capacity * (1.15 - heap.NEAR_FACTOR) / 2


def test_what_stays_in_use_is_not_looked_for_again_and_again() -> None:
    trims = []

    async def main() -> None:
        trimmer = Trimmer(lambda: CAPACITY, resident=lambda: NEAR + (100 << 20), trim=lambda: trims.append(1))
        for _ in range(5):
            await trimmer.look()

    trio.run(main)
    assert len(trims) == 1


def test_dirty_data_leaves_a_tiny_l1_room_for_chunks(tmp_path: Path) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path, l1__capacity="4MiB", writeback__interval="1h") as volume:
            image = await volume.open_image((await volume.create(ROOT_ID, "disk.raw")).node_id)
            await image.write(0, os.urandom(4 * CHUNK))
            await image.commit()
            l1 = volume.cache.l1
            for name in ("prefetch", "policy", "maps"):
                l1.set_reserved(name, l1.capacity_bytes // 5)
            for number in range(100, 180):
                await image.write(number * CHUNK, os.urandom(CHUNK))
            assert l1.used_bytes <= l1.capacity_bytes
            assert 0 < l1.statistics().reserved_bytes["dirty"] < l1.capacity_bytes // 2
            await image.read(0, 4 * CHUNK)
            assert image.read_nowait(3 * CHUNK, CHUNK) is not None
            await volume.close_image(image)

    trio.run(main)


def test_dirty_data_counts_against_l1_up_to_a_half_of_it_until_it_is_committed(tmp_path: Path) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path, l1__capacity="32MiB", writeback__interval="1h") as volume:
            entry = await volume.create(ROOT_ID, "disk.raw")
            image = await volume.open_image(entry.node_id)
            l1 = volume.cache.l1
            counted = []
            for number in range(400):
                await image.write(number * CHUNK, os.urandom(CHUNK))
                counted.append(l1.statistics().reserved_bytes.get("dirty", 0))
                assert l1.used_bytes <= l1.capacity_bytes
                assert counted[-1] >= min(image.dirty_bytes - (1 << 20), l1.capacity_bytes // 2)
            assert counted == sorted(counted) and counted[-1] == l1.capacity_bytes // 2 < image.dirty_bytes
            await image.commit()
            assert not image.dirty_bytes and "dirty" not in l1.statistics().reserved_bytes
            await volume.close_image(image)

    trio.run(main)
