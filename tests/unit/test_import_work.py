"""What an import takes, counted: requests before and beside its content, calls into the codec, and modules that a command imports."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path

import botocore.session
import pytest
import trio
import trio.testing
from click.testing import CliRunner

from novafs import cli, codec
from novafs.bulk import BATCH_BYTES, import_stream
from novafs.cache.base import Frame
from novafs.catalogtree import ROOT_ID
from novafs.codec import Codec, encode, encode_many
from novafs.errors import SourceError
from novafs.objectstore.s3models import read_quickly
from novafs.volume import Volume
from tests.support.engine import fresh_volume, opened

CHUNK = 64 << 10
CONTENTS = [bytes(CHUNK), os.urandom(CHUNK), b"abcdefgh" * 8192, os.urandom(CHUNK // 2) + bytes(CHUNK // 2), b"x", b""]


@pytest.mark.parametrize("kind", [Codec.NONE, Codec.GZIP, Codec.LZ4, Codec.SNAPPY, Codec.ZSTD])
@pytest.mark.parametrize("empty", [False, True])
def test_many_contents_become_the_frames_that_each_alone_becomes(kind: Codec, empty: bool) -> None:
    contents = CONTENTS if empty else CONTENTS[:-1]
    expected = [encode(content, kind) for content in contents]
    assert encode_many(contents, kind) == expected
    read = [bytearray(content) for content in contents]
    views = encode_many([memoryview(content) for content in read], kind)
    for content in read:
        content[:] = bytes(len(content))  # what was read into is used again
    assert views == expected
    assert all(type(frame.payload) is bytes for frame in views)
    for several in range(len(contents)):
        assert encode_many(contents[:several], kind) == expected[:several]


def requests(volume: Volume) -> dict[str, int]:
    return {name: operation.requests for name, operation in volume.client.statistics().by_operation.items()}


def test_an_import_of_one_pack_reads_before_it_asks_the_store_and_asks_six_or_seven_times(tmp_path: Path) -> None:
    content = os.urandom(3 * CHUNK)
    before: list[dict[str, int]] = []

    async def main() -> None:
        async with fresh_volume(tmp_path) as volume:
            begin = requests(volume)

            async def source() -> AsyncIterator[tuple[int, bytes]]:
                before.append(requests(volume))
                yield 0, content

            await import_stream(volume, ROOT_ID, "disk.raw", source(), size=len(content))
            assert before == [begin]
            after = requests(volume)
            made = {name: count - begin.get(name, 0) for name, count in after.items() if count != begin.get(name, 0)}
            # Listed: packs, what is condemned, the catalog; that once more where the pack took more than a second.
            # Created: the pack, the image, its name.
            assert made in ({"list": 3, "create": 3}, {"list": 4, "create": 3})

    trio.run(main)


def test_an_import_compresses_four_mebibytes_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    every = codec.encode_many

    def counted(plains: Sequence[bytes | memoryview], kind: Codec, level: int | None = None) -> list[Frame]:
        sizes.append(len(plains))
        return every(plains, kind, level)

    monkeypatch.setattr(codec, "encode_many", counted)
    content = os.urandom(192 * CHUNK)

    async def main() -> None:
        async with fresh_volume(tmp_path) as volume:

            async def source() -> AsyncIterator[tuple[int, bytes]]:
                for at in range(0, len(content), 1 << 20):
                    yield at, content[at : at + (1 << 20)]

            await import_stream(volume, ROOT_ID, "disk.raw", source(), size=len(content))
            image = await volume.open_image((await volume.catalog.resolve("disk.raw")).node_id)
            assert await image.read(0, len(content)) == content
            await volume.close_image(image)

    trio.run(main)
    assert sorted(sizes) == [64, 64, 64]


def test_an_import_reads_no_further_ahead_than_its_processors_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many workers were asked for: each batch takes twice its bytes."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    piece = os.urandom(BATCH_BYTES)
    taken = 0

    async def source() -> AsyncIterator[tuple[int, bytes]]:
        nonlocal taken
        for number in range(20):
            taken += 1
            yield number * BATCH_BYTES, piece

    async def main() -> None:
        async with fresh_volume(tmp_path) as volume:
            known, fill = trio.Event(), volume.dedup.fill

            async def held() -> None:
                await known.wait()
                await fill()

            monkeypatch.setattr(volume.dedup, "fill", held)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(import_stream, volume, ROOT_ID, "disk.raw", source(), size=20 * BATCH_BYTES, workers=64))
                await trio.testing.wait_all_tasks_blocked()
                while taken < 7:  # what it opens it may read in a thread
                    await trio.testing.wait_all_tasks_blocked()
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert taken == 7  # two processors and one more thread, twice, and the one that is read
                known.set()
            assert taken == 20

    trio.run(main)


def test_what_another_host_has_stored_is_found_however_long_the_look_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(8 * CHUNK)

    async def source() -> AsyncIterator[tuple[int, bytes]]:
        yield 0, content

    async def main() -> None:
        async with fresh_volume(tmp_path) as volume:
            await import_stream(volume, ROOT_ID, "disk.raw", source(), size=len(content))
        async with opened(f"file://{tmp_path / 'store'}", tmp_path / "other") as volume:
            begun, known, fill = trio.Event(), trio.Event(), volume.dedup.fill

            async def held() -> None:
                begun.set()
                await known.wait()
                await fill()

            monkeypatch.setattr(volume.dedup, "fill", held)

            async def ended() -> None:
                await begun.wait()
                await trio.testing.wait_all_tasks_blocked(0.05)
                known.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ended)
                result = await import_stream(volume, ROOT_ID, "again.raw", source(), size=len(content))
            assert (result.new_chunks, result.dedup_chunks) == (0, 8)

    trio.run(main)


@pytest.mark.parametrize("runs", [[(CHUNK, b"x"), (CHUNK, b"y")], [(0, b"x" * CHUNK), (5, b"y")], [(0, b"x"), (4 * CHUNK - 1, b"yz")]])
def test_a_source_that_goes_back_or_beyond_its_size_is_an_error_and_leaves_no_image(tmp_path: Path, runs: list[tuple[int, bytes]]) -> None:
    async def source() -> AsyncIterator[tuple[int, bytes]]:
        for run in runs:
            yield run

    async def main() -> None:
        async with fresh_volume(tmp_path) as volume:
            with pytest.raises(SourceError, match=r"went back|beyond its size"):
                await import_stream(volume, ROOT_ID, "disk.raw", source(), size=4 * CHUNK)
            assert await volume.catalog.list(ROOT_ID) == []

    trio.run(main)


def test_a_command_imports_its_own_module_alone() -> None:
    program = (
        "import sys; from novafs.cli import main; main(['import', '--help']); "
        "print([name for name in sys.modules if name in ('novafs.cli.import_', 'novafs.cli.bench', 'novafs.cli.mount')], file=sys.stderr)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert said.stderr.strip() == "['novafs.cli.import_']"


def test_every_command_is_found_under_its_name_and_listed() -> None:
    said = CliRunner().invoke(cli.group, ["--help"]).output
    for name in cli.COMMANDS:
        assert f"\n  {name} " in said
        found = cli.group.get_command(None, name)  # type: ignore[arg-type]  # not looked at
        assert found is not None
        assert found.name == name


def test_the_sdk_finds_the_same_descriptions_quickly() -> None:
    usual, quick = botocore.session.Session(), botocore.session.Session()
    read_quickly(quick)
    for kind in ("service-2", "endpoint-rule-set-1", "paginators-1"):
        model = quick.get_component("data_loader").load_service_model("s3", kind)
        assert model == usual.get_component("data_loader").load_service_model("s3", kind)
    assert quick.get_component("data_loader").load_data("endpoints") == usual.get_component("data_loader").load_data("endpoints")
    assert set(usual.get_available_services()) <= set(quick.get_available_services())
