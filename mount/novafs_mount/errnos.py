"""Errors to errnos: the one table, and the one place where a handler's exception becomes an answer to the kernel.

What is promised: every class of `novafs.errors` has an errno, its own or that of the nearest class above it
(`tests/unit/test_errnos.py` walks the tree); whatever a handler raises, the kernel gets an answer and the daemon
lives on. What an operator should see is logged once, where it is turned into an errno: errors of the volume (EIO,
ENOSPC, ESTALE, EROFS) as one line, what nobody foresaw with its traceback, mistakes of the caller (ENOENT, EEXIST)
only at debug level.

The choice where it is not obvious:

- A store that refuses credentials is EIO, not EACCES: the guest that reads a block has no permission to ask for.
- StoreUnavailableError is EIO, not EAGAIN: the client has retried for `io_timeout_s`, and QEMU would spin on EAGAIN.
- UnsupportedError is EOPNOTSUPP, on which `cp`, `qemu-img` and glibc fall back to plain reads and writes.
"""

from __future__ import annotations

import errno
import functools
import logging
import math
from collections.abc import Callable, Coroutine, Mapping
from time import monotonic, perf_counter
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

from pyfuse3 import FUSEError

from novafs import errors
from novafs.latency import LatencyBook

log = logging.getLogger(__name__)

ERRNOS: Final[Mapping[type[errors.NovaError], int]] = {
    errors.NovaError: errno.EIO,
    errors.UserError: errno.EINVAL,
    errors.ConfigError: errno.EINVAL,
    errors.InvalidNameError: errno.EINVAL,
    errors.NotFoundError: errno.ENOENT,
    errors.NoAttributeError: errno.ENODATA,
    errors.ExistsError: errno.EEXIST,
    errors.NotDirectoryError: errno.ENOTDIR,
    errors.IsDirectoryError: errno.EISDIR,
    errors.NotEmptyError: errno.ENOTEMPTY,
    errors.ReadOnlyError: errno.EROFS,
    errors.TooLargeError: errno.EFBIG,
    errors.BusyError: errno.EBUSY,
    errors.ClosedError: errno.EBADF,
    errors.AccessDeniedError: errno.EACCES,
    errors.UnsupportedError: errno.EOPNOTSUPP,
    errors.SourceError: errno.EINVAL,
    errors.MountError: errno.EINVAL,
    errors.VolumeError: errno.EIO,
    errors.RetryableError: errno.EIO,
    errors.PermanentError: errno.EIO,
    errors.StoreFullError: errno.ENOSPC,
    errors.StaleError: errno.ESTALE,
    errors.LeaseLostError: errno.EIO,
    errors.CorruptionError: errno.EIO,
    errors.BugError: errno.EIO,
}

_QUIET: Final = frozenset(
    {
        errno.EINVAL,
        errno.ENOENT,
        errno.ENODATA,
        errno.EEXIST,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENOTEMPTY,
        errno.EBUSY,
        errno.EBADF,
        errno.EFBIG,
        errno.EACCES,
        errno.EOPNOTSUPP,
    }
)
"""The caller sees these and can act on them; in the log they would be noise."""


def errno_of(error: BaseException) -> int:
    """The errno of `error`: that of the nearest class in the table, EIO for anything that is not a NovaError."""
    return _errno_of_class(type(error))


def _errno_of_class(cls: type[BaseException]) -> int:
    return next((ERRNOS[above] for above in cls.__mro__ if above in ERRNOS), errno.EIO)


class Told:
    """What the kernel was told of errors that an operator should see, since the process began: it has one mount.

    counts: by class of `novafs.errors`, each there from the start, at 0, or a monitor could not tell the first one from none; or of what
    nobody foresaw. store_failed_s: `time.monotonic` when a request failed last because the store did not answer.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        for cls in vars(errors).values():
            if isinstance(cls, type) and issubclass(cls, errors.NovaError) and _errno_of_class(cls) not in _QUIET:
                self.counts[cls.__name__] = 0
        self.store_failed_s = -math.inf

    def note(self, error: Exception) -> None:
        """The kernel is told of `error`."""
        name = type(error).__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        if isinstance(error, (errors.RetryableError, errors.StoreDeniedError, errors.BucketMissingError)):
            self.store_failed_s = monotonic()


told: Final = Told()


def fuse_error(error: Exception, what: str) -> FUSEError:
    """The answer to the kernel for `error`, having logged it as the module says.

    what: the call and its object, for the log line: `read web/a.raw at 65536+4096`.
    """
    if isinstance(error, FUSEError):
        return error
    if isinstance(error, ExceptionGroup):
        error = _foremost(error)
    number = errno_of(error)
    if number not in _QUIET:
        told.note(error)
    if not isinstance(error, errors.NovaError):
        log.error("%s: answered EIO to an error that nobody foresaw", what, exc_info=error)
    elif isinstance(error, errors.BugError):
        log.error("%s: %s", what, error, exc_info=error)
    elif number in _QUIET:
        log.debug("%s: %s: %s", what, errno.errorcode[number], error)
    else:
        level = logging.WARNING if number in (errno.EROFS, errno.ESTALE) else logging.ERROR
        log.log(level, "%s: %s: %s", what, errno.errorcode[number], error)
    return FUSEError(number)


def _foremost(group: ExceptionGroup[Exception]) -> Exception:
    """The error of a group that decides: one that nobody foresaw before a NovaError, of those the first."""
    leaves: list[Exception] = []
    stack: list[Exception] = [group]
    while stack:
        error = stack.pop()
        if isinstance(error, ExceptionGroup):
            stack.extend(reversed(error.exceptions))
        else:
            leaves.append(error)
    for error in leaves:
        if not isinstance(error, errors.NovaError):
            return error
    return leaves[0]


class Describes(Protocol):
    """What a class must offer for `answered` to decorate its handlers. latencies: where the time that they take is noted."""

    latencies: LatencyBook

    def describe(self, call: str, arguments: tuple[Any, ...]) -> str:
        """The call and its object in a few words, for the log. Must not raise."""
        ...


P = ParamSpec("P")
R = TypeVar("R")
D = TypeVar("D", bound=Describes)


def answered(handler: Callable[Concatenate[D, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[D, P], Coroutine[Any, Any, R]]:
    """Decorate a request handler: it raises FUSEError or nothing. `read` and `write` do the same by hand, for speed."""

    @functools.wraps(handler)
    async def wrapper(self: D, /, *args: P.args, **kwargs: P.kwargs) -> R:
        began_s = perf_counter()
        try:
            return await handler(self, *args, **kwargs)
        except FUSEError:
            raise
        except Exception as error:
            raise fuse_error(error, self.describe(handler.__name__, args)) from error
        finally:
            self.latencies.of("fuse", handler.__name__).note(perf_counter() - began_s)

    return wrapper
