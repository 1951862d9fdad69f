"""A machine goes to another host with its memory: suspended into a mount, handed off, resumed from another mount; beside copying its files.

    python -m tests.bench.handoff [--rounds 3] [--delay-ms 20] [--mbit 2000] [--json]

The machine is the Debian guest of the tests with 512 MiB of memory, on a disk of 4 GiB of which about 1 GiB is in use. Each round takes it
from the host that it is on to one that has never had it:

    mount   the machine is stopped; QEMU writes its memory into the mount (`migrate`) while `novafs handoff` gives the disk up and the
            target's QEMU starts; that resumes from the memory file on a mount with an empty L1 and a state directory of its own. Both
            mounts speak to the store alone: there is no L2
    copy    QEMU writes its memory into a local file, both files are copied, QEMU resumes from the copies. "whole": all bytes of the disk,
            as `scp` and `rsync` send them. "sparse": the ranges alone that hold data, which takes a tool that knows them on both sides

All that goes to the store, comes from it, or is copied passes a link with the delay and, in each direction, the bandwidth of the options.
The time is from the order to stop until the guest, resumed, has read its boot working set from its disk: with its page cache dropped, all
files that its boot had read. Who receives a copy writes no zeros; it is still in the host's page cache and read past it (`cache=none`), as
on the mount.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import trio

from novafs.control import call
from novafs.statedir import CONTROL_SOCKET
from tests.bench.images import data_ranges, make_disk
from tests.bench.relay import relay
from tests.support.ceph import Ceph, free_port
from tests.support.cli import novafs, novafs_json
from tests.support.engine import make_volume
from tests.support.guest import Guest, GuestImage, guest_image
from tests.support.mounted import Mount, running

DISK_BYTES = 4 << 30
USED_BYTES = 1 << 30
PIECE = 1 << 20
TIMEOUT_S = 600

SCRIPT = """\
booted=$(awk '/^btime/ { print $2 }' /proc/stat)
find /etc /usr /var -xdev -type f -newerat "@$((booted - 1))" -print0 >/run/working-set
exec 3</dev/ttyS1
echo "GUEST ready"
while read -r word <&3; do
    echo 3 >/proc/sys/vm/drop_caches
    echo "GUEST has read $word $(xargs -0 cat </run/working-set | wc -c)"
done
"""


class Machine:
    """The guest on one host. directory: of its script disk and log."""

    def __init__(self, guest: GuestImage, disk: Path, directory: Path, number: int) -> None:
        """number: 0 boots it; others are to be resumed."""
        self._speak = directory / f"speak{number}"
        self._speak.unlink(missing_ok=True)
        extra = ["-serial", f"unix:{self._speak},server=on,wait=off"]
        if number:
            extra += ["-incoming", "defer"]
        self.guest = Guest(guest, disk, script=SCRIPT, workdir=directory, cache="none", extra=extra)

    def suspend(self, memory: Path) -> None:
        """Write the machine's memory into a file, and end the emulator."""
        written = self.guest.log_path.parent / "written"
        written.unlink(missing_ok=True)
        self.guest.qmp("stop")
        self.guest.qmp("migrate-set-parameters", {"max-bandwidth": 1 << 40})
        self.guest.qmp("migrate", {"uri": f"exec:cat >{memory} && touch {written}"})
        wait_until(written.exists)
        self.guest.kill()

    def resume(self, memory: Path) -> None:
        """Read the memory, and let the machine go on."""
        self.guest.qmp("migrate-incoming", {"uri": f"exec:cat {memory}"})
        # A machine that stood still when it was written does so when it is read.
        wait_until(lambda: self.guest.qmp("query-status")["status"] == "paused")
        self.guest.qmp("cont")

    def read_working_set(self, word: str) -> int:
        """Have the guest read it past its page cache; how many bytes."""
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(self._speak))
            line.sendall(f"{word}\n".encode())
            return int(self.guest.wait_for(f"GUEST has read {word} ", timeout_s=TIMEOUT_S).split()[-1])


