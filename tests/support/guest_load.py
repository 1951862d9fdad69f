"""Reads and writes like a guest's, on a mount, in a thread: sequential and at random, with fsyncs, past the kernel's page cache."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHUNK = 65536


def make_image(path: Path, chunks: int, *, seed: int) -> None:
    """An image of which every fourth chunk is a hole and every eighth has the same content."""
    source = random.Random(seed)
    with path.open("wb") as file:
        for index in range(chunks):
            if index % 4 == 3:
                file.seek(CHUNK, os.SEEK_CUR)
            else:
                file.write(bytes([7]) * CHUNK if index % 8 == 0 else source.randbytes(CHUNK // 2) * 2)
        file.truncate(chunks * CHUNK)


class _Load:
    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._ended = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self.error = error

    def _run(self) -> None:
        source = random.Random(1)
        handles = [os.open(path, os.O_RDWR) for path in self._paths]
        sizes = [os.fstat(handle).st_size for handle in handles]
        at = 0
        try:
            while not self._ended.wait(0.01):
                number = source.randrange(len(handles))
                handle, size = handles[number], sizes[number]
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                for _ in range(8):
                    os.pread(handle, CHUNK, at % size)
                    at += CHUNK
                for _ in range(20):
                    os.pread(handle, 4096, source.randrange(size // 8) // 4096 * 4096)
                if source.random() < 0.3:
                    os.pwrite(handle, source.randbytes(8192), source.randrange(size // 4) // 4096 * 4096)
                    os.fsync(handle)
        finally:
            for handle in handles:
                os.close(handle)

    def end(self) -> None:
        self._ended.set()


@contextmanager
def guest_load(*paths: Path) -> Iterator[None]:
    """Load on these images for as long as the block lasts. Raises what a read or write raised."""
    load = _Load(list(paths))
    thread = threading.Thread(target=load.run)
    thread.start()
    try:
        yield
    finally:
        load.end()
        thread.join()
    if load.error is not None:
        raise load.error
