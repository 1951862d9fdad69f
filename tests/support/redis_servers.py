"""Real Redis (or Valkey) servers for tests: one alone (TCP, TLS and password, Unix socket), under Sentinel, and as a Cluster.

Each is a context manager that owns its processes and a directory below the one it is given; nothing outlives the test
process, even where that is killed. Ports are free ones of 127.0.0.1; a server keeps its port when it is started again.

    with RedisServer(tmp_path) as server:
        open_l2(server.url, …)
        server.pause(); …; server.resume()
        server.kill(); …; server.start()
"""

from __future__ import annotations

import ctypes
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis

from tests.support.certificates import write_certificate

HOST = "127.0.0.1"
READY_TIMEOUT_S = 30
SERVICE = "mymaster"
PASSWORD = "correct horse/battery@staple"
"""With characters that a URL must quote."""
PASSWORD_QUOTED = "correct%20horse%2Fbattery%40staple"

_PR_SET_PDEATHSIG = 1


def server_binary() -> str | None:
    """redis-server or valkey-server, whichever is installed."""
    return shutil.which("redis-server") or shutil.which("valkey-server")


def cli_binary() -> str | None:
    """The client that goes with `server_binary`."""
    return shutil.which("redis-cli") or shutil.which("valkey-cli")


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as one:
        one.bind((HOST, 0))
        return int(one.getsockname()[1])


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Poll until `condition()`; errors of a server that is not there yet count as no."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if condition():
                return
        except (OSError, redis.RedisError):
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s} s")
        time.sleep(0.01)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class RedisServer:
    """One server. `unix_only`: on a Unix socket and no port; `tls`: on a TLS port only, with `PASSWORD`."""

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        name: str = "redis",
        unix_only: bool = False,
        tls: bool = False,
        password: str | None = None,
        sentinel: str | None = None,
    ) -> None:
        self.directory = directory / name
        self.directory.mkdir(parents=True, exist_ok=True)
        self.port = 0 if unix_only else free_port()
        self.socket_path = self.directory / "s"
        self.password = PASSWORD if tls else password
        self.ca: Path | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self._arguments = list(arguments)
        self._sentinel = sentinel
        if tls:
            certificate = write_certificate(self.directory, "server")
            self.ca = certificate.certificate
            self._arguments += ["--tls-port", str(self.port), "--tls-auth-clients", "no"]
            self._arguments += ["--tls-cert-file", str(certificate.certificate), "--tls-key-file", str(certificate.key)]
            self._arguments += ["--tls-ca-cert-file", str(certificate.certificate)]
        self._unix_only = unix_only
        quoted = f":{PASSWORD_QUOTED}@" if self.password else ""
        if unix_only:
            self.url = f"unix://{quoted}{self.socket_path}"
        elif tls:
            self.url = f"rediss://{quoted}{HOST}:{self.port}?ca={self.ca}"
        else:
            self.url = f"redis://{quoted}{HOST}:{self.port}"

    def start(self) -> None:
        """Start it (again), empty, and wait until it answers."""
        binary = server_binary()
        assert binary is not None
        command = [binary]
        if self._sentinel is not None:
            # Sentinel keeps its state in its configuration file, so it gets one of its own at each start.
            configuration = self.directory / "sentinel.conf"
            configuration.write_text(self._sentinel)
            command += [str(configuration), "--sentinel"]
        else:
            command += ["--save", "", "--appendonly", "no", "--unixsocket", str(self.socket_path), "--enable-debug-command", "local"]
        command += ["--port", "0" if self._unix_only or self.ca else str(self.port), "--bind", HOST, "--dir", str(self.directory)]
        if self.password and self._sentinel is None:
            command += ["--requirepass", self.password]
        command += self._arguments
        with (self.directory / "log").open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)

        def answers() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended: {(self.directory / 'log').read_text()[-2000:]}")
            with self.client() as client:
                return bool(client.ping())

        wait_until(answers, f"{self.url} to answer")

    def client(self, **settings: Any) -> Any:
        """A plain redis-py client, for looking and for doing damage."""
        make: Any = redis.Redis
        settings = {"password": self.password, "protocol": 2, "socket_timeout": 10, **settings}
        if self._sentinel is not None or self.ca is not None:
            if self.ca is not None:
                settings |= {"ssl": True, "ssl_ca_certs": str(self.ca)}
            return make(host=HOST, port=self.port, **settings)
        return make(unix_socket_path=str(self.socket_path), **settings)

    def pause(self) -> None:
        """SIGSTOP: connections stay open and get no answer."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()


class SentinelServers:
    """A primary, a replica and a Sentinel that watches them; all want `PASSWORD`. The primary changes when it is killed."""

    def __init__(self, directory: Path) -> None:
        self.primary = RedisServer(directory, "--masterauth", PASSWORD, name="primary", password=PASSWORD)
        self.replica = RedisServer(
            directory, "--masterauth", PASSWORD, "--replicaof", HOST, str(self.primary.port), name="replica", password=PASSWORD
        )
        self.sentinel = RedisServer(
            directory,
            name="sentinel",
            password=PASSWORD,
            sentinel=f'requirepass "{PASSWORD}"\n'
            f"sentinel monitor {SERVICE} {HOST} {self.primary.port} 1\n"
            f'sentinel auth-pass {SERVICE} "{PASSWORD}"\n'
            f"sentinel down-after-milliseconds {SERVICE} 300\n"
            f"sentinel failover-timeout {SERVICE} 2000\n",
        )
        self.url = (
            f"redis+sentinel://:{PASSWORD_QUOTED}@{HOST}:{free_port()},{HOST}:{self.sentinel.port}/{SERVICE}"
            f"?sentinel_password={PASSWORD_QUOTED}"
        )
        """The first Sentinel that it names is not there: the second must be asked."""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for server in (self.primary, self.replica, self.sentinel):
                stack.enter_context(server)
            with self.replica.client() as replica:
                wait_until(lambda: replica.info("replication")["master_link_status"] == "up", "the replica to follow")
            with self.sentinel.client() as sentinel:
                wait_until(lambda: sentinel.sentinel_master(SERVICE)["num-slaves"] == 1, "the Sentinel to see the replica")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()


class ClusterServers:
    """A Redis Cluster of three primaries."""

    def __init__(self, directory: Path) -> None:
        self.nodes = [
            RedisServer(
                directory,
                *("--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--cluster-node-timeout", "1000"),
                name=f"node{number}",
            )
            for number in range(3)
        ]
        self.url = f"redis+cluster://{','.join(f'{HOST}:{node.port}' for node in self.nodes)}"
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for node in self.nodes:
                stack.enter_context(node)
            cli = cli_binary()
            assert cli is not None
            places = [f"{HOST}:{node.port}" for node in self.nodes]
            subprocess.run([cli, "--cluster", "create", *places, "--cluster-yes"], check=True, capture_output=True, timeout=READY_TIMEOUT_S)
            for node in self.nodes:
                with node.client() as client:

                    def formed(client: Any = client) -> bool:
                        state = client.execute_command("CLUSTER INFO")
                        return "cluster_state:ok" in str(state) or (isinstance(state, dict) and state.get("cluster_state") == "ok")

                    wait_until(formed, f"{node.url} to join the cluster")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
