"""The metrics of a mount, as Prometheus's own client library reads them, and its health."""

from __future__ import annotations

import json
import mmap
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from novafs.metrics import COUNTER, FAMILIES, HISTOGRAM, markdown, parse_address
from novafs.metricsamples import PATTERNS
from novafs.prefetch.patterns import Pattern
from tests.support.ceph import free_port
from tests.support.cli import novafs_json
from tests.support.mounted import mounted

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def fetch(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def scrape(port: int) -> Samples:
    families = list(text_string_to_metric_families(fetch(port, "/metrics")[1]))
    assert all(family.documentation for family in families)
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for family in families for sample in family.samples}


@pytest.mark.fuse
def test_a_mount_tells_what_it_does_and_what_is_at_risk(tmp_path: Path) -> None:
    port = free_port()
    with mounted(tmp_path, "--metrics", str(port), "--set", "writeback.interval=1h") as mount:
        before = scrape(port)
        assert before[("novafs_dirty_bytes", ())] == 0 and before[("novafs_mounted", ())] == 1
        given = {
            ("cache_hit_rate", "l1"), ("cache_hit_rate", "l3"), ("cache_dedup_ratio",), ("cache_dedup_saved_bytes",),
            ("cache_ml_accuracy",), ("cache_ml_predictions",), ("cache_prefetch_accuracy",), ("cache_prefetch_count",),
            *(("cache_latency_ms", percentile, tier) for percentile in ("p50", "p95", "p99") for tier in ("l1", "l3")),
        }  # fmt: skip
        assert {(name, *(value for _, value in labels)) for name, labels in before if name.startswith("cache_")} == given
        assert ("novafs_model_accuracy", (("model", "prefetch"),)) not in before, "what is not known has no figure"
        with (mount.path / "disk.raw").open("wb") as file:
            file.write(os.urandom(300_000))
            file.flush()
            os.fsync(file.fileno())
            at_risk = scrape(port)
            assert at_risk[("novafs_dirty_bytes", ())] >= 300_000
            assert at_risk[("novafs_dirty_images", ())] == 1
            assert at_risk[("novafs_dirty_age_seconds", ())] > 0
            assert at_risk[("novafs_journal_syncs_total", ())] >= 1
            assert at_risk[("novafs_leases", (("state", "held"),))] == 1
            assert fetch(port, "/readyz") == (200, "ready\n")
        assert (mount.path / "disk.raw").stat().st_size == 300_000
        after = scrape(port)
        assert after[("novafs_dirty_bytes", ())] == 0
        assert after[("novafs_store_requests_total", (("operation", "create"),))] > before.get(
            ("novafs_store_requests_total", (("operation", "create"),)), 0
        )
        assert after[("novafs_guest_written_bytes_total", ())] == 300_000
        assert after[("novafs_written_chunks_total", (("result", "new"),))] == 5
        assert after[("novafs_commits_total", ())] >= 1
        for operation in ("write", "fsync", "flush"):
            count = after[("novafs_request_seconds_count", (("operation", operation),))]
            assert count >= 1
            assert after[("novafs_request_seconds_bucket", (("le", "+Inf"), ("operation", operation)))] == count


