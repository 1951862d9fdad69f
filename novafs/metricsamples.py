"""How the samples of a metric are read from the statistics document: the words in which `novafs.metrics.FAMILIES` is written.

Each gives a function of the document that yields label values and value for what the document has, and nothing for what it has not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

Document = Mapping[str, Any]
Sample = tuple[tuple[str, ...], float]
Buckets = tuple[tuple[str, ...], list[tuple[str, float]], float]
"""Of a histogram: label values, cumulative counts by upper end, sum."""
Samples = Callable[[Document], Iterable[Sample]]


def at(document: Document, path: str) -> Any:
    """The value under a dotted path; None where a part of it is missing or null."""
    found: Any = document
    for name in path.split("."):
        if not isinstance(found, Mapping) or (found := found.get(name)) is None:
            return None
    return found


def one(path: str) -> Samples:
    def samples(document: Document) -> Iterator[Sample]:
        value = at(document, path)
        if value is not None:
            yield (), float(value)

    return samples


def each(**paths: str) -> Samples:
    """A sample for each label value whose path there is."""

    def samples(document: Document) -> Iterator[Sample]:
        for label, path in paths.items():
            value = at(document, path)
            if value is not None:
                yield (label,), float(value)

    return samples


def in_charge(document: Document) -> Iterator[Sample]:
    """Who of the eviction policies decides."""
    name = at(document, "eviction.in_charge")
    for policy in {*(at(document, "eviction.shadow_hit_rates") or {}), *([name] if name else [])}:
        yield (str(policy),), float(policy == name)


def calibration(document: Document) -> Iterator[Sample]:
    """What was observed of chances, by tenth."""
    for said, observed, _ in at(document, "eviction.calibration") or ():
        yield (f"{min(9, int(10 * said)) / 10:.1f}",), float(observed)


def members(path: str, field: str = "") -> Samples:
    """A sample for each member of a table, labelled with its name."""

    def samples(document: Document) -> Iterator[Sample]:
        for name, part in (at(document, path) or {}).items():
            value = at(part, field) if field else part
            if value is not None:
                yield (str(name),), float(value)

    return samples


def with_label(label: str, samples: Samples) -> Samples:
    """The same samples with one more label value at the end."""

    def labelled(document: Document) -> Iterator[Sample]:
        for labels, value in samples(document):
            yield (*labels, label), value

    return labelled


def both(*parts: Samples) -> Samples:
    def samples(document: Document) -> Iterator[Sample]:
        for part in parts:
            yield from part(document)

    return samples


def info(*paths: str) -> Samples:
    """1, with the texts under the paths as labels."""

    def samples(document: Document) -> Iterator[Sample]:
        values = [at(document, path) for path in paths]
        if None not in values:
            yield tuple(str(value) for value in values), 1.0

    return samples


def total(path: str, *others: str) -> Samples:
    def samples(document: Document) -> Iterator[Sample]:
        values = [at(document, one) for one in (path, *others)]
        if any(value is not None for value in values):
            yield (), float(sum(value or 0 for value in values))

    return samples


def histogram(subject: str) -> Callable[[Document], Iterable[Buckets]]:
    """By operation."""

    def samples(document: Document) -> Iterator[Buckets]:
        for found, operation, buckets, sum_s in document.get("histograms", ()):
            if found == subject:
                yield (operation,), buckets, sum_s

    return samples


def tier_histograms(document: Document) -> Iterator[Buckets]:
    for tier in TRAFFIC:
        for (operation,), buckets, sum_s in histogram(tier)(document):
            yield (tier, operation), buckets, sum_s


def unlabelled(subject: str) -> Callable[[Document], Iterable[Buckets]]:
    def samples(document: Document) -> Iterator[Buckets]:
        for _, buckets, sum_s in histogram(subject)(document):
            yield (), buckets, sum_s

    return samples


def requests(document: Document) -> Iterator[Buckets]:
    """Of READ there are two: those that memory answered at once are noted by the image, under `l1`, the others by the mount."""
    quick = [found for found in histogram("l1")(document) if found[0] == ("get",)]
    for (operation,), buckets, sum_s in histogram("fuse")(document):
        if operation == "read" and quick:
            buckets = [(end, count + more) for (end, count), (_, more) in zip(buckets, quick[0][1], strict=True)]
            sum_s += quick[0][2]
        yield (operation,), buckets, sum_s


def milliseconds(document: Document) -> Iterator[Sample]:
    """Of each tier that there is; 0 before it was read."""
    for tier in TRAFFIC if at(document, "cache") is not None else ():
        for percentile in ("p50", "p95", "p99") if _is_there(document, tier) else ():
            yield (tier, percentile), 1000 * float(at(document, f"latency.{tier}.get.{percentile}_s") or 0.0)


def or_zero(path: str) -> Samples:
    """The figure of an open volume; 0 where it is not known yet."""

    def samples(document: Document) -> Iterator[Sample]:
        if at(document, "cache") is not None:
            yield (), float(at(document, path) or 0.0)

    return samples


def _models(document: Document) -> Iterator[tuple[str, int, int, float]]:
    """Of each model that learns here: its name, predictions, those that were judged, and those of them that were right."""
    if at(document, "eviction.predictions") is not None:
        judged = int(at(document, "eviction.judged") or 0)
        yield "eviction", int(at(document, "eviction.predictions")), judged, judged * float(at(document, "eviction.accuracy") or 0.0)
    if at(document, "prefetch.examples") is not None:
        yield (
            "prefetch",
            int(at(document, "prefetch.candidates")),
            int(at(document, "prefetch.examples")),
            float(at(document, "prefetch.right")),
        )


def model_predictions(document: Document) -> Iterator[Sample]:
    for name, predictions, _, _ in _models(document):
        yield (name,), float(predictions)


def model_accuracy(document: Document) -> Iterator[Sample]:
    """Of each model of which a prediction was judged."""
    for name, _, judged, right in _models(document):
        if judged:
            yield (name,), right / judged


def all_predictions(document: Document) -> Iterator[Sample]:
    if at(document, "cache") is not None:
        yield (), float(sum(predictions for _, predictions, _, _ in _models(document)))


def all_accuracy(document: Document) -> Iterator[Sample]:
    if at(document, "cache") is not None:
        judged = [(judged, right) for _, _, judged, right in _models(document)]
        yield (), sum(right for _, right in judged) / (sum(count for count, _ in judged) or 1)


def patterns(document: Document) -> Iterator[Sample]:
    """Of images, every one, so that one that no image shows is 0."""
    found = at(document, "prefetch.patterns")
    for pattern in PATTERNS if found is not None else ():
        yield (pattern,), float(found.get(pattern, 0))


def dedup_ratio(document: Document) -> Iterator[Sample]:
    ratio, new = at(document, "collection.dedup_ratio"), at(document, "written.new_chunks")
    if ratio is not None:
        yield (), float(ratio)
    elif new is not None:
        yield (), (new + at(document, "written.dedup_chunks")) / new if new else 1.0


def dedup_saved(document: Document) -> Iterator[Sample]:
    saved, chunks = at(document, "collection.saved_bytes"), at(document, "written.dedup_chunks")
    if saved is not None:
        yield (), float(saved)
    elif chunks is not None:
        yield (), float(chunks * at(document, "volume.chunk_size"))


def compression(document: Document) -> Iterator[Sample]:
    stored = at(document, "written.stored_bytes")
    if stored:
        yield (), at(document, "written.new_bytes") / stored


def mounted(document: Document) -> Iterator[Sample]:
    phase = at(document, "mount.phase")
    if phase is not None:
        yield (), float(phase == "mounted")


def store_errors(document: Document) -> Iterator[Sample]:
    for operation, counters in (at(document, "store.by_operation") or {}).items():
        # These from the start, or a monitor could not tell the first one from none.
        for name, count in {"StoreUnavailableError": 0, "StoreDeniedError": 0, **counters.get("errors", {})}.items():
            yield (operation, name), float(count)


def ends(document: Document) -> Iterator[Sample]:
    for source, counts in (at(document, "prefetch.sources") or {}).items():
        for end in ("issued", "used", "late", "wasted", "dropped"):
            yield (source, end), float(counts[end])


def hit_rates(document: Document) -> Iterator[Sample]:
    """Of each tier that there is; 0 before it was asked for anything."""
    for tier, path in TRAFFIC.items():
        hits, misses = at(document, f"{path}.hits"), at(document, f"{path}.misses")
        if hits is not None and _is_there(document, tier):
            yield (tier,), hits / ((hits + misses) or 1)


def _is_there(document: Document, tier: str) -> bool:
    return tier != "l2" or at(document, "cache.l2") is not None


PATTERNS: Final = ("idle", "sequential", "periodic", "bursty", "random")
"""`novafs.prefetch.patterns.Pattern`, which is not imported here: it loads numpy."""
TRAFFIC: Final = {"l1": "cache.l1", "l2": "cache.l2_traffic", "l3": "cache.l3_traffic"}


def tiers(field: str) -> Samples:
    return each(**{tier: f"{path}.{field}" for tier, path in TRAFFIC.items()})
