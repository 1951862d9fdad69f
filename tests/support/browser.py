"""A headless Chromium, driven through its own pipe (the DevTools protocol, one JSON object after the other with NUL between)."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# The browser reads descriptor 3 and writes descriptor 4; those that it is given may be in the way.
_LAUNCH = """
import fcntl, os, sys
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
for fd, wanted in zip(high, (3, 4)):
    os.dup2(fd, wanted)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def missing_browser() -> str:
    """What to install, or nothing."""
    return "" if any(shutil.which(name) for name in BROWSERS) else "no Chromium is installed (Debian: chromium)"


class Browser:
    """One tab. trouble: what the page wrote to its console as errors, and exceptions that nothing caught."""

    def __init__(self, send: int, receive: io.BufferedReader) -> None:
        self._send = send
        self._receive = receive
        self._last = 0
        self._pending = b""
        self.trouble: list[str] = []
        self.requested: list[str] = []
        target = self._call("Target.createTarget", {"url": "about:blank"}, session=None)["targetId"]
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True}, session=None)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable", {})

    def _call(self, method: str, parameters: dict[str, Any], session: str | None = "own") -> Any:
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            part = self._receive.read1(1 << 16)
            assert part, "the browser has ended"
            self._pending += part
        line, _, self._pending = self._pending.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, what: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.trouble.append(json.dumps(what["exceptionDetails"])[:500])
        elif event == "Log.entryAdded" and what["entry"]["level"] == "error":
            self.trouble.append(f"{what['entry']['text']} ({what['entry'].get('url', '')})")
        elif event == "Runtime.consoleAPICalled" and what["type"] in ("error", "assert"):
            self.trouble.append(json.dumps(what["args"])[:500])
        elif event == "Page.javascriptDialogOpening":
            self.trouble.append(f"a dialog: {what['message']}")
        elif event == "Network.requestWillBeSent":
            self.requested.append(what["request"]["url"])

    def look(self, *, width: int, height: int = 900, dark: bool = False) -> None:
        """As a screen of that width, in light or dark."""
        self._call("Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", {"features": [scheme]})

    def open(self, url: str) -> None:
        """Go there."""
        found = self._call("Page.navigate", {"url": url})
        assert not found.get("errorText"), found

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page, a promise awaited."""
        found = self._call("Runtime.evaluate", {"expression": expression, "returnByValue": True, "awaitPromise": True})
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def wait(self, condition: str, *, timeout_s: float = 30) -> Any:
        """Until an expression is true in the page; its value."""
        return self.evaluate(
            f"""new Promise((yes, no) => {{
                const began = Date.now();
                (function look() {{
                    let found = false;
                    try {{ found = {condition}; }} catch {{ /* not there yet */ }}
                    if (found) yes(found);
                    else if (Date.now() - began > {1000 * timeout_s}) no(new Error({json.dumps("never: " + condition)}));
                    else setTimeout(look, 50);
                }})();
            }})"""
        )

    def screenshot(self, path: Path) -> bytes:
        """The whole page as PNG."""
        found = self._call("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
        image = base64.b64decode(found["data"])
        path.write_bytes(image)
        return image


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser of its own, ended with the block."""
    name = next(name for name in BROWSERS if shutil.which(name))
    asked, send = os.pipe()
    receive, answered = os.pipe()
    with tempfile.TemporaryDirectory(prefix="novafs-browser-", ignore_cleanup_errors=True) as profile:
        arguments = [
            name,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
        ]
        process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(asked), str(answered), *arguments],
            env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")},
            pass_fds=(asked, answered),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(asked)
        os.close(answered)
        try:
            with os.fdopen(receive, "rb") as stream:
                yield Browser(send, stream)
        finally:
            os.close(send)
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