@pytest.mark.fuse
def test_reads_are_counted_by_what_answered_and_once_each(tmp_path: Path) -> None:
    port = free_port()
    with mounted(tmp_path, "--metrics", str(port)) as mount:
        image = mount.path / "disk.raw"
        image.write_bytes(os.urandom(1 << 20))
        handle = os.open(image, os.O_RDONLY | os.O_DIRECT)
        before = scrape(port)
        page = mmap.mmap(-1, 4096)
        for index in range(64):
            os.preadv(handle, [page], index * 4096)
        os.close(handle)
        after = scrape(port)

    def grown(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after.get(key, 0) - before.get(key, 0)

    assert grown("novafs_guest_reads_total", answered="memory") + grown("novafs_guest_reads_total", answered="waited") == 64
    assert (
        grown("novafs_guest_read_bytes_total", answered="memory") + grown("novafs_guest_read_bytes_total", answered="waited") == 64 * 4096
    )
    assert grown("novafs_request_seconds_count", operation="read") == 64
    assert grown("novafs_tier_seconds_count", tier="l1", operation="get") == grown("novafs_guest_reads_total", answered="memory")


@pytest.mark.fuse
def test_a_store_that_goes_away_is_told_as_down_and_degraded_and_comes_back(tmp_path: Path) -> None:
    port = free_port()
    with mounted(tmp_path, "--metrics", str(port), "--set", "writeback.interval=200ms", "--set", "store.io_timeout=1s") as mount:
        image = mount.path / "disk.raw"
        with image.open("wb", buffering=0) as file:
            file.write(b"x" * 65536)
            os.fsync(file.fileno())
            assert fetch(port, "/readyz")[0] == 200
            store = tmp_path / "store"
            hidden = tmp_path / "hidden"
            store.rename(hidden)
            try:
                file.write(b"y" * 65536)
                os.fsync(file.fileno())
                status = wait_for(port, lambda found: found[("novafs_tier_up", (("tier", "l3"),))] == 0)
                assert status[("novafs_store_failing_seconds", ())] >= 0
                code, words = fetch(port, "/readyz")
                assert code == 200 and words.startswith("ready: degraded: the store has not answered")
                wait_for(port, lambda found: found[("novafs_log_events_total", (("level", "warning"),))] > 0)
                happened = json.loads(fetch(port, "/status.json")[1])["happened"]
                assert any(event["kind"] in ("warning", "error") and "disk.raw" in event["text"] for event in happened)
            finally:
                hidden.rename(store)
            wait_for(port, lambda found: found[("novafs_tier_up", (("tier", "l3"),))] == 1)
            assert fetch(port, "/readyz") == (200, "ready\n")


def wait_for(port: int, condition: Callable[[Samples], bool], timeout_s: float = 60) -> Samples:
    deadline_s = time.monotonic() + timeout_s
    while not condition(found := scrape(port)):
        assert time.monotonic() < deadline_s, "it never came so far"
        time.sleep(0.05)
    return found


@pytest.mark.fuse
def test_a_busy_port_that_was_asked_for_is_named_and_nothing_is_mounted(tmp_path: Path) -> None:
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
    assert str(port) in done.stderr and "in use" in done.stderr and "auto" in done.stderr
    assert "Traceback" not in done.stderr
    assert not os.path.ismount(tmp_path / "mnt")


@pytest.mark.fuse
def test_two_mounts_of_a_host_serve_on_ports_of_their_own_without_being_told(tmp_path: Path) -> None:
    with mounted(tmp_path / "a") as one, mounted(tmp_path / "b") as other:
        pages = [novafs_json("stats", mount.path)["mount"]["status_page"] for mount in (one, other)]
        assert len(set(pages)) == 2
        for page, mount in zip(pages, (one, other), strict=True):
            with urllib.request.urlopen(f"{page}status.json", timeout=30) as answer:
                assert json.load(answer)["mount"]["mountpoint"] == str(mount.path)


@pytest.mark.fuse
def test_metrics_can_be_off(tmp_path: Path) -> None:
    with mounted(tmp_path, "--metrics", "off") as mount:
        assert novafs_json("stats", mount.path)["mount"]["status_page"] is None


def test_addresses() -> None:
    assert parse_address("9567") == ("127.0.0.1", 9567)
    assert parse_address("0.0.0.0:80") == ("0.0.0.0", 80)
    assert parse_address("[::1]:9567") == ("::1", 9567)


def test_the_document_lists_every_metric() -> None:
    assert PAGE.read_text() == markdown(), "run: python -m novafs.metrics > docs/metrics.md"
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_every_pattern_is_one_that_the_metrics_name() -> None:
    assert set(PATTERNS) == {pattern.value for pattern in Pattern}


def test_names_follow_the_conventions_but_for_those_that_were_given() -> None:
    for family in FAMILIES:
        assert (family.kind == COUNTER) == family.name.endswith("_total"), family.name
        if family.kind == HISTOGRAM:
            assert family.name.endswith("_seconds"), family.name
        if family.name.startswith("novafs_"):
            assert not any(family.name.endswith(end) for end in ("_ms", "_mb", "_percent")), family.name
    given = {family.name: family.labels for family in FAMILIES if family.name.startswith("cache_")}
    assert given == {
        "cache_hit_rate": ("tier",),
        "cache_prefetch_accuracy": (),
        "cache_prefetch_count": (),
        "cache_dedup_ratio": (),
        "cache_dedup_saved_bytes": (),
        "cache_latency_ms": ("tier", "percentile"),
        "cache_ml_accuracy": (),
        "cache_ml_predictions": (),
    }
