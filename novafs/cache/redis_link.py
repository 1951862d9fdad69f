"""The connection to L2's servers: one call that sends commands in a batch and gets every answer, whatever the topology.

`RedisLink.execute` is made from many threads at once. It raises LinkError where the servers can not be reached, do not
answer in time or are in no state to serve, and nothing else; an error that a server answers to one command stands in
that command's place in the list.

redis-py does protocol, pool, TLS and finding the primary through Sentinel. For Redis Cluster it is asked only which
node serves which slot: its own cluster pipeline answers a dead node by trying every command again by itself, which
turns one time-out into as many as there are commands. Here each node gets one plain pipeline, all nodes at once; where
a slot has moved, the map is read again, is set right by the answers where it is still behind, and the batch goes out again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final, NamedTuple

import redis
import redis.exceptions as errors
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from novafs.cache.redis_address import RedisAddress

CONNECT_TIMEOUT_S_MIN: Final = 1.0
"""A first connection may need a name lookup and a TLS handshake; reads that can not wait have a bound of their own."""
READ_BYTES: Final = 64 << 10
"""Socket reads of this size answered reads of 16 × 64 KiB fastest: 1.2 ms, against 1.75 with redis-py's 32 KiB and 2.2 with 1 MiB."""
_NODE_THREADS: Final = 16
_SCAN_COUNT: Final = 1000
_REDIRECTIONS: Final = 3


class LinkError(Exception):
    """The servers did not answer. The message names the reason and holds no password."""


class Command(NamedTuple):
    """key: decides the node of a cluster; its hash tag is that of every key in args. args: as redis-py sends them."""

    key: bytes
    args: tuple[Any, ...]


class _MovedError(Exception):
    """The map of slots is out of date. moves: where the servers say that the slots are."""

    def __init__(self, moves: Sequence[errors.MovedError] = ()) -> None:
        super().__init__()
        self.moves = moves


_UNREACHABLE: Final[tuple[type[BaseException], ...]] = (
    errors.ConnectionError,
    errors.TimeoutError,
    errors.AuthenticationError,
    errors.RedisClusterException,
    errors.ClusterError,
    errors.InvalidResponse,
    OSError,
    RuntimeError,  # the node threads have been shut down by `close`
)
_SCAN_ERRORS: Final[tuple[type[BaseException], ...]] = (*_UNREACHABLE, errors.ResponseError)
# A server that does not speak the protocol makes the parser stumble in ways of its own.
_GARBLED: Final[tuple[type[BaseException], ...]] = (ValueError, IndexError, TypeError, AttributeError, UnicodeError, KeyError)


