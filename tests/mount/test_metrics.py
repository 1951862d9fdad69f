"""The metrics of a mount, as Prometheus's own client library reads them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from novafs.metrics import FAMILIES, markdown, parse_address
from tests.support.ceph import free_port
from tests.support.mounted import mounted

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(port: int) -> Samples:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30).read().decode()
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation for family in families)
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for family in families for sample in family.samples}


def test_a_mount_tells_what_it_does_and_what_is_at_risk(tmp_path: Path) -> None:
    port = free_port()
    with mounted(tmp_path, "--metrics", str(port), "--set", "writeback.interval=1h") as mount:
        before = scrape(port)
        assert before[("novafs_dirty_bytes", ())] == 0
        with (mount.path / "disk.raw").open("wb") as file:
            file.write(os.urandom(300_000))
            file.flush()
            os.fsync(file.fileno())
            at_risk = scrape(port)
            assert at_risk[("novafs_dirty_bytes", ())] >= 300_000
            assert at_risk[("novafs_dirty_images", ())] == 1
            assert at_risk[("novafs_dirty_age_seconds", ())] > 0
            assert at_risk[("novafs_journal_syncs_total", ())] >= 1
        assert (mount.path / "disk.raw").stat().st_size == 300_000
        after = scrape(port)
        assert after[("novafs_dirty_bytes", ())] == 0
        assert after[("novafs_store_requests_total", (("operation", "create"),))] > before.get(
            ("novafs_store_requests_total", (("operation", "create"),)), 0
        )


def test_a_busy_port_is_named_and_nothing_is_mounted(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "novafs.cli"]
        (tmp_path / "mnt").mkdir()
        url = f"file://{tmp_path / 'store'}"
        subprocess.run([*command, "init", url], check=True, capture_output=True)
        done = subprocess.run(
            [*command, "mount", url, str(tmp_path / "mnt"), "--foreground", "--state-dir", str(tmp_path / "state"), "--metrics", str(port)],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 2
    assert str(port) in done.stderr
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr
    assert not os.path.ismount(tmp_path / "mnt")


def test_addresses() -> None:
    assert parse_address("9567") == ("127.0.0.1", 9567)
    assert parse_address("0.0.0.0:80") == ("0.0.0.0", 80)
    assert parse_address("[::1]:9567") == ("::1", 9567)


def test_the_document_lists_every_metric() -> None:
    assert PAGE.read_text() == markdown(), "run: python -m novafs.metrics > docs/metrics.md"
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
