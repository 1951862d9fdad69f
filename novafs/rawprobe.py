"""What the first bytes of a raw source tell: that it is something else, or that its end is missing.

Any bytes are a raw image, so nothing here is proof; it finds the two mistakes that people make: importing a file that is
still compressed (or of another format, through a pipe), and importing one whose copy broke off. The caller lets a
user overrule it with `--format raw`.

Sources: MBR and GPT: UEFI specification 2.10, 5.2 and 5.3; ext4: Documentation/filesystems/ext4/super.rst of Linux.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

HEAD_BYTES: Final = 64 << 10
"""How much of the beginning `foreign_format` and `claimed_size` want to see; less is fine."""

_FOREIGN: Final = (
    (0, b"QFI\xfb", "a qcow2 image", ""),
    (0, b"KDMV", "a VMDK image", ""),
    (0, b"COWD", "a VMDK image", ""),
    (0, b"# Disk DescriptorFile", "a VMDK descriptor", ""),
    (64, b"\x7f\x10\xda\xbe", "a VDI image", ""),
    (0, b"vhdxfile", "a VHDX image", ""),
    (0, b"conectix", "a VHD image", ""),
    (0, b"\x1f\x8b\x08", "compressed with gzip", "gzip -dc"),
    (0, b"\xfd7zXZ\x00", "compressed with xz", "xz -dc"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", "zstd -dc"),
    (0, b"BZh", "compressed with bzip2", "bzip2 -dc"),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4", "lz4 -dc"),
    (0, b"PK\x03\x04", "a zip archive", "unzip -p"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x -so"),
    (257, b"ustar", "a tar archive", "tar -xOf"),
)


class Foreign(NamedTuple):
    """what: for a message, after "is". unpack: the command that gives its content, "" where it is an image format."""

    what: str
    unpack: str


def foreign_format(head: bytes) -> Foreign | None:
    """The format that `head`, the beginning of something taken for raw, has the mark of; None for none."""
    for at, magic, what, unpack in _FOREIGN:
        if head[at : at + len(magic)] == magic:
            return Foreign(what, unpack)
    return None


class Claim(NamedTuple):
    """size_bytes: where what `what` describes ends."""

    size_bytes: int
    what: str


def claimed_size(head: bytes) -> Claim | None:
    """How large the disk must be by its partition table or file system; None where there is none that is known."""
    return _gpt(head) or _mbr(head) or _ext(head)


def _gpt(head: bytes) -> Claim | None:
    for sector in (512, 4096):
        header = head[sector : sector + 92]
        if len(header) == 92 and header[:8] == b"EFI PART":
            (backup_lba,) = struct.unpack_from("<Q", header, 32)
            return Claim((backup_lba + 1) * sector, "partition table (GPT, with a copy at the end)")
    return None


def _mbr(head: bytes) -> Claim | None:
    if len(head) < 512 or head[510:512] != b"\x55\xaa":
        return None
    entries = [struct.unpack_from("<B3sB3sII", head, 446 + 16 * number) for number in range(4)]
    # The boot sector of a FAT or NTFS file system ends with the same two bytes, but has no such status bytes there.
    if any(status not in (0x00, 0x80) for status, *_ in entries):
        return None
    ends = [start + count for _, _, kind, _, start, count in entries if kind not in (0x00, 0xEE) and start and count]
    return Claim(max(ends) * 512, "partition table (MBR)") if ends else None


def _ext(head: bytes) -> Claim | None:
    block = head[1024:2048]
    if len(block) < 1024 or block[56:58] != b"\x53\xef":
        return None
    (blocks_low,) = struct.unpack_from("<I", block, 4)
    (log_block_size,) = struct.unpack_from("<I", block, 24)
    (incompatible,) = struct.unpack_from("<I", block, 96)
    blocks_high = struct.unpack_from("<I", block, 0x150)[0] if incompatible & 0x80 else 0
    if log_block_size > 6:
        return None
    return Claim(((blocks_high << 32) | blocks_low) << (10 + log_block_size), "ext file system")
