"""One GET or PUT of an object with a fraction of the SDK's work: botocore's own signer and connections, without its model of the call.

Of the CPU time of a small request most goes into validating parameters, resolving the endpoint, serializing and parsing by the service
model, each time anew and each time with the same result. The reads of a boot and an fsync that must reach the store wait for that.
So the address of the bucket is asked of the SDK once, and these two requests are then put together here.

What always holds: only a plain success (200, 206) counts; whatever else happens, the caller asks the SDK in the ordinary way, which
repeats, follows redirects, corrects its clock, refreshes what has expired and says its errors. A PUT that is repeated so is one whose
answer may have been lost, as any that the SDK itself repeats. Where three in a row came to nothing, no more are tried.

Signature: AWS Signature Version 4, https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import botocore
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import BotoCoreError, ClientError
from botocore.utils import percent_encode

from novafs import __version__

if TYPE_CHECKING:
    from botocore.credentials import Credentials
    from mypy_boto3_s3 import S3Client

log = logging.getLogger(__name__)

USER_AGENT: Final = f"novafs/{__version__} botocore/{botocore.__version__}"
FAILURES_MAX: Final = 3
_PROBE: Final = "key"
_ANSWERED: Final = (200, 206)


class Answer(NamedTuple):
    """A success: its headers (any case), its body, and how long that should be."""

    headers: Mapping[str, str]
    body: bytes
    content_length: int


class DirectRequests:
    """For one bucket. Thread-safe: what changes is one counter, whose exactness does not matter."""

    def __init__(self, http_session: Any, credentials: Credentials, region: str, base: str) -> None:
        self._http = http_session
        self._credentials = credentials
        self._region = region
        self._base = base
        self._failures = 0

    @classmethod
    def of(cls, client: S3Client, credentials: Credentials | None, bucket: str) -> DirectRequests | None:
        """Beside an SDK client, over its connections. None where it has no credentials, or signs in a way of its own for this bucket."""
        http_session = getattr(getattr(client, "_endpoint", None), "http_session", None)
        if http_session is None or credentials is None or ":" in bucket or bucket.endswith("--x-s3"):
            return None  # access points and directory buckets have other signatures
        try:
            url = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": _PROBE})
        except (BotoCoreError, ClientError):
            return None
        base, found, _ = url.partition(_PROBE + "?")
        if not found:
            return None
        return cls(http_session, credentials, client.meta.region_name, base)

    def send(self, method: str, key: str, headers: Mapping[str, str], data: bytes = b"") -> Answer | None:
        """The answer where it is a success, else None: ask the SDK."""
        if self._failures >= FAILURES_MAX:
            return None
        try:
            request = AWSRequest(method, self._base + percent_encode(key, safe="/~"), data=data, headers=dict(headers))
            request.headers["User-Agent"] = USER_AGENT
            S3SigV4Auth(self._credentials.get_frozen_credentials(), "s3", self._region).add_auth(request)
            answer = self._http.send(request.prepare())
        except BotoCoreError as error:
            self._failed(method, error)
            return None
        if answer.status_code not in _ANSWERED:
            # A name that is not there, or is taken, is an answer of a store that is well.
            if answer.status_code not in (404, 409, 412, 416, 429) and answer.status_code < 500:
                self._failed(method, f"status {answer.status_code}")
            return None
        expected = answer.headers.get("Content-Length", "")
        if not answer.headers.get("ETag") or not (expected.isascii() and expected.isdigit()):
            self._failed(method, "an answer that is not S3's")
            return None
        self._failures = 0
        return Answer(answer.headers, answer.content, int(expected))

    def _failed(self, method: str, found: object) -> None:
        self._failures += 1
        if self._failures == FAILURES_MAX:
            log.debug("%s of objects goes through the SDK from here on: %s", method, found)
