"""What prefetch and eviction have learned, at the end of a volume and beside newer versions."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from novafs import modelstore
from novafs import volume as module
from novafs.errors import NewerFormatError
from novafs.eviction.state import KIND, VERSION, ForestRecord
from novafs.record import seal
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
