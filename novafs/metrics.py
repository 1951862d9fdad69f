"""Every metric: name, kind, unit, labels and meaning, in one place; and the endpoint that Prometheus scrapes.

All are read from the statistics document (`Volume.statistics`) when somebody scrapes, so they cost reads and writes nothing. Names follow
Prometheus's conventions: base units, `_total` for counters. `docs/metrics.md` is made from `FAMILIES` (`python -m novafs.metrics`).

`MetricsServer` serves `/metrics` on an address of its own: prometheus_client's server in a thread of its own, which asks the trio
thread for the document. A scrape that the trio thread does not answer within `ANSWER_S` gets an error, and nobody else waits for it.
"""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

import trio
from prometheus_client import start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from novafs.errors import ConfigError

Document = Mapping[str, Any]
Sample = tuple[tuple[str, ...], float]
ANSWER_S: Final = 5.0
SCRAPES_MAX: Final = 8
"""At a time; others are turned away."""
IDLE_S: Final = 10.0


class Family(NamedTuple):
    """One metric. labels: names; samples: label values and value, for what the document has."""

    name: str
    kind: str
    help: str
    samples: Callable[[Document], Iterable[Sample]]
    labels: tuple[str, ...] = ()


def _at(document: Document, path: str) -> Any:
    """The value under a dotted path; None where a part of it is missing or null."""
    found: Any = document
    for name in path.split("."):
        if not isinstance(found, Mapping) or (found := found.get(name)) is None:
            return None
    return found


def _one(path: str) -> Callable[[Document], Iterable[Sample]]:
    def samples(document: Document) -> Iterator[Sample]:
        value = _at(document, path)
        if value is not None:
            yield (), float(value)

    return samples


def _each(**paths: str) -> Callable[[Document], Iterable[Sample]]:
    """A sample for each label value whose path there is."""

    def samples(document: Document) -> Iterator[Sample]:
        for label, path in paths.items():
            value = _at(document, path)
            if value is not None:
                yield (label,), float(value)

    return samples


def _members(path: str, field: str = "") -> Callable[[Document], Iterable[Sample]]:
    """A sample for each member of a table, labelled with its name."""

    def samples(document: Document) -> Iterator[Sample]:
        for name, part in (_at(document, path) or {}).items():
            value = _at(part, field) if field else part
            if value is not None:
                yield (str(name),), float(value)

    return samples


def _store_errors(document: Document) -> Iterator[Sample]:
    for operation, counters in (_at(document, "store.by_operation") or {}).items():
        for name, count in counters.get("errors", {}).items():
            yield (operation, name), float(count)


def _ends(document: Document) -> Iterator[Sample]:
    for source, counts in (_at(document, "prefetch.sources") or {}).items():
        for end in ("issued", "used", "late", "wasted", "dropped"):
            yield (source, end), float(counts[end])


def _hit_rates(document: Document) -> Iterator[Sample]:
    for tier, path in _TRAFFIC.items():
        hits, misses = _at(document, f"{path}.hits"), _at(document, f"{path}.misses")
        if hits is not None and hits + misses:
            yield (tier,), hits / (hits + misses)


_TRAFFIC: Final = {"l1": "cache.l1", "l2": "cache.l2_traffic", "l3": "cache.l3_traffic"}


def _tiers(field: str) -> Callable[[Document], Iterable[Sample]]:
    return _each(**{tier: f"{path}.{field}" for tier, path in _TRAFFIC.items()})


COUNTER: Final = "counter"
GAUGE: Final = "gauge"

