"""One GET or PUT of an object with a fraction of the SDK's work: over its connections, without its model of the call.

Of the CPU time of a small request most goes into validating parameters, resolving the endpoint, serializing and parsing by the service
model, each time anew and each time with the same result. The reads of a boot and an fsync that must reach the store wait for that.
So the address of the bucket and the region that signatures name are asked of the SDK once, and these two requests are then put
together here, signed (`s3sign`) and sent (`s3wire`). Where no connection is open botocore signs and sends, and so opens one.

What always holds: only a plain success (200, 206) counts. A store that is away or fails (5xx, 429) is an error like the SDK's, so that
nobody waits for it twice; where the SDK is to retry by itself, these requests are not made. Whatever else happens, the caller asks the SDK
in the ordinary way, which follows redirects, corrects its clock, refreshes what has expired and says its errors: the store has answered, so
such a PUT has had no effect, or somebody else's had. Where three in a row came to nothing, the SDK is
asked for the next minute.

Signature: AWS Signature Version 4, https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import urlsplit

import botocore
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import BotoCoreError, ClientError
from botocore.utils import percent_encode

from novafs import __version__
from novafs.objectstore.s3sign import Signer
from novafs.objectstore.s3wire import Wire

if TYPE_CHECKING:
    from botocore.credentials import Credentials, ReadOnlyCredentials
    from mypy_boto3_s3 import S3Client

log = logging.getLogger(__name__)

USER_AGENT: Final = f"novafs/{__version__} botocore/{botocore.__version__}"
FAILURES_MAX: Final = 3
REST_S: Final = 60.0
"""How long the SDK is asked after so many: what was refused may be accepted again."""
_PROBE: Final = "key"
_SCOPE: Final = re.compile(r"AWS4-HMAC-SHA256 Credential=[^,]*/([^/,]+)/s3/aws4_request,")
_ANSWERED: Final = (200, 206)
_CODE: Final = re.compile(rb"<Code>([A-Za-z0-9.]{1,64})</Code>")


class Answer(NamedTuple):
    """A success: its status, its headers (any case), its body, and how long that should be (of a GET)."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    content_length: int


class _Stop(Exception):  # noqa: N818 - no error, and seen by nobody else
    """The SDK's request is not sent."""


class DirectRequests:
    """For one bucket. Thread-safe: what changes are a counter and a time, whose exactness does not matter."""

    def __init__(self, http_session: Any, credentials: Credentials, region: str, base: str) -> None:
        self._http = http_session
        self._credentials = credentials
        self._region = region
        self._base = base
        self._path = urlsplit(base).path
        self._signer = Signer(region, S3SigV4Auth(credentials, "s3", region).headers_to_sign(AWSRequest("GET", base))["host"])
        self._wire = Wire.of(http_session, base)
        self._failures = 0
        self._rests_until_s = 0.0

    @classmethod
    def of(cls, client: S3Client, credentials: Credentials | None, bucket: str) -> DirectRequests | None:
        """Beside an SDK client, over its connections. None where it has no credentials, or signs in a way of its own for this bucket."""
        http_session = getattr(getattr(client, "_endpoint", None), "http_session", None)
        if http_session is None or credentials is None or ":" in bucket or bucket.endswith("--x-s3"):
            return None  # access points and directory buckets have other signatures
        asked: list[tuple[str, str]] = []

        def stop(request: Any, **_: object) -> None:
            signed = request.headers.get("Authorization", "")
            asked.append((request.url, signed.decode() if isinstance(signed, bytes) else signed))
            raise _Stop

        # Not by a presigned URL: its host is the global one, which knows few regions, and few networks have a way to it.
        client.meta.events.register_first("before-send.s3.GetObject", stop)
        try:
            client.get_object(Bucket=bucket, Key=_PROBE)
        except (_Stop, BotoCoreError, ClientError):
            pass
        finally:
            client.meta.events.unregister("before-send.s3.GetObject", stop)
        if not asked:
            return None
        url, signed = asked[-1]
        scope = _SCOPE.match(signed)
        if scope is None or not url.endswith("/" + _PROBE):
            return None
        return cls(http_session, credentials, scope[1], url.removesuffix(_PROBE))

    def send(self, method: str, key: str, headers: Mapping[str, str], data: bytes = b"") -> Answer | None:
        """The answer where it is a success, None: ask the SDK. Raises what the SDK raises where the store is away or fails."""
        if self._failures >= FAILURES_MAX and time.monotonic() < self._rests_until_s:
            return None
        try:
            credentials = self._credentials.get_frozen_credentials()
        except BotoCoreError as error:
            self._failed(method, error)
            return None
        status, found, content = self._exchange(credentials, method, percent_encode(key, safe="/~"), headers, data)
        if status not in _ANSWERED:
            if status >= 500 or status == 429:
                raise ClientError(_error(status, content), f"{method} Object")
            # A name that is not there, or is taken, is an answer of a store that is well.
            if status not in (404, 409, 412, 416):
                self._failed(method, f"status {status}")
            return None
        length = found.get("Content-Length", "")
        # The length of a PUT's answer does not matter. To ask again for its sake would find the object that was just created.
        if not found.get("ETag") or (method == "GET" and not (length.isascii() and length.isdigit())):
            self._failed(method, "an answer that is not S3's")
            return None
        self._failures = 0
        return Answer(status, found, content, int(length) if method == "GET" else 0)

    def _exchange(
        self, credentials: ReadOnlyCredentials, method: str, name: str, headers: Mapping[str, str], data: bytes
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of what was answered. name: encoded. Raises what the SDK raises."""
        if self._wire is not None:
            signed = self._signer.signed(credentials, method, self._path + name, headers, data)
            signed.update({"user-agent": USER_AGENT, "accept-encoding": "identity"})
            if (quick := self._wire.exchange(method, self._path + name, signed, data)) is not None:
                return quick
        request = AWSRequest(method, self._base + name, data=data, headers=dict(headers))
        request.headers["User-Agent"] = USER_AGENT
        S3SigV4Auth(credentials, "s3", self._region).add_auth(request)
        answer = self._http.send(request.prepare())
        return answer.status_code, answer.headers, answer.content

    def _failed(self, method: str, found: object) -> None:
        self._failures += 1
        if self._failures >= FAILURES_MAX:
            self._rests_until_s = time.monotonic() + REST_S
            log.debug("%s of objects goes through the SDK for the next %.0f s: %s", method, REST_S, found)


def _error(status: int, body: bytes) -> Any:
    """An error as the SDK parses it, from the little that is looked at."""
    found = _CODE.search(body[:4096])
    return {
        "Error": {"Code": found[1].decode() if found else str(status), "Message": ""},
        "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": {}, "RetryAttempts": 0},
    }
