"""The catalog against nested dicts: two hosts create, rename and remove in one volume, in any order (Hypothesis)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import msgspec
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from novafs.catalogtree import ROOT_ID, Kind
from novafs.errors import (
    ExistsError,
    InvalidNameError,
    IsDirectoryError,
    NotDirectoryError,
    NotEmptyError,
    NotFoundError,
    UserError,
)
from novafs.volume import Volume
from tests.support.engine import make_volume, opened
from tests.support.portal import Portal

NAMES = st.sampled_from(["a", "b", "c", "ü", "a.raw"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(tuple)
HOSTS = st.integers(0, 1)
Path_ = tuple[str, ...]


class Model:
    """path -> "dir" or a node's bytes; the root is ()."""

    def __init__(self) -> None:
        self.nodes: dict[Path_, bytes | str] = {(): "dir"}

    def parent_error(self, path: Path_) -> type[UserError] | None:
        for depth in range(len(path)):
            found = self.nodes.get(path[:depth])
            if found is None:
                return NotFoundError
            if found != "dir":
                return NotDirectoryError
        return None

    def below(self, path: Path_) -> list[Path_]:
        return [p for p in self.nodes if len(p) > len(path) and p[: len(path)] == path]


class CatalogMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.portal = Portal()
        self.model = Model()
        self.volumes: list[Volume] = []

    @initialize()
    def open(self) -> None:
        url = f"file://{self.directory / 'store'}"
        self.portal.run(make_volume, url)
        for host in range(2):
            state = self.directory / f"state{host}"
            self.volumes.append(self.portal.enter(lambda state=state: opened(url, state)))  # type: ignore[misc]

    def attempt(self, host: int, expected: type[UserError] | None, work: str, *arguments: object) -> bytes | None:
        """Run `work` on one host; it must end as the model says."""
        volume = self.volumes[host]

        async def go() -> bytes | None:
            await volume.catalog.refresh()
            result = await getattr(self, f"_{work}")(volume, *arguments)
            return result if isinstance(result, bytes) else None

        try:
            result = self.portal.run(go)
        except UserError as error:
            assert expected is not None, error
            assert type(error) is expected, (error, expected)
            return None
        assert expected is None, f"{work} {arguments} succeeded, expected {expected}"
        return result

    @staticmethod
    async def _parent(volume: Volume, path: Path_) -> bytes:
        entry = await volume.catalog.resolve("/".join(path[:-1]))
        if entry.kind is not Kind.DIRECTORY:
            raise NotDirectoryError("model")
        return entry.node_id

    async def _create(self, volume: Volume, path: Path_) -> bytes:
        return (await volume.create(await self._parent(volume, path), path[-1])).node_id

    async def _mkdir(self, volume: Volume, path: Path_) -> None:
        await volume.mkdir(await self._parent(volume, path), path[-1])

    async def _remove(self, volume: Volume, path: Path_, directory: bool) -> None:
        parent = await self._parent(volume, path)
        await (volume.rmdir(parent, path[-1]) if directory else volume.unlink(parent, path[-1]))

    async def _rename(self, volume: Volume, path: Path_, new: Path_, replace: bool) -> None:
        parent = await self._parent(volume, path)
        await volume.rename(parent, path[-1], await self._parent(volume, new), new[-1], replace=replace)

    @rule(host=HOSTS, path=PATHS, directory=st.booleans())
    def make(self, host: int, path: Path_, directory: bool) -> None:
        expected = self.model.parent_error(path) or (ExistsError if path in self.model.nodes else None)
        made = self.attempt(host, expected, "mkdir" if directory else "create", path)
        if expected is None:
            self.model.nodes[path] = "dir" if directory else made or b""

    @rule(host=HOSTS, path=PATHS, directory=st.booleans())
    def remove(self, host: int, path: Path_, directory: bool) -> None:
        found = self.model.nodes.get(path)
        expected = self.model.parent_error(path)
        if expected is None:
            if found is None:
                expected = NotFoundError
            elif directory and found != "dir":
                expected = NotDirectoryError
            elif not directory and found == "dir":
                expected = IsDirectoryError
            elif directory and self.model.below(path):
                expected = NotEmptyError
        self.attempt(host, expected, "remove", path, directory)
        if expected is None:
            del self.model.nodes[path]

    @rule(host=HOSTS, path=PATHS, new=PATHS, replace=st.booleans())
    def rename(self, host: int, path: Path_, new: Path_, replace: bool) -> None:
        nodes = self.model.nodes
        source, target = nodes.get(path), nodes.get(new)
        expected = self.model.parent_error(path) or self.model.parent_error(new)
        if expected is None:
            if source is None:
                expected = NotFoundError
            elif target is not None and not replace:
                expected = ExistsError
            elif path == new:
                expected = None
            elif target == "dir" and source != "dir":
                expected = IsDirectoryError
            elif target == "dir" and self.model.below(new):
                expected = NotEmptyError
            elif target is not None and target != "dir" and source == "dir":
                expected = NotDirectoryError
            elif source == "dir" and new[: len(path)] == path:
                expected = InvalidNameError
        self.attempt(host, expected, "rename", path, new, replace)
        if expected is None and path != new and source is not None:
            moved = {new + p[len(path) :]: nodes.pop(p) for p in self.model.below(path)}
            del nodes[path]
            nodes.pop(new, None)
            nodes[new] = source
            nodes.update(moved)

    @rule(host=HOSTS, path=PATHS, mode=st.integers(0, 0o777))
    def chmod(self, host: int, path: Path_, mode: int) -> None:
        if path in self.model.nodes:

            async def change() -> None:
                volume = self.volumes[host]
                entry = await volume.catalog.resolve("/".join(path), max_age_s=0)
                assert (await volume.set_attributes(entry.node_id, mode=mode)).mode == mode

            self.portal.run(change)

    @invariant()
    def both_hosts_see_the_model(self) -> None:
        async def tree(volume: Volume) -> dict[Path_, bytes | str]:
            await volume.catalog.refresh()
            found: dict[Path_, bytes | str] = {(): "dir"}

            async def walk(node_id: bytes, path: Path_) -> None:
                for entry in await volume.catalog.list(node_id):
                    below = (*path, entry.name)
                    directory = entry.kind is Kind.DIRECTORY
                    found[below] = "dir" if directory else entry.node_id
                    assert volume.catalog.path_of(entry) == "/".join(below)
                    assert await volume.catalog.get(entry.node_id) == entry
                    if directory:
                        await walk(entry.node_id, below)

            await walk(ROOT_ID, ())
            return found

        for volume in self.volumes:
            assert self.portal.run(tree, volume) == self.model.nodes

    def teardown(self) -> None:
        self.portal.close()
        shutil.rmtree(self.directory)


