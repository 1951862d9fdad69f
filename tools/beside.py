"""Runs commands beside each other, each a line of standard input; prints what each of them printed, whole, when it has ended.

    printf '%s\\n' "first command" "second command" | python3 tools/beside.py

The exit status is the first one that is not 0. Ctrl-C reaches all of them, since they are in this process group, and is waited for.
A shell's `&` would not do: it has its commands ignore Ctrl-C, and all that those start.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import time
from typing import IO

MINUTE_S = 60.0


class Running:
    """A command and what it prints."""

    def __init__(self, line: str) -> None:
        self.line = line
        self.output: IO[bytes] = tempfile.TemporaryFile()
        self.began_s = time.monotonic()
        self.process = subprocess.Popen(shlex.split(line), stdin=subprocess.DEVNULL, stdout=self.output, stderr=subprocess.STDOUT)

    def show(self) -> None:
        """Print everything, since the command has ended."""
        self.output.seek(0)
        sys.stdout.buffer.write(self.output.read())
        print(f"==> ended with status {self.process.returncode} after {time.monotonic() - self.began_s:.0f} s: {self.line}", flush=True)

    def progress(self) -> str:
        """The last line so far, for somebody who watches."""
        size = self.output.seek(0, 2)
        self.output.seek(max(0, size - 400))
        lines = self.output.read().decode(errors="replace").splitlines()
        self.output.seek(0, 2)
        return next((line for line in reversed(lines) if line.strip()), "")


def main() -> int:
    """The exit status."""
    lines = [line.strip() for line in sys.stdin if line.strip()]
    running = [Running(line) for line in lines]
    status, told_s = 0, time.monotonic()
    while running:
        try:
            time.sleep(0.2)
        except KeyboardInterrupt:
            continue  # they have got it, too, and end
        for command in [command for command in running if command.process.poll() is not None]:
            running.remove(command)
            command.show()
            status = status or command.process.returncode
        if time.monotonic() - told_s > MINUTE_S:
            told_s = time.monotonic()
            for command in running:
                print(f"    {command.progress()}", flush=True)
    return status if status >= 0 else 1


if __name__ == "__main__":
    sys.exit(main())
