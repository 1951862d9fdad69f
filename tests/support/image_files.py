"""Small disk images with a real file system in them, built with `mke2fs -d` from made-up files."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

WORDS = ("kernel", "module", "driver", "socket", "thread", "buffer", "signal", "kmalloc", "return", "static", "struct", "const", "void")


def make_tree(directory: Path, *, size_bytes: int, seed: int) -> None:
    """Files below `directory`, about `size_bytes` in sum: half of it text that compresses, half of it noise."""
    draw = random.Random(seed)
    written = number = 0
    while written < size_bytes:
        length = min(draw.choice((700, 5_000, 40_000, 300_000)), size_bytes - written)
        folder = directory / f"dir{number % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        content = draw.randbytes(length) if number % 2 else " ".join(draw.choices(WORDS, k=length // 6 + 1)).encode()[:length]
        (folder / f"file{number}").write_bytes(content)
        written += length
        number += 1
    for found in [*directory.rglob("*"), directory]:
        os.utime(found, (1_700_000_000, 1_700_000_000))


def build_ext4(path: Path, *, image_bytes: int, content_bytes: int, seed: int) -> Path:
    """A sparse ext4 image file of `image_bytes` holding about `content_bytes` of files; the same for the same arguments."""
    tree = path.with_name(path.name + ".tree")
    make_tree(tree, size_bytes=content_bytes, seed=seed)
    with path.open("wb") as file:
        file.truncate(image_bytes)
    try:
        subprocess.run(
            ["mke2fs", "-q", "-t", "ext4", "-F", "-b", "4096", "-U", "6e6f7661-6673-4000-8000-000000000000", "-d", str(tree), str(path)],
            check=True,
            capture_output=True,
            env={**os.environ, "E2FSPROGS_FAKE_TIME": "1700000000", "PATH": f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin"},
        )
    finally:
        shutil.rmtree(tree)
    return path


class ImageFiles:
    """Images in a directory, each built when it is first asked for. Tests read them and must not write them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def ext4(self, *, image_mib: int = 64, content_mib: int = 8, seed: int = 1) -> Path:
        """A raw ext4 image of `image_mib` MiB with `content_mib` MiB of files in it, the rest holes."""
        path = self._directory / f"ext4-{image_mib}-{content_mib}-{seed}.raw"
        if not path.exists():
            temporary = path.with_suffix(".building")
            build_ext4(temporary, image_bytes=image_mib << 20, content_bytes=content_mib << 20, seed=seed)
            temporary.rename(path)
        return path

    def qcow2(self, *, image_mib: int = 64, content_mib: int = 8, seed: int = 1) -> Path:
        """The same as qcow2."""
        path = self._directory / f"ext4-{image_mib}-{content_mib}-{seed}.qcow2"
        if not path.exists():
            raw = self.ext4(image_mib=image_mib, content_mib=content_mib, seed=seed)
            temporary = path.with_suffix(".building")
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(temporary)], check=True)
            temporary.rename(path)
        return path
