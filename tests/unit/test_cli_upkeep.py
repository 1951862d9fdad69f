"""`novafs gc`, `fsck` and `lease` as a user calls them."""

from __future__ import annotations

import io
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from novafs.lease import LeaseManager, LeaseRules
from novafs.objectstore.client import StoreClient
from novafs.objectstore.file import FileStore
from tests.support.cli_fixtures import Cli, LocalVolume

GRACE = ("--set", "gc.grace=100ms")
AWAKE_S = 1.3
"""A grace, and the second that S3's times are blunt by."""


class Terminal(io.StringIO):
    """Standard input with somebody at it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def volume(local_volume: LocalVolume, tmp_path: Path) -> LocalVolume:
    """A volume with one image and a clone of it."""
    (tmp_path / "disk").write_bytes(random.Random(1).randbytes(1 << 20))
    local_volume("import", tmp_path / "disk", "disk.raw", "--format", "raw")
    local_volume("clone", "disk.raw", "copy.raw")
    return local_volume


def holder(volume: LocalVolume, **rules: Any) -> tuple[bytes, str]:
    """Another host that holds the lease of disk.raw; its journal, and the image's id."""
    image_id = next(row["id"] for row in volume.json("ls") if row["name"] == "disk.raw")
    journal_id = b"j" * 16

    async def main() -> None:
        client = StoreClient(FileStore(volume.root))
        manager = LeaseManager(client, journal_id, LeaseRules(**rules))
        await manager.acquire(bytes.fromhex(image_id), "disk.raw")

    trio.run(main)
    return journal_id, image_id


# --- gc -----------------------------------------------------------------------------------------------------------


def test_gc_tells_what_is_shared(volume: LocalVolume) -> None:
    found = volume.json("gc")
    assert (found["images"], found["references"], found["unique_chunks"], found["histogram"]) == (2, 32, 16, {"2": 16})
    assert found["dedup_ratio"] == 2.0
    text = volume("gc")
    assert "32 to 16 chunks, dedup 2.00 : 1" in text
    assert "2: 16" in text


def test_gc_frees_what_was_removed_in_runs_a_grace_apart(volume: LocalVolume) -> None:
    volume("rm", "disk.raw", "copy.raw")
    time.sleep(AWAKE_S)  # by the store's own clock: there is no other to turn
    dry = volume.json("gc", "--all", "--dry-run", *GRACE)
    assert (dry["packs_condemned"], dry["packs_newly_condemned"]) == (1, 1)
    assert volume.json("gc", "--all", *GRACE)["packs_condemned"] == 1
    time.sleep(AWAKE_S)
    assert "freed" in volume("gc", "--all", *GRACE)
    assert not list((volume.root / "packs").rglob("*.*"))
    assert [path for path in (volume.root / "packs").rglob("*") if path.is_file()] == []
    assert volume("ls") == ""


def test_gc_keeps_what_is_dead_while_there_is_room(volume: LocalVolume) -> None:
    volume("rm", "disk.raw", "copy.raw")
    time.sleep(AWAKE_S)
    found = volume.json("gc", *GRACE)
    assert (found["packs"], found["packs_kept"], found["packs_condemned"]) == (1, 1, 0)


def test_gc_refuses_a_grace_that_writers_do_not_count_with(volume: LocalVolume) -> None:
    assert "--set gc.grace" in volume.fails("gc", "--grace", "1s", status=2)
    assert "duration" in volume.fails("gc", "--grace", "soon", status=2)
    volume("gc", "--grace", "10m")


def test_gc_fails_where_something_can_not_be_read(volume: LocalVolume, command: Cli) -> None:
    image_id = volume.json("ls")[0]["id"]
    for path in (volume.root / "images" / image_id).iterdir():
        path.write_bytes(b"rubbish")
    result = command.run("gc", volume.url, *volume.options)
    assert result.status == 1
    assert "nothing was freed" in result.err
    assert "copy.raw" in result.err


# --- fsck ---------------------------------------------------------------------------------------------------------


def test_fsck_is_quiet_about_a_good_volume(volume: LocalVolume) -> None:
    text = volume("fsck", "--scrub")
    assert text.endswith("no problems\n")
    assert "16 frames" in text
    found = volume.json("fsck")
    assert (found["problems"], found["images"], found["packs"]) == (0, 2, 1)


