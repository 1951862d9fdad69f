"""Fixtures with real Redis servers: for the whole session where tests only use them, fresh where tests do damage."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.redis_servers import ClusterServers, RedisServer, SentinelServers, server_binary


def _require_redis() -> None:
    if server_binary() is None:
        pytest.skip("no Redis server is installed (Debian: redis-server)")


@pytest.fixture(scope="session")
def redis_plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server on TCP, without password."""
    _require_redis()
    with RedisServer(tmp_path_factory.mktemp("redis-plain")) as server:
        yield server


@pytest.fixture(scope="session")
def redis_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server on TLS with a password."""
    _require_redis()
    with RedisServer(tmp_path_factory.mktemp("redis-tls"), tls=True) as server:
        yield server


@pytest.fixture(scope="session")
def redis_unix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server on a Unix socket."""
    _require_redis()
    with RedisServer(tmp_path_factory.mktemp("redis-unix"), unix_only=True) as server:
        yield server


@pytest.fixture(scope="session")
def redis_sentinel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelServers]:
    """Primary, replica and Sentinel, with passwords."""
    _require_redis()
    with SentinelServers(tmp_path_factory.mktemp("redis-sentinel")) as servers:
        yield servers


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterServers]:
    """Three nodes."""
    _require_redis()
    with ClusterServers(tmp_path_factory.mktemp("redis-cluster")) as servers:
        yield servers


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own: to kill, pause, flush and fill with garbage."""
    _require_redis()
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
def volume_id() -> str:
    """A volume id that no other test uses."""
    return secrets.token_hex(16)
