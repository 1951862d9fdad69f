"""`novafs import`: a disk image from a file, a block device or a pipe becomes an image of the volume."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import click

from novafs.cli import common
from novafs.cli.common import Settings
from novafs.config import Config
from novafs.errors import ExistsError, IsDirectoryError, NotDirectoryError, NotFoundError, SourceError
from novafs.units import format_size

if TYPE_CHECKING:
    from novafs.bulk import ImportResult
    from novafs.diskimage import DiskImage
    from novafs.volume import Volume

_DISK_SUFFIX: Final = re.compile(r"\.(raw|img|qcow2?|qed|vmdk|vdi|vhdx?|vpc)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for. format: of qemu-img, None to find out."""

    source: str
    image: str
    format: str | None
    follow: bool
    replace: bool
    parents: bool
    workers: int


class Runs(Protocol):
    """A source of an import: `novafs.rawsource`."""

    def runs(self) -> AsyncGenerator[tuple[int, bytes], None]: ...


@click.command("import")
@click.argument("volume")
@click.argument("source")
@click.argument("image", required=False)
@click.option("--format", "format_", metavar="FORMAT", help="Format of SOURCE instead of finding out; raw: take the bytes as they are.")
@click.option("--follow", is_flag=True, help="Read other files that SOURCE names too (backing file, extents elsewhere).")
@click.option("--replace", is_flag=True, help="Replace IMAGE, in one step, where it exists.")
@click.option("--parents", is_flag=True, help="Make the directories of IMAGE that are missing.")
@click.option("--workers", type=click.IntRange(1, 64), default=4, show_default=True, help="Batches that are compressed and stored at once.")
@common.json_option
@common.volume_options
def import_(
    volume: str,
    source: str,
    image: str | None,
    format_: str | None,
    follow: bool,
    replace: bool,
    parents: bool,
    workers: int,
    as_json: bool,
    settings: Settings,
) -> None:
    """Import SOURCE into VOLUME as IMAGE.

    SOURCE is a file in a format that qemu-img reads (raw, qcow2, vmdk, vdi, vhdx, …), a block device, or - for raw
    bytes from standard input. Without IMAGE, the name is that of SOURCE with the suffix .raw, which takes the place
    of .img, .qcow2, .vmdk and the like. The image appears when all of it is stored, or not at all.
    """
    if image is None:
        if source == "-":
            raise click.UsageError("IMAGE is needed: standard input has no name")
        image = default_name(source)
    config = settings.load(volume)
    request = Request(source, image, format_, follow, replace, parents, workers)
    result = common.run(_import, common.without_l2(config), request)
    if as_json:
        common.emit_json({"image": image, **asdict(result)})
    else:
        common.emit(_summary(image, result))


def default_name(source: str) -> str:
    """The image's name for a source's: base name, with .raw for the suffix of a disk format, and added where there is none."""
    return _DISK_SUFFIX.sub("", Path(source).name) + ".raw"


def _summary(image: str, result: ImportResult) -> str:
    known = result.new_chunks + result.dedup_chunks
    new_share = result.new_chunks / known if known else 0.0
    plain_new = result.allocated_bytes * new_share
    return (
        f"{common.printable(image)}: {format_size(result.size)}, of it {format_size(result.allocated_bytes)} data in {known:,} chunks; "
        f"{result.new_chunks:,} new, {result.dedup_chunks:,} known already; "
        f"stored {format_size(result.stored_bytes)}"
        + (f" (compression {common.ratio(plain_new / result.stored_bytes)})" if result.stored_bytes else "")
        + f"; {common.rate(result.size, result.seconds)}"
    )


async def _import(config: Config, request: Request) -> ImportResult:
    from novafs.volume import open_volume

    with ExitStack() as opened:
        # The source first: what is wrong with it shows without the store.
        probed = await _probe(request)
        async with open_volume(config) as volume:
            parent_id, name = await _place(volume, request)
            source, size = await _open(config, request, probed, opened)
            return await _store(volume, parent_id, name, source, size, request)


async def _probe(request: Request) -> DiskImage | None:
    """What the source is; None for a stream."""
    import trio

    from novafs import diskimage

    if request.source == "-" or _is_pipe(request.source):
        if request.format not in (None, diskimage.RAW):
            raise SourceError(f"a {request.format} image cannot be read from a pipe: import the file itself by its name")
        return None
    return await trio.to_thread.run_sync(lambda: diskimage.probe(request.source, format=request.format, follow=request.follow))


