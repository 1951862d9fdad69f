"""A real Prometheus on a mount under load: every query of the dashboard and of the alerts finds something, and each alert fires."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from novafs.metrics import FAMILIES, PROCESS, exposition
from tests.support.ceph import free_port
from tests.support.cli import novafs
from tests.support.engine import make_volume
from tests.support.guest_load import guest_load, make_image
from tests.support.mounted import mounted
from tests.support.prometheus import Prometheus, prometheus
from tests.support.redis_servers import RedisServer

DOCS = Path(__file__).parents[2] / "docs"
RULES = DOCS / "prometheus" / "novafs.rules.yml"
DASHBOARD = json.loads((DOCS / "grafana" / "novafs.json").read_text())
FOUND_S = 90
LATER = ("Shadow hit rates, A",)
"""Known only once the learner, which may take a twentieth of the processor, has had enough of it: the query is run, and may find nothing.
That the metrics are there when the figures are is shown below."""
COMPARISON = re.compile(r"^(.+) (?:==|!=|<=|>=|<|>) (-?[\d.e+]+)$", re.DOTALL)


def dashboard_queries() -> dict[str, str]:
    """Of each target: panel and letter, and the query with Grafana's variables filled in."""
    found = {}
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"].replace("$__rate_interval", "8s").replace("$instance", ".*")
            assert "$" not in query, query
            found[f"{panel['title']}, {target['refId']}"] = query
    return found


def alert_queries(server: Prometheus) -> dict[str, str]:
    """Of each alert: the quantity that it compares."""
    found = {}
    for group in server.get("rules")["groups"]:
        for rule in group["rules"]:
            matched = COMPARISON.match(rule["query"])
            assert matched is not None, f"{rule['name']}: {rule['query']} does not end with a comparison with a number"
            found[rule["name"]] = matched[1]
    return found


