"""`novafs import` and `export`: what comes out is what went in, and nothing is half done."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from novafs.cli import common
from novafs.cli.import_ import default_name
from tests.support.cli_fixtures import LocalVolume

SIZE = 3 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A small raw disk: random bytes, text, and holes between and at the end."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.write(random.Random(7).randbytes(200_000))
        file.seek(1 << 20)
        file.write(b"text that compresses " * 20_000)
        file.truncate(SIZE)
    return path


def exported(volume: LocalVolume, image: str, path: Path, *options: str) -> bytes:
    volume("export", image, path, *options)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/x/debian.raw", "debian.raw"),
        ("debian.qcow2", "debian.raw"),
        ("a/b/Debian.VMDK", "Debian.raw"),
        ("x.img", "x.raw"),
        ("x.vdi", "x.raw"),
        ("x.vhdx", "x.raw"),
        ("x.vhd", "x.raw"),
        ("/dev/vda", "vda.raw"),
        ("debian-12.5", "debian-12.5.raw"),
        ("disk.iso", "disk.iso.raw"),
        ("a.tar.raw", "a.tar.raw"),
    ],
)
def test_an_image_is_named_after_its_source(source: str, name: str) -> None:
    assert default_name(source) == name


def test_what_is_exported_is_what_was_imported(local_volume: LocalVolume, disk: Path, tmp_path: Path) -> None:
    text = local_volume("import", disk)
    assert text.startswith("disk.raw: 3.0 MiB, of it ")
    assert " new, 0 known already; stored " in text
    assert local_volume.names() == ["disk.raw"]
    assert exported(local_volume, "disk.raw", tmp_path / "out.raw") == disk.read_bytes()
    assert (tmp_path / "out.raw").stat().st_blocks * 512 < SIZE // 2, "holes were written"


def test_a_second_import_finds_every_chunk_known(local_volume: LocalVolume, disk: Path) -> None:
    first = local_volume.json("import", disk)
    again = local_volume.json("import", disk, "again.raw")
    assert first["image"] == "disk.raw"
    assert first["size"] == again["size"] == SIZE
    assert (again["new_chunks"], again["stored_bytes"], again["dedup_chunks"]) == (0, 0, first["new_chunks"] + first["dedup_chunks"])
    assert "stored 0 B;" in local_volume("import", disk, "third.raw")


def test_a_name_that_is_taken_is_refused_unless_it_is_to_be_replaced(local_volume: LocalVolume, disk: Path, tmp_path: Path) -> None:
    local_volume("import", disk, "a.raw")
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(512) + b"x" * 512)
    assert local_volume.fails("import", other, "a.raw") == "a.raw: exists already; choose another name, or add --replace"
    assert exported(local_volume, "a.raw", tmp_path / "1") == disk.read_bytes()
    local_volume("import", other, "a.raw", "--replace")
    assert exported(local_volume, "a.raw", tmp_path / "2") == other.read_bytes()
    assert local_volume.names() == ["a.raw"]


def test_directories_of_the_image_are_made_when_asked_for(local_volume: LocalVolume, disk: Path, tmp_path: Path) -> None:
    assert "web: no such directory in the volume; add --parents to make it" in local_volume.fails("import", disk, "web/prod/a.raw")
    local_volume("import", disk, "web/prod/a.raw", "--parents")
    local_volume("import", disk, "/web//prod/b.raw")
    assert local_volume.names("web/prod") == ["a.raw", "b.raw"]
    assert "web/prod: is a directory of the volume; name the image" in local_volume.fails("import", disk, "web/prod")
    assert "is an image, not a directory" in local_volume.fails("import", disk, "web/prod/a.raw/x.raw")
    assert "is an image, not a directory" in local_volume.fails("import", disk, "web/prod/a.raw/x/y.raw", "--parents")


@pytest.mark.qemu
@pytest.mark.parametrize("name", ["qcow2", "vmdk", "vdi", "vhdx"])
def test_formats_of_qemu_img_come_in_and_go_out(local_volume: LocalVolume, disk: Path, tmp_path: Path, name: str) -> None:
    source = tmp_path / f"disk.{name}"
    subprocess.run(["qemu-img", "convert", "-O", name, disk, source], check=True)
    local_volume("import", source)
    assert exported(local_volume, "disk.raw", tmp_path / "out.raw") == disk.read_bytes()
    local_volume("export", "disk.raw", tmp_path / f"out.{name}")
    subprocess.run(["qemu-img", "compare", "-f", name, "-F", "raw", tmp_path / f"out.{name}", disk], check=True, stdout=subprocess.DEVNULL)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["disk.raw", f"disk.{name}", "out.raw", f"out.{name}", "store", "state"]
    ), "something was left behind"


@pytest.mark.qemu
@pytest.mark.parametrize(("option", "format_"), [("vhd", "vpc"), ("QCOW2", "qcow2"), ("img", "raw")])
def test_the_format_can_be_said(local_volume: LocalVolume, disk: Path, tmp_path: Path, option: str, format_: str) -> None:
    local_volume("import", disk, "--format", "raw")
    out = tmp_path / "out.bin"
    assert f" as {format_};" in local_volume("export", "disk.raw", out, "--format", option)
    subprocess.run(["qemu-img", "compare", "-f", format_, "-F", "raw", out, disk], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.qemu
def test_a_format_that_is_none_is_refused_with_the_nearest(local_volume: LocalVolume, disk: Path, tmp_path: Path) -> None:
    local_volume("import", disk)
    message = local_volume.fails("export", "disk.raw", tmp_path / "out", "--format", "vmdkk", status=2)
    assert message == "--format vmdkk: qemu-img has no such format; did you mean 'vmdk'?"


# --- streams: in processes of their own -----------------------------------------------------------------------


def process(volume: LocalVolume, name: str, *arguments: object, stdin: bytes | int | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "novafs.cli", name, volume.url, *map(str, arguments), *volume.options]
    if isinstance(stdin, int):
        return subprocess.run(command, stdin=stdin, capture_output=True, timeout=120)
    return subprocess.run(command, input=stdin or b"", capture_output=True, timeout=120)


def test_a_pipe_comes_in_and_goes_out(local_volume: LocalVolume, disk: Path) -> None:
    done = process(local_volume, "import", "-", "piped.raw", stdin=disk.read_bytes())
    assert (done.returncode, done.stderr) == (0, b"")
    assert process(local_volume, "export", "piped.raw", "-").stdout == disk.read_bytes()


def test_standard_input_that_is_a_file_is_read_like_one(local_volume: LocalVolume, disk: Path, tmp_path: Path) -> None:
    with disk.open("rb") as file:
        assert process(local_volume, "import", "-", "a.raw", stdin=file.fileno()).returncode == 0
    assert exported(local_volume, "a.raw", tmp_path / "out") == disk.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "standard input is empty: expected a disk image"),
        (b"hello", "standard input is no disk image: its size of 5 bytes is no multiple of 512"),
        (b"QFI\xfb".ljust(4096, b"\0"), "standard input is a qcow2 image, not a raw image: import the file itself by its name"),
        (b"\x1f\x8b\x08".ljust(4096, b"\0"), "standard input is compressed with gzip, not a raw image: unpack it first"),
    ],
)
def test_a_pipe_that_is_no_raw_image_is_refused(local_volume: LocalVolume, content: bytes, message: str) -> None:
    done = process(local_volume, "import", "-", "a.raw", stdin=content)
    assert done.returncode == 1
    assert done.stderr.decode().startswith(f"novafs: {message}")
    assert local_volume.names() == []


def test_a_pipe_is_taken_as_it_is_when_that_is_said(local_volume: LocalVolume) -> None:
    assert process(local_volume, "import", "-", "a.raw", "--format", "raw", stdin=b"hello").returncode == 0
    assert process(local_volume, "export", "a.raw", "-").stdout == b"hello"
    done = process(local_volume, "import", "-", "b.raw", "--format", "qcow2", stdin=b"hello")
    assert b"a qcow2 image cannot be read from a pipe" in done.stderr


def test_a_named_pipe_comes_in_and_goes_out(local_volume: LocalVolume, disk: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(disk.read_bytes()), daemon=True)
    writer.start()
    local_volume("import", fifo, "a.raw")
    writer.join(60)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()), daemon=True)
    reader.start()
    local_volume("export", "a.raw", fifo)
    reader.join(60)
    assert read == [disk.read_bytes()]


# --- export -----------------------------------------------------------------------------------------------------


def test_a_file_that_is_there_is_kept_unless_it_is_to_be_replaced(local_volume: LocalVolume, disk: Path, tmp_path: Path) -> None:
    local_volume("import", disk)
    out = tmp_path / "out.raw"
    out.write_text("precious")
    assert local_volume.fails("export", "disk.raw", out) == f"{out} exists: choose another name, or add --force to replace it"
    assert out.read_text() == "precious"
    assert exported(local_volume, "disk.raw", out, "--force") == disk.read_bytes()


def test_a_link_as_destination_is_replaced_and_not_followed(local_volume: LocalVolume, disk: Path, tmp_path: Path) -> None:
    local_volume("import", disk)
    (tmp_path / "target").write_text("precious")
    link = tmp_path / "link"
    link.symlink_to("target")
    assert "exists: choose another name" in local_volume.fails("export", "disk.raw", link)
    assert exported(local_volume, "disk.raw", link, "--force") == disk.read_bytes()
    assert (tmp_path / "target").read_text() == "precious"


def test_an_export_that_cannot_be_made_leaves_nothing(local_volume: LocalVolume, disk: Path, tmp_path: Path) -> None:
    local_volume("import", disk)
    out = tmp_path / "out"
    out.mkdir()
    assert local_volume.fails("export", "disk.raw", out) == f"{out} is a directory: write the name of a file"
    missing = out / "missing" / "x.raw"
    assert local_volume.fails("export", "disk.raw", missing) == f"cannot write {missing}: its directory does not exist"
    assert "nothing.raw: no such image or directory" in local_volume.fails("export", "nothing.raw", out / "x.raw")
    local_volume("import", disk, "dir/a.raw", "--parents")
    assert "dir: is a directory of the volume, expected an image" in local_volume.fails("export", "dir", out / "x.raw")
    assert local_volume.fails("export", "disk.raw", "-", "--format", "qcow2") == "a stream can only be raw, not qcow2: write a file"
    assert "/dev/null is a device: only raw can be written to it" in local_volume.fails(
        "export", "disk.raw", "/dev/null", "--format", "vdi"
    )
    local_volume("export", "disk.raw", "/dev/null")
    assert list(out.iterdir()) == []


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(local_volume: LocalVolume, disk: Path) -> None:
    local_volume("import", disk)
    assert local_volume.fails("export", "disk.raw", "/dev/full") == "no space for /dev/full: No space left on device"


def test_a_terminal_gets_no_raw_bytes(local_volume: LocalVolume, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local_volume("import", disk)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert local_volume.command.run("export", local_volume.url, "disk.raw", "-", *local_volume.options).status == 2


@pytest.fixture
def loop_device(tmp_path: Path) -> str:
    """A block device of SIZE bytes full of old content."""
    backing = tmp_path / "backing"
    backing.write_bytes(b"old!" * (SIZE // 4))
    if os.geteuid() != 0 or shutil.which("losetup") is None:
        pytest.skip("a block device needs root and losetup (Debian: mount)")
    done = subprocess.run(["losetup", "--find", "--show", backing], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no loop device to be had here: {done.stderr.strip()}")
    device = done.stdout.strip()
    yield device  # type: ignore[misc]
    subprocess.run(["losetup", "--detach", device], check=True)


def test_a_block_device_goes_out_and_comes_in(local_volume: LocalVolume, disk: Path, tmp_path: Path, loop_device: str) -> None:
    local_volume("import", disk)
    assert f"{loop_device} is a block device, whose content would be lost" in local_volume.fails("export", "disk.raw", loop_device)
    local_volume("export", "disk.raw", loop_device, "--force")
    assert Path(loop_device).read_bytes() == disk.read_bytes(), "holes must be zeros on a device"
    local_volume("import", loop_device, "from-device.raw")
    assert exported(local_volume, "from-device.raw", tmp_path / "out") == disk.read_bytes()
    larger = tmp_path / "larger.raw"
    larger.write_bytes(bytes(SIZE + 512))
    local_volume("import", larger)
    message = local_volume.fails("export", "larger.raw", loop_device, "--force")
    assert message == f"{loop_device} has {SIZE} bytes, the image needs {SIZE + 512}: nothing was written"


# --- progress -----------------------------------------------------------------------------------------------------


def test_a_terminal_gets_a_progress_bar_and_others_do_not(local_volume: LocalVolume, disk: Path) -> None:
    import pty

    terminal, ours = pty.openpty()
    command = [sys.executable, "-m", "novafs.cli", "import", local_volume.url, str(disk), *local_volume.options]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=ours) as child:
        os.close(ours)
        shown = b""
        while True:
            try:
                part = os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(terminal)
    assert child.returncode == 0
    assert b"importing disk.raw" in shown
    assert b"100%" in shown


def test_a_bar_takes_names_with_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with common.progress_bar("a\x1b[31m[bold]", 10) as progress:
        progress(5)
    with common.progress_bar("stream", None) as progress:
        progress(5)
