"""Every error has an errno, and whatever a handler raises the kernel gets an answer."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator

import pytest
import trio
from pyfuse3 import FUSEError

from novafs import errors
from novafs.latency import LatencyBook
from novafs_mount.errnos import ERRNOS, answered, errno_of, fuse_error


def tree(cls: type[errors.NovaError] = errors.NovaError) -> Iterator[type[errors.NovaError]]:
    yield cls
    for below in cls.__subclasses__():
        yield from tree(below)


def make(cls: type[errors.NovaError]) -> errors.NovaError:
    if cls is errors.FrameCorruptError:
        return errors.FrameCorruptError(bytes(32), "pack 00", 4096, "wrong hash")
    return cls("the message")


OURS = sorted((cls for cls in tree() if cls.__module__ == "novafs.errors"), key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", OURS)
def test_every_class_of_the_tree_maps(cls: type[errors.NovaError]) -> None:
    number = errno_of(make(cls))
    assert number in errno.errorcode
    assert number == next(ERRNOS[base] for base in cls.__mro__ if base in ERRNOS)


@pytest.mark.parametrize(
    "cls", [cls for cls in tree(errors.UserError) if cls is not errors.UserError and cls.__module__ == "novafs.errors"]
)
def test_no_mistake_of_a_user_is_an_io_error(cls: type[errors.NovaError]) -> None:
    assert errno_of(make(cls)) != errno.EIO or issubclass(cls, errors.VolumeError)


def test_the_most_specific_class_wins() -> None:
    assert errno_of(errors.NotFoundError("x")) == errno.ENOENT
    assert errno_of(errors.NoAttributeError("x")) == errno.ENODATA
    assert errno_of(errors.PermanentError("x")) == errno.EIO
    assert errno_of(errors.StoreFullError("x")) == errno.ENOSPC

    class Unheard(errors.StoreFullError):
        pass

    assert errno_of(Unheard("x")) == errno.ENOSPC


def test_corruption_and_an_absent_store_are_io_errors() -> None:
    for error in (make(errors.FrameCorruptError), errors.StoreUnavailableError("x"), errors.StoreDeniedError("x"), errors.BugError("x")):
        assert errno_of(error) == errno.EIO


class Object:
    """Something with handlers."""

    def __init__(self) -> None:
        self.latencies = LatencyBook()
        self.error: BaseException | None = None

    def describe(self, call: str, arguments: tuple[object, ...]) -> str:
        return f"{call} web/a.raw"

    @answered
    async def getattr(self, inode: int) -> int:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        return inode + 1


def answer(error: BaseException | None) -> int:
    thing = Object()
    thing.error = error
    try:
        assert trio.run(thing.getattr, 1) == 2
    except FUSEError as found:
        return found.errno
    return 0


def test_a_handler_that_succeeds_is_left_alone() -> None:
    assert answer(None) == 0


def test_a_fuse_error_passes_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    assert answer(FUSEError(errno.EXDEV)) == errno.EXDEV
    assert not caplog.records
    error = FUSEError(errno.EXDEV)
    assert fuse_error(error, "read x") is error


def test_an_io_error_is_one_line_that_names_the_image(caplog: pytest.LogCaptureFixture) -> None:
    assert answer(errors.StoreUnavailableError("no answer within 30 s")) == errno.EIO
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage() == "getattr web/a.raw: EIO: no answer within 30 s"
    assert record.exc_info is None


def test_mistakes_of_the_caller_stay_out_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert answer(errors.NotFoundError("x")) == errno.ENOENT
    assert answer(errors.ExistsError("x")) == errno.EEXIST
    assert not caplog.records


def test_a_read_only_or_stale_image_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert answer(errors.ReadOnlyError("held by host b")) == errno.EROFS
    assert answer(errors.StaleError("another host wrote")) == errno.ESTALE
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.WARNING]


@pytest.mark.parametrize(
    "error", [ValueError("unforeseen"), OSError(errno.ENOENT, "of a local file"), errors.BugError("invariant"), MemoryError()]
)
def test_what_nobody_foresaw_is_eio_with_a_traceback(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    assert answer(error) == errno.EIO
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_a_group_is_answered_by_its_worst_member(caplog: pytest.LogCaptureFixture) -> None:
    ours = ExceptionGroup("g", [ExceptionGroup("h", [errors.StoreFullError("full")]), errors.NotFoundError("x")])
    assert answer(ours) == errno.ENOSPC
    assert answer(ExceptionGroup("g", [errors.NotFoundError("x"), ValueError("unforeseen")])) == errno.EIO


def test_cancellation_is_not_swallowed() -> None:
    async def main() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await Object().getattr(1)
        assert scope.cancelled_caught

    trio.run(main)
