"""A relay before a server that delays and caps what it answers: `netdelay.c`, compiled on the spot (needs a C compiler).

The same delay for every answer however many are under way, and one link's bandwidth for all of them, as a network has it.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.ceph import free_port

SOURCE = Path(__file__).with_name("netdelay.c")


@contextmanager
def relay(upstream_port: int, *, delay_ms: float = 20, mbit_per_s: float = 2000, up_mbit_per_s: float = 0) -> Iterator[int]:
    """The port of a relay to a server on this host, for as long as the block lasts. up_mbit_per_s: to the server, 0: no bound."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise SystemExit("no C compiler: install gcc")
    with TemporaryDirectory() as directory:
        program = Path(directory) / "netdelay"
        subprocess.run([compiler, "-O2", "-o", str(program), str(SOURCE)], check=True)
        port = free_port()
        process = subprocess.Popen([str(program), str(port), str(upstream_port), str(delay_ms), str(mbit_per_s), str(up_mbit_per_s)])
        try:
            time.sleep(0.2)  # it says nothing when it listens
            yield port
        finally:
            process.kill()
            process.wait()
