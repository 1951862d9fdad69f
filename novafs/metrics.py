"""Every metric: name, kind, unit, labels and meaning, in one place; and how they are written for Prometheus.

All are read from the statistics document (`novafs.board.Board.document`) and the histograms (`novafs.latency`) when somebody scrapes, so
that a read or a write pays for a counter at most. Names follow Prometheus's conventions: base units, `_total` for counters; those
that begin with `cache_` are the first specification's, kept as it gives them. `docs/metrics.md` is made from `FAMILIES`
(`python -m novafs.metrics`). `novafs.statusserver` serves them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from novafs import metricsamples as read
from novafs.errors import ConfigError
from novafs.metricsamples import Document

if TYPE_CHECKING:
    from prometheus_client.core import Metric

AUTO: Final = "auto"


class Family(NamedTuple):
    """One metric. labels: names; samples: label values and value, for what the document has.

    Of a histogram the samples are `novafs.metricsamples.Buckets`.
    """

    name: str
    kind: str
    help: str
    samples: Callable[[Document], Iterable[Any]]
    labels: tuple[str, ...] = ()


COUNTER: Final = "counter"
GAUGE: Final = "gauge"
HISTOGRAM: Final = "histogram"
UNTYPED: Final = "untyped"
"""A counter whose name was given without `_total`."""

FAMILIES: Final = (
    # The mount
    Family("novafs_build_info", GAUGE, "1, with the version as a label.", read.info("mount.version"), ("version",)),
    Family(
        "novafs_volume_info",
        GAUGE,
        "1, with the volume's URL (without secrets) and the mount point.",
        read.info("volume.url", "mount.mountpoint"),
        ("volume", "mountpoint"),
    ),
    Family("novafs_mounted", GAUGE, "1 while the volume is mounted; 0 while it is being opened, or closed.", read.mounted),
    Family("novafs_uptime_seconds", GAUGE, "Since the daemon began.", read.one("mount.uptime_s")),
    Family("novafs_images_open", GAUGE, "Images that are open here.", read.one("images_open")),
    Family("novafs_handles_open", GAUGE, "Open files.", read.one("mount.handles")),
    # What guests ask
    Family(
        "novafs_request_seconds", HISTOGRAM, "Time to answer a request of the kernel (FUSE), by operation.", read.requests, ("operation",)
    ),
    Family(
        "novafs_guest_reads_total",
        COUNTER,
        "Reads, by what answered: `memory` (dirty data and L1, at once), or another tier or the map (`waited`).",
        read.each(memory="traffic.memory_reads", waited="traffic.waited_reads"),
        ("answered",),
    ),
    Family(
        "novafs_guest_read_bytes_total",
        COUNTER,
        "Bytes of these reads.",
        read.each(memory="traffic.memory_bytes", waited="traffic.waited_bytes"),
        ("answered",),
    ),
    Family("novafs_guest_writes_total", COUNTER, "Writes.", read.one("traffic.writes")),
    Family("novafs_guest_written_bytes_total", COUNTER, "Bytes written.", read.one("traffic.written_bytes")),
    Family(
        "novafs_errors_total",
        COUNTER,
        "Requests that failed for a reason that an operator should see (the caller's own mistakes apart), by class.",
        read.members("mount.errors"),
        ("error",),
    ),
    Family("novafs_log_events_total", COUNTER, "Warnings and errors in the log.", read.members("events"), ("level",)),
    # Data at risk, commits, journal, leases
    Family(
        "novafs_dirty_bytes",
        GAUGE,
        "Data at risk: written bytes that no generation in the store holds yet.",
        read.one("data_at_risk.bytes"),
    ),
    Family(
        "novafs_dirty_age_seconds",
        GAUGE,
        "Age of the oldest byte that no generation in the store holds yet.",
        read.one("data_at_risk.age_s"),
    ),
    Family("novafs_dirty_images", GAUGE, "Images with such data.", read.one("data_at_risk.images")),
    Family("novafs_dirty_max_bytes", GAUGE, "The cap on data at risk; at it, writers wait.", read.one("dirty_max_bytes")),
    Family("novafs_commits_total", COUNTER, "Generations of images committed.", read.one("commits")),
    Family("novafs_commit_errors_total", COUNTER, "Commits in the background that failed, and are tried again.", read.one("commit_errors")),
    Family("novafs_commit_seconds", HISTOGRAM, "Time that a commit took, from the freeze to the answer.", read.unlabelled("commit")),
    Family(
        "novafs_journal_sync_seconds", HISTOGRAM, "Time to write a group of records to the journal and sync it.", read.unlabelled("journal")
    ),
    Family("novafs_journal_syncs_total", COUNTER, "fdatasync calls of the journal.", read.one("journal.syncs")),
    Family("novafs_journal_records_total", COUNTER, "Writes and resizes put into the journal.", read.one("journal.records")),
    Family("novafs_journal_written_bytes_total", COUNTER, "Bytes written to the journal.", read.one("journal.written_bytes")),
    Family("novafs_journal_bytes", GAUGE, "Bytes of journal segments that are needed.", read.one("journal.segment_bytes")),
    Family(
        "novafs_leases",
        GAUGE,
        "Images by the state of their lease: held here, asked for by another host (`wanted`), still to be given back (`leaving`).",
        read.each(held="leases.held", wanted="leases.wanted", leaving="leases.leaving"),
        ("state",),
    ),
    Family("novafs_leases_lost_total", COUNTER, "Leases that another host took over.", read.one("leases.lost")),
    Family(
        "novafs_lease_heartbeat_age_seconds",
        GAUGE,
        "Since the last answered heartbeat of the lease whose is the oldest; 0 where none is held.",
        read.one("leases.heartbeat_age_s"),
    ),
    Family("novafs_lease_ttl_seconds", GAUGE, "How long a heartbeat counts.", read.one("lease_ttl_s")),
    # Tiers
    Family("novafs_hits_total", COUNTER, "Chunks that a tier had.", read.tiers("hits"), ("tier",)),
    Family("novafs_misses_total", COUNTER, "Chunks that a tier was asked for and did not have.", read.tiers("misses"), ("tier",)),
    Family(
        "novafs_tier_requests_total",
        COUNTER,
        "Requests to a tier: of L1, reads of guests and chunks put there; of L2, batches; of L3, ranges and packs.",
        read.both(
            read.with_label(
                "get",
                read.both(
                    read.with_label("l1", read.total("traffic.memory_reads", "traffic.waited_reads")),
                    read.each(l2="cache.l2_traffic.requests", l3="cache.l3_traffic.requests"),
                ),
            ),
            read.with_label("put", read.each(l1="cache.l1.insertions", l2="cache.fill.requests", l3="written.packs")),
        ),
        ("tier", "operation"),
    ),
    Family(
        "novafs_tier_bytes_total",
        COUNTER,
        "Bytes read from a tier and written to it: of L1, content that it answered; of L2 and L3, payloads and packs.",
        read.both(
            read.with_label(
                "get", read.each(l1="traffic.memory_bytes", l2="cache.l2_traffic.read_bytes", l3="cache.l3_traffic.read_bytes")
            ),
            read.with_label("put", read.each(l2="cache.fill.written_bytes", l3="written.uploaded_bytes")),
        ),
        ("tier", "operation"),
    ),
    Family(
        "novafs_tier_seconds",
        HISTOGRAM,
        "Time that a tier took: of L1, for a read of a guest that it answered; of L2 and L3, for a batch, verification excluded.",
        read.tier_histograms,
        ("tier", "operation"),
    ),
    Family(
        "novafs_corruptions_total",
        COUNTER,
        "Frames that were not what they should be.",
        read.each(l2="cache.l2_traffic.corruptions", l3="cache.l3_traffic.corruptions"),
        ("tier",),
    ),
    Family(
        "novafs_tier_errors_total",
        COUNTER,
        "Requests to a tier that failed.",
        read.each(l1="cache.l1.errors", l2="cache.l2.errors", l3="cache.l3_traffic.errors"),
        ("tier",),
    ),
    Family(
        "novafs_tier_timeouts_total",
        COUNTER,
        "Batches that a tier did not answer in time.",
        read.each(l2="cache.l2_traffic.timeouts"),
        ("tier",),
    ),
    Family(
        "novafs_tier_used_bytes",
        GAUGE,
        "Bytes that a tier holds.",
        read.each(l1="cache.l1.used_bytes", l2="cache.l2.used_bytes"),
        ("tier",),
    ),
    Family(
        "novafs_tier_capacity_bytes",
        GAUGE,
        "Bytes that a tier may hold.",
        read.each(l1="cache.l1.capacity_bytes", l2="cache.l2.capacity_bytes", l3="l3_capacity_bytes"),
        ("tier",),
    ),
    Family(
        "novafs_tier_up",
        GAUGE,
        "Whether a tier answered when it was asked last: 1 or 0. l2 is Redis, l3 the store.",
        read.each(l1="cache.l1.up", l2="cache.l2.up", l3="store.up"),
        ("tier",),
    ),
    Family(
        "novafs_evictions_total",
        COUNTER,
        "Chunks evicted from a tier by this process.",
        read.each(l1="cache.l1.evictions", l2="cache.l2.evictions"),
        ("tier",),
    ),
    Family("novafs_fills_total", COUNTER, "Chunks written to L2.", read.one("cache.fill.fills")),
    Family("novafs_demotions_total", COUNTER, "Chunks that L1 evicted and L2 took.", read.one("cache.fill.demotions")),
    Family(
        "novafs_shared_fetches_total",
        COUNTER,
        "Times that a chunk was asked for while its fetch was under way.",
        read.one("cache.shared_fetches"),
    ),
    # The store
    Family(
        "novafs_store_failing_seconds",
        GAUGE,
        "Since when no request to the store was answered; 0 while it answers.",
        read.one("store.failing_s"),
    ),
    Family(
        "novafs_store_request_seconds",
        HISTOGRAM,
        "Time that one request to the store took, waiting for a connection and retries excluded.",
        read.histogram("store"),
        ("operation",),
    ),
    Family(
        "novafs_store_requests_total", COUNTER, "Requests to the store.", read.members("store.by_operation", "requests"), ("operation",)
    ),
    Family(
        "novafs_store_retries_total",
        COUNTER,
        "Requests to the store that repeated one.",
        read.members("store.by_operation", "retries"),
        ("operation",),
    ),
    Family(
        "novafs_store_seconds_total",
        COUNTER,
        "Seconds that calls of the store took, waiting and retries included.",
        read.members("store.by_operation", "seconds"),
        ("operation",),
    ),
    Family(
        "novafs_store_read_bytes_total", COUNTER, "Object bytes read.", read.members("store.by_operation", "read_bytes"), ("operation",)
    ),
    Family(
        "novafs_store_written_bytes_total",
        COUNTER,
        "Object bytes written.",
        read.members("store.by_operation", "written_bytes"),
        ("operation",),
    ),
    Family(
        "novafs_store_errors_total",
        COUNTER,
        "Calls of the store that raised, 'no such object' included.",
        read.store_errors,
        ("operation", "error"),
    ),
    Family("novafs_store_waiting", GAUGE, "Calls that wait for a connection to the store.", read.one("store.waiting")),
    # Deduplication, compression, collection
    Family(
        "novafs_written_chunks_total",
        COUNTER,
        "Chunks that commits wrote: stored anew, known already (`duplicate`), or zeros (`hole`).",
        read.each(new="written.new_chunks", duplicate="written.dedup_chunks", hole="written.hole_chunks"),
        ("result",),
    ),
    Family("novafs_written_plain_bytes_total", COUNTER, "Content that was stored anew, before compression.", read.one("written.new_bytes")),
    Family("novafs_written_stored_bytes_total", COUNTER, "The same, after compression.", read.one("written.stored_bytes")),
    Family("novafs_compression_ratio", GAUGE, "Content / payload of what this process has stored.", read.compression),
    Family("novafs_delta_frames_total", COUNTER, "Chunks and map nodes that were stored as deltas.", read.one("delta.stored")),
    Family("novafs_delta_saved_bytes_total", COUNTER, "By how much smaller those are than they would be.", read.one("delta.saved_bytes")),
    Family("novafs_delta_reads_total", COUNTER, "Deltas that were read from L3.", read.one("delta.reads")),
    Family("novafs_delta_base_read_bytes_total", COUNTER, "What was read from L3 to read those.", read.one("delta.base_bytes")),
    Family("novafs_delta_resting_images", GAUGE, "Images for which deltas were found not to pay for now.", read.one("delta.resting")),
    Family(
        "novafs_collection",
        GAUGE,
        "Figures of the last complete collection, by name (`novafs gc`): dedup ratio, saved and freed bytes among them.",
        read.members("collection"),
        ("figure",),
    ),
    Family("novafs_collection_ended_timestamp_seconds", GAUGE, "When that collection ended.", read.one("collection.ended_s")),
    # Prefetch
    Family(
        "novafs_prefetch_chunks_total",
        COUNTER,
        "Prefetched chunks by source and what became of them: issued; and used, late, wasted or dropped.",
        read.ends,
        ("source", "end"),
    ),
    Family(
        "novafs_read_around_chunks_total",
        COUNTER,
        "Chunks fetched around those that guests waited for (`prefetch.read_around`): how many came, were used, and left L1 unused.",
        read.each(**{end: f"prefetch.around.{end}" for end in ("arrived", "used", "wasted")}),
        ("end",),
    ),
    Family(
        "novafs_prefetch_accuracy", GAUGE, "Prefetched chunks used before they were evicted / prefetched.", read.one("prefetch.accuracy")
    ),
    Family("novafs_prefetch_coverage", GAUGE, "Misses avoided / misses without prefetch.", read.one("prefetch.coverage")),
    Family(
        "novafs_prefetch_misses_total",
        COUNTER,
        "Misses of guests, with prefetch as it is, and as they would have been without (`without`).",
        read.each(**{"with": "prefetch.misses", "without": "prefetch.misses_without"}),
        ("prefetch",),
    ),
    Family("novafs_prefetch_in_flight_chunks", GAUGE, "Prefetches under way.", read.one("prefetch.in_flight")),
    Family(
        "novafs_access_pattern_images",
        GAUGE,
        "Images that were read here, by how they are read: `idle` is too little to tell. `novafs info` has it of each.",
        read.patterns,
        ("pattern",),
    ),
    # Warming and handoffs
    Family(
        "novafs_warmed_chunks_total",
        COUNTER,
        "Chunks that were asked for ahead of need (`novafs warm`, the library, handoffs), by what came of it: brought (`fetched`), there "
        "already (`held`), or not to be read (`failed`).",
        read.each(fetched="warmed.fetched", held="warmed.held", failed="warmed.failed"),
        ("result",),
    ),
    Family("novafs_warmed_read_bytes_total", COUNTER, "Payloads read from L3 for it.", read.one("warmed.read_bytes")),
    Family(
        "novafs_handoffs_total",
        COUNTER,
        "Images `given` up to another host (`novafs handoff`) and offers `taken`, done or `failed`: nobody answered and the image stayed; "
        "an offer was damaged, or what is hot could not be brought.",
        read.both(
            read.with_label("done", read.each(given="handoffs.given", taken="handoffs.taken")),
            read.with_label("failed", read.each(given="handoffs.given_failed", taken="handoffs.taken_failed")),
        ),
        ("direction", "result"),
    ),
    Family("novafs_handoff_chunks_total", COUNTER, "Chunks that other hosts' offers brought.", read.one("handoffs.chunks")),
    # Learning
    Family(
        "novafs_policy_cpu_seconds_total",
        COUNTER,
        "CPU seconds spent on learning, predicting and choosing.",
        read.each(prefetch="prefetch.policy_cpu_s", eviction="eviction.cpu_s"),
        ("part",),
    ),
    Family(
        "novafs_model_predictions_total",
        COUNTER,
        "Predictions of each model that learns here: `prefetch`, whether a chunk will be used before it is evicted; `eviction` (where "
        "`l1.policy` learns), whether it will be read again.",
        read.model_predictions,
        ("model",),
    ),
    Family(
        "novafs_model_accuracy",
        GAUGE,
        "Of its predictions whose outcome is known, the share that was right.",
        read.model_accuracy,
        ("model",),
    ),
    Family(
        "novafs_prefetch_examples_total", COUNTER, "Candidates whose end the prefetch gate has learned from.", read.one("prefetch.examples")
    ),
    Family(
        "novafs_prefetch_log_loss",
        GAUGE,
        "Mean log loss of the prefetch gate's lately judged predictions: 0 is perfect, 0.69 a coin.",
        read.one("prefetch.log_loss"),
    ),
    Family(
        "novafs_eviction_shadow_hit_rate",
        GAUGE,
        "Hit rate of each policy's shadow cache.",
        read.members("eviction.shadow_hit_rates"),
        ("policy",),
    ),
    Family(
        "novafs_eviction_in_charge",
        GAUGE,
        "1 for the policy that decides who leaves L1, where that learns.",
        read.in_charge,
        ("policy",),
    ),
    Family("novafs_eviction_changes_total", COUNTER, "How often another policy took charge.", read.one("eviction.switches")),
    Family("novafs_eviction_trainings_total", COUNTER, "Models that the eviction policy has learned.", read.one("eviction.trainings")),
    Family(
        "novafs_eviction_calibration",
        GAUGE,
        "Of chunks that were given about this chance of being asked for again, the share that was.",
        read.calibration,
        ("said",),
    ),
    # Between the tiers
    Family(
        "novafs_promotions_total",
        COUNTER,
        "Chunks that came up into L1, by where from.",
        read.each(l2="cache.fill.l2_promotions", l3="cache.fill.l3_promotions"),
        ("tier",),
    ),
    Family(
        "novafs_admissions_total",
        COUNTER,
        "Chunks read from L3, by whether they were let into L2 (`admitted`) or nobody was expected to ask for them again (`one_off`).",
        read.each(admitted="cache.fill.admissions", one_off="cache.fill.one_offs"),
        ("outcome",),
    ),
    Family(
        "novafs_demotions_refused_total",
        COUNTER,
        "Chunks that L1 evicted, that L2 lacked, and that were not worth a place there.",
        read.one("cache.fill.demotions_refused"),
    ),
    # The names of the first specification
    Family("cache_hit_rate", GAUGE, "Chunks that a tier had / asked of it, since the start.", read.hit_rates, ("tier",)),
    Family(
        "cache_latency_ms",
        GAUGE,
        "Milliseconds that a read of a tier took in the last minute, or since the start where that had none.",
        read.milliseconds,
        ("tier", "percentile"),
    ),
    Family("cache_prefetch_accuracy", GAUGE, "The same as novafs_prefetch_accuracy.", read.or_zero("prefetch.accuracy")),
    Family("cache_prefetch_count", UNTYPED, "Chunks prefetched.", read.or_zero("prefetch.total.issued")),
    Family(
        "cache_dedup_ratio",
        GAUGE,
        "References to chunks / chunks stored, of the whole volume as the last collection counted; before there was one, of what "
        "this process has written.",
        read.dedup_ratio,
    ),
    Family(
        "cache_dedup_saved_bytes",
        GAUGE,
        "Content that is not stored again because it is stored already; of what, as for cache_dedup_ratio.",
        read.dedup_saved,
    ),
    Family(
        "cache_ml_accuracy",
        GAUGE,
        "Predictions that were right / whose outcome is known, of all models that learn here; novafs_model_accuracy has it of each.",
        read.all_accuracy,
    ),
    Family("cache_ml_predictions", UNTYPED, "Predictions of these models.", read.all_predictions),
)


def families(document: Document) -> Iterator[Metric]:
    """The metrics of a document, for prometheus_client."""
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        UnknownMetricFamily,
    )  # an HTTP server comes along

    kinds = {GAUGE: GaugeMetricFamily, UNTYPED: UnknownMetricFamily}
    for family in FAMILIES:
        if family.kind == HISTOGRAM:
            histogram = HistogramMetricFamily(family.name, family.help, labels=family.labels)
            for labels, buckets, sum_s in family.samples(document):
                histogram.add_metric(labels, buckets, sum_s)
            yield histogram
            continue
        if family.kind == COUNTER:
            metric: Any = CounterMetricFamily(family.name.removesuffix("_total"), family.help, labels=family.labels)
        else:
            metric = kinds[family.kind](family.name, family.help, labels=family.labels)
        for labels, value in family.samples(document):
            metric.add_metric(labels, value)
        yield metric


def exposition(document: Document, accept: str) -> tuple[bytes, str]:
    """What `/metrics` answers, these metrics and the process's own, and its Content-Type. accept: the request's header."""
    from prometheus_client import ProcessCollector
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.registry import Collector, CollectorRegistry

    class Documents(Collector):
        def collect(self) -> Iterable[Metric]:
            return families(document)

        def describe(self) -> Iterable[Metric]:
            return ()

    registry = CollectorRegistry()
    registry.register(Documents())
    ProcessCollector(registry=registry)
    encode, kind = choose_encoder(accept)
    return encode(registry), kind


def parse_address(text: str) -> tuple[str, int]:
    """ "ADDRESS:PORT", "[IPV6]:PORT" or "PORT" (on loopback). Raises ConfigError."""
    address, _, port = text.strip().rpartition(":")
    address = address.strip("[]") or "127.0.0.1"
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{text!r}: expected ADDRESS:PORT with a port from 1 to 65535, auto, or off")
    return address, int(port)


PROCESS: Final = (
    ("process_cpu_seconds_total", COUNTER, "CPU seconds of the daemon."),
    ("process_resident_memory_bytes", GAUGE, "Memory of the daemon."),
    ("process_virtual_memory_bytes", GAUGE, "Its address space."),
    ("process_open_fds", GAUGE, "Its open descriptors."),
    ("process_max_fds", GAUGE, "How many it may have."),
    ("process_start_time_seconds", GAUGE, "When it began, in epoch seconds."),
)
"""What prometheus_client adds."""


_INTRODUCTION: Final = """\
# Metrics

