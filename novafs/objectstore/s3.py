"""Objects in an S3 bucket, under a prefix: AWS, Ceph's RADOS Gateway, MinIO and what speaks like them, through boto3.

What always holds: a create is one PUT with ``If-None-Match: *``, so the service decides who was first (`probe_create_only` finds
out whether it does); an answer is used only when it is as long as its headers and the request say. Data is checked further
up, by its own hashes, so the checksums of newer SDKs are used only where S3 demands one: not every gateway knows them.

Credentials come by the usual AWS chain (environment, profile, role). One boto3 client serves all threads; it is made at the first call,
under a lock, because making a session is not thread-safe.
"""

from __future__ import annotations

import builtins
import contextlib
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final, TypeVar

import boto3
import botocore.session
import botocore.utils
from botocore.config import Config
from botocore.exceptions import ClientError

from novafs import __version__
from novafs.errors import BucketMissingError, NovaError, ObjectNotFoundError, StoreUnavailableError
from novafs.objectstore import s3errors
from novafs.objectstore.base import ObjectInfo, ObjectStore, StoreUsage
from novafs.objectstore.names import check_name, check_prefix, check_range, is_name
from novafs.objectstore.options import StoreOptions
from novafs.objectstore.probe import probe_create_only
from novafs.objectstore.s3direct import Answer, DirectRequests
from novafs.objectstore.s3http import acknowledge_at_once
from novafs.objectstore.s3models import read_quickly

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef, ListObjectsV2OutputTypeDef, ObjectIdentifierTypeDef

T = TypeVar("T")

PAGE_MAX: Final = 1000
"""Keys in one listing answer or one DeleteObjects request, by the protocol."""
CONFLICTS_MAX: Final = 8
REGION_DEFAULT: Final = "us-east-1"
"""What gateways that have no regions expect in a signature."""

_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)", re.ASCII)
EXPIRED: Final = "Credentials were refreshed"
"""How botocore's RuntimeError begins where a source of credentials gives expired ones."""
ENCODINGS: Final = frozenset({"br", "compress", "deflate", "gzip", "x-gzip", "zstd"})
_session_lock: Final = threading.Lock()


def parse_time(text: Any) -> datetime:
    """What botocore's own parser returns, ten times faster for the two forms that S3 uses: it is most of the work of a long listing.

    Raises ValueError for what is no time.
    """
    for parse in (datetime.fromisoformat, parsedate_to_datetime) if isinstance(text, str) else ():
        with contextlib.suppress(ValueError):
            found = parse(text)
            return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
    return botocore.utils.parse_timestamp(text)


def _ends_rightly(last: int, total: str, start: int, length: int | None) -> bool:
    """Whether an answer ends, with byte `last` of `total`, where it must: with what was asked for, or with the object."""
    if total == "*":
        return length is None or last < start + length
    return last == (int(total) if length is None else min(int(total), start + length)) - 1


def _without_expect(params: dict[str, Any], **_: object) -> None:
    params["headers"].pop("Expect", None)


