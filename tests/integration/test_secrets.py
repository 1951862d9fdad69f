"""Marked secrets go through everything an operator does, and are looked for in all that anybody else can see.

Looked through: what commands print, logs, every file of the state directory, metrics, the status page, the mount table, and the command
lines of all processes (what `ps` shows) while the mount lives.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest
from redis import Redis

from novafs import statedir
from novafs.mounttable import mount_at
from tests.support.ceph import Ceph, Credentials, free_port
from tests.support.redis_servers import RedisServer

pytestmark = [pytest.mark.fuse, pytest.mark.redis, pytest.mark.s3]

REDIS = "marked/redis@secret"
AWS = "markedawssecret0123456789"
TOKEN = "markedawstoken"
WRONG = "markedwrongsecret"
IN_URL = "markedurlsecret"
MARKS = ("marked/redis", quote(REDIS, safe=""), "redis@secret", AWS, TOKEN, WRONG, IN_URL)


class Watch:
    """Runs commands and keeps all that could be seen of them."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.environ = environ
        self.seen: list[tuple[str, str]] = []

    def run(self, *arguments: object, status: int | None = 0, **environ: str) -> str:
        command = [sys.executable, "-m", "novafs.cli", *map(str, arguments)]
        everything = {**os.environ, **self.environ, **environ}
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, env=everything)
        # The arguments are this test's own; what is said of them is not.
        self.seen.append((f"output of novafs {arguments[0]}", done.stdout + done.stderr))
        assert status is None or done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def look_at_processes(self) -> None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it has ended
            self.seen.append((str(path), text))

    def look_at_files(self, directory: Path) -> None:
        for path in directory.rglob("*"):
            if path.is_file() and not path.is_symlink():
                self.seen.append((str(path), path.read_bytes().decode("latin-1")))

    def found(self) -> list[str]:
        """What shows a secret, with the place."""
        return [f"{where}: {text[max(0, text.find(mark) - 200) :][:400]}" for where, text in self.seen for mark in MARKS if mark in text]


def test_no_secret_is_seen_by_anybody(ceph_rgw: Ceph, tmp_path: Path) -> None:
    ceph_rgw.add_user("secretive", credentials=Credentials("SECRETIVE", AWS))
    ceph_rgw.make_bucket("secretive", Credentials("SECRETIVE", AWS))
    volume = ceph_rgw.volume_url("secretive", "volume")
    (tmp_path / "etc").mkdir()
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    with RedisServer(tmp_path) as redis:
        with Redis(port=redis.port) as client:
            client.config_set("requirepass", REDIS)
        url = f"redis://:{quote(REDIS, safe='')}@127.0.0.1:{redis.port}/0"
        port = free_port()
        file = tmp_path / "etc/web.toml"
        text = f'volume = "{volume}"\nstate_dir = "{tmp_path}/state"\nmetrics = "127.0.0.1:{port}"\n[l1]\ncapacity = "64MiB"\n[l2]\n'
        file.write_text(f'{text}url = "{url}"\n')
        watch = Watch(
            {
                "AWS_ACCESS_KEY_ID": "SECRETIVE",
                "AWS_SECRET_ACCESS_KEY": AWS,
                "NOVAFS_CONFIG_DIR": str(file.parent),
                "HOME": str(tmp_path),
                "COVERAGE_PROCESS_CONFIG": "",
            }
        )
        watch.run("init", "web", "-vv")

        # A password on the command line, as a careless user gives it.
        watch.run("mount", "web", mnt, "-vv", "--l2-url", url, "-o", f"l2_url={url}", "--log-level", "debug")
        pid = statedir.holder(tmp_path / "state")
        assert pid is not None
        try:
            watch.look_at_processes()
            (mnt / "a.raw").write_bytes(os.urandom(300_000))
            watch.run("stats", mnt, "--json")
            watch.run("stats", mnt)
            watch.run("info", "web", "--settings")
            for path in ("metrics", ""):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=30) as answer:
                    watch.seen.append((f"http /{path}", answer.read().decode()))
            file.write_text(f'{text}url = "redis://:{WRONG}@127.0.0.1:{redis.port}/0"\n')
            watch.run("reload", mnt)
            file.write_text(f'{text}url = "redis://:{WRONG}@127.0.0.1:port/0"\n')
            watch.run("reload", "web", status=None)
            os.kill(pid, signal.SIGHUP)
            watch.seen.append(("mount table", Path("/proc/self/mountinfo").read_text()))
        finally:
            watch.run("umount", mnt)
        assert mount_at(mnt) is None

        # Not a URL, with a password in it; and one that only the file has.
        assert "l2.url" in watch.run("ls", "web", status=2)
        # Wrong secrets: a Redis that refuses the password, a store that refuses the key, a token, and a URL with both in it.
        file.write_text(f'{text}url = "redis://:{WRONG}@127.0.0.1:{redis.port}/0"\n')
        assert "L2 at" in watch.run("export", "web", "a.raw", tmp_path / "out", "-vv")
        file.write_text(f'{text}url = "none"\n')
        assert "SignatureDoesNotMatch" in watch.run("ls", "web", "-vv", status=1, AWS_SECRET_ACCESS_KEY=WRONG)
        watch.run("ls", "web", "-vv", status=None, AWS_SESSION_TOKEN=TOKEN)
        assert "credentials" in watch.run("ls", f"s3://SECRETIVE:{IN_URL}@secretive/volume", "-vv", status=2)
        watch.run("mount", "web", mnt, "--l2-url", f"rediss://:{WRONG}@127.0.0.1:1/0?ca=/missing&password={WRONG}", "-vv", status=None)
        if mount_at(mnt) is not None:
            watch.run("umount", mnt)
        watch.look_at_files(tmp_path / "state")
        log = (tmp_path / "state/mount.log").read_text()

    assert re.search(r"level=debug", log), "the log was not tried at its most talkative"
    assert any("novafs.cli mount" in text for _, text in watch.seen), "the daemon's command line was not seen"
    assert watch.found() == []
