"""Connections to S3 that acknowledge an answer's headers at once.

Ceph's gateway (unless its front end is told ``tcp_nodelay=1``) sends headers and body of an answer in two pieces and, by Nagle's
algorithm, holds the second until the first is acknowledged, which Linux delays by 40 ms in the hope of sending it along with data.
Each small read and each listing then takes 44 ms instead of 3 (measured on Ceph 16). TCP_QUICKACK after the headers sends the
acknowledgement; the kernel forgets the option by itself, so it is set for each answer. It costs one system call.

botocore has no public way to give a session connections of another class. `acknowledge_at_once` reaches for the attribute and does nothing
where it is not there: requests then are slower, and right. `tests/contract/test_s3.py` notices.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any, Final

from botocore.awsrequest import AWSHTTPConnection, AWSHTTPConnectionPool, AWSHTTPSConnection, AWSHTTPSConnectionPool

_QUICKACK: Final = getattr(socket, "TCP_QUICKACK", None)


class _AtOnce:
    """Mixed into a connection: sends the acknowledgement that the server may be waiting for before its next piece."""

    sock: socket.socket | None

    def getresponse(self) -> Any:
        answer = super().getresponse()  # type: ignore[misc]  # the class that it is mixed into has it
        # Where the connection is to be closed after this answer it is gone from here already.
        if self.sock is not None and _QUICKACK is not None:
            with contextlib.suppress(OSError):  # no TCP, or a connection that just broke: the read will tell
                self.sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
        return answer


class PromptConnection(_AtOnce, AWSHTTPConnection):  # type: ignore[misc]  # as AWSHTTPConnection itself
    """For http."""


class PromptTlsConnection(_AtOnce, AWSHTTPSConnection):  # type: ignore[misc]  # as AWSHTTPSConnection itself
    """For https."""


class PromptPool(AWSHTTPConnectionPool):
    """Of `PromptConnection`."""

    ConnectionCls = PromptConnection


class PromptTlsPool(AWSHTTPSConnectionPool):
    """Of `PromptTlsConnection`."""

    ConnectionCls = PromptTlsConnection


def acknowledge_at_once(client: Any) -> bool:
    """Give a fresh boto3 client such connections, before its first request; whether that was possible."""
    session = getattr(getattr(client, "_endpoint", None), "http_session", None)
    classes = getattr(session, "_pool_classes_by_scheme", None)
    if not isinstance(classes, dict) or set(classes) != {"http", "https"}:
        return False
    classes.update(http=PromptPool, https=PromptTlsPool)  # the pool managers hold this very dict
    return True
