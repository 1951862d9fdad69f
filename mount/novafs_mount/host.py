"""What the daemon asks of the host's kernel, each where it may, none of it needed for correctness.

- It serves the host's own memory reclaim (a guest's disk is on it): `PR_SET_IO_FLUSHER` keeps its allocations from
  waiting for write-back that only it can do, and a low `oom_score_adj` keeps it from being the first to be killed
  (design 8). Both are inherited by threads and children made later, so this runs before there are any.
- Read-ahead of the mount is raised from 128 KiB to 1 MiB: buffered readers (`cp`, `qemu-img convert`) then send an
  eighth of the requests. Random and O_DIRECT reads are not affected.
- `max_background` bounds how many asynchronous requests the kernel sends before it waits; its default of 12 would cap
  the queue depth of all guests on a mount together. Needs the fusectl file system, which systemd mounts.

Blocking; called before the event loop or in a worker thread.
"""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

PR_SET_IO_FLUSHER: Final = 57
OOM_SCORE_ADJ: Final = -900
"""Below any guest's, above what nothing may kill (-1000): a leak in here must not take the host down."""

READ_AHEAD_KIB: Final = 1024
"""As large as a FUSE request can be (256 pages)."""

BACKGROUND_MAX: Final = 128
CONGESTION_THRESHOLD: Final = 96


def protect_process() -> list[str]:
    """Make reclaim and the OOM killer spare this process, where privileged. What was done, for the log."""
    done = []
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0:
        done.append("IO flusher")
    else:
        log.debug("PR_SET_IO_FLUSHER: %s", os.strerror(ctypes.get_errno()))
    if _write(Path("/proc/self/oom_score_adj"), str(OOM_SCORE_ADJ)):
        done.append(f"OOM score {OOM_SCORE_ADJ}")
    return done


def tune_mount(major: int, minor: int) -> list[str]:
    """Raise read-ahead and the number of background requests of the mount with this device number. What was done."""
    done = []
    if _write(Path(f"/sys/class/bdi/{major}:{minor}/read_ahead_kb"), str(READ_AHEAD_KIB)):
        done.append(f"read-ahead {READ_AHEAD_KIB} KiB")
    control = Path(f"/sys/fs/fuse/connections/{minor}")
    if _write(control / "max_background", str(BACKGROUND_MAX)) and _write(control / "congestion_threshold", str(CONGESTION_THRESHOLD)):
        done.append(f"{BACKGROUND_MAX} background requests")
    return done


def _write(path: Path, text: str) -> bool:
    try:
        path.write_text(text)
    except OSError as error:
        log.debug("%s: %s", path, error.strerror)
        return False
    return True
