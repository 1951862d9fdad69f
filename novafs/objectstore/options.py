"""How a store is spoken to: what does not name the store and therefore is no part of its URL."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """connect_timeout_s, read_timeout_s: of one attempt of one request. pool_size: connections kept, which should be
    the number of requests at once. retries_max: by the store itself, with jittered exponential backoff; none by default,
    because `StoreClient` repeats what is retryable and counts it.
    """

    connect_timeout_s: float = 5.0
    read_timeout_s: float = 20.0
    pool_size: int = 32
    retries_max: int = 0
