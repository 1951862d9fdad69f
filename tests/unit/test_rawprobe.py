"""What the first bytes of a raw source tell."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from novafs.rawprobe import Claim, claimed_size, foreign_format


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"QFI\xfb\0\0\0\3", "qcow2"),
        (b"KDMV\1\0\0\0", "VMDK"),
        (b"# Disk DescriptorFile\nversion=1\n", "VMDK descriptor"),
        (bytes(64) + b"\x7f\x10\xda\xbe", "VDI"),
        (b"vhdxfile", "VHDX"),
        (b"conectix", "VHD"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"BZh9", "bzip2"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (b"PK\3\4", "zip"),
        (b"7z\xbc\xaf\x27\x1c", "7z"),
        (b"disk.raw".ljust(257, b"\0") + b"ustar\0", "tar"),
    ],
)
def test_other_formats_are_known_by_their_marks(head: bytes, what: str) -> None:
    found = foreign_format(head)
    assert found is not None
    assert what in found.what


@pytest.mark.parametrize("head", [b"", bytes(4096), b"\x7fELF", b"QF", b"plain text"])
def test_a_raw_image_has_no_mark(head: bytes) -> None:
    assert foreign_format(head) is None


def mbr(*partitions: tuple[int, int, int, int]) -> bytes:
    """A boot sector; partitions: status, type, first sector, sectors."""

    def entries() -> Iterator[bytes]:
        for number in range(4):
            status, kind, start, count = partitions[number] if number < len(partitions) else (0, 0, 0, 0)
            yield struct.pack("<B3sB3sII", status, b"", kind, b"", start, count)

    return bytes(446) + b"".join(entries()) + b"\x55\xaa"


def test_a_partition_table_says_where_the_last_partition_ends() -> None:
    assert claimed_size(mbr((0x80, 0x83, 2048, 10000), (0, 0x82, 20000, 48))) == Claim(20048 * 512, "partition table (MBR)")


def test_a_boot_sector_without_partitions_says_nothing() -> None:
    assert claimed_size(mbr()) is None
    assert claimed_size(mbr((0, 0xEE, 1, 0xFFFFFFFF))) is None, "the protective entry of a GPT covers any size"
    assert claimed_size(mbr((0x4E, 0x54, 0x4C445220, 0x7373696D))) is None, "text of a boot sector that is no partition table"
    assert claimed_size(b"") is None
    assert claimed_size(bytes(65536)) is None


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_gpt_says_where_its_copy_at_the_end_lies(sector: int) -> None:
    header = b"EFI PART" + struct.pack("<IIIIQQ", 0x10000, 92, 0, 0, 1, 999) + bytes(52)
    head = mbr((0, 0xEE, 1, 999)).ljust(sector, b"\0") + header.ljust(512, b"\0")
    assert claimed_size(head) == Claim(1000 * sector, "partition table (GPT, with a copy at the end)")


def superblock(blocks: int, *, log_block_size: int = 2, wide: bool = False) -> bytes:
    block = bytearray(1024)
    struct.pack_into("<I", block, 4, blocks & 0xFFFFFFFF)
    struct.pack_into("<I", block, 24, log_block_size)
    block[56:58] = b"\x53\xef"
    if wide:
        struct.pack_into("<I", block, 96, 0x80)
        struct.pack_into("<I", block, 0x150, blocks >> 32)
    return bytes(1024) + bytes(block)


def test_an_ext_file_system_says_how_large_it_is() -> None:
    assert claimed_size(superblock(1000)) == Claim(1000 * 4096, "ext file system")
    assert claimed_size(superblock(7, log_block_size=0)) == Claim(7 * 1024, "ext file system")
    assert claimed_size(superblock((1 << 33) + 5, wide=True)) == Claim(((1 << 33) + 5) * 4096, "ext file system")
    assert claimed_size(superblock(1, log_block_size=7)) is None


@given(st.binary(max_size=2048))
def test_no_bytes_make_it_fail(head: bytes) -> None:
    foreign_format(head)
    claim = claimed_size(head)
    assert claim is None or claim.size_bytes >= 0
