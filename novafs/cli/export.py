"""`novafs export`: an image of the volume becomes a file, a block device's content, or a stream."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from novafs.cli import common
from novafs.cli.common import Settings
from novafs.config import Config
from novafs.errors import ConfigError, ExistsError, IsDirectoryError, StoreFullError, UnsupportedError, UserError

if TYPE_CHECKING:
    from novafs.rawsink import Sink, Workspace

RAW: Final = "raw"
_BY_SUFFIX: Final = {".qcow2": "qcow2", ".vmdk": "vmdk", ".vdi": "vdi", ".vhdx": "vhdx", ".vhd": "vpc", ".vpc": "vpc", ".qed": "qed"}
_ALIASES: Final = {"vhd": "vpc", "img": RAW}
_OPTIONS: Final = {"vpc": ("-o", "force_size=on")}
"""A VHD's size is rounded to cylinders of a disk of 1990 unless told."""
_ROUNDING: Final = 1 << 20
"""Formats round the disk's size up to their unit: at most a mebibyte."""


class Kind(Enum):
    """What a destination is."""

    STDOUT = "standard output"
    STREAM = "a pipe"
    DEVICE = "a block device"
    FILE = "a file"


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for. destination: "-" for standard output."""

    image: str
    destination: str
    format: str
    force: bool
    workers: int


@click.command()
@click.argument("volume")
@click.argument("image")
@click.argument("destination", metavar="DEST")
@click.option(
    "--format", "format_", metavar="FORMAT", help="raw, qcow2, vmdk, vdi, vhdx, vhd, …; by default what DEST's suffix says, else raw."
)
@click.option("--force", is_flag=True, help="Replace DEST where it exists; needed for a block device, whose content is lost.")
@click.option("--workers", type=click.IntRange(1, 64), default=8, show_default=True, help="Blocks of 4 MiB that are read at once.")
@common.volume_options
def export(volume: str, image: str, destination: str, format_: str | None, force: bool, workers: int, settings: Settings) -> None:
    """Write IMAGE of VOLUME to DEST.

    DEST is a file (holes stay holes), a block device, a named pipe, or - for standard output. What is written is the
    newest committed state. A file appears under its name when all of it is written, or not at all.
    """
    if "\0" in destination:
        raise UserError(f"{destination!r}: no path has a NUL character in it")
    request = Request(image, destination, _format(destination, format_), force, workers)
    if destination == "-" and sys.stdout.isatty():
        raise click.UsageError("standard output is a terminal: redirect it into a file or a pipe")
    config = settings.load(volume)
    path = Path(os.path.abspath(destination))  # noqa: PTH100  # not resolve(): a link as destination is replaced, not followed
    size, seconds = common.run(_export, common.quiet_l2(config), request, _kind_of(request, path), path)
    if destination != "-":
        common.emit(f"{common.printable(destination)}: {common.with_bytes(size)} as {request.format}; {common.rate(size, seconds)}")


def _format(destination: str, asked: str | None) -> str:
    """The format to write. Raises ConfigError for one that qemu-img has not, UnsupportedError for a stream of one."""
    if asked is None:
        guessed = _BY_SUFFIX.get(Path(destination).suffix.lower(), RAW)
        return RAW if destination == "-" else guessed
    wanted = _ALIASES.get(asked.lower(), asked.lower())
    if wanted == RAW:
        return RAW
    if destination == "-":
        raise UnsupportedError(f"a stream can only be raw, not {asked}: write a file")
    known = _known_formats()
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=1)
        raise ConfigError(f"--format {asked}: qemu-img has no such format" + (f"; did you mean {near[0]!r}?" if near else ""))
    return wanted


def _known_formats() -> list[str]:
    from novafs.diskimage import qemu_img

    said = subprocess.run([qemu_img(), "--help"], capture_output=True, text=True, check=False).stdout
    line = next((line for line in said.splitlines() if line.startswith("Supported formats:")), "")
    return line.partition(":")[2].split()


async def _export(config: Config, request: Request, kind: Kind, path: Path) -> tuple[int, float]:
    """Bytes of the disk, and seconds."""
    import trio

    from novafs import catalogtree
    from novafs.rawsink import copy_image
    from novafs.volume import open_volume

    started = time.monotonic()
    async with open_volume(config, read_only=True) as volume:
        entry = await volume.catalog.resolve(request.image)
        if entry.kind is catalogtree.Kind.DIRECTORY:
            raise IsDirectoryError(f"{request.image or '/'}: is a directory of the volume, expected an image")
        image = await volume.open_image(entry.node_id)
        try:
            size = image.size
            target = await trio.to_thread.run_sync(_Target, request, kind, path, size)
            try:
                with common.progress_bar(f"exporting {request.image}", size) as progress:
                    await copy_image(image, target.sink, workers=request.workers, progress=progress)
                await trio.to_thread.run_sync(target.publish)
            except BaseException:
                if kind is Kind.DEVICE:  # the one destination that shows what is half done
                    common.say(f"{path} holds only a part of the image now: export it again")
                raise
            finally:
                target.close()
            return size, time.monotonic() - started
        finally:
            await volume.close_image(image)


def _kind_of(request: Request, path: Path) -> Kind:
    """What the destination is; all that can be refused before the volume is opened is refused here."""
    from novafs.rawsink import check_free, is_stream

    if request.destination == "-":
        return Kind.STDOUT
    device = path.is_block_device()
    if device or is_stream(path):
        if request.format != RAW:
            raise UnsupportedError(f"{path} is a device: only raw can be written to it, not {request.format}")
        if device and not request.force:
            raise ExistsError(f"{path} is a block device, whose content would be lost: add --force if that is meant")
        return Kind.DEVICE if device else Kind.STREAM
    check_free(path, force=request.force)
    return Kind.FILE


class _Target:
    """An open destination. Blocking. sink: takes the disk's bytes; publish: what makes them count, after all of them."""

    def __init__(self, request: Request, kind: Kind, path: Path, size: int) -> None:
        from novafs.rawsink import DeviceSink, FileSink, StreamSink, Workspace

        self._request, self._path, self._size = request, path, size
        self._opened = ExitStack()
        self._workspace: Workspace | None = None
        self.sink: Sink
        with self._opened:
            if kind is Kind.STDOUT:
                self.sink = StreamSink(sys.stdout.fileno(), "standard output")
            elif kind is Kind.STREAM:
                fd = _open_stream(path)
                self._opened.callback(os.close, fd)
                self.sink = StreamSink(fd, str(path))
            elif kind is Kind.DEVICE:
                self.sink = DeviceSink(path, size)
            else:
                workspace = Workspace(path, force=request.force)
                self._opened.callback(workspace.close)
                self._workspace = workspace
                self.sink = FileSink(workspace.path if request.format == RAW else workspace.raw_path, str(path))
            self._opened.callback(self.sink.close)
            self._opened = self._opened.pop_all()

    def publish(self) -> None:
        """Convert, verify the size, and give the file its name."""
        from novafs.rawsink import write_error

        if self._workspace is None:
            return
        path, request = self._workspace.path, self._request
        if request.format != RAW:
            _convert(self._workspace.raw_path, path, request.format, str(self._path))
        try:
            have = _size_of(path, request.format)
        except OSError as error:
            raise write_error(str(self._path), error) from error
        slack = 0 if request.format == RAW else _ROUNDING
        if not self._size <= have <= self._size + slack:
            raise UserError(
                f"{self._path}: what was written has {have} bytes, expected {self._size}: nothing was kept; is the disk healthy?"
            )
        self._workspace.publish()

    def close(self) -> None:
        """Give up what was not published."""
        self._opened.close()


def _open_stream(path: Path) -> int:
    """A named pipe, open for writing; waits for its reader."""
    from novafs.rawsink import write_error

    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        raise write_error(str(path), error) from error


def _convert(raw: Path, target: Path, format_: str, name: str) -> None:
    from novafs.diskimage import qemu_img

    command = [qemu_img(), "convert", "-f", RAW, "-O", format_, *_OPTIONS.get(format_, ()), "--", str(raw), str(target)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode != 0:
        said = result.stderr.strip().splitlines()[-1:] or ["it did not say why"]
        kind = StoreFullError if "No space left" in result.stderr else UserError
        raise kind(f"qemu-img cannot write {name} as {format_}: {said[0].removeprefix('qemu-img: ')}")
    raw.unlink()


def _size_of(path: Path, format_: str) -> int:
    """Bytes of the disk in what was written."""
    import json

    from novafs.diskimage import qemu_img

    if format_ == RAW:
        return path.stat().st_size
    command = [qemu_img(), "info", "--output=json", "-f", format_, "--", str(path)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False)
    return int(json.loads(result.stdout)["virtual-size"]) if result.returncode == 0 else -1
