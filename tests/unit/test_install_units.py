"""What `novafs install-units` puts where, and that what is written down of the commands is what they are."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from novafs.cli import install_units, main, manpages

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted(path.name for path in (ROOT / "systemd").glob("novafs*@.*"))


def install(root: Path, *arguments: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["install-units", "--root", str(root), *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_everything_is_put_in_place_once_and_taken_away_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = install(tmp_path, capsys=capsys)
    found = files(tmp_path)
    assert {f"usr/local/lib/systemd/system/{name}" for name in UNITS} <= found
    assert {"usr/sbin/mount.novafs", "usr/sbin/mount.fuse.novafs", "usr/sbin/umount.fuse.novafs"} <= found
    assert "usr/local/share/man/man8/mount.novafs.8" in found
    assert {line.split()[1].removeprefix(f"{tmp_path}/") for line in said} == found
    assert {line.split()[0] for line in said} == {"installed"}
    assert {line.split()[0] for line in install(tmp_path, capsys=capsys)} == {"unchanged"}

    (tmp_path / "usr/sbin/mount.novafs").chmod(0o644)
    older = install_units._stamped("[Unit]\nDescription=of an older version\n")
    (tmp_path / "usr/local/lib/systemd/system/novafs@.service").write_text(older)
    assert sorted(line.split()[0] for line in install(tmp_path, capsys=capsys) if "unchanged" not in line) == ["updated", "updated"]
    assert {line.split()[0] for line in install(tmp_path, "--remove", capsys=capsys)} == {"removed"}
    assert files(tmp_path) == set()


def test_what_somebody_changed_or_put_there_is_kept_beside_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(tmp_path, capsys=capsys)
    unit = tmp_path / "usr/local/lib/systemd/system/novafs@.service"
    helper = tmp_path / "usr/sbin/mount.novafs"
    edited = unit.read_text().replace("WatchdogSec=60", "WatchdogSec=120")
    unit.write_text(edited)
    helper.unlink()
    helper.symlink_to("/opt/elsewhere/mount.novafs")
    said = install(tmp_path, capsys=capsys)
    assert [line for line in said if "unchanged" not in line] == [
        f"replaced  {unit}",
        f"          it was not as novafs had left it: that is kept as {unit}.novafs-saved",
        f"replaced  {helper}",
        f"          it was not as novafs had left it: that is kept as {helper}.novafs-saved",
        "what you change in a unit belongs into a drop-in, which stays: systemctl edit novafs@.service (or novafs@NAME.service)",
    ]
    assert Path(f"{unit}.novafs-saved").read_text() == edited and "WatchdogSec=60" in unit.read_text()
    assert os.readlink(f"{helper}.novafs-saved") == "/opt/elsewhere/mount.novafs" and helper.is_file() and not helper.is_symlink()
    assert {line.split()[0] for line in install(tmp_path, capsys=capsys)} == {"unchanged"}
    unit.write_text("mine\n")
    assert f"          it was not as novafs had left it: that is kept as {unit}.novafs-saved.2" in install(
        tmp_path, "--remove", capsys=capsys
    )
    assert sorted(map(Path, (f"{unit}.novafs-saved", f"{unit}.novafs-saved.2", f"{helper}.novafs-saved"))) == sorted(
        path for path in tmp_path.rglob("*") if not path.is_dir()
    )
    assert Path(f"{unit}.novafs-saved.2").read_text() == "mine\n"


def test_the_units_call_this_novafs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(tmp_path, "--prefix", "/usr", capsys=capsys)
    unit = (tmp_path / "usr/lib/systemd/system/novafs@.service").read_text()
    assert "/usr/bin/novafs " not in unit
    assert "\nExecStart=/" in unit and " mount --foreground %i\n" in unit
    helper = (tmp_path / "usr/sbin/mount.novafs").read_text()
    assert helper.startswith("#!/bin/sh\nexec ") and ' -P -m novafs.cli.mount_helper mount "$@"\n' in helper


def test_a_path_that_systemd_would_misread_is_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(tmp_path, "--novafs", '/opt/50% "off"/$x/novafs', capsys=capsys)
    unit = (tmp_path / "usr/local/lib/systemd/system/novafs-gc@.service").read_text()
    assert '\nExecStart="/opt/50%% \\"off\\"/$$x/novafs" gc %i\n' in unit


def test_a_separate_sbin_is_the_place_of_the_helpers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sbin").mkdir()
    install(tmp_path, capsys=capsys)
    assert (tmp_path / "sbin/mount.novafs").is_file()


def test_a_place_that_can_not_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "usr").write_text("a file")
    assert main(["install-units", "--root", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "usr/local/lib/systemd/system" in error and "run as root, or choose other places" in error


@pytest.mark.parametrize(
    ("before", "with_us", "without_us"),
    [
        (None, "novafs\n*\n", ""),
        ("xfs\next4\n*\n", "xfs\next4\nnovafs\n*\n", "xfs\next4\n*\n"),
        ("ext4\n", "ext4\nnovafs\n", "ext4\n"),
        ("novafs\n*\n", "novafs\n*\n", ""),
    ],
)
def test_the_list_of_file_systems_keeps_the_lines_of_others(before: str | None, with_us: str, without_us: str, tmp_path: Path) -> None:
    path = tmp_path / "filesystems"
    if before is not None:
        path.write_text(before)
    install_units._install(install_units._filesystems(path, remove=False))
    assert path.read_text() == with_us
    install_units._install(install_units._filesystems(path, remove=True))
    assert (path.read_text() if path.exists() else "") == without_us


def test_the_manual_pages_in_the_tree_are_current() -> None:
    written = {path.name: path.read_text() for path in (ROOT / "docs/man").iterdir()}
    assert written == manpages.pages(), "run: make generated"


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is missing: tools/install-deps.sh test installs it")
@pytest.mark.parametrize("page", ["novafs.1", "mount.novafs.8"])
def test_a_manual_page_is_sound_roff(page: str) -> None:
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-z", str(ROOT / "docs/man" / page)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_asks_novafs_itself(shell: str) -> None:
    text = install_units.completion(shell)
    assert "_NOVAFS_COMPLETE" in text and f"{shell}_complete" in text


def test_bash_completes_commands_and_options() -> None:
    path = f"{Path(install_units._program()[0]).parent}:/usr/bin:/bin"
    program = install_units.completion("bash") + (
        '\nCOMP_WORDS=(novafs mou); COMP_CWORD=1; COMPREPLY=(); _novafs_completion novafs; echo "${COMPREPLY[@]}"'
        '\nCOMP_WORDS=(novafs umount --verb); COMP_CWORD=2; COMPREPLY=(); _novafs_completion novafs; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True, env={"PATH": path})
    assert done.stdout.splitlines() == ["mount", "--verbose"]


def test_what_it_makes_can_be_read_by_all_whatever_the_umask_of_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = os.umask(0o077)
    try:
        install(tmp_path, capsys=capsys)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o055 for path in tmp_path.rglob("*") if path.is_dir()} == {0o055}


def test_a_file_that_is_no_text_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(tmp_path, capsys=capsys)
    (tmp_path / "usr/sbin/mount.novafs").write_bytes(b"\x7fELF\xff")
    assert [line.split()[0] for line in install(tmp_path, capsys=capsys) if "unchanged" not in line] == ["replaced", "it"]
    assert (tmp_path / "usr/sbin/mount.novafs.novafs-saved").read_bytes() == b"\x7fELF\xff"