def test_fsck_names_what_damage_touches_and_fails(volume: LocalVolume, command: Cli) -> None:
    (pack,) = (path for path in (volume.root / "packs").rglob("*") if path.is_file())
    data = bytearray(pack.read_bytes())
    data[200] ^= 1
    pack.write_bytes(data)
    assert command.run("fsck", volume.url, *volume.options).status == 0
    result = command.run("fsck", volume.url, "--scrub", "--rate", "1GB", *volume.options)
    assert result.status == 1
    assert "problem: copy.raw: 65536 bytes from byte 0 can not be read" in result.out
    assert "problem: disk.raw: 65536 bytes from byte 0 can not be read" in result.out
    result = command.run("fsck", volume.url, "--json", *volume.options)
    assert result.status == 1
    found = json.loads(result.out)
    assert [t["path"] for t in found["touched"]] == ["copy.raw", "disk.raw"]
    assert command.run("fsck", volume.url, "--repair", *volume.options).status == 1  # there is no other copy


def test_fsck_mends_a_volume_that_can_not_be_opened(volume: LocalVolume, command: Cli) -> None:
    (volume.root / "novafs.json").unlink()
    assert "no NovaFS volume" in volume.fails("ls")
    result = command.run("fsck", volume.url, *volume.options)
    assert (result.status, "problem: novafs.json is missing" in result.out) == (1, True)
    assert "repaired: novafs.json" in volume("fsck", "--repair")
    assert volume.names() == ["copy.raw", "disk.raw"]


def test_fsck_says_how_it_is_called(volume: LocalVolume, command: Cli) -> None:
    for arguments in (["--apply-aside", "f"], ["--as", "x"], ["--onto", "3"], ["--rate", "1MB"]):
        assert command.run("fsck", volume.url, *arguments, *volume.options).status == 2
    assert "no such file" in volume.fails("fsck", "--apply-aside", "missing.seg", "--as", "x")


# --- lease --------------------------------------------------------------------------------------------------------


def test_lease_ls_tells_who_writes(volume: LocalVolume, command: Cli) -> None:
    def run(*arguments: object) -> str:
        return command("lease", "ls", volume.url, *arguments, *volume.options)

    assert run() == "no image is being written\n"
    holder(volume)
    assert "disk.raw: held by" in run()
    assert "epoch 1, heartbeat" in run("disk.raw")
    (row,) = json.loads(run("--json"))
    assert (row["image"], row["state"], row["epoch"], row["journal_id"]) == ("disk.raw", "held", 1, (b"j" * 16).hex())
    assert "no such image" in command.fails("lease", "ls", volume.url, "other.raw", *volume.options)


def test_lease_break_says_what_may_be_lost(volume: LocalVolume, command: Cli) -> None:
    _, image_id = holder(volume)
    result = command.run("lease", "break", volume.url, "disk.raw", *volume.options)
    assert result.status == 0
    assert "most likely alive" in result.err
    assert "in its journal alone" in result.err
    assert "epoch 1, held by" in result.out
    assert "released" in command("lease", "ls", volume.url, "--all", *volume.options)
    assert "nobody holds" in command("lease", "break", volume.url, image_id, *volume.options)
    assert json.loads(command("lease", "break", volume.url, "copy.raw", "--json", *volume.options)) == {
        "image": "copy.raw",
        "broken": False,
    }


def test_lease_break_of_an_image_without_a_name(volume: LocalVolume, command: Cli) -> None:
    _, image_id = holder(volume, durability="store")
    volume("rm", "disk.raw")
    result = command.run("lease", "break", volume.url, image_id, "--json", *volume.options)
    assert "nothing that was fsynced is lost" in result.err
    assert json.loads(result.out) == {"image": f"image {image_id}", "broken": True, "epoch": 1}


@pytest.mark.parametrize(("answer", "yes", "broken"), [("n\n", False, False), ("y\n", False, True), ("", True, True)])
def test_lease_break_asks_somebody_at_a_terminal(
    volume: LocalVolume, command: Cli, monkeypatch: pytest.MonkeyPatch, answer: str, yes: bool, broken: bool
) -> None:
    holder(volume)
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    result = command.run("lease", "break", volume.url, "disk.raw", *(["--yes"] if yes else []), *volume.options)
    assert (result.status == 0) == broken
    assert ("Take the lease away?" in result.err) != yes
    (row,) = json.loads(command("lease", "ls", volume.url, "disk.raw", "--json", *volume.options))
    assert row["state"] == ("released" if broken else "held")