def _is_pipe(source: str) -> bool:
    try:
        return stat.S_ISFIFO(Path(source).stat().st_mode)
    except (OSError, ValueError):
        return False


async def _place(volume: Volume, request: Request) -> tuple[bytes, str]:
    """Directory and name of the new image. Raises ExistsError, IsDirectoryError, NotFoundError, InvalidNameError."""
    from novafs.catalogtree import Kind, check_name, split_path

    *directories, name = split_path(request.image) or [""]
    check_name(name)
    parent = volume.catalog.root
    for number, directory in enumerate(directories):
        try:
            parent = await volume.catalog.lookup(parent.node_id, directory)
        except NotFoundError as error:
            path = "/".join(directories[: number + 1])
            if not request.parents:
                raise NotFoundError(f"{path}: no such directory in the volume; add --parents to make it") from error
            parent = await volume.mkdir(parent.node_id, directory, uid=os.getuid(), gid=os.getgid())
    if parent.kind is not Kind.DIRECTORY:
        raise NotDirectoryError(f"{'/'.join(directories)}: is an image, not a directory")
    try:
        found = await volume.catalog.lookup(parent.node_id, name)
    except NotFoundError:
        return parent.node_id, name
    if found.kind is Kind.DIRECTORY:
        raise IsDirectoryError(f"{request.image}: is a directory of the volume; name the image, as in {request.image.rstrip('/')}/NAME")
    if not request.replace:
        raise ExistsError(f"{request.image}: exists already; choose another name, or add --replace")
    return parent.node_id, name


async def _open(config: Config, request: Request, probed: DiskImage | None, opened: ExitStack) -> tuple[Runs, int | None]:
    """The source's runs, and its size in bytes if known. What is to be closed afterwards goes to `opened`."""
    import trio

    from novafs import diskimage, statedir
    from novafs.rawsource import FileSource, StreamSource

    if probed is None:
        if request.source == "-":
            if sys.stdin.isatty():
                raise SourceError("standard input is a terminal: expected a raw image from a pipe or a file")
            stream = StreamSource(sys.stdin.fileno(), "standard input")
        else:
            fd = await trio.to_thread.run_sync(os.open, request.source, os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, fd)
            stream = StreamSource(fd, request.source)
        if request.format is None:
            diskimage.check_raw_head(_name(request), stream.head)
        return stream, None
    if probed.format == diskimage.RAW:
        fd = os.open(probed.path, os.O_RDONLY | os.O_CLOEXEC)
        opened.callback(os.close, fd)
        file = FileSource(fd, request.source)
        return file, file.size
    scratch = diskimage.scratch_file(statedir.prepare(config.state_dir), probed.size_bytes)
    opened.callback(os.close, scratch)
    with common.progress_bar(f"unpacking {probed.format}", probed.size_bytes) as progress:
        await diskimage.convert_to_raw(probed, scratch, progress)
    return FileSource(scratch, request.source, scratch=True), probed.size_bytes


def _name(request: Request) -> str:
    return "standard input" if request.source == "-" else request.source


async def _checked(source: Runs, request: Request) -> AsyncGenerator[tuple[int, bytes], None]:
    """The runs of a stream, and at its end the checks for which its size is needed."""
    from contextlib import aclosing

    from novafs import diskimage
    from novafs.rawsource import StreamSource

    async with aclosing(source.runs()) as runs:
        async for run in runs:
            yield run
    if isinstance(source, StreamSource) and request.format is None:
        diskimage.check_raw_size(_name(request), source.head, source.size)


async def _store(volume: Volume, parent_id: bytes, name: str, source: Runs, size: int | None, request: Request) -> ImportResult:
    from contextlib import aclosing

    from novafs.bulk import import_stream

    with common.progress_bar(f"importing {name}", size) as progress:
        async with aclosing(_checked(source, request)) as runs:
            return await import_stream(
                volume,
                parent_id,
                name,
                runs,
                size=size,
                workers=request.workers,
                progress=progress,
                replace=request.replace,
                uid=os.getuid(),
                gid=os.getgid(),
            )
