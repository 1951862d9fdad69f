"""What holds for all tests.

A test whose tool or device is missing skips and says what to install. Where the environment has ``CI=true`` a skipped
test fails the run: there everything is meant to be installed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.browser import missing_browser
from tests.support.ceph import missing_tools
from tests.support.traces import REASON, traces_folder

# Every module of fixtures in tests/support, so that a new one need not be told here.
pytest_plugins = sorted(f"tests.support.{path.stem}" for path in (Path(__file__).parent / "support").glob("*fixtures.py"))

# CI judges a change by the same examples each time; everybody else, and a torture run, looks for new ones.
settings.register_profile("ci", derandomize=True, print_blob=True)
if os.environ.get("CI") == "true" and not os.environ.get("NOVAFS_TEST_TORTURE"):
    settings.load_profile("ci")

REDIS_SERVERS = ("redis-server", "valkey-server")


def _missing_fuse() -> str:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no access to /dev/fuse (modprobe fuse; in a container: --device /dev/fuse --cap-add SYS_ADMIN)"
    return "" if shutil.which("fusermount3") else "fusermount3 is not installed (Debian: fuse3)"


def _missing_redis() -> str:
    return "" if any(shutil.which(server) for server in REDIS_SERVERS) else "no Redis server is installed (Debian: redis-server)"


def _missing_ceph() -> str:
    missing = missing_tools()
    return f"not installed: {', '.join(missing)} (Debian: ceph-mon ceph-osd radosgw)" if missing else ""


def _missing_qemu() -> str:
    missing = [tool for tool in ("qemu-system-x86_64", "qemu-img") if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)} (Debian: qemu-system-x86 qemu-utils)" if missing else ""


def _missing_prometheus() -> str:
    missing = [tool for tool in ("prometheus", "promtool") if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)} (Debian: prometheus)" if missing else ""


NEEDS = {
    "fuse": _missing_fuse,
    "redis": _missing_redis,
    "s3": _missing_ceph,
    "qemu": _missing_qemu,
    "prometheus": _missing_prometheus,
    "browser": missing_browser,
}


def pytest_report_header() -> list[str]:
    return [] if traces_folder() is not None else [f"{REASON}: tests on them are left out"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A marker of `NEEDS` skips its tests, with the reason, where what it needs is missing.

    The recorded traces are data that nobody can install: without them their tests are deselected, and the header says so.
    """
    if traces_folder() is None:
        left_out = [item for item in items if item.get_closest_marker("traces")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]
    reasons = {marker: look() for marker, look in NEEDS.items()}
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


class SkipsFail:
    """Fails a run in which a test was skipped."""

    def __init__(self) -> None:
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test that is expected to fail is reported as skipped as well, and is none.
        if report.skipped and not hasattr(report, "wasxfail"):
            self._note(report.nodeid, report.longrepr)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._note(report.nodeid, report.longrepr)

    def _note(self, nodeid: str, longrepr: object) -> None:
        reason = longrepr[2] if isinstance(longrepr, tuple) else longrepr
        self.skipped.append(f"{nodeid}: {reason}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.skipped:
            terminalreporter.section("CI=true, and these were skipped", red=True)
            for line in self.skipped:
                terminalreporter.line(line)


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("CI", "").lower() in ("true", "1"):
        config.pluginmanager.register(SkipsFail(), "novafs-skips-fail")


def pytest_sessionstart() -> None:
    """Nothing of a developer's own configuration reaches a test."""
    for name in list(os.environ):
        if name.startswith("NOVAFS_") and not name.startswith("NOVAFS_TEST_"):
            del os.environ[name]
