"""The library against a dict: whatever is done through one of two caches, both say what the dict says."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from novafs import CacheConfig, HierarchicalCache
from novafs.errors import IsDirectoryError, NotDirectoryError

NAMES = st.sampled_from(["a", "b", "c/d", "c/e", "c/f/g", "h"])
DATA = st.builds(
    lambda start, size: bytes([start]) * size, st.integers(0, 3), st.sampled_from([0, 1, 4096, 65536, 65537, 200_000, 1_200_000])
)
WHICH = st.integers(0, 1)


class LibraryMachine(RuleBasedStateMachine):
    """Two caches of one volume: the rules pick one, and look through the other."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="novafs-library-"))
        self.values: dict[str, bytes] = {}
        self.caches = [self.opened(0), self.opened(1)]

    def opened(self, which: int) -> HierarchicalCache:
        config = CacheConfig(state_dir=self.directory / f"state{which}", fresh_s=0.0, l1_capacity="32MiB", chunk_size=65536)
        return HierarchicalCache(self.directory / "volume", config)

    @rule(which=WHICH, key=NAMES, data=DATA)
    def set(self, which: int, key: str, data: bytes) -> None:
        self.caches[which].set(key, data)
        self.values[key] = data
        assert self.caches[1 - which].get(key) == data

    @rule(which=WHICH, values=st.dictionaries(NAMES, DATA, max_size=4))
    def set_multi(self, which: int, values: dict[str, bytes]) -> None:
        self.caches[which].set_multi(values)
        self.values |= values

    @rule(which=WHICH, key=NAMES, data=DATA)
    def write(self, which: int, key: str, data: bytes) -> None:
        with self.caches[which].open(key, "wb") as file:
            for start in range(0, len(data), 70_000):
                file.write(data[start : start + 70_000])
        self.values[key] = data

    @rule(which=WHICH, key=NAMES)
    def delete(self, which: int, key: str) -> None:
        assert self.caches[which].delete(key) == (key in self.values)
        self.values.pop(key, None)

    @rule(which=WHICH, key=NAMES)
    def read(self, which: int, key: str) -> None:
        if key in self.values:
            with self.caches[which].open(key) as file:
                assert file.read() == self.values[key]
        assert self.caches[which].size(key) == (len(self.values[key]) if key in self.values else None)

    @rule(which=WHICH)
    def get_multi(self, which: int) -> None:
        assert self.caches[which].get_multi([*self.values, "nothing"]) == self.values

    @rule(which=WHICH)
    def a_directory_is_no_value(self, which: int) -> None:
        if any(key.startswith("c/") for key in self.values):
            with pytest.raises(IsDirectoryError):
                self.caches[which].set("c", b"")
        if "a" in self.values:
            with pytest.raises(NotDirectoryError):
                self.caches[which].set_multi({"new": b"", "a/x": b""})

    @rule(which=WHICH)
    def forget_what_is_cached(self, which: int) -> None:
        self.caches[which].drop_cached()

    @rule(which=WHICH)
    def clear(self, which: int) -> None:
        assert self.caches[which].clear() == len(self.values)
        self.values.clear()

    @rule(which=WHICH)
    def reopen(self, which: int) -> None:
        self.caches[which].close()
        self.caches[which] = self.opened(which)

    @invariant()
    def both_have_the_keys(self) -> None:
        for cache in self.caches:
            assert cache.keys() == sorted(self.values)

    def teardown(self) -> None:
        for cache in self.caches:
            cache.close()
        shutil.rmtree(self.directory)


TestLibrary = LibraryMachine.TestCase
TestLibrary.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)
