"""Disk images through qemu-img: what a source is, and that a source with a part missing never passes for a whole one."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from novafs.diskimage import DiskImage, convert_to_raw, probe, scratch_file
from novafs.errors import NovaError, SourceError, StoreFullError, UnsupportedError

pytestmark = pytest.mark.qemu

Run = Callable[..., Any]
SIZE = 8 << 20
FORMATS = {
    "qcow2": ("-O", "qcow2"),
    "qcow2-compressed": ("-c", "-O", "qcow2"),
    "vmdk": ("-O", "vmdk"),
    "vmdk-stream": ("-O", "vmdk", "-o", "subformat=streamOptimized"),
    "vmdk-flat": ("-O", "vmdk", "-o", "subformat=monolithicFlat"),
    "vmdk-split": ("-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"),
    "vdi": ("-O", "vdi"),
    "vhdx": ("-O", "vhdx"),
    "vhd": ("-O", "vpc", "-o", "force_size=on"),
}


def qemu_img(*arguments: object) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk: random bytes, text that compresses, holes, and data up to its very end."""
    draw = random.Random(3)
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.seek(65536)
        file.write(draw.randbytes(700_000))
        file.seek(3 << 20)
        file.write(b"the same line again and again\n" * 30_000)
        file.seek(SIZE - 300_000)
        file.write(draw.randbytes(300_000))
    return path