FAMILIES: Final = (
    Family(
        "novafs_dirty_bytes", GAUGE, "Data at risk: written bytes that no generation in the store holds yet.", _one("data_at_risk.bytes")
    ),
    Family(
        "novafs_dirty_age_seconds", GAUGE, "Age of the oldest byte that no generation in the store holds yet.", _one("data_at_risk.age_s")
    ),
    Family("novafs_dirty_images", GAUGE, "Images with such data.", _one("data_at_risk.images")),
    Family("novafs_dirty_max_bytes", GAUGE, "The cap on data at risk; at it, writers wait.", _one("dirty_max_bytes")),
    Family("novafs_commits_total", COUNTER, "Generations committed in the background.", _one("commits")),
    Family("novafs_commit_errors_total", COUNTER, "Commits in the background that failed, and are tried again.", _one("commit_errors")),
    Family("novafs_journal_syncs_total", COUNTER, "fdatasync calls of the journal.", _one("journal.syncs")),
    Family("novafs_journal_records_total", COUNTER, "Writes and resizes put into the journal.", _one("journal.records")),
    Family("novafs_journal_written_bytes_total", COUNTER, "Bytes written to the journal.", _one("journal.written_bytes")),
    Family("novafs_journal_bytes", GAUGE, "Bytes of journal segments that are needed.", _one("journal.segment_bytes")),
    Family("novafs_images_open", GAUGE, "Images that are open here.", _one("images_open")),
    Family("novafs_hits_total", COUNTER, "Chunks that a tier had.", _tiers("hits"), ("tier",)),
    Family("novafs_misses_total", COUNTER, "Chunks that a tier was asked for and did not have.", _tiers("misses"), ("tier",)),
    Family(
        "novafs_tier_requests_total",
        COUNTER,
        "Batches asked of a tier.",
        _each(l2="cache.l2_traffic.requests", l3="cache.l3_traffic.requests"),
        ("tier",),
    ),
    Family(
        "novafs_tier_read_bytes_total",
        COUNTER,
        "Payload bytes read from a tier.",
        _each(l2="cache.l2_traffic.read_bytes", l3="cache.l3_traffic.read_bytes"),
        ("tier",),
    ),
    Family(
        "novafs_tier_read_seconds_total",
        COUNTER,
        "Seconds that reads of a tier took, verification excluded.",
        _each(l2="cache.l2_traffic.seconds", l3="cache.l3_traffic.seconds"),
        ("tier",),
    ),
    Family(
        "novafs_corruptions_total",
        COUNTER,
        "Frames that were not what they should be.",
        _each(l2="cache.l2_traffic.corruptions", l3="cache.l3_traffic.corruptions"),
        ("tier",),
    ),
    Family(
        "novafs_tier_timeouts_total",
        COUNTER,
        "Batches that a tier did not answer in time.",
        _each(l2="cache.l2_traffic.timeouts"),
        ("tier",),
    ),
    Family(
        "novafs_tier_used_bytes", GAUGE, "Bytes that a tier holds.", _each(l1="cache.l1.used_bytes", l2="cache.l2.used_bytes"), ("tier",)
    ),
    Family(
        "novafs_tier_capacity_bytes",
        GAUGE,
        "Bytes that a tier may hold.",
        _each(l1="cache.l1.capacity_bytes", l2="cache.l2.capacity_bytes"),
        ("tier",),
    ),
    Family("novafs_tier_up", GAUGE, "Whether a tier answers: 1 or 0.", _each(l1="cache.l1.up", l2="cache.l2.up"), ("tier",)),
    Family(
        "novafs_evictions_total",
        COUNTER,
        "Chunks evicted from a tier by this process.",
        _each(l1="cache.l1.evictions", l2="cache.l2.evictions"),
        ("tier",),
    ),
    Family("novafs_fills_total", COUNTER, "Chunks written to L2.", _one("cache.fill.fills")),
    Family("novafs_demotions_total", COUNTER, "Chunks that L1 evicted and L2 took.", _one("cache.fill.demotions")),
    Family(
        "novafs_shared_fetches_total",
        COUNTER,
        "Times that a chunk was asked for while its fetch was under way.",
        _one("cache.shared_fetches"),
    ),
    Family("novafs_store_requests_total", COUNTER, "Requests to the store.", _members("store.by_operation", "requests"), ("operation",)),
    Family(
        "novafs_store_retries_total",
        COUNTER,
        "Requests to the store that repeated one.",
        _members("store.by_operation", "retries"),
        ("operation",),
    ),
    Family(
        "novafs_store_seconds_total",
        COUNTER,
        "Seconds that calls of the store took, waiting included.",
        _members("store.by_operation", "seconds"),
        ("operation",),
    ),
    Family("novafs_store_read_bytes_total", COUNTER, "Object bytes read.", _members("store.by_operation", "read_bytes"), ("operation",)),
    Family(
        "novafs_store_written_bytes_total",
        COUNTER,
        "Object bytes written.",
        _members("store.by_operation", "written_bytes"),
        ("operation",),
    ),
    Family(
        "novafs_store_errors_total",
        COUNTER,
        "Calls of the store that raised, 'no such object' included.",
        _store_errors,
        ("operation", "error"),
    ),
    Family("novafs_store_waiting", GAUGE, "Calls that wait for a connection to the store.", _one("store.waiting")),
    Family("novafs_prefetch_chunks_total", COUNTER, "Prefetched chunks by source and what became of them.", _ends, ("source", "end")),
    Family("novafs_prefetch_accuracy", GAUGE, "Prefetched chunks used before they were evicted / prefetched.", _one("prefetch.accuracy")),
    Family("novafs_prefetch_coverage", GAUGE, "Misses avoided / misses without prefetch.", _one("prefetch.coverage")),
    Family("novafs_prefetch_in_flight_chunks", GAUGE, "Prefetches under way.", _one("prefetch.in_flight")),
    Family("novafs_policy_cpu_seconds_total", COUNTER, "CPU seconds spent on learning and predicting.", _one("prefetch.policy_cpu_s")),
    Family("cache_ml_accuracy", GAUGE, "Predictions of the eviction model that were right / judged.", _one("eviction.accuracy")),
    Family("cache_ml_predictions", COUNTER, "Predictions of the eviction model.", _one("eviction.predictions")),
    Family("novafs_eviction_cpu_seconds_total", COUNTER, "CPU seconds spent on learning whom to evict.", _one("eviction.cpu_s")),
    Family(
        "novafs_eviction_shadow_hit_rate",
        GAUGE,
        "Hit rate of each policy's shadow cache.",
        _members("eviction.shadow_hit_rates"),
        ("policy",),
    ),
    Family(
        "novafs_collection",
        GAUGE,
        "Figures of the last complete collection, by name (`novafs gc`): dedup ratio, saved and freed bytes among them.",
        _members("collection"),
        ("figure",),
    ),
    Family("cache_hit_rate", GAUGE, "Chunks that a tier had / asked of it.", _hit_rates, ("tier",)),
    Family("cache_prefetch_accuracy", GAUGE, "The same as novafs_prefetch_accuracy.", _one("prefetch.accuracy")),
    Family("cache_prefetch_count", COUNTER, "Chunks prefetched.", _one("prefetch.total.issued")),
)


