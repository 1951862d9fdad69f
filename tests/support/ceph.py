"""A real S3 for tests: one Ceph monitor, one OSD in memory and a RADOS Gateway, up in about two seconds.

What always holds: everything lives in one temporary directory and on 127.0.0.1, with no authentication inside the
cluster; nothing of the system's own Ceph (``/etc/ceph``, ``/var/lib/ceph``) is read or written. The daemons die with
the process that started them, however it ends: by `stop`, at exit, and by the kernel (`PR_SET_PDEATHSIG`) where the
process was killed. Call `start` from a thread that lives as long as the cluster: the kernel's signal follows the thread.

The data is held in the OSD's memory, at most `memory_bytes`; it is gone when the cluster stops.

    python -m tests.support.ceph --run [--port 7480] [--memory-gib 6] [--bucket novafs]

starts one, prints ``export`` lines for a shell and waits until SIGTERM, SIGINT or SIGHUP.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import fcntl
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

TOOLS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin", "setpriv")
DIRECTORY_PREFIX = "novafs-ceph-"
START_TIMEOUT_S = 120
"""Bounds a hang on an overloaded machine only; two seconds is what it takes."""

CONFIG = """\
[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{mon_port}
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_msgr1 = false
ms_bind_msgr2 = true
# No authentication: then there are no keys to hand out, and the messenger's secure mode has none to use either.
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_cluster_mode = crc
ms_mon_service_mode = crc
ms_mon_client_mode = crc
ms_cluster_mode = crc
ms_service_mode = crc
ms_client_mode = crc
# The monitor gathers changes for a second by default; RGW's pools are a dozen changes, one after the other.
paxos_propose_interval = 0.02
paxos_min_wait = 0.01
mon_allow_pool_size_one = true
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
# Machines that run tests stall: an OSD that is slow to answer is not dead.
osd_heartbeat_grace = 600
mon_osd_report_timeout = 3600
admin_socket =
pid_file =
run_dir = {directory}
crash_dir = {directory}
log_file = {directory}/$type.log
mon_cluster_log_file = {directory}/cluster.log
log_to_stderr = false
err_to_stderr = true
[mon]
mon_data = {directory}/mon
mon_data_avail_crit = 1
mon_data_avail_warn = 2
[osd]
osd_data = {directory}/osd
osd_objectstore = memstore
memstore_device_bytes = {memory_bytes}
[client]
keyring = {directory}/keyring
# A request that came before the OSD is sent again at the next tick, every five seconds by default.
objecter_tick_interval = 0.25
rgw_data = {directory}
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1 ssl_endpoint=127.0.0.1:{tls_port} ssl_certificate={directory}/rgw.pem
# Without tcp_nodelay small answers wait 40 ms for an acknowledgement, in a relay or a proxy in front of it above all.
rgw_thread_pool_size = 128
rgw_enable_usage_log = false
rgw_enable_ops_log = false
# The tails of deleted objects wait two hours by default; the memory is wanted sooner.
rgw_gc_obj_min_wait = 10
rgw_gc_processor_period = 10
# A quota that a test sets counts at once.
rgw_bucket_quota_ttl = 0
rgw_user_quota_bucket_sync_interval = 1
"""


class CephError(Exception):
    """The cluster did not come up, or a tool of it failed; the message ends with what its logs say."""


class Credentials(NamedTuple):
    access_key: str
    secret_key: str


def missing_tools() -> list[str]:
    """The programs that are not installed, of those that a cluster needs."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ceph:
    """One cluster. `with Ceph() as ceph:` or `start` and `stop`.

    `endpoint` (http), `tls_endpoint` (https, self-signed, trusted through `ca_bundle`), `credentials` of one user.
    """

    def __init__(self, *, port: int | None = None, memory_bytes: int = 6 << 30) -> None:
        self.memory_bytes = memory_bytes
        self.credentials = Credentials("NOVAFSTEST" + secrets.token_hex(5).upper(), secrets.token_hex(20))
        self._port_wanted = port
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._directory: Path | None = None
        self._lock = -1
        self.port = self.tls_port = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def tls_endpoint(self) -> str:
        return f"https://127.0.0.1:{self.tls_port}"

    @property
    def ca_bundle(self) -> Path:
        return self.directory / "rgw.crt"

    @property
    def directory(self) -> Path:
        if self._directory is None:
            raise CephError("the cluster is not running")
        return self._directory

    @property
    def environment(self) -> dict[str, str]:
        """What the usual AWS chain needs to find these credentials and no others."""
        return {
            "AWS_ACCESS_KEY_ID": self.credentials.access_key,
            "AWS_SECRET_ACCESS_KEY": self.credentials.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    # ---- life

    def start(self) -> None:
        """Bring it up. Raises CephError where a tool is missing or a daemon does not come up."""
        if missing := missing_tools():
            raise CephError(f"not installed: {', '.join(missing)}; Debian's packages are ceph-mon, ceph-osd and radosgw")
        attempts = 3
        for attempt in range(1, attempts + 1):
            self._make_directory()
            atexit.register(self.stop)
            try:
                self._start()
            except CephError:
                # Somebody else may have taken a port between the look for a free one and the daemon's bind.
                self.stop()
                if attempt == attempts:
                    raise
            except BaseException:
                self.stop()
                raise
            else:
                return

    def _make_directory(self) -> None:
        # A process that was killed leaves its directory behind. Whoever holds the lock lives.
        for old in Path(tempfile.gettempdir()).glob(DIRECTORY_PREFIX + "*"):
            with contextlib.suppress(OSError), (old / "lock").open("r+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
        self._directory = Path(tempfile.mkdtemp(prefix=DIRECTORY_PREFIX))
        self._lock = os.open(self._directory / "lock.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        (self._directory / "lock.new").rename(self._directory / "lock")  # it has this name only while it is held

    def _start(self) -> None:
        from tests.support.certificates import write_certificate

        directory = self.directory
        self.port = self._port_wanted or free_port()
        self.tls_port, mon_port = free_port(), free_port()
        fsid = str(uuid.uuid4())
        (directory / "mon").mkdir()
        (directory / "osd").mkdir()
        (directory / "ceph.conf").write_text(
            CONFIG.format(
                fsid=fsid, mon_port=mon_port, port=self.port, tls_port=self.tls_port, directory=directory, memory_bytes=self.memory_bytes
            )
        )
        certificate = write_certificate(directory, "rgw")
        (directory / "rgw.pem").write_bytes(certificate.key.read_bytes() + certificate.certificate.read_bytes())

        monmap = directory / "monmap"
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", str(monmap), config=False)
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", str(monmap))
        self._spawn("ceph-mon", "-i", "a")
        osd_uuid = str(uuid.uuid4())
        self._run("ceph", "osd", "new", osd_uuid)  # waits for the monitor
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_uuid)
        self._spawn("ceph-osd", "-i", "0")
        self.add_user("novafs", credentials=self.credentials)  # makes the zone and its pools as well
        self._spawn("radosgw")
        self._wait_for_gateway()

    def stop(self) -> None:
        """Kill the daemons and delete the directory. Repeating it does nothing."""
        atexit.unregister(self.stop)
        # The order keeps a daemon from logging the death of another; nothing of the content is to be saved.
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            os.close(self._lock)
            self._directory = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def pause_gateway(self) -> None:
        """SIGSTOP: connections are accepted by the kernel and never answered."""
        self._daemons["radosgw"].send_signal(signal.SIGSTOP)

    def resume_gateway(self) -> None:
        self._daemons["radosgw"].send_signal(signal.SIGCONT)

    def kill_gateway(self) -> None:
        """The data stays; connections are refused until `start_gateway`."""
        gateway = self._daemons.pop("radosgw")
        gateway.kill()
        gateway.wait()

    def start_gateway(self) -> None:
        """Start it again, on the same ports, after `kill_gateway`."""
        self._spawn("radosgw")
        self._wait_for_gateway()

    # ---- what tests want of it

    def client(self, credentials: Credentials | None = None) -> Any:
        """A plain boto3 client, to look at the store from outside of the code under test."""
        # Here and below: imported by who needs a cluster, not by every run of tests that has none.
        import boto3
        from botocore.config import Config as BotoConfig

        chosen = credentials or self.credentials
        return boto3.session.Session(chosen.access_key, chosen.secret_key, region_name="us-east-1").client(
            "s3",
            endpoint_url=self.endpoint,
            config=BotoConfig(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
        )

    def make_bucket(self, name: str, credentials: Credentials | None = None) -> None:
        client = self.client(credentials)
        client.create_bucket(Bucket=name)
        client.close()

    def add_user(self, name: str, *, quota_bytes: int | None = None, credentials: Credentials | None = None) -> Credentials:
        """Another user, with a quota over all its buckets if one is given."""
        wanted = credentials or Credentials(secrets.token_hex(10).upper(), secrets.token_hex(20))
        self._run(
            "radosgw-admin",
            "user",
            "create",
            f"--uid={name}",
            f"--display-name={name}",
            f"--access-key={wanted.access_key}",
            f"--secret={wanted.secret_key}",
        )
        if quota_bytes is not None:
            self.set_quota(name, quota_bytes)
            self._run("radosgw-admin", "quota", "enable", "--quota-scope=user", f"--uid={name}")
        return wanted

    def set_quota(self, name: str, quota_bytes: int) -> None:
        """Another quota for a user who has one."""
        self._run("radosgw-admin", "quota", "set", "--quota-scope=user", f"--uid={name}", f"--max-size={quota_bytes}")

    def volume_url(self, bucket: str, prefix: str = "", *, endpoint: str | None = None) -> str:
        """What a user would write to name that prefix."""
        return f"s3://{bucket}/{prefix}?endpoint={endpoint or self.endpoint}&region=us-east-1"

    # ---- below

    def _command(self, tool: str, arguments: tuple[str, ...], *, config: bool) -> list[str]:
        return [tool, *(("-c", str(self.directory / "ceph.conf")) if config else ()), *arguments]

    def _run(self, tool: str, *arguments: str, config: bool = True) -> str:
        try:
            done = subprocess.run(
                self._command(tool, arguments, config=config), capture_output=True, text=True, timeout=START_TIMEOUT_S, cwd=self.directory
            )
        except subprocess.TimeoutExpired as error:
            raise CephError(f"{tool} {' '.join(arguments[:2])} did not end within {START_TIMEOUT_S} s{self._logs()}") from error
        if done.returncode != 0:
            raise CephError(f"{tool} {' '.join(arguments[:2])} ended with status {done.returncode}: {done.stderr.strip()}{self._logs()}")
        return done.stdout

    def _spawn(self, tool: str, *arguments: str) -> None:
        with (self.directory / f"{tool}.out").open("ab") as output:
            # A session of its own: Ctrl-C at a terminal is for the tests, which then stop the daemons in good order.
            self._daemons[tool] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *self._command(tool, (*arguments, "-f"), config=True)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.directory,
                start_new_session=True,
            )

    def _wait_for_gateway(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            for tool, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise CephError(f"{tool} ended with status {daemon.returncode}{self._logs()}")
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection.request("GET", "/")
                if connection.getresponse().status in (200, 403):
                    connection.close()
                    return
            connection.close()
            if time.monotonic() > deadline:
                raise CephError(f"the gateway did not answer within {START_TIMEOUT_S} s{self._logs()}")
            time.sleep(0.02)

    def _logs(self) -> str:
        parts = []
        for path in sorted([*self.directory.glob("*.out"), *self.directory.glob("*.log")]):
            lines = path.read_text(errors="replace").splitlines()[-8:]
            if lines:
                parts.append(f"\n--- {path.name}\n" + "\n".join(lines))
        return "".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.ceph", description="A one-node Ceph with S3, in memory, until SIGTERM.")
    parser.add_argument("--run", action="store_true", required=True, help="start one and wait")
    parser.add_argument("--port", type=int, help="of the S3 endpoint; a free one where it is not given")
    parser.add_argument("--memory-gib", type=float, default=6, help="most that the data may take (default 6)")
    parser.add_argument("--bucket", default="novafs", help="made at the start (default novafs)")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of export lines")
    options = parser.parse_args()

    def stop(number: int, frame: FrameType | None) -> None:
        for other in stopping:
            signal.signal(other, signal.SIG_IGN)  # the clean-up that follows is not to be cut short
        raise SystemExit(0)

    stopping = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in stopping:
        signal.signal(number, stop)
    try:
        with Ceph(port=options.port, memory_bytes=int(options.memory_gib * (1 << 30))) as ceph:
            ceph.make_bucket(options.bucket)
            values = {**ceph.environment, "NOVAFS_TEST_S3_ENDPOINT": ceph.endpoint, "NOVAFS_TEST_S3_URL": ceph.volume_url(options.bucket)}
            if options.json:
                print(json.dumps(values), flush=True)
            else:
                print("\n".join(f"export {name}='{value}'" for name, value in values.items()), flush=True)
            while True:
                signal.pause()
    except CephError as error:
        print(f"ceph: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