@pytest.fixture(scope="module")
def images(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The disk in every format, each in a directory of its own (some are several files)."""
    made = {}
    for name, options in FORMATS.items():
        made[name] = tmp_path_factory.mktemp(name) / "disk.img"
        qemu_img("convert", *options, disk, made[name])
    return made


def unpacked(run: Run, image: DiskImage, directory: Path) -> bytes:
    fd = scratch_file(directory, image.size_bytes)
    try:
        done: list[int] = []
        run(lambda: convert_to_raw(image, fd, done.append))
        assert done == sorted(done)
        return os.pread(fd, image.size_bytes + 1, 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_recognised_and_unpacks_to_the_same_disk(
    run: Run, images: dict[str, Path], disk: Path, tmp_path: Path, name: str
) -> None:
    image = probe(str(images[name]))
    assert image.format == name.partition("-")[0].replace("vhd", "vpc", 1).replace("vpcx", "vhdx")
    assert image.size_bytes == SIZE
    assert unpacked(run, image, tmp_path) == disk.read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_what_is_unpacked_keeps_its_holes(run: Run, images: dict[str, Path], tmp_path: Path) -> None:
    image = probe(str(images["qcow2"]))
    fd = scratch_file(tmp_path, image.size_bytes)
    run(lambda: convert_to_raw(image, fd, lambda _: None))
    assert os.fstat(fd).st_blocks * 512 < SIZE // 2
    os.close(fd)


@pytest.mark.parametrize("missing", [1, 100, 512, 4096, 70_000, 500_000, 1_500_000])
@pytest.mark.parametrize("name", FORMATS)
def test_an_image_that_is_cut_short_is_refused_or_has_lost_nothing(
    run: Run, images: dict[str, Path], disk: Path, tmp_path: Path, name: str, missing: int
) -> None:
    shutil.copytree(images[name].parent, tmp_path / "cut")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    # The largest file is the one with the data.
    victim = max((tmp_path / "cut").iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(victim, max(0, victim.stat().st_size - missing))
    try:
        content = unpacked(run, probe(str(tmp_path / "cut" / "disk.img")), scratch)
    except SourceError as error:
        assert "disk.img" in str(error)
        return
    assert content == disk.read_bytes(), "bytes were lost, and nobody said so"


def test_a_vmdk_whose_extent_is_missing_is_refused(images: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(images["vmdk-flat"], tmp_path / "disk.vmdk")
    with pytest.raises(SourceError, match=r"disk.vmdk is no readable disk image: .*flat.*No such file or directory"):
        probe(str(tmp_path / "disk.vmdk"))


def test_a_backing_file_is_read_only_when_the_source_is_trusted(run: Run, images: dict[str, Path], disk: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", images["qcow2"], "-F", "qcow2", overlay)
    with pytest.raises(
        SourceError, match=r"has a backing file, .*disk.img, which would be read as well: add --follow if you trust the source"
    ):
        probe(str(overlay))
    assert unpacked(run, probe(str(overlay), follow=True), tmp_path) == disk.read_bytes()


def test_a_backing_file_that_is_cut_short_or_missing_is_refused(images: dict[str, Path], tmp_path: Path) -> None:
    overlay, behind = tmp_path / "overlay.qcow2", tmp_path / "behind.qcow2"
    shutil.copy(images["qcow2"], behind)
    qemu_img("create", "-f", "qcow2", "-b", behind, "-F", "qcow2", overlay)
    os.truncate(behind, behind.stat().st_size - 4096)
    with pytest.raises(SourceError, match=r"overlay.qcow2: its backing file .*behind.qcow2 is cut short"):
        probe(str(overlay), follow=True)
    behind.unlink()
    with pytest.raises(SourceError, match=r"overlay.qcow2 is .*No such file"):
        probe(str(overlay), follow=True)


def test_an_external_data_file_is_read_only_when_the_source_is_trusted(tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path}/data.raw", tmp_path / "a.qcow2", "1M")
    with pytest.raises(SourceError, match=r"has a data file, .*data\.raw, which would be read as well"):
        probe(str(tmp_path / "a.qcow2"))
    assert probe(str(tmp_path / "a.qcow2"), follow=True).size_bytes == 1 << 20


@pytest.mark.parametrize("elsewhere", ["/etc/hostname", "../outside.raw", "link.raw"])
def test_an_extent_outside_the_directory_is_read_only_when_the_source_is_trusted(tmp_path: Path, elsewhere: str) -> None:
    directory = tmp_path / "images"
    directory.mkdir()
    (tmp_path / "outside.raw").write_bytes(bytes(512))
    (directory / "link.raw").symlink_to("../outside.raw")
    descriptor = f'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\nRW 1 FLAT "{elsewhere}" 0\n'
    (directory / "evil.vmdk").write_text(descriptor)
    with pytest.raises(SourceError, match=r"has an extent outside its directory|is no readable disk image"):
        probe(str(directory / "evil.vmdk"))


# --- raw ----------------------------------------------------------------------------------------------------------


def test_a_raw_file_is_taken_as_it_is(disk: Path) -> None:
    assert probe(str(disk)) == DiskImage(disk, "raw", SIZE)


def refusal(path: Path, **kwargs: Any) -> str:
    with pytest.raises(SourceError) as caught:
        probe(str(path), **kwargs)
    return str(caught.value)


def test_a_source_that_is_missing_or_no_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.raw") == f"{tmp_path}/none.raw: no such file"
    assert "is a directory: expected a disk image" in refusal(tmp_path)
    assert refusal(Path("/dev/null")) == "/dev/null is neither a file nor a block device"
    (tmp_path / "empty").touch()
    assert "is empty: expected a disk image" in refusal(tmp_path / "empty")
    assert "Not a directory" in refusal(tmp_path / "empty" / "x")


def test_a_file_that_is_no_disk_is_refused_and_taken_when_it_is_meant(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a disk\n")
    assert refusal(path) == (
        f"{path} is no disk image: its size of 11 bytes is no multiple of 512; add --format raw to import these very bytes"
    )
    assert probe(str(path), format="raw").size_bytes == 11


def test_a_compressed_file_is_refused_with_the_way_to_unpack_it(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw.gz"
    path.write_bytes(b"\x1f\x8b\x08".ljust(1024, b"\0"))
    assert "is compressed with gzip, not a raw image: unpack it first (gzip -dc … | novafs import VOLUME - IMAGE)" in refusal(path)
    assert probe(str(path), format="raw").size_bytes == 1024


def test_a_raw_disk_that_ends_before_its_partitions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    head = bytearray(512)
    head[446:462] = bytes.fromhex("80000000830000000008000000100000")  # 2 MiB from sector 2048
    head[510:512] = b"\x55\xaa"
    path.write_bytes(bytes(head).ljust(2 << 20, b"\0"))
    assert "is cut short: it has 2097152 bytes, and its partition table (MBR) needs 3145728; copy it again" in refusal(path)
    os.truncate(path, 3 << 20)
    assert probe(str(path)).size_bytes == 3 << 20


def test_a_format_that_it_is_not_is_refused(disk: Path) -> None:
    assert "is no readable disk image: Image is not in qcow2 format" in refusal(disk, format="qcow2")
    assert "is no readable disk image" in refusal(disk, format="nonsense")


def test_an_image_that_another_process_writes_is_refused(images: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "busy.qcow2"
    shutil.copy(images["qcow2"], path)
    with subprocess.Popen(["qemu-io", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write("write 0 4096\n")
        writer.stdin.flush()
        while "ops;" not in writer.stdout.readline():
            pass
        assert "Is another process using the image" in refusal(path)
        writer.stdin.close()


def test_qemu_img_that_is_missing_is_a_clear_error(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UnsupportedError, match="qemu-img is not installed: install the package qemu-utils"):
        probe(str(disk))
    assert probe(str(disk), format="raw").size_bytes == SIZE


def test_no_room_for_what_is_unpacked_is_a_clear_error(run: Run, images: dict[str, Path], tmp_path: Path) -> None:
    image = probe(str(images["qcow2"]))
    fd = os.open("/dev/full", os.O_RDWR)
    try:
        with pytest.raises(NovaError) as caught:
            run(lambda: convert_to_raw(image, fd, lambda _: None))
    finally:
        os.close(fd)
    assert isinstance(caught.value, (StoreFullError, SourceError))
