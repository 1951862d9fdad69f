"""Where the chunks of an image are: exact for a small one, sampled and bounded for a large one."""

from __future__ import annotations

import os
from pathlib import Path

import trio
import trio.testing

from novafs import residency as module
from novafs.catalogtree import ROOT_ID
from novafs.image import Image
from novafs.residency import CELLS_MAX, LOOKS_MAX, STATES, Residency, residency
from novafs.volume import Volume
from tests.support.engine import fresh_volume

CHUNK = 65536


async def look(volume: Volume, image: Image) -> Residency:
    return await residency(volume.cache, image, ask=trio.CapacityLimiter(1))


def test_a_small_image_is_told_exactly(tmp_path: Path) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path) as volume:
            image = await volume.open_image((await volume.create(ROOT_ID, "a.raw")).node_id)
            await image.resize(8 * CHUNK)
            await image.write(0, os.urandom(4 * CHUNK))
            await image.commit()
            await image.write(7 * CHUNK, b"dirty")
            gone = image.entry_nowait(1)
            assert gone is not None
            volume.cache.l1.drop_many([gone[:32]])
            found = await look(volume, image)
            assert found.exact and found.chunks == 8 and not found.l2_known
            assert found.l1 == [1, 0, 1, 1, 0, 0, 0, 0]
            assert found.dirty == [0, 0, 0, 0, 0, 0, 0, 1]
            assert found.hole == [0, 0, 0, 0, 1, 1, 1, 0]
            assert found.totals()["l1"] == 3 / 8 and found.document()["chunk_size"] == CHUNK
            await volume.close_image(image)

    trio.run(main)


def test_an_image_of_no_bytes_has_no_cells(tmp_path: Path) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path) as volume:
            image = await volume.open_image((await volume.create(ROOT_ID, "a.raw")).node_id)
            found = await look(volume, image)
            assert found.chunks == 0 and found.l1 == [] and found.totals()["l1"] == 0
            await volume.close_image(image)

    trio.run(main)


def test_cells_cover_every_chunk_once_whatever_their_number(tmp_path: Path) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path, chunk_size=4096) as volume:
            for chunks in (1, 2, 239, 240, 241, 1000, LOOKS_MAX, LOOKS_MAX + 1, 16_411):
                image = await volume.open_image((await volume.create(ROOT_ID, f"{chunks}.raw")).node_id)
                await image.resize(chunks * 4096)
                for index in (0, chunks // 2, chunks - 1):
                    await image.write(index * 4096, b"x")
                found = await look(volume, image)
                cells = len(found.dirty)
                assert cells == min(chunks, CELLS_MAX)
                sizes = [(cell + 1) * chunks // cells - cell * chunks // cells for cell in range(cells)]
                assert round(sum(share * size for share, size in zip(found.dirty, sizes, strict=True))) == len({0, chunks // 2, chunks - 1})
                await image.commit()
                await volume.close_image(image)

    trio.run(main)


def test_a_look_at_a_huge_image_is_bounded_and_finds_what_was_read(tmp_path: Path) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path) as volume:
            image = await volume.open_image((await volume.create(ROOT_ID, "a.raw")).node_id)
            await image.resize(1 << 40)
            start = 1 << 39
            await image.write(start, os.urandom(256 * CHUNK))
            await image.commit()
            await image.read(start, 1 << 20)
            looked = 0
            contains, entry_nowait = volume.cache.l1.contains, image.entry_nowait

            def counted(index: int) -> bytes | None:
                nonlocal looked
                looked += 1
                return entry_nowait(index)

            image.entry_nowait = counted  # type: ignore[method-assign]
            found = await look(volume, image)
            assert looked <= LOOKS_MAX and not found.exact and len(found.l1) == CELLS_MAX
            assert contains is not None
            full = [cell for cell, share in enumerate(found.l1) if share > 0]
            assert full == [CELLS_MAX // 2]
            assert found.l1[full[0]] <= 256 / (found.chunks // CELLS_MAX) * 1.01
            await volume.close_image(image)

    trio.run(main)


def test_others_have_their_turn_during_a_look(tmp_path: Path) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path, chunk_size=4096) as volume:
            image = await volume.open_image((await volume.create(ROOT_ID, "a.raw")).node_id)
            await image.write(0, os.urandom(4000 * 4096))
            await image.commit()
            turns = 0

            async def other() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await trio.lowlevel.checkpoint()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(other)
                await look(volume, image)
                nursery.cancel_scope.cancel()
            assert turns >= 4000 // module.SLICE - 1, "one for each slice but the last"
            await volume.close_image(image)

    trio.run(main)


def test_l2_is_asked_in_one_bounded_batch_and_may_not_answer(tmp_path: Path) -> None:
    class Slow:
        up = True
        asked = 0

        def contains_many(self, chunk_ids: list[bytes]) -> set[bytes]:
            self.asked += len(chunk_ids)
            return set(chunk_ids)

    async def main() -> None:
        async with fresh_volume(tmp_path, chunk_size=4096) as volume:
            image = await volume.open_image((await volume.create(ROOT_ID, "a.raw")).node_id)
            await image.write(0, os.urandom(4000 * 4096))
            await image.commit()
            volume.cache.l1.clear()
            tier = Slow()
            volume.cache.l2 = tier  # type: ignore[assignment]
            found = await look(volume, image)
            assert found.l2_known and 0 < tier.asked <= module.L2_LOOKS_MAX
            assert found.totals()["l2"] > 0.9
            tier.up = False
            assert not (await look(volume, image)).l2_known
            volume.cache.l2 = None
            await volume.close_image(image)

    trio.run(main)


def test_shares_of_a_cell_add_up(tmp_path: Path) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path, chunk_size=4096) as volume:
            image = await volume.open_image((await volume.create(ROOT_ID, "a.raw")).node_id)
            for index in range(0, 3000, 3):
                await image.write(index * 4096, os.urandom(4096))
            await image.commit()
            await image.write(100 * 4096, os.urandom(50 * 4096))
            found = await look(volume, image)
            for cell in range(len(found.l1)):
                assert abs(sum(getattr(found, state)[cell] for state in STATES) - 1) < 1e-9
            await image.commit()
            await volume.close_image(image)

    trio.run(main)