class _Documents(Collector):
    def __init__(self, read: Callable[[], Document]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return ()  # nothing is asked of the trio thread before the first scrape

    def collect(self) -> Iterator[Metric]:
        document = self._read()
        for family in FAMILIES:
            if family.kind == COUNTER:
                metric: Metric = CounterMetricFamily(family.name.removesuffix("_total"), family.help, labels=family.labels)
            else:
                metric = GaugeMetricFamily(family.name, family.help, labels=family.labels)
            for labels, value in family.samples(document):
                metric.add_metric(labels, value)  # type: ignore[attr-defined]  # both have it, their base has not
            yield metric


def parse_address(text: str) -> tuple[str, int]:
    """ "ADDRESS:PORT", "[IPV6]:PORT" or "PORT" (on loopback). Raises ConfigError."""
    address, _, port = text.strip().rpartition(":")
    address = address.strip("[]") or "127.0.0.1"
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{text!r}: expected ADDRESS:PORT with a port from 1 to 65535, or off")
    return address, int(port)


@asynccontextmanager
async def metrics_server(where: str, statistics: Callable[[], Document]) -> AsyncIterator[None]:
    """Serve `/metrics` at `where` for as long as the block lasts. Raises ConfigError where the address can not be used."""
    address, port = parse_address(where)
    token = trio.lowlevel.current_trio_token()

    def read() -> Document:
        async def answer() -> Document:
            with trio.fail_after(ANSWER_S):
                await trio.lowlevel.checkpoint()
                return statistics()

        return trio.from_thread.run(answer, trio_token=token)

    registry = CollectorRegistry()
    registry.register(_Documents(read))
    try:
        server, thread = await trio.to_thread.run_sync(lambda: start_http_server(port, addr=address, registry=registry))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"metrics: port {port} of {address} is in use by another process; give another with --metrics, or off"
            ) from error
        raise ConfigError(f"metrics: cannot listen on {address} port {port}: {error.strerror}; give another address, or off") from error
    _bound(server)
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            # In a thread: a scrape that is under way needs this one to end.
            await trio.to_thread.run_sync(server.shutdown)
            await trio.to_thread.run_sync(thread.join)
            server.server_close()


def _bound(server: Any) -> None:
    """Clients that connect and say nothing hold at most SCRAPES_MAX threads and descriptors, each for IDLE_S."""
    slots = threading.BoundedSemaphore(SCRAPES_MAX)
    serve = server.process_request_thread

    def process(request: Any, client_address: Any) -> None:
        try:
            serve(request, client_address)
        finally:
            slots.release()

    server.RequestHandlerClass = type("Handler", (server.RequestHandlerClass,), {"timeout": IDLE_S})
    server.verify_request = lambda _request, _client_address: slots.acquire(blocking=False)
    server.process_request_thread = process


def markdown() -> str:
    """`docs/metrics.md`."""
    rows = [
        f"| `{family.name}`{'{' + ', '.join(family.labels) + '}' if family.labels else ''} | {family.kind} | {family.help} |"
        for family in FAMILIES
    ]
    return "\n".join(
        [
            "# Metrics",
            "",
            "Served by a mount at `/metrics` where `metrics` names an address (`novafs mount … --metrics 127.0.0.1:9567`). Made from",
            "`novafs/metrics.py` by `python -m novafs.metrics`.",
            "",
            "| metric | kind | meaning |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.stdout.write(markdown())
