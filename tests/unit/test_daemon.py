"""Going into the background: the terminal is kept until the daemon is ready, or has failed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from novafs import daemon
from novafs.errors import AccessDeniedError, BugError

PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
from novafs import daemon

log = Path(sys.argv[1])

def facts():
    return {"pid": os.getpid(), "sid": os.getsid(0), "cwd": os.getcwd(), "fds": sorted(map(int, os.listdir("/proc/self/fd")))}

def work(ready, report):
    %s

started = daemon.background(work, log=log)
print(json.dumps(started._asdict()))
"""


def background(tmp_path: Path, body: str) -> tuple[dict[str, object], str]:
    """What the caller of `background` got, and the log as it was then."""
    log = tmp_path / "log"
    code = PROGRAM % body.strip().replace("\n", "\n    ")
    done = subprocess.run(
        [sys.executable, "-c", code, str(log)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True
    )
    return json.loads(done.stdout), log.read_text()


def wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
                os.sched_yield()
                continue
        return
    raise AssertionError(f"process {pid} is still there")


def test_the_caller_returns_when_the_daemon_is_ready_and_the_daemon_goes_on(tmp_path: Path) -> None:
    started, log = background(
        tmp_path, "print(json.dumps(facts()))\nsys.stdout.flush()\nready()\nsignal.sigwait({signal.SIGTERM})\nreturn 0"
    )
    pid = started["pid"]
    assert isinstance(pid, int)
    try:
        assert started == {"pid": pid, "status": None, "message": ""}
        facts = json.loads(log)
        assert facts["pid"] == pid
        assert facts["sid"] not in (pid, os.getsid(0)), "a session of its own, and not its leader, so that it can get no terminal"
        assert facts["cwd"] == "/"
        assert [fd for fd in facts["fds"] if fd > 2][1:] == facts["fds"][-1:], "nothing inherited is open but the pipe to the caller"
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_gone(pid)


def test_what_the_daemon_reports_before_it_is_ready_reaches_the_caller(tmp_path: Path) -> None:
    started, _ = background(tmp_path, 'report(2, "the key is wrong")\nreturn 2')
    assert (started["status"], started["message"]) == (2, "the key is wrong")


def test_a_report_after_ready_has_no_effect(tmp_path: Path) -> None:
    started, _ = background(tmp_path, 'ready()\nreport(2, "late")\nready()\nreturn 2')
    assert started["status"] is None


def test_a_daemon_that_ends_before_it_is_ready_has_failed(tmp_path: Path) -> None:
    started, _ = background(tmp_path, "return 0")
    assert started["status"] == 1
    assert "ended before it was ready; see the end of" in str(started["message"])
    started, _ = background(tmp_path, "return 3")
    assert started["status"] == 3


def test_a_bug_in_the_daemon_is_in_the_log_and_its_last_line_on_the_terminal(tmp_path: Path) -> None:
    started, log = background(tmp_path, 'raise ValueError("oops")')
    assert (started["status"], started["message"]) == (1, "ValueError: oops")
    assert "Traceback" in log
    assert log.endswith("ValueError: oops\n")


def test_a_daemon_that_is_killed_before_it_is_ready_has_failed(tmp_path: Path) -> None:
    started, _ = background(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert started["status"] == 1
    assert "ended before it was ready" in str(started["message"])


def test_exit_handlers_of_the_daemon_run(tmp_path: Path) -> None:
    _, log = background(tmp_path, 'import atexit\natexit.register(lambda: print("the end"))\nprint("bye")\nready()\nreturn 0')
    deadline = time.monotonic() + 30
    while "the end" not in log and time.monotonic() < deadline:
        log = (tmp_path / "log").read_text()
    assert log == "bye\nthe end\n"


def test_an_interrupted_caller_ends_the_daemon(tmp_path: Path) -> None:
    log = tmp_path / "log"
    body = 'print(os.getpid(), flush=True); signal.sigwait({signal.SIGTERM}); print("ended", flush=True); return 0'
    caller = subprocess.Popen([sys.executable, "-c", PROGRAM % body, str(log)], stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        os.sched_yield()
    pid = int(log.read_text())
    caller.send_signal(signal.SIGINT)
    assert caller.wait(30) == -signal.SIGINT
    wait_gone(pid)


def test_a_long_log_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "LOG_BYTES_MAX", 10)
    log = tmp_path / "log"
    log.write_text("x" * 11)
    os.close(daemon._open_log(log))
    assert (log.read_text(), (tmp_path / "log.1").read_text()) == ("", "x" * 11)
    log.write_text("short")
    os.close(daemon._open_log(log))
    assert log.read_text() == "short"


def test_a_log_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(AccessDeniedError, match=r"cannot write the log .*: No such file"):
        daemon._open_log(tmp_path / "missing" / "log")


def test_a_fork_beside_threads_is_refused(tmp_path: Path) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with pytest.raises(BugError, match=r"into the background with \d+ threads"):
            daemon.background(lambda _ready, _report: 0, log=tmp_path / "log")
    finally:
        stop.set()
        thread.join()