@pytest.mark.fuse
@pytest.mark.redis
@pytest.mark.prometheus
@pytest.mark.slow
def test_every_query_of_the_dashboard_and_of_the_alerts_finds_something_on_a_mount_under_load(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    url = trio.run(lambda: make_volume(f"file://{tmp_path / 'store'}"))
    novafs("gc", url, "--state-dir", tmp_path / "state")  # figures of a collection
    where = f"127.0.0.1:{free_port()}"
    settings = ["--metrics", where, "--l1-capacity", "8MiB", "--set", "l1.policy=learned", "--set", "writeback.interval=1s"]
    with (
        prometheus(tmp_path, scrape=where, rules=RULES) as server,
        mounted(tmp_path, *settings, url=url, l2=redis_server.url) as mount,
    ):
        images = [mount.path / name for name in ("a.raw", "b.raw")]
        for number, image in enumerate(images):
            make_image(image, 320, seed=number)
        with guest_load(*images):
            queries = {**dashboard_queries(), **{f"alert {name}": query for name, query in alert_queries(server).items()}}
            empty = queries
            deadline_s = time.monotonic() + FOUND_S
            while empty and time.monotonic() < deadline_s:
                empty = {name: query for name, query in empty.items() if not server.values(query) and name not in LATER}
                time.sleep(0.5)
        assert not empty, json.dumps(empty, indent=1)
        for group in server.get("rules")["groups"]:
            for rule in group["rules"]:
                assert rule["health"] == "ok", rule
        for name in (family.name for family in FAMILIES if family.name.startswith("cache_")):
            assert server.values(name), name
        assert server.values("cache_ml_predictions > 0") and server.values("cache_prefetch_count > 0")
        labels = {(s["metric"]["tier"], s["metric"]["percentile"]) for s in server.get("query", query="cache_latency_ms")["result"]}
        assert labels == {(tier, percentile) for tier in ("l1", "l2", "l3") for percentile in ("p50", "p95", "p99")}


# --- the alerts -----------------------------------------------------------------------------------------------------

HEALTHY: dict[str, str] = {
    'up{job="novafs",instance="h"}': "1x140",
    'novafs_mounted{instance="h"}': "1x140",
    'novafs_errors_total{instance="h",error="StoreUnavailableError"}': "0x140",
    'novafs_request_seconds_bucket{instance="h",operation="read",le="0.001"}': "0+100x140",
    'novafs_request_seconds_bucket{instance="h",operation="read",le="2.5"}': "0+100x140",
    'novafs_request_seconds_bucket{instance="h",operation="read",le="+Inf"}': "0+100x140",
    'novafs_store_failing_seconds{instance="h"}': "0x140",
    'novafs_store_request_seconds_bucket{instance="h",operation="get",le="0.1"}': "0+100x140",
    'novafs_store_request_seconds_bucket{instance="h",operation="get",le="5.0"}': "0+100x140",
    'novafs_store_request_seconds_bucket{instance="h",operation="get",le="+Inf"}': "0+100x140",
    'novafs_store_requests_total{instance="h",operation="get"}': "0+100x140",
    'novafs_store_retries_total{instance="h",operation="get"}': "0x140",
    'novafs_corruptions_total{instance="h",tier="l3"}': "0x140",
    'novafs_tier_up{instance="h",tier="l2"}': "1x140",
    'novafs_dirty_age_seconds{instance="h"}': "5x140",
    'novafs_dirty_bytes{instance="h"}': "10x140",
    'novafs_dirty_max_bytes{instance="h"}': "100x140",
    'novafs_commit_errors_total{instance="h"}': "0x140",
    'novafs_journal_sync_seconds_bucket{instance="h",le="0.01"}': "0+10x140",
    'novafs_journal_sync_seconds_bucket{instance="h",le="1.0"}': "0+10x140",
    'novafs_journal_sync_seconds_bucket{instance="h",le="+Inf"}': "0+10x140",
    'novafs_leases_lost_total{instance="h"}': "0x140",
    'novafs_lease_heartbeat_age_seconds{instance="h"}': "9x140",
    'novafs_lease_ttl_seconds{instance="h"}': "30x140",
    'novafs_hits_total{instance="h",tier="l1"}': "0+90x140",
    'novafs_misses_total{instance="h",tier="l1"}': "0+10x140",
    'novafs_prefetch_accuracy{instance="h"}': "0.9x140",
    'novafs_policy_cpu_seconds_total{instance="h",part="prefetch"}': "0+1x140",
    'process_cpu_seconds_total{job="novafs",instance="h"}': "0+60x140",
    'novafs_collection_ended_timestamp_seconds{instance="h"}': "0x140",
    'novafs_collection{instance="h",figure="stored_bytes"}': "10x140",
    'novafs_tier_capacity_bytes{instance="h",tier="l3"}': "100x140",
}
"""Series of a mount that is well, a sample a minute (promtool's notation)."""

TROUBLE: dict[str, dict[str, str]] = {
    "NovaFSMountDown": {'up{job="novafs",instance="h"}': "0x140"},
    "NovaFSMountNotReady": {'novafs_mounted{instance="h"}': "0x140"},
    "NovaFSRequestsFail": {'novafs_errors_total{instance="h",error="StoreUnavailableError"}': "0+1x140"},
    "NovaFSReadsSlow": {'novafs_request_seconds_bucket{instance="h",operation="read",le="0.001"}': "0+90x140"},
    "NovaFSStoreDown": {'novafs_store_failing_seconds{instance="h"}': "0+60x140"},
    "NovaFSStoreSlow": {'novafs_store_request_seconds_bucket{instance="h",operation="get",le="0.1"}': "0+50x140"},
    "NovaFSStoreRetries": {'novafs_store_retries_total{instance="h",operation="get"}': "0+10x140"},
    "NovaFSCorruption": {'novafs_corruptions_total{instance="h",tier="l3"}': "0+1x140"},
    "NovaFSRedisDown": {'novafs_tier_up{instance="h",tier="l2"}': "0x140"},
    "NovaFSDataAtRiskOld": {'novafs_dirty_age_seconds{instance="h"}': "0+60x140"},
    "NovaFSDataAtRiskFull": {'novafs_dirty_bytes{instance="h"}': "95x140"},
    "NovaFSCommitsFail": {'novafs_commit_errors_total{instance="h"}': "0+1x140"},
    "NovaFSJournalSlow": {'novafs_journal_sync_seconds_bucket{instance="h",le="0.01"}': "0+5x140"},
    "NovaFSLeaseLost": {'novafs_leases_lost_total{instance="h"}': "0x110 1x30"},
    "NovaFSHeartbeatLate": {'novafs_lease_heartbeat_age_seconds{instance="h"}': "31x140"},
    "NovaFSHitRateLow": {'novafs_misses_total{instance="h",tier="l1"}': "0+200x140"},
    "NovaFSPrefetchInaccurate": {'novafs_prefetch_accuracy{instance="h"}': "0.3x140"},
    "NovaFSPolicyCpuHigh": {'novafs_policy_cpu_seconds_total{instance="h",part="prefetch"}': "0+20x140"},
    "NovaFSCollectionOld": {'novafs_collection_ended_timestamp_seconds{instance="h"}': "-700000x140"},
    "NovaFSCapacityFull": {'novafs_collection{instance="h",figure="stored_bytes"}': "95x140"},
}
AT = "2h15m"


def _case(name: str, series: dict[str, str], firing: list[str]) -> dict[str, Any]:
    return {
        "name": name,
        "interval": "1m",
        "input_series": [{"series": series_name, "values": values} for series_name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": 'sum by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": AT,
                "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in firing],
            }
        ],
    }


