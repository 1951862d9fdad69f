"""What was measured, as JSON: by scenario, the rounds as they came, and what the daemons of NovaFS took.

A run adds to what the file has, scenario by scenario, so that pieces of a few minutes make the whole. Each scenario says when and on what
it was measured, since ratios within one are compared and never figures of two.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from novafs import durable

Round = dict[str, float]
"""Figures of one round, by what each is of."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One scenario's. machine: in words. daemons: of each mount, memory in bytes and CPU in seconds (`site.Daemon`)."""

    measured: str
    machine: str
    rounds: Sequence[Round]
    daemons: Sequence[Mapping[str, float]]


def load(path: Path) -> dict[str, Measured]:
    """What the file has; nothing where there is none."""
    if not path.exists():
        return {}
    document: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return {name: Measured(**found) for name, found in document.items()}


def save(path: Path, found: Mapping[str, Measured]) -> None:
    """Write the whole file anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: asdict(measured) for name, measured in sorted(found.items())}, indent=1)
    durable.replace(path, text.encode())


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC"


def machine() -> str:
    """Processors, their model and the kernel."""
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ""
    )
    return f"{os.cpu_count()} processors ({model or platform.machine()}), Linux {platform.release()}"
