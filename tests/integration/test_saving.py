"""What deduplication saves, counted in the objects of the store and not in what the program says about itself."""

from __future__ import annotations

import filecmp
import random
import shutil
from pathlib import Path

import pytest

from tests.support.cli import novafs, novafs_json
from tests.support.image_files import ImageFiles

CHUNK = 64 << 10


class VolumeFiles:
    """A volume in a local directory, with the objects in it as files."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "volume"
        self.url = f"file://{self.root}"
        self._options = ("--l2-url", "none", "--state-dir", directory / "state")
        novafs("init", self.url, *self._options)

    def do_import(self, source: Path, image: str, *options: str) -> dict[str, int]:
        result: dict[str, int] = novafs_json("import", self.url, source, image, *options, *self._options)
        return result

    def export(self, image: str, path: Path) -> None:
        novafs("export", self.url, image, path, *self._options)

    def packs(self) -> dict[str, int]:
        """Names and sizes of everything that holds chunks or map nodes."""
        return {str(path): path.stat().st_size for path in (self.root / "packs").rglob("*") if path.is_file()}

    def stored_bytes(self) -> int:
        """Every object of the volume, whatever it is for."""
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())


@pytest.fixture
def volume(tmp_path: Path) -> VolumeFiles:
    return VolumeFiles(tmp_path)


def allocated_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def clone_with_changes(source: Path, target: Path, share: float) -> int:
    """A sparse copy in which `share` of the allocated chunks hold new, incompressible content; returns how many that is."""
    shutil.copyfile(source, target)
    draw = random.Random(5)
    zero = bytes(CHUNK)
    with target.open("r+b") as file:
        size = target.stat().st_size
        used = []
        for offset in range(0, size, CHUNK):
            file.seek(offset)
            if file.read(CHUNK) != zero:
                used.append(offset)
        changed = draw.sample(used, round(len(used) * share))
        for offset in changed:
            file.seek(offset)
            file.write(draw.randbytes(CHUNK))
    return len(changed)


@pytest.mark.parametrize("name", ["again.raw", "first.raw"])
def test_a_second_import_of_the_same_image_stores_no_new_chunk(volume: VolumeFiles, image_files: ImageFiles, name: str) -> None:
    source = image_files.ext4(image_mib=64, content_mib=24)
    first = volume.do_import(source, "first.raw")
    assert first["new_chunks"] > 100
    before = volume.packs()

    again = volume.do_import(source, name, "--replace")

    assert again["new_chunks"] == 0
    assert again["stored_bytes"] == 0
    assert again["dedup_chunks"] == first["new_chunks"] + first["dedup_chunks"]
    assert volume.packs() == before


def test_two_clones_that_differ_in_five_percent_of_their_chunks_take_half_of_their_allocated_bytes(
    volume: VolumeFiles, image_files: ImageFiles, tmp_path: Path
) -> None:
    first = image_files.ext4(image_mib=256, content_mib=64, seed=2)
    second = tmp_path / "clone.raw"
    changed = clone_with_changes(first, second, 0.05)
    assert changed > 20

    volume.do_import(first, "first.raw")
    cloned = volume.do_import(second, "second.raw")

    assert cloned["new_chunks"] == changed
    allocated = allocated_bytes(first) * 2  # the copy may have lost holes, and must not look better for it
    saved = 1 - volume.stored_bytes() / allocated
    assert saved >= 0.5, f"{volume.stored_bytes():,} bytes stored for {allocated:,} allocated: {saved:.1%} saved"
    for image, source in (("first.raw", first), ("second.raw", second)):
        exported = tmp_path / f"exported-{image}"
        volume.export(image, exported)
        assert filecmp.cmp(exported, source, shallow=False)