TestCatalogMachine = CatalogMachine.TestCase
TestCatalogMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_a_large_directory_is_stored_as_pages_and_a_change_writes_few_of_them(tmp_path: Path) -> None:
    portal = Portal()
    url = f"file://{tmp_path / 'store'}"
    portal.run(make_volume, url)
    volume = portal.enter(lambda: opened(url, tmp_path / "a"))

    async def fill() -> None:
        template = await volume.create(ROOT_ID, "first")

        async def many(changes: object) -> None:
            await changes.entries(ROOT_ID)  # type: ignore[attr-defined]
            for number in range(3000):
                changes.set(msgspec.structs.replace(template, name=f"vm-{number:05}", node_id=(number + 1).to_bytes(16, "big")))  # type: ignore[attr-defined]

        await volume.catalog.change(many)

    async def one_more() -> tuple[int, int]:
        before = volume.client.statistics().by_operation["create"].written_bytes
        await volume.create(ROOT_ID, "vm-01500x")
        return before, volume.client.statistics().by_operation["create"].written_bytes

    portal.run(fill)
    assert volume.catalog.root.content.index
    before, after = portal.run(one_more)
    assert after - before < 60_000  # a page, the index, the catalog; the whole would be ten times that
    other = portal.enter(lambda: opened(url, tmp_path / "b"))
    names = [e.name for e in portal.run(other.catalog.list, ROOT_ID)]
    assert len(names) == 3002
    assert names == sorted(names)
    portal.close()
