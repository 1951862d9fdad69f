"""`novafs bench` on real mounts: what it says, that cold is cold, and that nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from novafs.cli.bench import PREFIX, _host, _Shown
from novafs.control import call
from novafs.statedir import CONTROL_SOCKET, holder
from tests.support.cli_fixtures import Cli
from tests.support.engine import make_volume
from tests.support.mounted import Mount, mounted, running

pytestmark = pytest.mark.fuse

MIB = 1 << 20
SHORT = ("--size", "4M", "--seconds", "0.1")
INTERRUPTED = "novafs: interrupted; nothing half done is visible, run again"
READS = {"read", "buffered", "random", "deep"}


def start(*arguments: object, temporary: Path | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "novafs.cli", "bench", *map(str, arguments)]
    environment = {**os.environ, **({"TMPDIR": str(temporary)} if temporary is not None else {})}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, env=environment)


def ended(program: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = program.communicate(timeout=120)
    return program.returncode, out, err


def bench(*arguments: object, temporary: Path | None = None) -> tuple[int, str, str]:
    return ended(start(*arguments, temporary=temporary))


def stats(mount: Mount) -> Any:
    return call(mount.state_dir / CONTROL_SOCKET, "stats")


def wait_for_image(mount: Mount, program: subprocess.Popen[str]) -> Path:
    """The image of a bench that runs, once it has been written and is read."""
    while True:
        assert program.poll() is None, program.communicate()
        found = list(mount.path.glob(f"{PREFIX}*/bench.raw"))
        if found and stats(mount)["traffic"]["memory_reads"]:
            return found[0]


@pytest.fixture
def plain(tmp_path: Path) -> Any:
    """A mount that reads what it is asked for alone, so that reads can be counted."""
    with mounted(tmp_path, "--set", "prefetch.enabled=false") as mount:
        yield mount


def test_cold_rows_come_from_the_store_and_warm_ones_from_memory(plain: Mount) -> None:
    (plain.path / "sub").mkdir()
    status, out, err = bench(plain.path / "sub", *SHORT, "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document["directory"] == str(plain.path / "sub")
    assert document["volume"] == plain.url
    assert (document["size_bytes"], document["chunk_size"], document["seconds"], document["depth"]) == (4 * MIB, 65536, 0.1, 16)
    assert (document["temporary_mount"], document["l2"], document["notes"]) == (False, False, [])
    rows = document["results"]
    assert {row["work"] for row in rows} == {"write", *READS, "fsync", "images"}
    assert [row["state"] for row in rows if row["work"] == "buffered"] == ["cold", "warm", "again"]
    for row in rows:
        assert row["operations"] > 0, row
        assert row["iops"] == pytest.approx(row["operations"] / row["seconds"])
        assert row["bytes_per_s"] == pytest.approx(row["bytes"] / row["seconds"])
        latency = row["latency_s"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p999"] <= latency["max"]
        did = row["mount"]
        if row["state"] == "cold":
            assert did["waited_reads"] >= row["operations"] * (row["work"] != "buffered"), row
            assert did["store_bytes"] >= min(row["bytes"], 4 * MIB), row
            assert did["store_requests"] > 0, row
        elif row["state"] == "warm":
            assert (did["waited_reads"], did["store_requests"], did["store_bytes"]) == (0, 0, 0), row
            assert did["memory_reads"] > 0, row
        elif row["state"] == "again":
            assert did["memory_reads"] + did["waited_reads"] == 0, "the page cache had it"
    assert os.listdir(plain.path / "sub") == []


def test_a_volume_that_is_not_mounted_is_mounted_for_it(tmp_path: Path) -> None:
    url = trio.run(lambda: make_volume(f"file://{tmp_path / 'store'}"))
    temporary, state = tmp_path / "tmp", tmp_path / "state"
    temporary.mkdir()
    options = ("--state-dir", state, "--l2-url", "none", "--work", "write,read", "--work", "fsync", *SHORT)
    status, out, err = bench(url, *options, temporary=temporary)
    assert (status, err) == (0, ""), out
    lines = out.splitlines()
    assert lines[0] == f"{url}, mounted for this: an image of 4.0 MiB, chunks of 64.0 KiB, L1 of {lines[0].rpartition(' L1 of ')[2]}"
    assert lines[2].split() == ["operations/s", "throughput", "p50", "p90", "p99", "p99.9", "max", "from", "the", "store"]
    assert [line.split("  ")[0] for line in lines[3:]] == [
        "write a new image, 1 MiB each, until fsync",
        "the same, until it is in the store",
        "read it in order, 1 MiB each",
        "",
        "4 KiB random writes, each fsynced",
    ]
    assert list(temporary.iterdir()) == []
    assert holder(state) is None


def test_two_at_once_do_not_meet(plain: Mount) -> None:
    programs = [start(plain.path, "--size", "1M", "--seconds", "0.2", "--work", "read,fsync") for _ in range(2)]
    for program in programs:
        status, _, err = ended(program)
        assert (status, err) == (0, "")
    assert os.listdir(plain.path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_bench_leaves_nothing(plain: Mount, number: signal.Signals) -> None:
    (plain.path / "others.raw").write_bytes(b"others")
    program = start(plain.path, "--size", "4M", "--seconds", "600", "--work", "random")
    wait_for_image(plain, program)
    program.send_signal(number)
    program.send_signal(number)
    status, out, err = ended(program)
    assert (status, out) == (130, "")
    assert err.strip() == INTERRUPTED
    assert os.listdir(plain.path) == ["others.raw"]


def test_an_interrupted_bench_takes_its_mount_away(tmp_path: Path) -> None:
    url = trio.run(lambda: make_volume(f"file://{tmp_path / 'store'}"))
    temporary, state = tmp_path / "tmp", tmp_path / "state"
    temporary.mkdir()
    options = ("--state-dir", state, "--l2-url", "none", "--size", "1M", "--seconds", "600", "--work", "random")
    program = start(url, *options, temporary=temporary)
    while not (found := list(temporary.glob(f"*/{PREFIX}*/bench.raw"))):
        assert program.poll() is None, program.communicate()
    root = found[0].parents[1]
    # It is nobody else's: at its end it would be taken away from under them.
    status, out, err = bench(url, *options, temporary=temporary)
    assert (status, out) == (1, "")
    assert err.startswith(f"novafs: {url} is mounted at {root} by another bench, for the time being: wait for its end; ")
    program.send_signal(signal.SIGINT)
    status, _, err = ended(program)
    assert (status, err.strip()) == (130, INTERRUPTED)
    assert list(temporary.iterdir()) == []
    assert holder(state) is None


def test_a_mount_of_its_own_that_is_in_use_is_told(tmp_path: Path, command: Cli) -> None:
    url = trio.run(lambda: make_volume(f"file://{tmp_path / 'store'}"))
    temporary, state = tmp_path / "tmp", tmp_path / "state"
    temporary.mkdir()
    options = ("--state-dir", state, "--l2-url", "none", "--size", "1M", "--seconds", "600", "--work", "random")
    program = start(url, *options, temporary=temporary)
    while not (found := list(temporary.glob(f"*/{PREFIX}*/bench.raw"))):
        assert program.poll() is None, program.communicate()
    root = found[0].parents[1]
    guest = os.open(root, os.O_RDONLY)
    program.send_signal(signal.SIGINT)
    status, _, err = ended(program)
    os.close(guest)
    try:
        # It is no failure of what was measured, which is told all the same where nobody interrupts.
        assert status == 130, err
        told, interrupted = filter(None, err.splitlines())  # an empty line is click's
        assert told.startswith(f"novafs: {root} is in use: ")
        assert told.endswith(f"; then 'novafs umount {root}'")
        assert interrupted == INTERRUPTED
        assert os.listdir(root) == []
    finally:
        command.run("umount", root)
    assert holder(state) is None


def test_a_terminal_that_was_closed_keeps_nothing_from_being_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    with open(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        for ended_by in ("a step", "the end"):
            shown = _Shown()
            shown._from_s = 0.0
            shown("reading", 0.1)
            if ended_by == "a step":
                os.close(master)
                shown("writing", 0.2)
            shown.end()


def test_a_wrong_byte_is_told_and_is_a_failure(plain: Mount) -> None:
    program = start(plain.path, "--size", "1M", "--seconds", "600", "--work", "random")
    image = wait_for_image(plain, program)
    over = threading.Event()

    def spoil() -> None:
        with image.open("r+b") as file:
            while not over.is_set():
                os.pwrite(file.fileno(), bytes(MIB), 0)

    spoiler = threading.Thread(target=spoil)
    spoiler.start()
    status, out, err = ended(program)
    over.set()
    spoiler.join()
    assert (status, out) == (1, "")
    assert err.startswith("novafs: WRONG DATA was read: ")
    assert len(err.splitlines()) == 1
    assert os.listdir(plain.path) == []


def test_what_is_wrong_is_said_in_one_line(plain: Mount, tmp_path: Path, command: Cli) -> None:
    left = f"{PREFIX}{_host()}-{1 << 30}-abcdef01"
    (plain.path / left).mkdir()
    for arguments, status, said in (
        ((plain.path, "--work", "raed"), 2, "--work raed: is none; choose of write, read, "),
        ((plain.path, "--seconds", "nan"), 2, "--seconds nan: expected a number of seconds"),
        ((plain.path, "--size", "5000"), 2, "--size 5000: expected a multiple of 1 MiB"),
        ((plain.path, "--size", "3000TiB"), 2, "--size 3000TiB: expected at most 1.0 TiB"),
        ((plain.path, "--size", "1TiB"), 1, "a bench of 1.0 TiB needs 1.2 TiB, and the volume has "),
        ((plain.path / "missing",), 1, f"{plain.path / 'missing'}: is no directory of the mount at {plain.path}"),
    ):
        told = command.fails("bench", *arguments, status=status)
        assert told.startswith(said), told
    status, out, err = bench(tmp_path / "none")
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert err.startswith(f"novafs: the directory {tmp_path / 'none'} does not exist; "), err
    result = command.run("bench", plain.path, "--work", "images", "--seconds", "0.01")
    assert result.err == f"novafs: {plain.path / left} was left by a bench that was killed: remove it with 'rm -r'\n"
    assert result.status == 0
    assert os.listdir(plain.path) == [left]


def test_a_mount_that_is_read_only_is_refused(tmp_path: Path, command: Cli) -> None:
    with mounted(tmp_path, "-o", "ro") as mount:
        assert command.fails("bench", mount.path) == f"{mount.path} is mounted read-only: a bench writes the image that it reads"


def test_a_mount_that_dies_is_an_error_like_any_other(tmp_path: Path) -> None:
    url = trio.run(lambda: make_volume(f"file://{tmp_path / 'store'}"))
    with running(url, tmp_path / "mnt", tmp_path / "state") as mount:
        program = start(mount.path, "--size", "1M", "--seconds", "600", "--work", "random")
        wait_for_image(mount, program)
        mount.kill()
        status, out, err = ended(program)
        assert (status, out) == (1, "")
        lines = err.splitlines()
        assert 0 < len(lines) <= 2, err
        assert all(line.startswith("novafs: ") for line in lines), err
