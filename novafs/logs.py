"""From events to lines: one line an event, in the form that its reader understands, without secrets, and never in floods.

| format | a line |
|---|---|
| text | `novafs: MESSAGE`, for a terminal; a traceback follows on lines of its own |
| logfmt | `time=… level=… module=… msg="MESSAGE" KEY=VALUE…` |
| json | the same as an object |
| journal | `<N>MESSAGE module=… KEY=VALUE…`; systemd's journal takes the priority off, and adds the time itself |

What always holds:

- An event whose arguments are a mapping, `log.warning("%(image)s: …", {"image": …})`, carries them as fields.
- What looks like a password in a URL, and every secret that was given to `hide`, is `***` in every format, tracebacks included.
- Of one event (the same logger, level, template and image, or other subject that it begins with) at most REPEATS_MAX lines are
  written in REPEAT_WINDOW_S; others are counted, and told in one line at the end of it. Debug events are all written.
- Control characters, line ends among them, are escaped: what a name holds can not forge a line.

Libraries are kept at warnings whatever is asked for: botocore's debug lines hold signed headers.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, quote_plus

from novafs.configkeys import redact_text

OURS: Final = ("novafs", "novafs_mount")
LEVELS: Final[Mapping[str, int]] = {
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
}
REPEATS_MAX: Final = 5
REPEAT_WINDOW_S: Final = 30.0
REPEATED_KEYS_MAX: Final = 256
SECRET_LENGTH_MIN: Final = 4
"""Shorter ones would be found in every second word; whoever has such a password hides nothing with it."""

_PRIORITIES: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7))
"""syslog(3)'s, which sd-daemon(3) reads at the beginning of a line."""
_PLAIN_VALUE: Final = re.compile(r"[^\s\"=\\]+")
_SUBJECT_FIRST: Final = ("%s: ", "image %s")
"""Templates whose first argument says what the event is about: another image's first event is not the repetition of this one's."""
_hidden: set[str] = set()


def hide(secret: str) -> None:
    """Never write this text, wherever it turns up."""
    if len(secret) >= SECRET_LENGTH_MIN:
        # Also as URLs, JSON and Python's repr write it.
        forms = {secret, quote(secret, safe=""), quote(secret), quote_plus(secret), json.dumps(secret)[1:-1], repr(secret)[1:-1]}
        _hidden.update(forms)


def scrubbed(text: str) -> str:
    """The text without what is secret in it."""
    # Longest first: of two that begin alike, the rest of the longer one must not stay. (A copy: other threads may add.)
    for secret in sorted(_hidden, key=len, reverse=True):
        text = text.replace(secret, "***")
    return redact_text(text)


