"""The daemon: one volume mounted at one directory, from opening it to the last commit.

What is promised:

- `ready()` is called once, when a stat of the mount point has been answered through the kernel; systemd is told then.
- However the mount ends, all images are committed before `run` returns; its status is 0 only if they were.
- Everything ends through normal interpreter shutdown; no signal cuts a commit short.

How it ends:

| what happens | what the daemon does |
|---|---|
| `umount`, `fusermount3 -u` from outside | the kernel closes the connection; commit, exit |
| the same with `-z` or `-l`, files open | the kernel keeps the connection until the last close; until then it serves |
| SIGTERM, SIGINT | unmounts; commit, exit |
| the same, files open | detaches the mount, serves what is open for at most `busy_timeout`, then cuts it off (ENOTCONN); commit, exit |
| a second SIGTERM or SIGINT | ends that wait at once. Later ones are ignored: a commit is never cut short |
| SIGHUP | reads the configuration again, and goes on |
| the connection is aborted through /sys/fs/fuse | detaches the dead mount; commit, exit 1 |

FUSE tells of an unmount only by closing the connection, and may drop RELEASE requests then, so handles that are still
in the table are closed, and committed, by `NovaOperations.close_handles`.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyfuse3
import trio

from novafs.asynctools import open_nursery
from novafs.board import Board, Phase
from novafs.configkeys import redact
from novafs.control import ControlServer
from novafs.errors import MountError, NovaError
from novafs.heap import Trimmer, one_arena
from novafs.operations import OPERATIONS
from novafs.reload import Reloaded, Reloader
from novafs.statedir import CONTROL_SOCKET
from novafs.volume import Volume, open_volume
from novafs_mount import host, mountpoint, requestloop
from novafs_mount.busypoll import busy_poll, fuse_descriptor
from novafs_mount.errnos import told
from novafs_mount.filesystem import NovaOperations
from novafs_mount.invalidate import Invalidator
from novafs_mount.killpriv import handshake
from novafs_mount.mountpoint import Unmounted
from novafs_mount.sdnotify import Notifier
from novafs_mount.supervision import Reporter, answers, keep_opening, watch

if TYPE_CHECKING:
    from novafs.config import Config
    from novafs.mountoptions import MountOptions

log = logging.getLogger(__name__)

TASKS_MAX: Final = 512
"""Requests in progress at the same time. Those that wait for a slow store must leave room for reads that L1 holds."""
INVALIDATOR_STOP_S: Final = 5.0
_ENDING: Final = (signal.SIGTERM, signal.SIGINT)


def run(
    config: Config,
    directory: Path,
    options: MountOptions,
    *,
    foreground: bool,
    ready: Callable[[], None],
    reread: Callable[[], Config] | None = None,
    changed: Callable[[Config], None] = lambda _: None,
    dead: mountpoint.Device | None = None,
) -> int:
    """Mount the volume of `config` at `directory` and serve it until it is unmounted; the exit status.

    Called on the main thread of the process that is to be the daemon, and at most once in it: pyfuse3 has one session.
    foreground: how the start is logged, and whether a service manager started this very process and is to be told.
    ready: see the module. reread: reads the configuration again, blocking; changed: is told what has come of that. dead: of a mount that
    is there, of a daemon that has died.
    Raises MountError and what `open_volume` raises.
    """
    notifier = Notifier.from_environment() if foreground else Notifier()
    if notifier.watchdog_s is not None:
        # systemd ends a daemon that hangs with SIGABRT: then the log has where each thread hung.
        faulthandler.enable()
    path = mountpoint.prepare(directory, allow_other=options.allow_other, dead=dead)
    privileges = host.protect_process()
    one_arena()
    # Before and after trio's own handlers are in place, a signal must not kill: at the end everything is committed, but
    # exit handlers still run. trio restores what it found, so these stay for the rest of the process.
    for number in (*_ENDING, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    daemon = _Daemon(config, path, options, ready, notifier, Reloader(config, reread or (lambda: config), changed), dead)
    log.info("starting%s, process %d%s", "" if foreground else " in the background", os.getpid(), _listed(privileges))
    notifier.status(f"opening {config.volume}")
    try:
        status = trio.run(daemon.serve)
    finally:
        notifier.close()
    log.info("%s: ended with status %d%s", path, status, "" if status else ", everything is stored")
    return status


def _listed(words: list[str]) -> str:
    return f" ({', '.join(words)})" if words else ""


class _Daemon:
    """One mount, from start to end."""

    def __init__(
        self,
        config: Config,
        path: Path,
        options: MountOptions,
        ready: Callable[[], None],
        notifier: Notifier,
        reloader: Reloader,
        dead: mountpoint.Device | None,
    ) -> None:
        self._config = config
        self._dead = dead
        self._notifier = notifier
        self._reloader = reloader
        self._reporter = Reporter(path, notifier, open_files=self._open_files)
        self._operations: NovaOperations | None = None
        self._path = path
        self._options = options
        self._ready = ready
        self._source = options.fsname or str(config.volume)
        self._status = 0
        self._phase = Phase.OPENING
        # Cancelled by a signal while the volume is being opened, and by nothing later.
        self._opening = trio.CancelScope()
        # The mount is no longer in the name space: the directory may be somebody else's mount by now.
        self._detached = False
        # Major and minor number of our mount, by which it is told from another at the same place.
        self._device: mountpoint.Device | None = None
        # A second signal: do not wait for open files.
        self._hurry = trio.Event()
        self._board = Board(redact(str(config.volume)))
        self._board.store_failed_s = lambda: told.store_failed_s
        self._board.mount = self._figures
        self._board.answers = self._answers
        self._asking = trio.CapacityLimiter(1)

    async def serve(self) -> int:
        with trio.open_signal_receiver(*_ENDING, signal.SIGHUP) as signals:
            async with self._status_port(), open_nursery() as nursery:
                nursery.start_soon(self._watch_signals, signals, nursery)
                keeping = trio.CancelScope()
                nursery.start_soon(self._keep_opening, keeping)
                with self._opening:
                    async with open_volume(
                        self._config, read_only=self._options.read_only, owns_state=True, prefetch=True, events=self._board.events
                    ) as volume:
                        keeping.cancel()
                        self._reloader.volume = volume
                        self._board.opened(volume)
                        nursery.start_soon(Trimmer(lambda: volume.cache.l1.capacity_bytes).run)
                        await self._mount(volume, nursery)
                    self._board.closed()
                if self._opening.cancelled_caught:
                    log.info("stopped before %s was mounted", self._path)
                nursery.cancel_scope.cancel()
        return self._status

    async def _keep_opening(self, scope: trio.CancelScope) -> None:
        with scope:
            await keep_opening(self._notifier)

    async def _watch_signals(self, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
        leaving = False
        async for number in signals:
            name = signal.Signals(number).name
            if number == signal.SIGHUP:
                nursery.start_soon(self._reload_for_signal)
            elif self._phase is Phase.OPENING:
                self._opening.cancel()
            elif self._phase is Phase.ENDING:
                log.info("%s: already ending; committing what is left", name)
            elif not leaving:
                leaving = True
                self._reporter.leaving()
                log.info("%s: unmounting %s", name, self._path)
                nursery.start_soon(self._leave)
            else:
                log.info("%s: not waiting for open files any longer", name)
                self._hurry.set()

    # -- the mount ----------------------------------------------------------------------------------------------

    async def _mount(self, volume: Volume, outer: trio.Nursery) -> None:
        invalidator = Invalidator()
        operations = NovaOperations(volume, self._options, invalidator)
        self._operations = operations
        await trio.to_thread.run_sync(partial(mountpoint.clear, self._path, dead=self._dead))
        try:
            pyfuse3.init(operations, str(self._path), self._fuse_options())
        except RuntimeError as error:
            # libfuse has told the reason on stderr.
            raise MountError(f"cannot mount at {self._path}: {error}; see the message of fuse above") from error
        self._phase = self._board.phase = Phase.MOUNTED
        self._device = mountpoint.device_of(self._path)
        # In the nursery that outlives the volume: it tells what is left while that is closed.
        outer.start_soon(self._reporter.run, volume)
        try:
            async with open_nursery() as nursery:
                control = ControlServer(self._config.state_dir / CONTROL_SOCKET)
                control.register("stats", self._stats)
                control.register("status", self._show)
                control.register("residency", self._residency)
                control.register("reload", self._reload)
                for op, operation in OPERATIONS.items():
                    control.register(op, partial(operation, volume))
                await nursery.start(control.run)
                if self._config.metrics != "off":
                    nursery.start_soon(self._board.probe_store)
                nursery.start_soon(self._announce, nursery)
                await self._fuse()
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._end(operations, invalidator)

    def _fuse_options(self) -> set[str]:
        # pyfuse3 takes ASCII only; libfuse reads a backslash as an escape.
        source = self._source.encode("ascii", "backslashreplace").decode().replace("\\", "\\\\").replace(",", "\\,")
        words = {f"fsname={source}", "subtype=novafs", "default_permissions"}
        if self._options.allow_other:
            words.add("allow_other")
        if self._options.read_only:
            words.add("ro")
        if self._options.debug:
            words.add("debug")
        return words

    async def _fuse(self) -> None:
        """Serve requests until the connection ends."""
        requestloop.install()
        # What there is by now, most of it modules, stays. A full collection that looked at it took 60 to 110 ms, and everybody waited.
        gc.freeze()
        fd = fuse_descriptor()
        spin = busy_poll(fd)
        if spin is not None:
            trio.lowlevel.add_instrument(spin)
        try:
            async with trio.open_nursery() as nursery:
                shaking = handshake(fd)
                if shaking is not None:
                    nursery.start_soon(shaking.run)
                await pyfuse3.main(min_tasks=4, max_tasks=TASKS_MAX)
        except BaseExceptionGroup as group:
            failed = group.subgroup(lambda error: not isinstance(error, trio.Cancelled))
            if failed is None:
                raise
            log.critical("%s: the request loop failed; unmounting", self._path, exc_info=failed)
            self._status = 1
        finally:
            if spin is not None:
                trio.lowlevel.remove_instrument(spin)

    async def _announce(self, nursery: trio.Nursery) -> None:
        """Say that the mount answers, once it does."""
        # In a thread: this very loop answers the stat.
        try:
            await trio.to_thread.run_sync(os.stat, self._path, abandon_on_cancel=True)
        except OSError as error:
            raise MountError(f"{self._path} is mounted, but does not answer: {error.strerror}") from error
        log.info("%s mounted at %s%s", self._source, self._path, _listed(await self._tune(self._config)))
        self._ready()
        self._notifier.ready()
        nursery.start_soon(watch, self._path, self._notifier)

    async def _tune(self, config: Config) -> list[str]:
        """Have the kernel treat the mount as `config` says. What was done."""
        if self._device is None:
            return []
        kernel, device = config.kernel, self._device
        set_it = partial(host.tune_mount, *device, read_ahead_bytes=kernel.read_ahead_bytes, background_max=kernel.background_max)
        return await trio.to_thread.run_sync(set_it)

    # -- what is asked of the daemon ----------------------------------------------------------------------------

    @asynccontextmanager
    async def _status_port(self) -> AsyncIterator[None]:
        """Metrics, status page and health, from before the volume is opened until it is closed."""
        loggers = [logging.getLogger(name) for name in ("novafs", "novafs_mount")]
        for logger in loggers:
            logger.addHandler(self._board.events)
        try:
            if self._config.metrics == "off":
                yield
                return
            from novafs.statusserver import status_server  # loads an HTTP server

            async with status_server(self._config.metrics, self._board) as url:
                log.info("status page and metrics at %s", url)
                yield
        finally:
            for logger in loggers:
                logger.removeHandler(self._board.events)

    def _figures(self) -> dict[str, Any]:
        operations = self._operations
        return {"mountpoint": str(self._path), **(operations.statistics() if operations is not None else {})}

    async def _answers(self) -> bool:
        # The limiter is its own: threads that a mount without answers keeps must be one, and not of those that others share.
        return await trio.to_thread.run_sync(answers, self._path, limiter=self._asking, abandon_on_cancel=True)

    def _open_files(self) -> int:
        return self._operations.handle_count if self._operations is not None else 0

    async def _reload(self, _request: Mapping[str, Any]) -> dict[str, Any]:
        return (await self._read_again())._asdict()

    async def _reload_for_signal(self) -> None:
        try:
            log.info("SIGHUP: %s", await self._read_again())
        except NovaError as error:
            log.error("SIGHUP: nothing was changed: %s", error)
        except Exception:
            # A mistake here must not end the mount, as it does not where the control socket asks.
            log.exception("SIGHUP: reading the configuration again failed by a mistake in NovaFS; please report it. The mount goes on")

    async def _read_again(self) -> Reloaded:
        if not self._serving:
            raise MountError(f"{self._path} is not mounted yet, or no more: nothing was changed")
        self._notifier.reloading()
        try:
            reloaded = await self._reloader.reload()
            if any(name.startswith("kernel.") for name in reloaded.applied):
                await self._tune(self._reloader.config)
            return reloaded
        finally:
            if self._serving:  # READY=1 would take back that it ends
                self._notifier.ready()

    @property
    def _serving(self) -> bool:
        return self._phase is Phase.MOUNTED and not self._reporter.is_leaving

    async def _stats(self, _request: Mapping[str, Any]) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return self._board.document()

    async def _residency(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return await self._board.residency(str(request.get("image")))

    async def _show(self, _request: Mapping[str, Any]) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return self._board.status()

    # -- the end ------------------------------------------------------------------------------------------------

    async def _leave(self) -> None:
        """Unmount because of a signal; the request loop ends by itself once the connection is gone, or here."""
        try:
            if await self._detach(lazy=False) is not Unmounted.BUSY:
                return
            paths = self._operations.open_paths() if self._operations is not None else []
            wait_s = self._options.busy_timeout_s
            self._reporter.leaving(f": waiting at most {wait_s:.0f} s for what is open in it", wait_s)
            log.warning("%s is busy: serving %d open images for at most %.0f s: %s", self._path, len(paths), wait_s, ", ".join(paths))
            await self._detach(lazy=True)
            with trio.move_on_after(wait_s):
                await self._hurry.wait()
        except MountError as error:
            log.error("%s; ending all the same", error)
        if self._phase is Phase.MOUNTED:
            pyfuse3.terminate()

    async def _detach(self, *, lazy: bool) -> Unmounted:
        # While the helper works the request loop goes on: it may look at the mount point, and so ask us.
        found = await trio.to_thread.run_sync(lambda: mountpoint.unmount(self._path, lazy=lazy))
        if found is not Unmounted.BUSY:
            self._detached = True
        return found

    async def _end(self, operations: NovaOperations, invalidator: Invalidator) -> None:
        """The loop has ended: commit, then close the session. Shielded."""
        self._phase = self._board.phase = Phase.ENDING
        self._reporter.ending()
        # First of all: once the mount is gone the kernel may give its number to another daemon's, at the same place.
        if not self._detached and await trio.to_thread.run_sync(mountpoint.device_of, self._path) == self._device:
            # The loop has ended, and the mount is still there: it was aborted through /sys/fs/fuse, or the loop failed.
            # libfuse would leave it there, since it takes a connection that is gone for a mount that is gone.
            log.error("%s: the connection to the kernel has broken; detaching the dead mount", self._path)
            self._status = 1
            try:
                await self._detach(lazy=True)
            except MountError as error:
                log.error("%s", error)
        if operations.handle_count:
            log.info("%s: committing %d handles that were not closed", self._path, operations.handle_count)
            await operations.close_handles()
        if await trio.to_thread.run_sync(invalidator.stop, INVALIDATOR_STOP_S):
            # unmount=True would detach whatever is mounted there by now.
            pyfuse3.close(unmount=not self._detached)
        else:
            log.warning("%s: an invalidation hangs in the kernel; the session is left to the end of the process", self._path)