class S3Store(ObjectStore):
    """The contract on a bucket. Thread-safe."""

    def __init__(
        self,
        url: str,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str | None = None,
        region: str | None = None,
        path_style: bool | None = None,
        verify: bool = True,
        ca_bundle: str | None = None,
        profile: str | None = None,
        options: StoreOptions | None = None,
    ) -> None:
        """url: for messages, without credentials. prefix: without slashes at its ends, or "". No request is made yet.

        path_style: None means yes where an endpoint is given. verify: False accepts any certificate.
        """
        self.url = url
        self._bucket = bucket
        self._root = prefix + "/" if prefix else ""
        self._endpoint = endpoint
        self._region = region
        self._path_style = endpoint is not None if path_style is None else path_style
        self._verify: bool | str = (ca_bundle or True) if verify else False
        self._profile = profile
        self._options = options or StoreOptions()
        self._made: S3Client | None = None
        self._direct: DirectRequests | None = None

    # ---- the contract

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        check_name(name)
        check_range(start, length)
        if length == 0:
            self.head(name)
            return b""
        whole = start == 0 and length is None
        ranged: dict[str, Any] = {} if whole else {"Range": f"bytes={start}-{'' if length is None else start + length - 1}"}

        def work(client: S3Client) -> bytes:
            if (quick := self._quick("GET", name, ranged)) is not None:
                self._check_plain(quick.headers.get("Content-Encoding", ""), f"reading {name}")
                content_range = quick.headers.get("Content-Range", "")
                return self._wanted(name, quick.body, quick.content_length, content_range, start, length, partial=quick.status == 206)
            try:
                answer = client.get_object(Bucket=self._bucket, Key=self._root + name, **ranged)
            except ClientError as error:
                if s3errors.status_of(error) == 416:
                    return b""  # the range begins at or past the end
                raise
            self._check_is_s3(answer, f"reading {name}")
            self._check_plain(answer.get("ContentEncoding", ""), f"reading {name}")
            return self._body(answer, name, start, length)

        return self._call(work, f"reading {name}", name)

    def _body(self, answer: GetObjectOutputTypeDef, name: str, start: int, length: int | None) -> bytes:
        stream = answer["Body"]
        try:
            data = stream.read()  # raises where the body is shorter than its Content-Length
        finally:
            stream.close()
        partial = answer["ResponseMetadata"]["HTTPStatusCode"] == 206
        content_range = answer.get("ContentRange", "")
        return self._wanted(name, data, answer.get("ContentLength", len(data)), content_range, start, length, partial=partial)

    def _wanted(
        self, name: str, data: bytes, content_length: int, content_range: str, start: int, length: int | None, *, partial: bool
    ) -> bytes:
        if not content_range and not partial:
            # The whole object; a server may ignore the range that it was asked for.
            self._check_length(name, content_length, len(data))
            return data if start == 0 and length is None else data[start : None if length is None else start + length]
        parts = _CONTENT_RANGE.fullmatch(content_range)
        if parts is None or int(parts[1]) != start or not _ends_rightly(int(parts[2]), parts[3], start, length):
            raise StoreUnavailableError(f"{self.url}: reading {name}: asked for {length} bytes from {start}, got {content_range!r}")
        self._check_length(name, int(parts[2]) + 1 - start, len(data))
        return data

    def _check_is_s3(self, answer: Mapping[str, Any], doing: str) -> None:
        """Each answer about an object has an ETag; that of a proxy or a portal on the way, which also may say 200, has none."""
        if not answer.get("ETag"):
            raise self._not_s3(doing, "no ETag")

    def _check_plain(self, encoding: str, doing: str) -> None:
        """We store nothing that is encoded, and ask for nothing that is: bytes that a proxy has compressed would look damaged."""
        if encoding.lower() in ENCODINGS:
            raise self._not_s3(doing, f"Content-Encoding: {encoding}")

    def _not_s3(self, doing: str, found: str) -> StoreUnavailableError:
        return StoreUnavailableError(f"{self.url}: {doing}: the answer is not S3's ({found}); check endpoint= and proxies on the way to it")

    def _check_length(self, name: str, expected: int, found: int) -> None:
        if found != expected:
            raise StoreUnavailableError(f"{self.url}: reading {name}: expected {expected} bytes, the answer ended after {found}")

    def create(self, name: str, data: bytes) -> None:
        check_name(name)

        def work(client: S3Client) -> None:
            if self._quick("PUT", name, {"If-None-Match": "*"}, data) is not None:
                return
            for attempt in range(1, CONFLICTS_MAX + 1):
                try:
                    answer = client.put_object(Bucket=self._bucket, Key=self._root + name, Body=data, IfNoneMatch="*")
                except ClientError as error:
                    # AWS answers 409 to all but one of several creates at once, or to all: whoever asks again is told who won.
                    if s3errors.status_of(error) != 409 or attempt == CONFLICTS_MAX:
                        raise
                    time.sleep(random.uniform(0, 0.01 * 2**attempt))  # noqa: S311 - jitter, not a secret
                else:
                    self._check_is_s3(answer, f"writing {name}")
                    return

        self._call(work, f"writing {name}", name, missing_is_bucket=True)

    def put(self, name: str, data: bytes) -> None:
        check_name(name)

        def work(client: S3Client) -> None:
            answer = client.put_object(Bucket=self._bucket, Key=self._root + name, Body=data)
            self._check_is_s3(answer, f"writing {name}")

        self._call(work, f"writing {name}", name, missing_is_bucket=True)

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> builtins.list[ObjectInfo]:
        check_prefix(prefix)
        found: builtins.list[ObjectInfo] = []
        position = {"StartAfter": self._root + after} if after else {}
        while limit is None or len(found) < limit:
            keys_max = PAGE_MAX if limit is None else min(PAGE_MAX, limit - len(found))
            answer = self._page(prefix, position, keys_max)
            rows = answer.get("Contents", [])
            for row in rows:
                name = row["Key"][len(self._root) :]
                if is_name(name):
                    found.append(ObjectInfo(name, row["Size"], row["LastModified"].timestamp()))
            if not answer["IsTruncated"]:
                break
            if token := answer.get("NextContinuationToken"):
                position = {"ContinuationToken": token}
            elif rows:
                position = {"StartAfter": rows[-1]["Key"]}
            else:
                raise self._not_s3(f"listing {prefix!r}", "there is more, but not where")
        return found

    def _page(self, prefix: str, position: dict[str, Any], keys_max: int) -> ListObjectsV2OutputTypeDef:
        def work(client: S3Client) -> ListObjectsV2OutputTypeDef:
            answer = client.list_objects_v2(Bucket=self._bucket, Prefix=self._root + prefix, MaxKeys=keys_max, **position)
            # Some proxy's page must not count as an empty listing: collection would take every pack for garbage.
            if "IsTruncated" not in answer:
                raise self._not_s3(f"listing {prefix!r}", "no listing")
            return answer

        return self._call(work, f"listing {prefix!r}")

    def head(self, name: str) -> ObjectInfo:
        check_name(name)

        def work(client: S3Client) -> ObjectInfo:
            answer = client.head_object(Bucket=self._bucket, Key=self._root + name)
            self._check_is_s3(answer, f"looking at {name}")
            return ObjectInfo(name, answer["ContentLength"], answer["LastModified"].timestamp())

        try:
            return self._call(work, f"looking at {name}", name)
        except ObjectNotFoundError:
            self.check_bucket()  # the answer to a HEAD does not say which of the two is missing
            raise

    def delete(self, name: str) -> None:
        check_name(name)
        try:
            self._call(lambda client: client.delete_object(Bucket=self._bucket, Key=self._root + name), f"deleting {name}", name)
        except ObjectNotFoundError:
            return  # S3 says 204 here, but not every gateway does

    def delete_many(self, names: Sequence[str]) -> None:
        """All of them are tried; then the first error is raised, if there was one."""
        for name in names:
            check_name(name)
        errors: builtins.list[NovaError] = []
        for first in range(0, len(names), PAGE_MAX):
            batch = names[first : first + PAGE_MAX]
            try:
                # mypy can not tell the type of a lambda that binds a name by its default.
                self._call(lambda client, batch=batch: self._delete_batch(client, batch, errors), f"deleting {len(batch)} objects")  # type: ignore[misc]
            except NovaError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _delete_batch(self, client: S3Client, names: Sequence[str], errors: builtins.list[NovaError]) -> None:
        objects: builtins.list[ObjectIdentifierTypeDef] = [{"Key": self._root + name} for name in names]
        answer = client.delete_objects(Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True})
        for row in answer.get("Errors", ()):
            name, code = row.get("Key", "")[len(self._root) :], row.get("Code", "")
            if code in ("NoSuchKey", "NoSuchVersion"):
                continue
            # The rows have no HTTP status; 500 makes an unknown code retryable, which deleting is.
            status = 403 if code in s3errors.DENIED_HELP else 500
            errors.append(s3errors.from_code(code, status, row.get("Message", ""), doing=f"deleting {name}", url=self.url, name=name))

    def clock_s(self) -> float:
        def work(client: S3Client) -> float:
            answer = client.head_bucket(Bucket=self._bucket)
            date = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
            try:
                return parsedate_to_datetime(date).timestamp()
            except ValueError as error:
                raise StoreUnavailableError(f"{self.url}: asking for the time: {date!r} is no Date header") from error

        return self._call(work, "asking for the time")

    def usage(self) -> StoreUsage:
        return StoreUsage(None, None)

    def probe_create_only(self) -> bool:
        return probe_create_only(self)

    def renew(self) -> None:
        def work() -> tuple[S3Client, DirectRequests | None]:
            with _session_lock:
                made = self._make_client()
            try:
                made[0].head_bucket(Bucket=self._bucket)
            except BaseException:
                made[0].close()
                raise
            return made

        client, direct = self._said(work, "trying the credentials that are configured now")
        with _session_lock:
            # Requests that are under way end with the client that they began with, which goes with the last of them.
            self._made, self._direct = client, direct

    def close(self) -> None:
        with _session_lock:
            client, self._made = self._made, None
        if client is not None:
            client.close()

    # ---- beyond the contract

    def check_bucket(self) -> None:
        """Raises BucketMissingError or StoreDeniedError where the bucket is not there or not ours."""
        self._call(lambda client: client.head_bucket(Bucket=self._bucket), f"looking for the bucket {self._bucket}")

    # ---- below

    def _quick(self, method: str, name: str, headers: Mapping[str, str], data: bytes = b"") -> Answer | None:
        """See `s3direct`; within `_call`. None: ask the SDK."""
        return self._direct.send(method, self._root + name, headers, data) if self._direct is not None else None

    def _client(self) -> S3Client:
        made = self._made
        if made is None:
            with _session_lock:
                if self._made is None:
                    client, self._direct = self._make_client()
                    self._made = client
                made = self._made
        return made

    def _make_client(self) -> tuple[S3Client, DirectRequests | None]:
        options = self._options
        core = botocore.session.Session()
        read_quickly(core)
        core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=parse_time)
        session = boto3.session.Session(profile_name=self._profile, botocore_session=core)
        client: S3Client = session.client(
            "s3",
            region_name=self._region or session.region_name or REGION_DEFAULT,
            endpoint_url=self._endpoint,
            verify=self._verify,
            config=Config(
                connect_timeout=options.connect_timeout_s,
                read_timeout=options.read_timeout_s,
                max_pool_connections=options.pool_size,
                retries={"mode": "standard", "total_max_attempts": 1 + options.retries_max},
                s3={"addressing_style": "path" if self._path_style else "auto"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                tcp_keepalive=True,
                user_agent_extra=f"novafs/{__version__}",
            ),
        )
        # "Expect: 100-continue" costs a round trip for every write, to save a body in the rare case that the write is refused.
        client.meta.events.register_last("before-call.s3", _without_expect)
        acknowledge_at_once(client)
        direct = None if options.retries_max else DirectRequests.of(client, session.get_credentials(), self._bucket)
        return client, direct

    def _call(self, work: Callable[[S3Client], T], doing: str, name: str | None = None, *, missing_is_bucket: bool = False) -> T:
        """Run `work` and say its errors in the store's words. missing_is_bucket: a 404 without a code can only mean the bucket."""
        return self._said(lambda: work(self._client()), doing, name, missing_is_bucket=missing_is_bucket)

    def _said(self, work: Callable[[], T], doing: str, name: str | None = None, *, missing_is_bucket: bool = False) -> T:
        try:
            return work()
        except RuntimeError as error:
            if EXPIRED not in str(error):
                raise
            raise s3errors.expired(error, doing=doing, url=self.url) from error
        except s3errors.FAILURES as error:
            ours = s3errors.from_exception(error, doing=doing, url=self.url, name=name)
            if missing_is_bucket and isinstance(ours, ObjectNotFoundError):
                ours = BucketMissingError(f"{self.url}: {doing}: the bucket is not there; make it first, or correct the URL")
            raise ours from error
