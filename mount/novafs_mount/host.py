"""What the daemon asks of the host's kernel, each where it may, none of it needed for correctness.

- It serves the host's own memory reclaim (a guest's disk is on it): `PR_SET_IO_FLUSHER` keeps its allocations from
  waiting for write-back that only it can do, and a low `oom_score_adj` keeps it from being the first to be killed
  (design 8). Both are inherited by threads and children made later, so this runs before there are any.
- Read-ahead of the mount (`kernel.read_ahead`): buffered readers (`cp`, `qemu-img convert`) send an eighth of the requests with
  1 MiB, as much as one can ask for, of those with the kernel's 128 KiB. O_DIRECT reads are not affected.
- `max_background` (`kernel.background_max`) bounds how many asynchronous requests the kernel sends for all files of the mount together:
  with its 12, a guest that waits for the store keeps the others from L1. Needs the fusectl file system, which systemd mounts.

What each is worth is in `docs/performance.md`, "Kernel settings".

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

READ_AHEAD_BYTES: Final = 1 << 20
BACKGROUND_MAX: Final = 128
"""What `kernel.read_ahead` and `kernel.background_max` are unless they are set."""


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


def tune_mount(major: int, minor: int, *, read_ahead_bytes: int = READ_AHEAD_BYTES, background_max: int = BACKGROUND_MAX) -> list[str]:
    """Set read-ahead and the number of background requests of the mount with this device number. What was done, for the log."""
    done = []
    if _write(Path(f"/sys/class/bdi/{major}:{minor}/read_ahead_kb"), str(read_ahead_bytes >> 10)):
        done.append(f"read-ahead {read_ahead_bytes >> 10} KiB")
    control = Path(f"/sys/fs/fuse/connections/{minor}")
    # It is congested from three quarters on, as it is by the kernel's own settings.
    threshold = max(1, background_max * 3 // 4)
    if _write(control / "max_background", str(background_max)) and _write(control / "congestion_threshold", str(threshold)):
        done.append(f"{background_max} background requests")
    return done


def _write(path: Path, text: str) -> bool:
    try:
        path.write_text(text)
    except OSError as error:
        log.debug("%s: %s", path, error.strerror)
        return False
    return True
