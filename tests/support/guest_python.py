"""NovaFS for a guest: the wheel of this tree, and what it depends on as a disk, so that a guest without a network can install it.

The dependencies are installed once by pip, as constraints.txt pins them, into a directory that becomes an ext4 image; it is kept in
`.cache/` under a key of what is in it. The guest has the same release as this machine, and so the same Python as /usr/bin/python3 here,
whatever the tests themselves run on: pip installs for that one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SYSTEM_PYTHON = "/usr/bin/python3"
CACHE = ROOT / ".cache" / "guest-python"


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Its output. Raises RuntimeError with all that it said."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    done = subprocess.run([*command], capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, "PATH": path})
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def build_wheel(directory: Path) -> Path:
    """The wheel of this tree, built from a copy so that nothing is left in the tree."""
    copy = directory / "tree"
    wanted = ("novafs", "mount", "systemd", "pyproject.toml", "README.md", "LICENSE")
    for name in wanted:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            copy.mkdir(exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "-w", directory, copy)
    [wheel] = directory.glob("novafs-*.whl")
    return wheel


def compile_modules(modules: Path, target: Path) -> None:
    """Compile what is in `modules` for the guest's Python into `target`. An import there would do it, and take ten times as long."""
    shutil.copytree(modules, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"), dirs_exist_ok=True)
    run(SYSTEM_PYTHON, "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", target)
    for source in target.rglob("*.py"):
        source.unlink()


def dependencies_disk() -> Path:
    """An ext4 image that holds, in `site`, what `novafs[embedded]` needs, and pip. Built first where it is missing. Raises RuntimeError."""
    version = run(SYSTEM_PYTHON, "-c", "import sys; print(sys.version)")
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["embedded"], "pip"]
    pinned = (ROOT / "constraints.txt").read_text()
    key = hashlib.sha256(repr((wanted, pinned, version)).encode()).hexdigest()[:12]
    disk = CACHE / f"{key}.raw"
    if not disk.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            site = Path(work, "tree", "site")
            pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", SYSTEM_PYTHON, "install")
            run(*pip, "-c", ROOT / "constraints.txt", "--target", site, *wanted)
            image = Path(work, "disk.raw")
            with image.open("wb") as file:
                file.truncate(512 << 20)  # sparse
            run("mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-d", Path(work, "tree"), image)
            for old in CACHE.glob("*.raw"):
                old.unlink()
            image.replace(disk)
    return disk
