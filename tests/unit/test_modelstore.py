"""What prefetch and eviction have learned, at the end of a volume and beside newer versions."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from novafs import modelstore
from novafs import volume as module
from novafs.errors import NewerFormatError
from novafs.eviction.state import KIND, VERSION, ForestRecord
from novafs.prefetch.markov import TransitionTable
from novafs.record import seal
from novafs.volume import Volume
from tests.support.engine import make_volume, opened


def test_a_slow_save_of_models_is_no_failed_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSE_TIMEOUT_S", 1.0)  # as if the commits had taken all but a second of it
    monkeypatch.setattr(module, "MODELS_TIMEOUT_S", 2.0)

    async def slow(_self: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(modelstore.ModelStore, "save", slow)

    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "state", prefetch=True):
            pass

    trio.run(main)


def test_an_eviction_model_of_a_newer_version_is_left_alone() -> None:
    record = ForestRecord(1, 1, 0.0, b"", b"", b"", b"", b"")
    with pytest.raises(NewerFormatError):
        modelstore.merge_saved(modelstore.EVICTION, seal(KIND, VERSION, record), seal(KIND, VERSION + 1, record))


def test_a_host_alone_joins_nothing_and_what_another_has_saved_is_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = []
    merge = modelstore.merge_saved

    def counted(name: str, mine: bytes, theirs: bytes) -> bytes:
        merged.append(name)
        return merge(name, mine, theirs)

    monkeypatch.setattr(modelstore, "merge_saved", counted)

    async def learn(volume: Volume, first: int) -> None:
        """Reads of images that teach something, and a save."""
        assert volume.prefetcher is not None and volume.models is not None
        engine = volume.prefetcher.engine
        for number in range(200):
            key = first + number % 20
            engine.table.learn(key - 1, key, key + 1, number)
        volume.models._seen = -1000
        await volume.models.save()

    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "one", prefetch=True) as one:
            for number in range(3):
                await learn(one, 100 * number + 1)
            assert one.models is not None and one.models.saves == 3
            assert not merged
            async with opened(url, tmp_path / "other", prefetch=True) as other:
                await learn(other, 1001)
                assert not merged  # it has read at its start all that there is
                await learn(one, 2001)
                assert "transitions" in merged
            saved = await modelstore.load_saved(one.client, "transitions")
            assert saved is not None
            known = TransitionTable.from_bytes(saved, "models/transitions", chunk_size=one.chunk_size).contents()
            assert {1, 101, 201, 1001, 2001} <= known

    trio.run(main)
