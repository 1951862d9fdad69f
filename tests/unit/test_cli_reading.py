"""`novafs init`, `ls`, `info`, `rm` and `stats`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

from novafs import statedir
from novafs.cli import stats
from novafs.control import ControlServer
from novafs.statedir import StateLock
from tests.support.cli_fixtures import Cli, LocalVolume


@pytest.fixture
def filled(local_volume: LocalVolume, tmp_path: Path) -> LocalVolume:
    """A volume with `a.raw` (1 MiB, half of it a hole, the rest twice the same chunks) and `web/b.raw` (the same)."""
    source = tmp_path / "a.raw"
    chunks = [bytes([65 + number % 4]) * 65536 for number in range(8)]
    source.write_bytes(b"".join(chunks).ljust(1 << 20, b"\0"))
    local_volume("import", source)
    local_volume("import", source, "web/b.raw", "--parents")
    return local_volume


# --- init -------------------------------------------------------------------------------------------------------


def test_a_volume_is_made_once(command: Cli, tmp_path: Path) -> None:
    url, options = f"file://{tmp_path}/v", ("--state-dir", tmp_path / "s", "--l2-url", "none")
    assert command("init", url, "--chunk-size", "4K", *options).endswith(f"at {url}, with chunks of 4.0 KiB\n")
    assert command.json("info", url, *options)["chunk_size"] == 4096
    assert "there is a NovaFS volume here already" in command.fails("init", url, *options)


@pytest.mark.parametrize(("size", "message"), [("64", "must be one of 4K, 64K, 1M"), ("2M", "must be one of"), ("many", "is no size")])
def test_a_chunk_size_that_is_none_is_wrong_usage(command: Cli, tmp_path: Path, size: str, message: str) -> None:
    assert message in command.fails("init", f"file://{tmp_path}/v", "--chunk-size", size, status=2)
    assert not (tmp_path / "v").exists()


def test_the_preset_given_to_init_is_this_hosts_default(command: Cli, tmp_path: Path) -> None:
    url, options = f"file://{tmp_path}/v", ("--state-dir", tmp_path / "s")
    command("init", url, "--preset", "global", *options)
    found = command.json("info", url, "--settings", *options)
    assert found["preset"]["value"] == "global"
    assert found["preset"]["origin"] == f"{tmp_path}/s/settings.toml line 2"
    assert found["l3.capacity"]["origin"] == "preset global"
    assert command.json("info", url, "--settings", "--preset", "edge", *options)["preset"]["value"] == "edge"


def test_a_volume_has_a_name_in_its_file(command: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOVAFS_CONFIG_DIR", str(tmp_path))
    (tmp_path / "vm.toml").write_text(f'volume = "file://{tmp_path}/v"\nstate_dir = "{tmp_path}/s"\n[l2]\nurl = "none"\n')
    command("init", "vm")
    assert command("ls", "vm") == ""


# --- ls ---------------------------------------------------------------------------------------------------------


def test_a_listing_has_the_columns_of_ls(filled: LocalVolume) -> None:
    lines = filled("ls").splitlines()
    assert [line.split()[0] for line in lines] == ["-rw-r--r--", "drwxr-xr-x"]
    assert [line.split()[-1] for line in lines] == ["a.raw", "web/"]
    assert lines[0].split()[3] == "1048576"
    assert filled("ls", "-H").splitlines()[0].split()[3:5] == ["1.0", "MiB"]
    assert filled("ls", "web").split()[-1] == "b.raw"
    assert filled("ls", "web/b.raw").split()[-1] == "b.raw"


def test_a_listing_in_json_has_all_figures(filled: LocalVolume) -> None:
    image, directory = filled.json("ls")
    assert (image["name"], image["kind"], image["size"], image["mode"]) == ("a.raw", "image", 1 << 20, 0o644)
    assert 0 < image["stored_bytes"] < 1 << 19
    assert (directory["name"], directory["kind"]) == ("web", "directory")


def test_a_listing_of_nothing_is_empty(local_volume: LocalVolume) -> None:
    assert local_volume("ls") == ""
    assert local_volume.json("ls") == []
    assert "nowhere: no such image or directory" in local_volume.fails("ls", "nowhere")


def test_owners_without_a_name_are_numbers_and_odd_names_are_escaped() -> None:
    from novafs.cli.ls import _columns

    row = {
        "kind": "image",
        "mode": 0o600,
        "uid": 4294967000,
        "gid": 4294967001,
        "size": 1,
        "stored_bytes": 0,
        "mtime_ns": 0,
        "name": "a\x1b[31m\nb",
    }
    columns = _columns(row, str)
    assert columns[1:3] == ["4294967000", "4294967001"]
    assert columns[-1] == "a\\x1b[31m\\nb"


def test_a_large_directory_is_listed_from_what_the_catalog_knows(filled: LocalVolume, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("novafs.cli.ls.EXACT_MAX", 1)
    assert next((row["name"], row["size"]) for row in filled.json("ls")) == ("a.raw", 1 << 20)


# --- info -------------------------------------------------------------------------------------------------------


def test_info_of_a_volume_counts_what_it_holds(filled: LocalVolume) -> None:
    found = filled.json("info")
    assert (found["images"], found["directories"], found["size_bytes"], found["allocated_bytes"]) == (2, 1, 2 << 20, 1 << 20)
    assert found["chunk_size"] == 65536
    assert found["compression_ratio"] > 1
    assert found["used_bytes"] > 0
    assert found["url"] == filled.url
    text = filled("info")
    for words in (filled.url, "2 images in 2 directories", "2.0 MiB (2,097,152 bytes)", "dedup", ": 1"):
        assert words in text


def test_info_of_an_empty_volume_divides_by_nothing(local_volume: LocalVolume) -> None:
    found = local_volume.json("info")
    assert (found["images"], found["directories"], found["dedup_ratio"], found["compression_ratio"]) == (0, 0, 1.0, 1.0)
    assert "0 images in 1 directories" in local_volume("info")


def test_info_of_an_image_tells_holes_dedup_and_compression(filled: LocalVolume) -> None:
    found = filled.json("info", "a.raw")
    assert (found["path"], found["size"], found["generation"]) == ("a.raw", 1 << 20, 0)
    assert (found["allocated_chunks"], found["unique_chunks"], found["hole_chunks"]) == (8, 4, 8)
    assert (found["allocated_bytes"], found["hole_bytes"]) == (1 << 19, 1 << 19)
    assert found["dedup_ratio"] == 2.0
    assert found["compression_ratio"] > 10
    text = filled("info", "a.raw")
    assert "8 chunks, 4 different" in text
    assert "2.00 : 1  (within the image)" in text
    assert "web: is a directory; 'novafs ls' lists it" in filled.fails("info", "web")
    assert "none.raw: no such image" in filled.fails("info", "none.raw")


# --- rm ---------------------------------------------------------------------------------------------------------


def test_images_are_removed_and_directories_only_when_asked_for(filled: LocalVolume) -> None:
    assert "web: is a directory; add -r to remove it with all in it" in filled.fails("rm", "a.raw", "web")
    assert "none.raw: no such image" in filled.fails("rm", "a.raw", "none.raw")
    assert filled.names() == ["a.raw", "web"], "a command with a wrong name removes nothing"
    assert filled("rm", "a.raw", "a.raw") == "removed a.raw\n"
    assert filled("rm", "-r", "web") == "removed web/b.raw\nremoved web\n"
    assert filled.names() == []
    assert "is the volume's root directory" in filled.fails("rm", "-r", "/")


# --- stats --------------------------------------------------------------------------------------------------------


def test_statistics_of_a_volume_that_is_not_mounted_come_from_the_volume(filled: LocalVolume) -> None:
    found = filled.json("stats")
    assert found["mounted"] is False
    assert found["volume"]["url"] == filled.url
    assert found["usage"]["used_bytes"] > 0
    text = filled("stats")
    assert text.startswith(f"{filled.url}, not mounted on this host\nchunks served from L1 0, L2 0, L3 0\n")


DOCUMENT = {
    "volume": {"url": "file:///v", "chunk_size": 65536, "read_only": False},
    "data_at_risk": {"bytes": 2048, "age_s": 1.5, "images": 1},
    "cache": {"l1": {"hits": 90, "misses": 10}, "l2_traffic": {"hits": 7}, "l3_traffic": {"hits": 3, "seconds": 0.25}},
    "mount": {"mountpoint": "/images", "pid": 12345},
    "tiers": [{"name": "l1", "used_bytes": 1 << 20}, 7],
    "nothing": {},
    "l2": None,
    "ratio": 1.5,
    "age_s": 90.0,
    "odd": "\x1b[31m",
}


class Mounted:
    """What a daemon shows of itself: the lock, and the socket with statistics."""

    def __init__(self, state: Path) -> None:
        self.state = state

    async def answer(self, work: Any) -> Any:
        async def handler(_request: Mapping[str, Any]) -> object:
            await trio.lowlevel.checkpoint()
            return DOCUMENT

        server = ControlServer(self.state / statedir.CONTROL_SOCKET)
        server.register("stats", handler)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            result = await trio.to_thread.run_sync(work)
            nursery.cancel_scope.cancel()
        return result


def test_statistics_of_a_volume_that_is_mounted_come_from_its_daemon(command: Cli, tmp_path: Path) -> None:
    state = statedir.prepare(tmp_path / "state")
    lock = StateLock.take(state, mountpoint="/images")
    arguments = ("stats", "file:///v", "--state-dir", state)
    assert json.loads(trio.run(Mounted(state).answer, lambda: command(*arguments, "--json"))) == DOCUMENT
    lines = trio.run(Mounted(state).answer, lambda: command(*arguments)).splitlines()
    assert lines[:3] == [
        "file:///v, mounted at /images by process 12345",
        "chunks served from L1 90 (90.0%), L2 7 (7.0%), L3 3 (3.0%)",
        "written and not stored yet: 2.0 KiB",
    ]
    for words in (
        "hit rate  90.0%",
        "seconds  250 ms",
        "used  1.0 MiB",
        "ratio  1.50",
        "age    1 min 30 s",
        "odd    \\x1b[31m",
        "read only   no",
    ):
        assert any(words in line for line in lines), (words, lines)
    assert "no mount answers at" in command.fails(*arguments)
    lock.release()


def test_a_file_in_the_place_of_the_state_directory_is_wrong_usage(local_volume: LocalVolume, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    message = local_volume.command.fails("ls", local_volume.url, "--l2-url", "none", "--state-dir", tmp_path / "file", status=2)
    assert message == f"the state directory {tmp_path}/file is not a directory: choose another with --state-dir"


def test_a_mount_of_something_else_is_not_asked(tmp_path: Path) -> None:
    assert stats.state_dir_of_mount("/proc") is None
    assert stats.state_dir_of_mount(str(tmp_path)) is None
    assert stats.state_dir_of_mount("s3://bucket/x") is None
    assert os.path.ismount("/proc")
