"""Codec hde: what is stored as a delta, that it can always be read, and that whatever it takes to read it is kept."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from novafs import delta
from novafs.cache.base import Frame
from novafs.catalogtree import ROOT_ID
from novafs.chunk import HOLE_BYTES, ChunkId, PackId, Reference, chunk_id
from novafs.codec import Codec, decode, encode, parse_codec
from novafs.condemned import mark_damaged, read_condemned
from novafs.delta import DEPTH_MAX, TRIALS, Deltas, Judge, Trial
from novafs.errors import ConfigError, CorruptionError, FrameCorruptError, NewerFormatError, ObjectNotFoundError, StoreDeniedError
from novafs.fsck import check
from novafs.fsckstart import check_start
from novafs.gc import GcReport, collect
from novafs.pack import PackBuilder, pack_name, parse_footer, read_footer, read_whole_footer, scan_frames
from novafs.snapshots import clone, take_snapshot
from novafs.superblock import NAME as SUPERBLOCK_NAME
from novafs.volume import Volume
from novafs.warming import warm_chunks
from tests.support.cli_fixtures import Cli
from tests.support.fixtures import run
from tests.support.hosts import CHUNK, World, alike, read_image, write_image
from tests.support.redis_servers import RedisServer

HOUR = 3600.0
COUNT = 6
FIRST = {i: alike(100 * i) for i in range(COUNT)}


def plain_of(content: dict[int, bytes]) -> bytes:
    return b"".join(content[i] for i in sorted(content))


def on_world(tmp_path: Path, main: Callable[[World, Volume], Awaitable[None]], **flags: str) -> None:
    async def play() -> None:
        world = World(tmp_path, delta=True, **flags)
        with world.running():
            async with world.host("a") as volume:
                await main(world, volume)

    run(play)


async def entries(volume: Volume, name: str) -> list[Reference]:
    """What the map names."""
    image = await volume.open_image((await volume.catalog.resolve(name, max_age_s=0)).node_id)
    raw = await image._state.entries(0, image._state.chunks, volume.cache.fetch)
    await volume.close_image(image)
    return [Reference.unpack(entry) for entry in raw if entry != HOLE_BYTES]


async def codecs(volume: Volume, name: str) -> list[int]:
    return [reference.codec for reference in await entries(volume, name)]


async def chain_of(volume: Volume, reference: Reference) -> delta.Chain:
    return delta.read_chain(await volume.client.get(pack_name(reference.pack_id), reference.offset, reference.length))


async def rewrite(volume: Volume, times: int, name: str = "disk", *, index: int = 0, start: int = 1) -> dict[int, bytes]:
    """Write one chunk again and again, each time a little different; what the image holds then."""
    content = dict(FIRST)
    for number in range(start, start + times):
        content[index] = alike(100 * index + number)
        await write_image(volume, name, {index: content[index]})
    return content


async def collected(world: World, volume: Volume, times: int = 4) -> GcReport:
    for _ in range(times):
        world.sleep(2 * HOUR)
        report = await collect(volume, everything=True)
        assert report.complete, report.problems
        assert not report.problems
    return report


# --- the bytes --------------------------------------------------------------------------------------------------


def reference_to(plain: bytes, codec: Codec = Codec.ZSTD) -> Reference:
    return Reference(chunk_id(plain), PackId(os.urandom(16)), 80, 100, codec)


@pytest.mark.parametrize("size", [4096, 16384, 65536, 1 << 20])
def test_a_delta_holds_what_differs_and_gives_the_content_back(size: int) -> None:
    base, new = alike(1, size), alike(2, size)
    chain = (reference_to(base),)
    frame, trial = delta.attempt(new, base, chain, encode(new, Codec.ZSTD))
    assert frame is not None
    assert frame.codec == Codec.HDE
    assert len(frame.payload) < size // 10
    assert trial.stored_bytes == len(frame.payload)
    assert trial.whole_bytes == size
    assert delta.read_chain(frame.payload) == chain
    assert delta.decode(frame.payload, base, size) == new


def test_what_is_not_half_the_size_is_no_delta() -> None:
    new = random.Random(1).randbytes(4096)
    base = new[:1000] + random.Random(2).randbytes(3096)
    assert delta.attempt(new, base, (reference_to(base),), encode(new, Codec.ZSTD))[0] is None
    base = new[:3000] + random.Random(2).randbytes(1096)
    assert delta.attempt(new, base, (reference_to(base),), encode(new, Codec.ZSTD))[0] is not None


def test_a_base_that_memory_has_changed_is_never_used() -> None:
    base, new = alike(1), alike(2)
    bad = bytes([base[0] ^ 1]) + base[1:]
    assert delta.encode(new, bad, (reference_to(base),), below=9999) is None


def test_garbage_is_a_corruption_and_nothing_else() -> None:
    base, new = alike(1), alike(2)
    frame = delta.encode(new, base, (reference_to(base),), below=9999)
    assert frame is not None
    rng = random.Random(5)
    for _ in range(600):
        payload = bytearray(frame.payload)
        if rng.random() < 0.3:
            del payload[rng.randrange(len(payload)) :]
        for _ in range(rng.randint(1, 3)):
            if payload:
                payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
        with contextlib.suppress(CorruptionError):
            assert len(delta.decode(bytes(payload), base, 4096)) <= 4096
    with pytest.raises(CorruptionError, match="at most 100"):
        delta.decode(frame.payload, base, 100)


def test_chains_that_no_writer_makes_are_refused() -> None:
    base = alike(1)
    whole, part = reference_to(base), reference_to(base, Codec.HDE)
    for chain in ((part,), (whole, whole), (part, part), (part, whole, part)):
        frame = delta.encode(alike(2), base, chain, below=9999)
        assert frame is not None
        with pytest.raises(CorruptionError, match="chain"):
            delta.read_chain(frame.payload)
    assert delta.encode(alike(2), base, (part,) * DEPTH_MAX + (whole,), below=9999) is None


def test_no_tier_and_no_setting_can_have_the_codec() -> None:
    with pytest.raises(ConfigError, match="no codec"):
        parse_codec("hde")
    with pytest.raises(ConfigError, match=r"l3\.delta"):
        encode(b"x", Codec.HDE)
    with pytest.raises(CorruptionError, match="delta frame"):
        decode(Codec.HDE, b"HD", 10)


def test_a_footer_names_the_bases_of_its_frames() -> None:
    base = alike(1)
    chain = (reference_to(base, Codec.HDE), reference_to(alike(3)))
    builder = PackBuilder()
    whole = builder.add(chunk_id(base), Frame(Codec.NONE, base), CHUNK)
    frame = delta.encode(alike(2), base, chain, below=9999)
    assert frame is not None
    part = builder.add(chunk_id(alike(2)), frame, CHUNK, chain)
    data = builder.finish()

    async def get(name: str, start: int, length: int) -> bytes:
        return data[start : start + length]

    async def main() -> None:
        assert [row.reference for row in await read_footer(builder.pack_id, len(data), get)] == [whole, part]
        footer = await read_whole_footer(builder.pack_id, len(data), get)
        assert len(footer.rows) == 96
        assert footer.bases == b"".join(part.offset.to_bytes(8, "little") + reference.pack() for reference in chain)

    run(main)
    rows = parse_footer(builder.pack_id, data)
    assert not isinstance(rows, int)
    assert rows == scan_frames(builder.pack_id, data)


# --- whether it pays --------------------------------------------------------------------------------------------


def test_a_judge_rests_where_deltas_do_not_pay_and_tries_again() -> None:
    judge = Judge()

    def passed() -> int:
        count = 0
        while not judge.wants():
            count += 1
        return count

    rests = []
    for _ in range(3):
        for _ in range(TRIALS):
            assert judge.wants()
            judge.note(Trial(4000, 4000, 1e-4))
        assert judge.resting
        rests.append(passed())
    assert rests == [1024, 2048, 4096]
    for _ in range(10 * TRIALS):
        judge.note(Trial(4000, 400, 1e-4))
        assert not judge.resting


@pytest.mark.parametrize(("trial", "bases"), [(Trial(4000, 3900, 1e-6), 0), (Trial(4000, 400, 1.0), 0), (Trial(4000, 400, 1e-6), 4000)])
def test_neither_small_gains_nor_slow_ones_nor_those_that_reading_eats_up_pay(trial: Trial, bases: int) -> None:
    judge = Judge()
    for _ in range(TRIALS):
        judge.note_bases(bases)
        judge.note(trial)
    assert judge.resting


def test_what_a_volume_remembers_of_chains_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "CHAINS_MAX", 3)
    deltas = Deltas(enabled=True)
    places = [Reference(ChunkId(os.urandom(32)), PackId(os.urandom(16)), 80, 10, Codec.HDE) for _ in range(5)]
    for place in places:
        deltas.note(place, (reference_to(b"x"),))
    assert [deltas.chain_over(place) is not None for place in places] == [False, False, True, True, True]


def test_contents_that_have_nothing_in_common_are_stored_whole_and_soon_not_tried(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        rng = random.Random(3)
        for _ in range(3):
            await write_image(volume, "disk", {i: rng.randbytes(CHUNK) for i in range(100)})
        assert set(await codecs(volume, "disk")) == {Codec.NONE}
        assert volume.deltas.statistics().resting == 1
        tried = volume.deltas.statistics().tried
        await write_image(volume, "disk", {i: rng.randbytes(CHUNK) for i in range(100)})
        assert volume.deltas.statistics().tried == tried

    on_world(tmp_path, main)


# --- writing and reading ----------------------------------------------------------------------------------------


def test_a_chunk_that_is_written_again_is_a_delta_and_other_hosts_read_it(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", FIRST)
        before = volume.writes.uploaded_bytes
        content = await rewrite(volume, 1)
        assert await codecs(volume, "disk") == [Codec.HDE, *[Codec.NONE] * (COUNT - 1)]
        assert volume.writes.uploaded_bytes - before < CHUNK // 4
        async with world.host("b") as other:
            assert await read_image(other, "disk") == plain_of(content)
            figures = other.deltas.statistics()
            assert (figures.reads, figures.base_reads) == (1, 1)
        async with world.host("c", read_only=True, l3__delta="false") as other:
            assert await read_image(other, "disk") == plain_of(content)

    on_world(tmp_path, main)


def test_chains_are_no_deeper_than_their_bound_and_every_depth_can_be_read(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", FIRST)
        depths = []
        async with world.host("b") as other:
            for number in range(1, 2 * DEPTH_MAX + 3):
                content = await rewrite(volume, 1, start=number)
                first = (await entries(volume, "disk"))[0]
                depths.append(len(await chain_of(volume, first)) if first.codec == Codec.HDE else 0)
                assert await read_image(other, "disk") == plain_of(content)
        assert depths == [1, 2, 3, 4, 0, 1, 2, 3, 4, 0]

    on_world(tmp_path, main)


def test_map_nodes_are_deltas_as_well(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        content = {i: alike(i) for i in range(300)}  # two leaves
        await write_image(volume, "disk", content)
        before = volume.writes.uploaded_bytes
        content[280] = alike(1000)
        await write_image(volume, "disk", {280: content[280]})
        assert volume.writes.uploaded_bytes - before < CHUNK // 2  # a whole leaf alone takes more
        async with world.host("b") as other:
            assert await read_image(other, "disk") == plain_of(content)

    on_world(tmp_path, main)


def test_a_part_of_a_chunk_that_is_written_is_merged_with_a_delta(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", FIRST)
        content = await rewrite(volume, 3)
        expected = bytearray(plain_of(content))
        async with world.host("b") as other:  # which knows no chains, and has nothing in L1
            image = await other.open_image((await other.catalog.resolve("disk")).node_id)
            await image.write(100, b"changed")
            expected[100:107] = b"changed"
            await other.close_image(image)
            assert (await codecs(other, "disk"))[0] == Codec.HDE  # reading told the chain
            assert await read_image(other, "disk") == expected
        assert await read_image(volume, "disk") == expected

    on_world(tmp_path, main)


def test_only_what_no_tier_has_of_a_chain_is_read(tmp_path: Path, redis_server: RedisServer) -> None:
    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", FIRST)
        content = await rewrite(volume, 3)
        expected = plain_of(content)
        first = (await entries(volume, "disk"))[0]
        chain = await chain_of(volume, first)
        assert len(chain) == 3
        async with world.host("b", l2__url=redis_server.url) as other:
            assert other.cache.l2 is not None
            for depth in range(4):  # the first so many of the chain are in no tier
                for in_l1 in (True, False):
                    other.cache.l2.clear()
                    other.cache.l1.clear()
                    before = other.deltas.statistics().base_reads
                    if depth < 3:
                        await other.cache.fetch([chain[depth]])
                        await other.cache.wait_idle()
                        other.cache.drop([reference.chunk_id for reference in (first, *chain[:depth])])
                        await other.cache.wait_idle()
                        if not in_l1:
                            other.cache.l1.clear()
                        before = other.deltas.statistics().base_reads
                    image = await other.open_image((await other.catalog.resolve("disk")).node_id)
                    assert await image.read(0, image.size) == expected
                    await other.close_image(image)
                    await other.cache.wait_idle()
                    assert other.deltas.statistics().base_reads - before == depth, (depth, in_l1)

    on_world(tmp_path, main)


def test_the_same_content_written_again_stays_where_it_is(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", FIRST)
        content = await rewrite(volume, 1)
        before = await entries(volume, "disk")
        new = volume.writes.new_chunks
        await write_image(volume, "disk", content)
        assert await entries(volume, "disk") == before
        assert volume.writes.new_chunks == new
        await write_image(volume, "disk", {0: content[0], 7: content[0]})  # and in a second place, where nothing was
        assert await read_image(volume, "disk") == plain_of({**content, 6: bytes(CHUNK), 7: content[0]})
        await collected(world, volume)
        async with world.host("b") as other:
            assert await read_image(other, "disk") == plain_of({**content, 6: bytes(CHUNK), 7: content[0]})

    on_world(tmp_path, main)


def test_a_chain_that_is_not_known_is_not_made_longer(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", FIRST)
        await rewrite(volume, 1)
        volume.deltas._chains.clear()
        content = await rewrite(volume, 1, start=7)
        assert (await codecs(volume, "disk"))[0] == Codec.NONE
        assert await read_image(volume, "disk") == plain_of(content)

    on_world(tmp_path, main)


def test_a_chain_that_came_damaged_is_not_made_longer_though_memory_had_its_base(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", FIRST)
        content = await rewrite(volume, 1)
        part = (await entries(volume, "disk"))[0]
        (base,) = await chain_of(volume, part)
        path = world.root / pack_name(part.pack_id)
        good = path.read_bytes()
        async with world.host("b") as other:
            await other.cache.fetch([base])
            damaged = bytearray(good)
            damaged[part.offset + 8 + 48] ^= 0x10  # where the base is, within its pack
            path.write_bytes(damaged)
            assert (await other.cache.fetch([part])) == [content[0]]
            path.write_bytes(good)
            content[0] = alike(50)
            await write_image(other, "disk", content)
        async with world.host("c") as reader:
            assert await read_image(reader, "disk") == plain_of(content)

    on_world(tmp_path, main)


def test_one_that_is_switched_off_or_was_not_made_for_it_makes_none(tmp_path: Path) -> None:
    async def main() -> None:
        for number, (made_for, setting) in enumerate([(True, "false"), (False, "true")]):
            world = World(tmp_path / str(number), delta=made_for)
            (tmp_path / str(number)).mkdir()
            with world.running():
                async with world.host("a", l3__delta=setting) as volume:
                    await write_image(volume, "disk", FIRST)
                    await rewrite(volume, 2)
                    assert Codec.HDE not in await codecs(volume, "disk")
                    assert volume.deltas.statistics().tried == 0

    run(main)


def test_dedup_never_finds_a_delta(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", FIRST)
        content = await rewrite(volume, 1)
        await write_image(volume, "other", {0: content[0], 1: content[1]})
        found = await entries(volume, "other")
        assert [reference.codec for reference in found] == [Codec.NONE, Codec.NONE]
        assert found[1] == (await entries(volume, "disk"))[1]
        async with world.host("b") as other:  # whose index is filled from footers
            await other.dedup.fill()
            assert (await entries(volume, "disk"))[0] not in (await other.dedup.find([found[0].chunk_id])).values()
            await write_image(other, "third", {0: content[0]})
            assert await codecs(other, "third") == [Codec.NONE]

    on_world(tmp_path, main)


def test_l2_never_holds_a_delta(tmp_path: Path, redis_server: RedisServer) -> None:
    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", FIRST)
        content = await rewrite(volume, 2)
        await volume.cache.wait_idle()
        assert volume.cache.l2 is not None
        async with world.host("b") as other:
            for clear in (True, False):
                if clear:
                    volume.cache.l2.clear()
                else:
                    other.cache.l1.clear()
                assert await read_image(other, "disk") == plain_of(content)
                await other.cache.wait_idle()
                ids = [reference.chunk_id for reference in await entries(other, "disk")]
                frames = volume.cache.l2.get_many(ids)
                assert frames.keys() == set(ids)
                assert all(frame.codec != Codec.HDE for frame in frames.values())
            volume.cache.l2.clear()
            other.cache.l1.clear()
            image = await other.open_image((await other.catalog.resolve("disk")).node_id)
            counts = await warm_chunks(other, image, [(0, COUNT)], l1=False, l2=True)
            await other.close_image(image)
            await other.cache.wait_idle()
            assert counts.failed == 0
            frames = volume.cache.l2.get_many(ids)
            assert frames.keys() == set(ids)
            assert all(frame.codec != Codec.HDE for frame in frames.values())

    on_world(tmp_path, main, l2__url=redis_server.url)


# --- keeping what they need -------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2, DEPTH_MAX, DEPTH_MAX + 1])
def test_collections_keep_what_deltas_were_made_against(tmp_path: Path, times: int) -> None:
    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", FIRST)
        # Nothing but the chain needs the first versions: every chunk is written again.
        for number in range(1, times + 1):
            content = {i: alike(100 * i + number) for i in range(COUNT)}
            await write_image(volume, "disk", content)
        await collected(world, volume)
        async with world.host("b") as other:
            assert await read_image(other, "disk") == plain_of(content)
            report = await check(other, scrub_packs=True)
            assert not report.problems, report.problems

    on_world(tmp_path, main)


def test_bases_go_with_the_last_delta_that_needs_them(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", FIRST)
        first_packs = set(world.names("packs/"))
        await write_image(volume, "disk", {i: alike(100 * i + 1) for i in range(COUNT)})
        await collected(world, volume)
        assert first_packs <= set(world.names("packs/"))
        await write_image(volume, "disk", {i: random.Random(i).randbytes(CHUNK) for i in range(COUNT)})
        await collected(world, volume)
        assert not first_packs & set(world.names("packs/"))
        assert len(world.names("packs/")) == 1

    on_world(tmp_path, main)


def test_compaction_makes_whole_frames_of_deltas_and_moves_bases(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        content = dict(FIRST)
        await write_image(volume, "disk", content)
        for number in range(1, 4):
            content.update({i: alike(100 * i + number) for i in range(COUNT)})
            await write_image(volume, "disk", {i: content[i] for i in range(COUNT)})
        # The packs of the last versions lose all chunks but one, those of the bases as well.
        kept = {0: content[0]}
        other_content = {i: random.Random(i).randbytes(CHUNK) for i in range(1, COUNT)}
        await write_image(volume, "disk", other_content)
        compacted = 0
        for _ in range(8):
            world.sleep(2 * HOUR)
            report = await collect(volume, everything=True)
            assert report.complete
            assert not report.problems
            compacted += report.packs_compacted
            async with world.host("b") as other:
                assert await read_image(other, "disk") == plain_of({**kept, **other_content})
                assert not (await check(other, scrub_packs=True)).problems
        assert compacted
        # The next commit names them where they are, and counts what they take now.
        final = {**kept, **other_content, 5: alike(999)}
        await write_image(volume, "disk", {5: final[5]})
        assert (await codecs(volume, "disk"))[0] == Codec.NONE
        image = await volume.open_image((await volume.catalog.resolve("disk")).node_id)
        assert image.head.stored_bytes == sum(reference.length for reference in await entries(volume, "disk"))
        await volume.close_image(image)
        await collected(world, volume)
        assert await read_image(volume, "disk") == plain_of(final)

    on_world(tmp_path, main)


def test_a_delta_on_what_was_moved_is_read_by_way_of_the_forward(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", {i: alike(100 * i) for i in range(20)})
        await write_image(volume, "disk", {0: alike(1)})
        # What is left of the first pack is the base of chunk 0, and one chunk.
        await write_image(volume, "disk", {i: random.Random(i).randbytes(CHUNK) for i in range(1, 19)})
        base = (await chain_of(volume, (await entries(volume, "disk"))[0]))[0]
        for _ in range(5):
            world.sleep(2 * HOUR)
            assert (await collect(volume, everything=True)).complete
        assert pack_name(base.pack_id) not in world.names("packs/")
        expected = plain_of({0: alike(1), **{i: random.Random(i).randbytes(CHUNK) for i in range(1, 19)}, 19: alike(1900)})
        async with world.host("b") as other:
            assert await read_image(other, "disk") == expected
            # And what is written on top of that names the base where it is.
            await write_image(other, "disk", {0: alike(2)})
        async with world.host("c") as other:
            assert await read_image(other, "disk") == alike(2) + expected[CHUNK:]
            first = (await entries(other, "disk"))[0]
            if first.codec == Codec.HDE:
                assert base.pack_id not in {reference.pack_id for reference in await chain_of(other, first)}

    on_world(tmp_path, main)


def test_snapshots_and_clones_keep_the_chains_of_their_own(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", FIRST)
        content = await rewrite(volume, 2)
        entry = await volume.catalog.resolve("disk", max_age_s=0)
        await take_snapshot(volume, entry, "s")
        await clone(volume, entry, ROOT_ID, "copy")
        await write_image(volume, "disk", {i: random.Random(i).randbytes(CHUNK) for i in range(COUNT)})
        await collected(world, volume)
        async with world.host("b") as other:
            assert await read_image(other, "copy") == plain_of(content)
            await other.unlink(ROOT_ID, "copy")
        await collected(world, volume)
        entry = await volume.catalog.resolve("disk", max_age_s=0)
        volume.cache.l1.clear()
        view = await volume.open_snapshot(entry.node_id, entry.snapshots["s"].counter, name="s")
        assert await view.read(0, COUNT * CHUNK) == plain_of(content)
        await volume.close_image(view)

    on_world(tmp_path, main)


def test_nothing_is_made_against_what_is_condemned(tmp_path: Path) -> None:
    """A pack that was compacted is condemned while maps still name it."""

    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", {i: alike(100 * i) for i in range(20)})
        await write_image(volume, "disk", {i: random.Random(i).randbytes(CHUNK) for i in range(1, 20)})
        world.sleep(2 * HOUR)
        await collect(volume)
        world.sleep(2 * HOUR)
        await collect(volume)
        condemned = (await read_condemned(volume.client)).packs
        old = (await entries(volume, "disk"))[0]
        assert old.pack_id in condemned
        await write_image(volume, "disk", {0: alike(1)})
        first = (await entries(volume, "disk"))[0]
        (base,) = await chain_of(volume, first)  # named where it is now
        assert not {first.pack_id, base.pack_id} & condemned.keys()
        await collected(world, volume)
        assert (await read_image(volume, "disk"))[:CHUNK] == alike(1)

    on_world(tmp_path, main)


def test_nothing_is_made_against_what_is_known_to_be_damaged(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", FIRST)
        old = (await entries(volume, "disk"))[0]
        await mark_damaged(volume.client, [(old.pack_id, old.chunk_id)])
        world.sleep(HOUR)
        await write_image(volume, "disk", {0: alike(1), 1: alike(101)})
        assert (await codecs(volume, "disk"))[:2] == [Codec.NONE, Codec.HDE]

    on_world(tmp_path, main)


def test_a_commit_that_sleeps_while_its_base_is_collected_is_stored_again(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", {i: alike(100 * i) for i in range(20)})
        await write_image(volume, "disk", {i: random.Random(i).randbytes(CHUNK) for i in range(1, 20)})
        async with world.host("c") as collector:
            async with world.asleep("a", "create", "images/", lambda: write_image(volume, "disk", {0: alike(1)})) as sleeper:
                for _ in range(6):
                    world.sleep(2 * HOUR)
                    await collect(collector, everything=True)
            assert sleeper.error is None
            for _ in range(4):
                world.sleep(2 * HOUR)
                await collect(collector, everything=True)
            expected = plain_of({0: alike(1), **{i: random.Random(i).randbytes(CHUNK) for i in range(1, 20)}})
            assert await read_image(collector, "disk") == expected
            assert not (await check(collector, scrub_packs=True)).problems

    on_world(tmp_path, main)


@pytest.mark.parametrize("kind", ["other", "as before", "in part"])
def test_a_commit_that_lost_its_packs_and_fails_refers_to_nothing_older_later(tmp_path: Path, kind: str) -> None:
    new = b"x" * 10 + alike(0)[10:] if kind == "in part" else alike(1)

    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", {i: alike(100 * i) for i in range(20)})
        await write_image(volume, "disk", {i: random.Random(f"{i}").randbytes(CHUNK) for i in range(1, 20)})
        store = world.stores["a"]

        def deny(operation: str, name: str) -> None:
            if operation == "create":
                raise StoreDeniedError(f"{name}: not now")

        def deny_what_follows(operation: str, name: str) -> None:
            if name.startswith("images/"):
                store.hook = deny

        async with world.host("c") as collector:
            image = await volume.open_image((await volume.catalog.resolve("disk", max_age_s=0)).node_id)
            await image.write(0, new[:10] if kind == "in part" else new)
            async with world.asleep("a", "create", "images/", image.commit) as sleeper:
                for _ in range(6):
                    world.sleep(2 * HOUR)
                    await collect(collector, everything=True)
                store.after = deny_what_follows
            assert isinstance(sleeper.error, StoreDeniedError)
            for _ in range(8):
                world.sleep(2 * HOUR)
                await collect(collector, everything=True)
            store.hook = store.after = lambda operation, name: None
            assert volume.cache.peek(chunk_id(alike(0))) is not None
            last = new
            if kind == "as before":
                last = alike(0)
                await image.write(0, last)
            await image.commit(brief=kind == "in part")
            expected = plain_of({0: last, **{i: random.Random(f"{i}").randbytes(CHUNK) for i in range(1, 20)}})
            async with world.host("d") as reader:
                assert await read_image(reader, "disk") == expected
            await image.write(0, alike(2))
            await image.commit()
            assert (await codecs(volume, "disk"))[0] == Codec.HDE  # and is made against what is there again
            await volume.close_image(image)

    on_world(tmp_path, main)


def test_a_delta_in_a_pack_without_a_footer_keeps_its_bases(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", FIRST)
        content = {i: alike(100 * i + 1) for i in range(COUNT)}
        await write_image(volume, "disk", content)
        part = (await entries(volume, "disk"))[0]
        path = world.root / pack_name(part.pack_id)
        data = bytearray(path.read_bytes())
        data[-40] ^= 1  # in the footer
        path.write_bytes(data)
        for _ in range(4):
            world.sleep(2 * HOUR)
            assert (await collect(volume, everything=True)).complete
        assert await read_image(volume, "disk") == plain_of(content)
        report = await check(volume, repair=True)
        assert any("was moved" in line for line in report.repaired)
        assert set(await codecs(volume, "disk")) == {Codec.HDE}  # the map is the same, a forward leads to whole frames
        await collected(world, volume)
        async with world.host("b") as other:
            assert await read_image(other, "disk") == plain_of(content)
            assert not (await check(other, scrub_packs=True)).problems

    on_world(tmp_path, main)


def test_a_delta_that_nothing_needs_is_no_damage_when_its_base_is_gone(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        content = {i: alike(100 * i) for i in range(20)}
        await write_image(volume, "disk", content)
        await write_image(volume, "disk", {i: alike(100 * i + 1) for i in range(6)})
        parts = (await entries(volume, "disk"))[:6]
        noise = {i: random.Random(i).randbytes(CHUNK) for i in range(4, 20)}  # two of the six deltas are dead then, and most bases
        await write_image(volume, "disk", noise)
        await collected(world, volume, 6)
        names = world.names("packs/")
        assert pack_name(parts[0].pack_id) in names
        assert pack_name((await chain_of(volume, parts[5]))[0].pack_id) not in names
        async with world.host("b") as other:
            report = await check(other, scrub_packs=True)
            assert (report.damaged_frames, report.findings) == (0, [])
            assert await read_image(other, "disk") == plain_of({**{i: alike(100 * i + 1) for i in range(4)}, **noise})

    on_world(tmp_path, main)


def test_compaction_leaves_a_delta_whose_base_can_not_be_read_where_it_is(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", FIRST)
        await write_image(volume, "disk", {i: alike(100 * i + 1) for i in range(COUNT)})
        part = (await entries(volume, "disk"))[0]
        (base,) = await chain_of(volume, part)
        await write_image(volume, "disk", {i: random.Random(i).randbytes(CHUNK) for i in range(1, COUNT)})
        spoil(world, base)
        async with world.host("b") as other:  # nothing of it is in L1
            for _ in range(5):
                world.sleep(2 * HOUR)
                assert (await collect(other, everything=True)).complete
        assert {pack_name(part.pack_id), pack_name(base.pack_id)} <= set(world.names("packs/"))
        assert part.pack_id not in (await read_condemned(volume.client)).damaged  # its base is, not it
        spoil(world, base)  # the same bit again: from a copy, so to speak
        async with world.host("c") as other:
            assert (await read_image(other, "disk"))[:CHUNK] == alike(1)

    on_world(tmp_path, main)


# --- damage -----------------------------------------------------------------------------------------------------


def spoil(world: World, place: Reference) -> None:
    path = world.root / pack_name(place.pack_id)
    data = bytearray(path.read_bytes())
    data[place.offset + place.length // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["damaged", "gone"])
def test_a_base_that_is_lost_is_an_error_that_names_it_and_fsck_names_the_image(tmp_path: Path, kind: str) -> None:
    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", FIRST)
        await write_image(volume, "other", {0: random.Random(9).randbytes(CHUNK)})
        content = {i: alike(100 * i + 1) for i in range(COUNT)}
        await write_image(volume, "disk", content)
        part = (await entries(volume, "disk"))[0]
        base = (await chain_of(volume, part))[0]
        if kind == "damaged":
            spoil(world, base)
        else:
            (world.root / pack_name(base.pack_id)).unlink()
        async with world.host("b", read_only=True) as other:
            with pytest.raises(
                (FrameCorruptError, ObjectNotFoundError), match=f"(?s){part.chunk_id.hex()}.*made against.*{base.pack_id.hex()}"
            ):
                await read_image(other, "disk")
        async with world.host("c") as other:
            report = await check(other, scrub_packs=True)
            lost = 1 if kind == "damaged" else COUNT
            (touched,) = report.touched
            assert (touched.path, touched.offset, touched.length) == ("disk", 0, lost * CHUNK)
            assert any("made against others" in finding.message for finding in report.problems)
            assert report.damaged_frames == (1 if kind == "damaged" else 0)  # of the base alone
            # What is written over it is well again.
            await write_image(other, "disk", dict.fromkeys(range(lost), random.Random(4).randbytes(CHUNK)))
            assert await read_image(other, "disk") == plain_of({**content, **dict.fromkeys(range(lost), random.Random(4).randbytes(CHUNK))})

    on_world(tmp_path, main)


def test_a_scrub_finds_a_damaged_chain_though_memory_has_the_base(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", FIRST)
        await rewrite(volume, 1)
        part = (await entries(volume, "disk"))[0]
        (base,) = await chain_of(volume, part)
        assert not (await check(volume, scrub_packs=True)).problems
        path = world.root / pack_name(part.pack_id)
        data = bytearray(path.read_bytes())
        data[part.offset + 8 + 48] ^= 0x10  # where the base is, within its pack
        path.write_bytes(data)
        await volume.cache.fetch([base])
        report = await check(volume, scrub_packs=True)
        assert report.damaged_frames == 1
        assert [(touched.path, touched.offset) for touched in report.touched] == [("disk", 0)]

    on_world(tmp_path, main)


def test_repair_finds_another_copy_of_a_base_but_never_a_delta_that_needs_it(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", FIRST)
        # Back to what it was: the first version is now there whole, and as a delta on the second.
        volume.dedup.enabled = False
        await write_image(volume, "disk", {0: alike(1)})
        await write_image(volume, "disk", {0: FIRST[0]})
        first = (await entries(volume, "disk"))[0]
        assert first.codec == Codec.HDE
        chain = await chain_of(volume, first)
        assert chain[-1].chunk_id == first.chunk_id  # a delta of a delta of itself
        spoil(world, chain[-1])
        async with world.host("b") as other:
            report = await check(other, scrub_packs=True, repair=True)
            assert [touched.path for touched in report.touched] == ["disk"]  # no copy but the one that needs it
            with pytest.raises(FrameCorruptError):
                await read_image(other, "disk")
            other.dedup.enabled = False
            await write_image(other, "copy", {0: FIRST[0]})
            report = await check(other, repair=True)
            assert not report.touched
            world.sleep(60)  # that there was no forward is remembered for a while
            assert await read_image(other, "disk") == plain_of(FIRST)

    on_world(tmp_path, main)


def test_content_that_comes_back_survives_every_compaction(tmp_path: Path) -> None:
    """A chunk that is there whole, and as a delta on a delta on itself: merging the two copies would be the end of both."""

    async def main(world: World, volume: Volume) -> None:
        volume.dedup.enabled = False
        await write_image(volume, "keeper", {i: alike(100 * i) for i in range(20)})
        await clone(volume, await volume.catalog.resolve("keeper", max_age_s=0), ROOT_ID, "disk")
        for number in (1, 0, 2, 0):
            await write_image(volume, "disk", {i: alike(100 * i + number) for i in range(20)})
        expected = {}
        for name in ("keeper", "disk"):
            await write_image(volume, name, {i: random.Random(i).randbytes(CHUNK) for i in range(3, 20)})
            expected[name] = plain_of(
                {**{i: alike(100 * i) for i in range(3)}, **{i: random.Random(i).randbytes(CHUNK) for i in range(3, 20)}}
            )
        for _ in range(8):
            world.sleep(2 * HOUR)
            assert (await collect(volume, everything=True)).complete
            async with world.host("b") as other:
                for name, plain in expected.items():
                    assert await read_image(other, name) == plain

    on_world(tmp_path, main)


def test_a_chain_that_leads_to_itself_is_an_error_and_no_hang(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        # Two frames in one pack, each of which names the other: made by hand, no writer does.
        one, two = alike(1), alike(2)
        builder = PackBuilder()
        length = 8 + 2 * 64 + 40

        def place(plain: bytes, at: int) -> Reference:
            return Reference(chunk_id(plain), builder.pack_id, 80 + at * (length + 48), length, Codec.HDE)

        end = Reference(chunk_id(b"end"), builder.pack_id, 80, length, Codec.ZSTD)
        for plain, base, at in ((one, two, 1), (two, one, 0)):
            frame = delta.encode(plain, base, (place(base, at), end), below=9999)
            assert frame is not None
            builder.add(chunk_id(plain), Frame(Codec.HDE, frame.payload[:length].ljust(length, b"\0")), CHUNK, (place(base, at), end))
        await volume.client.create(pack_name(builder.pack_id), builder.finish())
        with pytest.raises(FrameCorruptError):
            await volume.cache.fetch([place(one, 0), place(two, 1)])

    on_world(tmp_path, main)


# --- the format -------------------------------------------------------------------------------------------------


def test_a_volume_that_may_hold_deltas_is_of_format_2_and_names_it(tmp_path: Path) -> None:
    async def main(world: World, volume: Volume) -> None:
        assert (volume.superblock.format, volume.superblock.features) == (2, ("delta",))
        text = (world.root / SUPERBLOCK_NAME).read_text()
        assert '"format": 2' in text
        (world.root / SUPERBLOCK_NAME).write_text(text.replace('"delta"', '"delta", "gamma"'))
        with pytest.raises(NewerFormatError, match=r"'gamma'.*upgrade NovaFS"):
            async with world.host("b"):
                pass
        (world.root / SUPERBLOCK_NAME).write_text(text.replace('"format": 2', '"format": 3'))
        with pytest.raises(NewerFormatError, match="format 3"):
            async with world.host("b"):
                pass

    on_world(tmp_path, main)


def test_a_volume_without_deltas_is_what_it_was(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                assert '"format": 1' in (world.root / SUPERBLOCK_NAME).read_text()
                assert "features" not in (world.root / SUPERBLOCK_NAME).read_text()
                await write_image(volume, "disk", FIRST)
                # A superblock that was lost is made for all that the volume may hold.
                (world.root / SUPERBLOCK_NAME).unlink()
                await check_start(volume.client, repair=True)
                assert '"delta"' in (world.root / SUPERBLOCK_NAME).read_text()

    run(main)


def test_init_makes_a_volume_for_deltas_only_where_it_is_asked_to(command: Cli, tmp_path: Path) -> None:
    for name, options, features in (("plain", (), None), ("delta", ("--delta",), ["delta"])):
        command("init", f"file://{tmp_path / name}", *options, "--state-dir", tmp_path / f"state-{name}")
        assert json.loads((tmp_path / name / SUPERBLOCK_NAME).read_text()).get("features") == features
        told = command("info", f"file://{tmp_path / name}", "--state-dir", tmp_path / f"state-{name}")
        assert ("2 with delta, chunks of 64" in told) == bool(features)