def wait_until(reached: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not reached():
        if time.monotonic() > deadline_s:
            raise SystemExit("it takes too long")
        time.sleep(0.01)


# -- copying -----------------------------------------------------------------------------------------------------------


def extents_of(path: Path, sparse: bool) -> list[tuple[int, int]]:
    """What is to be sent of a file: (offset, length) of its data, or all of it."""
    return list(data_ranges(path)) if sparse else [(0, path.stat().st_size)]


def send(path: Path, extents: Sequence[tuple[int, int]], listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection, path.open("rb") as file:
        connection.recv(1)
        for offset, length in extents:
            at = offset
            while at < offset + length:
                at += os.sendfile(connection.fileno(), file.fileno(), at, offset + length - at)


def copy(source: Path, target: Path, *, sparse: bool, delay_ms: float, mbit: float) -> float:
    """Copy a file through a link; the seconds that it took."""
    extents = extents_of(source, sparse)
    with socket.create_server(("127.0.0.1", free_port())) as listener, target.open("wb") as out:
        out.truncate(source.stat().st_size)
        sender = threading.Thread(target=send, args=(source, extents, listener))
        sender.start()
        with (
            relay(listener.getsockname()[1], delay_ms=delay_ms, mbit_per_s=mbit) as port,
            socket.create_connection(("127.0.0.1", port)) as link,
        ):
            began_s = time.monotonic()
            link.sendall(b"g")
            buffer, zeros = memoryview(bytearray(PIECE)), bytes(PIECE)
            for offset, length in extents:
                out.seek(offset)
                while length:
                    got = link.recv_into(buffer, min(PIECE, length))
                    if buffer[:got] == zeros[:got]:
                        out.seek(got, os.SEEK_CUR)
                    else:
                        out.write(buffer[:got])
                    length -= got
            took_s = time.monotonic() - began_s
        sender.join()
    return took_s


# -- the two ways ------------------------------------------------------------------------------------------------------


class Clock:
    """What took how long, by name; the total is what is compared."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._began_s = time.monotonic()

    def lap(self, name: str) -> None:
        now_s = time.monotonic()
        self.parts[name], self._began_s = now_s - self._began_s, now_s

    def restart(self) -> None:
        """What was done since the last lap does not count."""
        self._began_s = time.monotonic()

    @property
    def total_s(self) -> float:
        return sum(self.parts.values())


def by_mount(guest: GuestImage, url: str, directory: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """From mount to mount; on the first one it boots."""
    with ExitStack() as stack:

        def mount(number: int) -> Mount:
            here = directory / f"host{number}"
            return stack.enter_context(running(url, here / "mnt", here / "state", "--metrics", "off"))

        source = mount(0)
        machine = Machine(guest, source.path / "disk.raw", directory / "machine", 0)
        stack.enter_context(machine.guest)
        machine.guest.wait_for("GUEST ready", timeout_s=TIMEOUT_S)
        machine.read_working_set("boot")
        for number in range(1, rounds + 1):
            target = mount(number)
            target_id = call(target.state_dir / CONTROL_SOCKET, "stats")["volume"]["host_id"]
            memory = f"memory{number}"
            clock = Clock()
            machine.guest.qmp("stop")
            next_machine = Machine(guest, target.path / "disk.raw", directory / "machine", number)
            stack.enter_context(next_machine.guest)
            with ThreadPoolExecutor() as beside:
                options = ("--to", target_id, "--state-dir", source.state_dir, "--l2-url", "none")
                handoff = beside.submit(novafs_json, "handoff", url, "disk.raw", *options)
                machine.suspend(source.path / memory)
                clock.lap("suspend")
                hot_chunks = handoff.result()["hot_chunks"]
            clock.lap("handoff after it")
            machine = next_machine
            machine.resume(target.path / memory)
            clock.lap("resume")
            working_set = machine.read_working_set(str(number))
            clock.lap("working set")
            memory_bytes = (target.path / memory).stat().st_size
            sizes = {"working_set_bytes": working_set, "memory_bytes": memory_bytes, "hot_chunks": hot_chunks}
            yield {"total_s": clock.total_s, **clock.parts, **sizes}
            source.unmount()
            source.wait()
            source = target
        machine.guest.kill()
        source.unmount()
        source.wait()


def by_copy(guest: GuestImage, disk: Path, directory: Path, rounds: int, delay_ms: float, mbit: float) -> Iterator[dict[str, Any]]:
    """From local file to local file; in the first one it boots."""
    with ExitStack() as stack:
        machine = Machine(guest, disk, directory / "machine", 0)
        stack.enter_context(machine.guest)
        machine.guest.wait_for("GUEST ready", timeout_s=TIMEOUT_S)
        machine.read_working_set("boot")
        for number in range(1, rounds + 1):
            here = directory / f"copy{number}"
            here.mkdir()
            memory = disk.with_name("memory")
            clock = Clock()
            machine.suspend(memory)
            clock.lap("suspend")
            # Not for the total: what of it is copied is said by `copy`.
            whole_s = copy(disk, here / "whole.raw", sparse=False, delay_ms=delay_ms, mbit=mbit)
            (here / "whole.raw").unlink()
            clock.parts["copy memory"] = copy(memory, here / "memory", sparse=False, delay_ms=delay_ms, mbit=mbit)
            clock.parts["copy disk sparse"] = copy(disk, here / "disk.raw", sparse=True, delay_ms=delay_ms, mbit=mbit)
            clock.restart()
            machine = Machine(guest, here / "disk.raw", directory / "machine", number)
            stack.enter_context(machine.guest)
            machine.resume(here / "memory")
            clock.lap("resume")
            working_set = machine.read_working_set(str(number))
            clock.lap("working set")
            sparse_s = clock.total_s
            whole_total_s = sparse_s - clock.parts["copy disk sparse"] + whole_s
            parts = {**clock.parts, "copy disk whole": whole_s}
            yield {"sparse_total_s": sparse_s, "whole_total_s": whole_total_s, **parts, "working_set_bytes": working_set}
            disk.unlink()
            disk = here / "disk.raw"
        machine.guest.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--delay-ms", type=float, default=20)
    parser.add_argument("--mbit", type=float, default=2000)
    parser.add_argument("--only", choices=("mount", "copy"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    guest = guest_image()
    found: dict[str, list[dict[str, Any]]] = {"mount": [], "copy": []}

    def note(way: str, one: dict[str, Any]) -> None:
        found[way].append(one)
        if not arguments.json:
            print(way, {name: round(value, 2) if name.endswith("_s") or " " in name else value for name, value in one.items()}, flush=True)

    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        directory = Path(name)
        disk = make_disk(guest, directory, size_bytes=DISK_BYTES, used_bytes=USED_BYTES)
        if arguments.only != "copy":
            with Ceph() as ceph:
                os.environ.update(ceph.environment)
                ceph.make_bucket("handoff")
                straight = ceph.volume_url("handoff")
                trio.run(lambda: make_volume(straight))
                novafs("import", straight, disk, "--l2-url", "none", "--state-dir", directory / "import")
                with relay(ceph.port, delay_ms=arguments.delay_ms, mbit_per_s=arguments.mbit, up_mbit_per_s=arguments.mbit) as port:
                    url = ceph.volume_url("handoff", endpoint=f"http://127.0.0.1:{port}")
                    for one in by_mount(guest, url, directory, arguments.rounds):
                        note("mount", one)
        if arguments.only != "mount":
            for one in by_copy(guest, disk, directory, arguments.rounds, arguments.delay_ms, arguments.mbit):
                note("copy", one)
    medians = {way: {name: statistics.median(one[name] for one in ones) for name in ones[0]} for way, ones in found.items() if ones}
    result: dict[str, Any] = {"disk_bytes": DISK_BYTES, "used_bytes": USED_BYTES, "medians": medians, "rounds": found}
    if arguments.only is None:
        mount_s = medians["mount"]["total_s"]
        result["faster_than_copied_whole"] = medians["copy"]["whole_total_s"] / mount_s
        result["faster_than_copied_sparse"] = medians["copy"]["sparse_total_s"] / mount_s
    print(json.dumps(result) if arguments.json else json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=1))


if __name__ == "__main__":
    main()
