"""Fixtures that most tests want: object stores (a directory, a real Ceph), and trio's run."""

from __future__ import annotations

import functools
import os
import re
import secrets
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pytest
import trio

from tests.support.ceph import Ceph, missing_tools

T = TypeVar("T")

BUCKET = "novafs-tests"
RUN_TIMEOUT_S = 120
"""Bounds a hang; no test is meant to take so long."""


def run(main: Callable[..., Awaitable[T]], *args: Any, clock: trio.abc.Clock | None = None) -> T:
    """`trio.run` for tests: ends a hang with TooSlowError. clock: a MockClock, whose time then is not bounded."""

    async def bounded() -> T:
        if clock is not None:
            return await main(*args)
        with trio.fail_after(RUN_TIMEOUT_S):
            return await main(*args)

    return trio.run(bounded, clock=clock)


def trio_test(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """An async test, run by `run`."""

    @functools.wraps(test)
    def wrapped(**fixtures: object) -> None:
        run(functools.partial(test, **fixtures))

    return wrapped


@pytest.fixture(name="run")
def _run() -> Callable[..., Any]:
    """`run` as a fixture."""
    return run


@pytest.fixture(scope="session")
def ceph_rgw() -> Iterator[Ceph]:
    """One Ceph for the whole session, with the bucket `BUCKET`; its credentials are in the environment, also for child processes."""
    if missing := missing_tools():
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: ceph-mon ceph-osd radosgw)")
    with Ceph() as ceph, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in ceph.environment.items():
            patch.setenv(name, value)
        ceph.make_bucket(BUCKET)
        yield ceph


def fresh_prefix(request: pytest.FixtureRequest) -> str:
    """A prefix that no other test uses, named after the test."""
    return re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:60] + "-" + secrets.token_hex(4)


@pytest.fixture
def s3_prefix(request: pytest.FixtureRequest) -> str:
    """A fresh prefix in `BUCKET`; for `ceph_rgw.volume_url(BUCKET, s3_prefix, endpoint=proxy.endpoint)`."""
    return fresh_prefix(request)


@pytest.fixture
def s3_url(ceph_rgw: Ceph, s3_prefix: str) -> str:
    """The URL of a fresh, empty prefix on the real Ceph."""
    return ceph_rgw.volume_url(BUCKET, s3_prefix)