@pytest.mark.prometheus
def test_each_alert_fires_at_its_trouble_alone_and_none_on_a_mount_that_is_well(tmp_path: Path) -> None:
    names = re.findall(r"^ +- alert: (\w+)$", RULES.read_text(), re.MULTILINE)
    assert sorted(names) == sorted(TROUBLE)
    cases = [_case("well", HEALTHY, [])] + [_case(alert, HEALTHY | change, [alert]) for alert, change in TROUBLE.items()]
    file = tmp_path / "cases.json"
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": cases}))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.prometheus
def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", "--lint=all", "--lint-fatal", str(RULES)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_words_a_severity_and_a_place_in_the_runbook() -> None:
    runbook = (DOCS / "operations.md").read_text()
    headings = {
        re.sub(r"[^\w-]", "", line.lstrip("# ").strip().lower().replace(" ", "-")) for line in runbook.splitlines() if line.startswith("#")
    }
    text = RULES.read_text()
    head = text.split("groups:")[0]
    for block in re.split(r"\n +- alert: ", text)[1:]:
        name = block.split()[0]
        assert re.search(r"summary: \S", block) and re.search(r"description: \S", block), name
        assert re.search(r"severity: (critical|warning)\n", block), name
        assert re.search(rf"runbook: docs/operations\.md#{name.lower()}$", block, re.MULTILINE), name
        assert name.lower() in headings, f"docs/operations.md has no section {name}"
        assert re.search(rf"\b{name}\b", head), f"the comment at the top does not name {name}"


def test_what_a_learner_knows_later_is_a_metric_then() -> None:
    eviction = {"accuracy": 0.875, "judged": 1000, "predictions": 1234, "shadow_hit_rates": {"lru": 0.5}, "cpu_s": 2.0}
    prefetch = {"candidates": 5000, "examples": 3000, "right": 2925, "patterns": {"idle": 2, "sequential": 1}}
    text = exposition({"cache": {}, "eviction": eviction, "prefetch": prefetch}, "")[0].decode()
    assert '\nnovafs_eviction_shadow_hit_rate{policy="lru"} 0.5\n' in text
    assert '\nnovafs_model_accuracy{model="eviction"} 0.875\nnovafs_model_accuracy{model="prefetch"} 0.975\n' in text
    assert "\ncache_ml_accuracy 0.95\n" in text and "\ncache_ml_predictions 6234.0\n" in text
    assert '\nnovafs_access_pattern_images{pattern="idle"} 2.0\n' in text and 'images{pattern="bursty"} 0.0\n' in text
    for where in LATER:
        assert "novafs_eviction_shadow_hit_rate" in dashboard_queries()[where]


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    known = {family.name for family in FAMILIES} | {name for name, _, _ in PROCESS} | {"up"}
    for where, query in dashboard_queries().items():
        for name in re.findall(r"\b((?:novafs|cache|process)_[a-z0-9_]+)\b", query):
            assert name in known or re.sub(r"_(bucket|count|sum)$", "", name) in known, f"{where}: {name}"