Every mount serves these at `/metrics`, on 127.0.0.1 port 9619 or the next that is free up to 9650, unless the key `metrics` says otherwise;
`novafs stats` tells where. [Alert rules](prometheus/novafs.rules.yml) and a [Grafana dashboard](grafana/novafs.json) are made for them;
[operations.md](operations.md) says what to do at each alert. This page is made from `novafs/metrics.py` by `python -m novafs.metrics`.

```yaml
scrape_configs:
  - job_name: novafs
    static_configs:
      - targets: ["127.0.0.1:9619"]   # and 9620, … where a host has several mounts
```

| path of the port | what it answers |
|---|---|
| `/metrics` | the metrics below |
| `/` | the status page: rates, tiers, a map of each open image, latencies, events; it fetches `/status.json` and `/residency.json` |
| `/healthz` | 200 while the daemon's event loop turns, from its start to its end; 503 where it does not answer within 5 s |
| `/readyz` | 200 while requests are answered; else 503 with the reason in words |

Ready is a mount that answers through the kernel. A store that is away makes it *degraded*, which is still ready: L1, L2 and the
journal go on. It is not ready while the volume is opened or closed, at the cap on data at risk, and, while the store is away, once a
request has failed by it, or with `durability = "store"`.

The port is read-only and takes no password: whoever may connect sees names of images and figures. Beyond loopback, put it behind
something that asks who it is. The page is shown under an address, `localhost` or the host's own name (also with its domain, as
the host's resolver knows it) only, so that no foreign web site can read it through a visitor's browser; a proxy before it must say one of
these as `Host`.

## The metrics

Tiers are `l1` (memory), `l2` (Redis) and `l3` (the store). Histograms have buckets at 1, 2.5 and 5 of each decade from 1 µs to 100 s.
Counters begin at 0 with the daemon. A `novafs_` figure that is not known (an accuracy before anything was predicted, the L2 of a mount that
has none) is missing: an alert that compares it stays quiet. Those that begin with `cache_` are there from the moment at which the volume
is mounted, for each tier that it has, and are 0 until there is something to count; `cache_ml_predictions` and `cache_prefetch_count` say
how much there was.

| metric | kind | meaning |
|---|---|---|
"""


def markdown() -> str:
    """`docs/metrics.md`."""
    rows = [
        f"| `{family.name}`{'{' + ', '.join(family.labels) + '}' if family.labels else ''} | {family.kind} | {family.help} |"
        for family in FAMILIES
    ]
    return _INTRODUCTION + "\n".join([*rows, *(f"| `{name}` | {kind} | {help_} |" for name, kind, help_ in PROCESS), ""])


if __name__ == "__main__":
    sys.stdout.write(markdown())
