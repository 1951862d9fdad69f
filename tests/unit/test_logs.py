"""Log lines: one per event, in each format, without secrets and without floods."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from novafs import logs
from novafs.configkeys import redact_text

log = logging.getLogger("novafs.test")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    hidden = set(logs._hidden)
    yield
    logs._hidden.clear()
    logs._hidden.update(hidden)
    logs.configure(logging.WARNING, "text")


def written(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def failed() -> Exception:
    try:
        raise ValueError("the\ncause")
    except ValueError as error:
        return error


def test_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(logging.INFO, "text")
    log.info("%s: done", "a\nb\x1b[31m")
    log.debug("not shown")
    assert written(capsys) == ["novafs: a\\nb\\x1b[31m: done"]


def test_logfmt_has_time_level_module_message_and_the_fields_of_the_event(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(logging.INFO, "logfmt")
    log.warning("%(image)s: committed", {"image": "my disk.raw", "bytes": 4096})
    log.error("it failed", exc_info=failed())
    first, second = written(capsys)
    assert first.startswith("time=20")
    assert first.partition("Z ")[2] == 'level=warning module=novafs.test msg="my disk.raw: committed" image="my disk.raw" bytes=4096'
    assert 'traceback="Traceback (most recent call last):\\n' in second and "the\\ncause" in second


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(logging.INFO, "json")
    log.info("%(image)s\nsecond", {"image": "a.raw", "level": "made up"})
    [line] = written(capsys)
    found = json.loads(line)
    assert (found["msg"], found["image"], found["level"], found["module"]) == ("a.raw\nsecond", "a.raw", "info", "novafs.test")


def test_the_journal_gets_its_priorities(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(logging.DEBUG, "journal")
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        log.log(level, "level %d", level)
    assert [line[:3] for line in written(capsys)] == ["<7>", "<6>", "<4>", "<3>", "<2>"]


def test_the_journal_is_recognised_by_its_file() -> None:
    program = "from novafs import logs; print(logs.is_journal())"
    reader, writer = os.pipe()
    found = os.fstat(writer)
    for stream, expected in ((f"{found.st_dev}:{found.st_ino}", "True"), ("1:2", "False"), ("", "False")):
        environ = {**os.environ, "JOURNAL_STREAM": stream}
        done = subprocess.run([sys.executable, "-c", program], env=environ, stderr=writer, stdout=subprocess.PIPE, text=True, check=True)
        assert done.stdout.strip() == expected
    os.close(reader)
    os.close(writer)


def test_a_template_that_does_not_fit_its_arguments_is_no_lost_event() -> None:
    record = logging.LogRecord("novafs", logging.INFO, "", 0, "%d of %s", ("one",), None)
    assert logs._Text().format(record) == "novafs: %d of %s ('one',)"


def test_what_repeats_is_told_once_with_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(logging.INFO, "logfmt")
    [handler] = [handler for handler in logging.getLogger().handlers if isinstance(handler, logs._Handler)]
    now_s = 0.0
    handler._clock_s = lambda: now_s
    for number in range(36):
        log.warning("the store failed: try %d of 100%%", number)
    log.warning("another event")
    lines = written(capsys)
    assert len(lines) == logs.REPEATS_MAX + 1, "another event is another event"
    now_s = logs.REPEAT_WINDOW_S - 1
    logs.flush_repeated()
    assert written(capsys) == [], "not over yet"
    now_s += 2
    logs.flush_repeated()
    [line] = written(capsys)
    assert 'msg="the store failed: try 35 of 100% (repeated 31 times)" repeated=31' in line and "level=warning" in line
    logs.flush_repeated(final=True)
    assert written(capsys) == []
    for _ in range(logs.REPEATS_MAX + 1):
        log.warning("the store failed: try %d of 100%%", 1)
    now_s += logs.REPEAT_WINDOW_S + 1
    log.warning("the store failed: try %d of 100%%", 2)
    assert [("repeated once" in line) for line in written(capsys)] == [False] * 5 + [True, False]


def test_different_texts_under_one_bare_template_are_different_events(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(logging.INFO, "text")
    for number in range(3 * logs.REPEATED_KEYS_MAX):
        log.warning("%s", f"error {number}")
    assert len(written(capsys)) == 3 * logs.REPEATED_KEYS_MAX


def test_each_image_has_events_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(logging.INFO, "text")
    for number in range(10 * logs.REPEATS_MAX):
        log.warning("%(image)s: not committed yet", {"image": f"{number % 2}.raw"})
    assert sorted(written(capsys)) == [f"novafs: {name}.raw: not committed yet" for name in (0, 1) for _ in range(logs.REPEATS_MAX)]


def test_debug_events_are_all_written(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(logging.DEBUG, "text")
    for _ in range(50):
        log.debug("a detail")
    assert len(written(capsys)) == 50


@pytest.mark.parametrize("format_", ["text", "logfmt", "json", "journal"])
def test_no_secret_is_written(format_: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(logging.INFO, format_)
    logs.hide("hunter2-marked")
    logs.hide("abc")  # too short: it would be found in every second word
    log.error("login with hunter2-marked at redis://me:swordfish@host/0 failed", exc_info=ValueError("hunter2-marked"))
    log.error("%(url)s abc", {"url": "rediss://:sword/fi@sh@host:1/0?password=sesame&x=1", "why": "hunter2-marked"})
    text = capsys.readouterr().err
    for secret in ("hunter2", "swordfish", "sword/fi", "sesame"):
        assert secret not in text
    assert "abc" in text and "redis://***@host/0" in text and "x=1" in text


def test_what_is_no_secret_stays() -> None:
    text = "s3://bucket/a@b?endpoint=http://127.0.0.1:7480&region=eu file:///x/y@z, unix:///run/redis.sock 100%"
    assert redact_text(text) == text
    assert redact_text("http://user:pw@host/a@b") == "http://***@host/a@b"


def test_a_thread_that_ends_by_a_mistake_is_an_event() -> None:
    program = (
        "import threading, logging\nfrom novafs import logs\nlogs.configure(logging.INFO, 'logfmt')\nlogs.log_unforeseen()\n"
        "t = threading.Thread(target=lambda: 1 / 0)\nt.start(); t.join()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.count("\n") == 1
    assert "level=error" in done.stderr and "ZeroDivisionError" in done.stderr


def test_a_password_that_begins_as_another_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(logging.INFO, "text")
    for secret in ("swordfish", "swordfish-new", "swordfish-newer"):
        logs.hide(secret)
    log.warning("refused: swordfish-newer, swordfish-new, swordfish.")
    assert written(capsys) == ["novafs: refused: ***, ***, ***."]


def test_a_secret_is_found_as_urls_and_reprs_write_it(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(logging.INFO, "text")
    logs.hide("pa/ss w'o\"rd@1")
    log.warning("%s %s %r %s", "pa%2Fss%20w%27o%22rd%401", "pa%2Fss+w%27o%22rd%401", "pa/ss w'o\"rd@1", json.dumps("pa/ss w'o\"rd@1"))
    assert written(capsys) == ["novafs: *** *** '***' \"***\""]


def test_another_images_first_event_is_no_repetition(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(logging.INFO, "text")
    for number in range(20):
        log.error("image %s: %d dirty bytes could not be committed: %s", f"{number}.raw", 4096, "why")
        log.warning("%s: its lease is given back later: %s", f"{number}.raw", "why")
    assert len(written(capsys)) == 40


def test_a_traceback_forges_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(logging.INFO, "text")
    log.error("it failed", exc_info=ValueError("a\nnovafs: everything is well\x1b[2J"))
    lines = written(capsys)
    assert [line for line in lines if line.startswith("novafs: ")] == ["novafs: it failed"]
    assert "\x1b" not in "".join(lines)