class RedisLink:
    """Connections to the servers of one address; made when they are first needed, and again after `reset`."""

    def __init__(self, address: RedisAddress, *, timeout_s: float) -> None:
        """timeout_s: how long one read or write on a socket may take."""
        self.address = address
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._client: Any = None
        self._closers: list[Callable[[], None]] = []
        self._threads: ThreadPoolExecutor | None = None
        self._closed = False

    @property
    def clustered(self) -> bool:
        """Whether each command may name keys of one shard only."""
        return self.address.cluster

    def execute(self, commands: Sequence[Command]) -> list[Any]:
        """The answers, in order; a ResponseError stands for itself. Raises LinkError."""
        try:
            client = self._connected()
            if not self.address.cluster:
                return _check([_run(client, commands)])[0]
            try:
                return self._spread(client, commands)
            except _MovedError:
                self.reset()
                return self._redirected(self._connected(), commands)
        except _MovedError as error:
            if self.address.cluster:
                raise LinkError("the slots are moving between nodes") from error
            raise LinkError("the server is part of a Redis Cluster: use redis+cluster:// in l2.url") from error
        except _UNREACHABLE as error:
            raise LinkError(self.address.scrub(f"{type(error).__name__}: {error}")) from error
        except _GARBLED as error:
            found = f"{type(error).__name__}: {error}"
            raise LinkError(self.address.scrub(f"the server does not speak the Redis protocol ({found})")) from error

    def scan(self, pattern: bytes) -> Iterator[list[bytes]]:
        """The keys that match a glob, on every primary, in batches; a key may come twice. Raises LinkError."""
        try:
            client = self._connected()
            nodes = [client.get_redis_connection(node) for node in client.get_primaries()] if self.address.cluster else [client]
            for node in nodes:
                cursor: int | None = None
                while cursor != 0:
                    cursor, keys = node.scan(cursor=cursor or 0, match=pattern, count=_SCAN_COUNT)
                    yield keys
        except _SCAN_ERRORS as error:
            raise LinkError(self.address.scrub(f"{type(error).__name__}: {error}")) from error

    def reset(self) -> None:
        """Forget connections and what is known of the topology; calls under way in other threads fail or end."""
        with self._lock:
            client, self._client = self._client, None
            closers, self._closers = self._closers, []
        if client is not None:
            for close in closers:
                _quietly(close)

    def close(self) -> None:
        """Give back connections and threads. The link is not used after."""
        self._closed = True
        self.reset()
        if self._threads is not None:
            self._threads.shutdown(wait=True)

    # --- inside -----------------------------------------------------------------------------------------------

    def _connected(self) -> Any:
        if self._closed:
            raise OSError("closed")
        client = self._client
        if client is None:
            # Under the lock: a cluster is asked for its map once, not by every thread that finds none.
            with self._lock:
                if self._client is None:
                    self._client, self._closers = self._connect()
                client = self._client
        return client

    def _connect(self) -> tuple[Any, list[Callable[[], None]]]:
        address = self.address
        settings: dict[str, Any] = {
            "username": address.username,
            "password": address.password,
            "socket_timeout": self._timeout_s,
            "socket_connect_timeout": max(self._timeout_s, CONNECT_TIMEOUT_S_MIN),
            "socket_read_size": READ_BYTES,
            "protocol": 2,
        }
        # A connection that the server has closed while it lay in the pool is made anew, once; a time-out is not repeated.
        retry: dict[str, Any] = {"retry": Retry(NoBackoff(), 1, (errors.ConnectionError,))}
        tls = _tls_settings(address)
        library: Any = redis
        client: Any
        if address.cluster:
            nodes = [library.cluster.ClusterNode(host, port) for host, port in address.hosts]
            once = Retry(NoBackoff(), 0, (errors.ConnectionError,))
            client = library.RedisCluster(startup_nodes=nodes, retry=once, require_full_coverage=False, **settings, **tls)
            if self._threads is None:
                self._threads = ThreadPoolExecutor(max_workers=_NODE_THREADS, thread_name_prefix="novafs-l2-node")
            return client, [client.close, client.disconnect_connection_pools]
        settings["db"] = address.database
        if address.path is not None:
            client = library.Redis(unix_socket_path=address.path, **settings, **retry)
            return client, [client.close]
        if address.service is not None:
            to_sentinels = dict(settings) | {"username": address.sentinel_username, "password": address.sentinel_password}
            del to_sentinels["db"]
            make: Any = Sentinel
            sentinel = make(list(address.hosts), sentinel_kwargs={**to_sentinels, **retry, **tls}, **settings, **retry, **tls)
            client = sentinel.master_for(address.service)
            return client, [client.close, *(one.close for one in sentinel.sentinels)]
        host, port = address.hosts[0]
        client = library.Redis(host=host, port=port, **settings, **retry, **tls)
        return client, [client.close]

    def _redirected(self, client: Any, commands: Sequence[Command]) -> list[Any]:
        """By a map that was just read. The node that gave it may be the last one to hear that slots have moved: what the others answer
        is written into it. Raises _MovedError where they send us round and round."""
        for _ in range(_REDIRECTIONS):
            try:
                return self._spread(client, commands)
            except _MovedError as moved:
                if not moved.moves:
                    raise
                for move in moved.moves:
                    client.nodes_manager.move_slot(move)
        return self._spread(client, commands)

    def _spread(self, client: Any, commands: Sequence[Command]) -> list[Any]:
        """Each node its own part of the commands, all at once."""
        parts: dict[str, tuple[Any, list[int]]] = {}
        for at, command in enumerate(commands):
            node = client.get_node_from_key(command.key)
            if node is None:
                raise _MovedError
            parts.setdefault(node.name, (node, []))[1].append(at)
        if self._threads is None:
            raise OSError("closed")
        places = [places for _, places in parts.values()]
        # The calling thread takes a part, too: with all of a small cluster's keys on one node nothing is handed over.
        waiting = [
            self._threads.submit(_run, client.get_redis_connection(node), [commands[at] for at in part])
            for node, part in list(parts.values())[1:]
        ]
        first, part = next(iter(parts.values()))
        failure: BaseException | None = None
        answers: list[list[Any]] = []
        try:
            answers.append(_run(client.get_redis_connection(first), [commands[at] for at in part]))
        except Exception as error:
            failure = error
        for one in waiting:
            try:
                answers.append(one.result())
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure
        ordered: list[Any] = [None] * len(commands)
        for where, some in zip(places, _check(answers), strict=True):
            for at, answer in zip(where, some, strict=True):
                ordered[at] = answer
        return ordered


def _run(client: Any, commands: Sequence[Command]) -> list[Any]:
    if len(commands) == 1:
        try:
            return [client.execute_command(*commands[0].args)]
        except errors.ResponseError as error:
            return [error]
    pipeline = client.pipeline(transaction=False)
    try:
        for command in commands:
            pipeline.execute_command(*command.args)
        answers: list[Any] = pipeline.execute(raise_on_error=False)
    finally:
        pipeline.reset()
    return answers


def _check(parts: list[list[Any]]) -> list[list[Any]]:
    """Answers that say that the server can not serve at all are raised; the others are passed on."""
    answers = [answer for part in parts for answer in part]
    for answer in answers:
        if isinstance(answer, _UNREACHABLE):
            raise answer
    moves = [answer for answer in answers if isinstance(answer, errors.MovedError)]
    if moves:
        raise _MovedError(moves)
    return parts


def _tls_settings(address: RedisAddress) -> dict[str, Any]:
    tls = address.tls
    if tls is None:
        return {}
    return {
        "ssl": True,
        "ssl_ca_certs": tls.ca,
        "ssl_certfile": tls.cert,
        "ssl_keyfile": tls.key,
        "ssl_cert_reqs": "none" if tls.verify == "no" else "required",
        "ssl_check_hostname": tls.verify == "yes",
    }


def _quietly(close: Callable[[], None]) -> None:
    # What is being given up may be broken in any way; there is nothing left to do about it.
    with suppress(Exception):
        close()