def is_journal(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether stderr goes to systemd's journal: then it is the file that JOURNAL_STREAM names (systemd.exec(5))."""
    stream = environ.get("JOURNAL_STREAM", "")
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return stream == f"{found.st_dev}:{found.st_ino}"


def priority(level: int) -> int:
    """syslog's priority of a level."""
    return next((number for least, number in _PRIORITIES if level >= least), 7)


# --- one line ---------------------------------------------------------------------------------------------------


def _one_line(text: str) -> str:
    """Without control characters, and what is no text, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


class _Formatter(logging.Formatter, ABC):
    """Fields of one event; the subclasses put them into a line."""

    def format(self, record: logging.LogRecord) -> str:
        try:
            message = record.getMessage()
        except Exception:  # a wrong template must not lose the event
            message = f"{record.msg} {record.args}"
        fields: dict[str, object] = dict(record.args) if isinstance(record.args, Mapping) else {}
        if record.exc_info and record.exc_info[1] is not None:
            fields["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        return self.line(record, scrubbed(message), {name: scrubbed(str(value)) for name, value in fields.items()})

    @abstractmethod
    def line(self, record: logging.LogRecord, message: str, fields: Mapping[str, str]) -> str:
        """The line of an event; message and fields hold no secret any more."""


def _logfmt(fields: Mapping[str, str]) -> str:
    return " ".join(
        f"{name}={value if _PLAIN_VALUE.fullmatch(value) else json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()
    )


def _header(record: logging.LogRecord) -> dict[str, str]:
    moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    return {
        "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "module": record.name,
    }


class _Text(_Formatter):
    def line(self, record: logging.LogRecord, message: str, fields: Mapping[str, str]) -> str:  # noqa: ARG002
        after = fields.get("traceback", "")
        # What an exception's text holds can forge no event, and steers no terminal.
        return "\n".join([f"novafs: {_one_line(message)}", *(f"  {_one_line(line)}" for line in after.rstrip().splitlines())])


class _Logfmt(_Formatter):
    def line(self, record: logging.LogRecord, message: str, fields: Mapping[str, str]) -> str:
        return _one_line(_logfmt({**_header(record), "msg": message, **fields}))


class _Json(_Formatter):
    def line(self, record: logging.LogRecord, message: str, fields: Mapping[str, str]) -> str:
        return json.dumps({**fields, **_header(record), "msg": message})


class _Journal(_Formatter):
    def line(self, record: logging.LogRecord, message: str, fields: Mapping[str, str]) -> str:
        tail = _logfmt({"module": record.name, **fields})
        return f"<{priority(record.levelno)}>{_one_line(f'{message} {tail}')}"


_FORMATTERS: Final[Mapping[str, Callable[[], _Formatter]]] = {"text": _Text, "logfmt": _Logfmt, "json": _Json, "journal": _Journal}


# --- repetition -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Window:
    """Since when an event is counted, how often it came, and how often it was not written."""

    since_s: float
    count: int = 0
    held: int = 0
    last: logging.LogRecord | None = None


class _Handler(logging.Handler):
    """Writes to what `sys.stderr` is at that moment."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock_s = clock_s
        self._windows: OrderedDict[tuple[str, int, str], _Window] = OrderedDict()

    def emit(self, record: logging.LogRecord) -> None:
        """Called with the handler's lock held."""
        if record.levelno <= logging.DEBUG or self._admits(record):
            self._write(record)

    def _admits(self, record: logging.LogRecord) -> bool:
        template = str(record.msg)
        if template == "%s":
            template = record.getMessage()
        elif isinstance(record.args, Mapping):
            template += f" {record.args.get('image', '')}"
        elif isinstance(record.args, tuple) and record.args and template.startswith(_SUBJECT_FIRST):
            template += f" {record.args[0]}"
        key = (record.name, record.levelno, template)
        window = self._windows.get(key)
        now_s = self._clock_s()
        if window is None or now_s - window.since_s > REPEAT_WINDOW_S:
            if window is not None:
                self._tell(key, window)
            window = self._windows[key] = _Window(now_s)
            if len(self._windows) > REPEATED_KEYS_MAX:
                self._tell(*self._windows.popitem(last=False))
        window.count += 1
        if window.count <= REPEATS_MAX:
            return True
        window.held += 1
        window.last = record
        return False

    def flush_repeated(self, *, final: bool = False) -> None:
        """Tell of what was held back, where its window is over; `final`: everything, at the end of the process."""
        self.acquire()
        try:
            now_s = self._clock_s()
            for key, window in list(self._windows.items()):
                if final or now_s - window.since_s > REPEAT_WINDOW_S:
                    del self._windows[key]
                    self._tell(key, window)
        finally:
            self.release()

    def _tell(self, key: tuple[str, int, str], window: _Window) -> None:
        last = window.last
        if last is None:
            return
        times = f"repeated {window.held} times" if window.held > 1 else "repeated once"
        self._write(
            logging.makeLogRecord(
                {
                    "name": key[0],
                    "levelno": last.levelno,
                    "levelname": last.levelname,
                    "msg": f"{last.getMessage()} ({times})".replace("%", "%%"),
                    "args": {"repeated": window.held},
                }
            )
        )

    def _write(self, record: logging.LogRecord) -> None:
        try:
            # One write: lines of several threads must not mix.
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def configure(level: int, format_: str) -> None:
    """Log our own events from `level` on to stderr, and warnings of libraries, as `format_` (one of `_FORMATTERS`) says."""
    handler = _Handler()
    handler.setFormatter(_FORMATTERS[format_]())
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    set_level(level)


def set_level(level: int) -> None:
    """Log from this level on."""
    for name in OURS:
        logging.getLogger(name).setLevel(level)


def flush_repeated(*, final: bool = False) -> None:
    """Tell of what was held back because it came too often; called now and then, and at the end with `final`."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Handler):
            handler.flush_repeated(final=final)


def log_unforeseen() -> None:
    """Have what no code catches, in any thread, and Python's own warnings, logged as events."""
    logging.captureWarnings(True)

    def thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
            logging.getLogger("novafs").error("a thread ended by a mistake in NovaFS", exc_info=args.exc_value)

    threading.excepthook = thread
