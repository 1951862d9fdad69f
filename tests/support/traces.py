"""Where the recorded disk traces are: test data that is read, not copied into the tree."""

from __future__ import annotations

import os
from pathlib import Path

REASON = "the disk traces are not here (set NOVAFS_TRACES to their folder)"


def traces_folder() -> Path | None:
    """The folder of NOVAFS_TRACES, or `../shared/traces` beside the tree; None where neither is."""
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("NOVAFS_TRACES") or root.parent / "shared" / "traces")
    return folder if (folder / "README.md").is_file() else None
