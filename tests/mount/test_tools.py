"""The tools that people use on disk images, all byte-exact: cp, dd, qemu-img, qemu-io, fio."""

from __future__ import annotations

import filecmp
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.image_files import ImageFiles

pytestmark = pytest.mark.fuse

MIB = 1 << 20


def tool(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def same(a: Path, b: Path) -> bool:
    return filecmp.cmp(a, b, shallow=False)


@pytest.mark.parametrize(
    "options", [[], ["--sparse=always"], ["--sparse=never"], ["--reflink=auto"], ["-a"]], ids=lambda words: " ".join(words)
)
def test_cp_in_within_and_out(place: Path, tmp_path: Path, image_files: ImageFiles, options: list[str]) -> None:
    source = image_files.ext4()
    tool("cp", *options, source, place / "in.raw")
    assert same(source, place / "in.raw")
    tool("cp", *options, place / "in.raw", place / "copy.raw")
    assert same(source, place / "copy.raw")
    tool("cp", *options, place / "copy.raw", tmp_path / "out.raw")
    assert same(source, tmp_path / "out.raw")
    # Zeros cost nothing, whether they were skipped or written.
    assert (place / "in.raw").stat().st_blocks <= source.stat().st_blocks


DD = {
    "plain": (["bs=1M"], []),
    "odd blocks": (["bs=77777"], []),
    "fsync": (["bs=256K", "conv=fsync"], []),
    "fdatasync": (["bs=64K", "conv=fdatasync"], []),
    "direct": (["bs=1M", "oflag=direct"], ["iflag=direct"]),
    "direct small": (["bs=4K", "oflag=direct"], ["iflag=direct"]),
    "sparse": (["bs=64K", "conv=sparse"], []),
    "dsync": (["bs=1M", "oflag=dsync"], []),
}


@pytest.mark.parametrize("words", DD.values(), ids=DD)
def test_dd_in_and_out(place: Path, tmp_path: Path, image_files: ImageFiles, words: tuple[list[str], list[str]]) -> None:
    source = image_files.ext4(image_mib=16, content_mib=4)
    tool("dd", f"if={source}", f"of={place / 'a.raw'}", *words[0])
    assert same(source, place / "a.raw")
    tool("dd", f"if={place / 'a.raw'}", f"of={tmp_path / 'out.raw'}", words[0][0], *words[1])
    assert same(source, tmp_path / "out.raw")


def test_dd_overwrites_in_the_middle(place: Path, tmp_path: Path, image_files: ImageFiles) -> None:
    source = image_files.ext4(image_mib=16, content_mib=4)
    for target in (place / "a.raw", tmp_path / "a.raw"):
        shutil.copyfile(source, target)
        tool("dd", f"if={source}", f"of={target}", "bs=4096", "count=700", "skip=100", "seek=1500", "conv=notrunc")
    assert same(place / "a.raw", tmp_path / "a.raw")


@pytest.mark.parametrize("cache", ["none", "writeback", "directsync"])
def test_qemu_img_converts_into_and_out_of_the_mount(place: Path, tmp_path: Path, image_files: ImageFiles, cache: str) -> None:
    raw, qcow2 = image_files.ext4(), image_files.qcow2()
    tool("qemu-img", "convert", "-t", cache, "-f", "qcow2", "-O", "raw", qcow2, place / "a.raw")
    assert same(raw, place / "a.raw")
    assert (place / "a.raw").stat().st_blocks <= raw.stat().st_blocks
    tool("qemu-img", "convert", "-T", cache, "-f", "raw", "-O", "qcow2", place / "a.raw", tmp_path / "out.qcow2")
    assert "identical" in tool("qemu-img", "compare", tmp_path / "out.qcow2", raw)
    # A qcow2 file may itself lie in the mount.
    tool("qemu-img", "convert", "-t", cache, "-f", "raw", "-O", "qcow2", raw, place / "b.qcow2")
    tool("qemu-img", "check", place / "b.qcow2")
    assert "identical" in tool("qemu-img", "compare", place / "b.qcow2", place / "a.raw")


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_qemu_img_creates_an_image(place: Path, preallocation: str) -> None:
    path = place / "a.raw"
    done = subprocess.run(
        ["qemu-img", "create", "-f", "raw", "-o", f"preallocation={preallocation}", str(path), "8M"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert path.stat().st_size == 8 * MIB
    assert path.read_bytes() == bytes(8 * MIB)
    assert path.stat().st_blocks == 0
    assert '"format": "raw"' in tool("qemu-img", "info", "--output=json", "-f", "raw", path)


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "cache=none"])
def test_qemu_io_patterns(place: Path, format_: str, direct: bool) -> None:
    path = place / f"a.{format_}"
    tool("qemu-img", "create", "-q", "-f", format_, path, "32M")
    draw = random.Random(5)
    # Non-overlapping ranges, each with a pattern of its own, some discarded or zeroed afterwards.
    expected: list[tuple[int, int, int]] = []
    commands: list[str] = []
    for number in range(40):
        offset = number * 768 * 1024 + draw.randrange(0, 128) * 512
        length = draw.choice((512, 4096, 65536, 300 * 512))
        pattern = draw.randrange(1, 256)
        commands.append(f"aio_write -P {pattern:#x} {offset} {length}" if number % 2 else f"write -P {pattern:#x} {offset} {length}")
        if number % 5 == 0:
            commands.append("aio_flush")
            commands.append(f"write -z {offset} {length}" if number % 10 else f"write -z -u {offset} {length}")
            pattern = 0
        if number % 7 == 0:
            commands.append("flush")
        expected.append((pattern, offset, length))
    commands.append("aio_flush")
    words = [word for command in commands for word in ("-c", command)]
    tool("qemu-io", "-f", format_, *(["-n"] if direct else []), *words, path)
    checks = [word for pattern, offset, length in expected for word in ("-c", f"read -P {pattern:#x} {offset} {length}")]
    out = tool("qemu-io", "-f", format_, *(["-n"] if direct else []), *checks, path)
    assert "verification failed" not in out
    if format_ == "qcow2":
        tool("qemu-img", "check", path)


FIO = {
    "direct": ["--direct=1", "--ioengine=libaio", "--iodepth=16", "--bsrange=4k-64k"],
    "buffered": ["--ioengine=psync", "--bsrange=512-32k", "--bs_unaligned=1", "--fsync=64"],
    "dsync": ["--direct=1", "--ioengine=libaio", "--iodepth=4", "--bs=4k", "--fdatasync=32"],
    "mmap": ["--ioengine=mmap", "--bs=4k"],
}


@pytest.mark.parametrize("words", FIO.values(), ids=FIO)
def test_fio_verifies_random_writes(place: Path, words: list[str]) -> None:
    size = "2m" if "--fdatasync=32" in words else "12m"
    job = ["--name=verify", f"--filename={place / 'a.raw'}", f"--size={size}", "--rw=randwrite", "--verify=crc32c", "--verify_fatal=1"]
    tool("fio", *job, *words, "--do_verify=1", "--end_fsync=1", cwd=place.parent)
    # Once more from another process that only verifies.
    tool("fio", *job, *words, "--verify_only=1", cwd=place.parent)


def test_e2fsck_and_debugfs_work_on_an_image_in_the_mount(place: Path, image_files: ImageFiles, tmp_path: Path) -> None:
    path = place / "a.raw"
    tool("cp", image_files.ext4(), path)
    environ = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin"}
    assert subprocess.run(["e2fsck", "-fn", str(path)], capture_output=True, env=environ).returncode == 0
    payload = tmp_path / "payload"
    payload.write_bytes(os.urandom(700_000))
    subprocess.run(["debugfs", "-w", "-R", f"write {payload} payload", str(path)], check=True, capture_output=True, env=environ)
    dumped = tmp_path / "dumped"
    subprocess.run(["debugfs", "-R", f"dump payload {dumped}", str(path)], check=True, capture_output=True, env=environ)
    assert same(payload, dumped)
    assert subprocess.run(["e2fsck", "-fn", str(path)], capture_output=True, env=environ).returncode == 0


def test_tar_and_rsync_style_copies_of_a_tree(place: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number in range(20):
        directory = source / f"d{number % 4}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"f{number}").write_bytes(os.urandom(number * 1000))
        os.setxattr(directory / f"f{number}", "user.number", str(number).encode())
    archive = tmp_path / "a.tar"
    tool("tar", "--xattrs", "-C", source, "-cf", archive, ".")
    target = place / "target"
    target.mkdir()
    tool("tar", "--xattrs", "-C", target, "-xf", archive)
    tool("diff", "-r", source, target)
    assert os.getxattr(target / "d3" / "f7", "user.number") == b"7"
    # Back again: nothing of the mount's own figures goes along (they are not listed).
    shutil.copytree(target, tmp_path / "back")
    tool("diff", "-r", source, tmp_path / "back")
    assert os.listxattr(tmp_path / "back" / "d3" / "f7") == ["user.number"]
