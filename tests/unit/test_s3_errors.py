"""What a bucket's failures mean: those of the real gateway, and those that a proxy in front of it scripts."""

from __future__ import annotations

import gzip
import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from botocore import exceptions as boto

from novafs.errors import (
    BucketMissingError,
    ConfigError,
    NovaError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreDeniedError,
    StoreFullError,
    StoreUnavailableError,
)
from novafs.objectstore import s3errors
from novafs.objectstore.base import ObjectStore
from novafs.objectstore.s3 import S3Store
from novafs.objectstore.s3direct import FAILURES_MAX
from novafs.objectstore.url import StoreOptions, create_root, open_store
from tests.support.ceph import Ceph, Credentials
from tests.support.fault_proxy import Answer, Chunked, Cut, Fault, Hold, HttpFaultProxy, LoseAnswer, Reset
from tests.support.fixtures import BUCKET

CALLS: dict[str, Callable[[ObjectStore], object]] = {
    "get": lambda store: store.get("a"),
    "create": lambda store: store.create("b", b"x"),
    "put": lambda store: store.put("b", b"x"),
    "list": lambda store: store.list(""),
    "head": lambda store: store.head("a"),
    "delete": lambda store: store.delete("a"),
    "delete_many": lambda store: store.delete_many(["a", "b"]),
    "clock_s": lambda store: store.clock_s(),
}


TAG = {"ETag": '"0123"'}


def use(monkeypatch: pytest.MonkeyPatch, credentials: Credentials) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", credentials.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", credentials.secret_key)


def each_raises(store: ObjectStore, expected: type[NovaError], text: str) -> None:
    try:
        for operation, call in CALLS.items():
            with pytest.raises(expected, match=text) as caught:
                call(store)
            assert store.url in str(caught.value), operation
            assert caught.value.__cause__ is not None
    finally:
        store.close()


# ---- the real gateway's own


@pytest.mark.s3
def test_a_missing_bucket_is_named(ceph_rgw: Ceph) -> None:
    url = ceph_rgw.volume_url("no-such-bucket", "p")
    each_raises(open_store(url), BucketMissingError, "make the bucket first")
    with pytest.raises(BucketMissingError, match="looking for the bucket no-such-bucket"):
        create_root(url)


@pytest.mark.s3
def test_create_root_makes_no_bucket_and_accepts_one_that_is_there(ceph_rgw: Ceph) -> None:
    with pytest.raises(BucketMissingError):
        create_root(ceph_rgw.volume_url("another-bucket"))
    assert "another-bucket" not in [bucket["Name"] for bucket in ceph_rgw.client().list_buckets()["Buckets"]]
    create_root(ceph_rgw.volume_url(BUCKET, "p"))


@pytest.mark.s3
@pytest.mark.parametrize("wrong", ["access key", "secret"])
def test_wrong_credentials_are_refused(ceph_rgw: Ceph, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    access, secret = ceph_rgw.credentials
    use(monkeypatch, Credentials("NOBODY", secret) if wrong == "access key" else Credentials(access, "wrong"))
    each_raises(open_store(ceph_rgw.volume_url(BUCKET, "p")), StoreDeniedError, "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")


@pytest.mark.s3
def test_anothers_bucket_is_refused(ceph_rgw: Ceph, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, ceph_rgw.add_user("stranger-" + secrets.token_hex(4)))
    store = open_store(ceph_rgw.volume_url(BUCKET, "p"))
    for call in (lambda: store.get("a"), lambda: store.create("b", b"x"), lambda: store.list("")):
        with pytest.raises(StoreDeniedError, match=r"AccessDenied.*may not do this"):
            call()
    with pytest.raises(StoreDeniedError, match="looking for the bucket"):
        create_root(store.url)
    with pytest.raises(StoreDeniedError):
        store.probe_create_only()
    store.close()


@pytest.mark.s3
def test_no_credentials_at_all_is_said(ceph_rgw: Ceph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    each_raises(open_store(ceph_rgw.volume_url(BUCKET, "p")), StoreDeniedError, "no credentials found; set AWS_ACCESS_KEY_ID")


def test_half_of_the_credentials_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Credentials("ONLY", "x"))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    each_raises(open_store("s3://bucket?endpoint=http://127.0.0.1:1"), StoreDeniedError, "Partial credentials")


def test_an_unknown_profile_is_a_configuration_error() -> None:
    each_raises(open_store("s3://bucket?endpoint=http://127.0.0.1:1&profile=no-such"), ConfigError, "no-such")


@pytest.mark.s3
def test_a_used_up_quota_is_a_full_store(ceph_rgw: Ceph, monkeypatch: pytest.MonkeyPatch) -> None:
    user = ceph_rgw.add_user("poor-" + secrets.token_hex(4), quota_bytes=100_000)
    bucket = "poor-" + secrets.token_hex(4)
    ceph_rgw.make_bucket(bucket, user)
    use(monkeypatch, user)
    store = open_store(ceph_rgw.volume_url(bucket))
    with pytest.raises(StoreFullError, match=r"QuotaExceeded.*novafs gc"):
        store.create("b", bytes(200_000))
    store.close()


@pytest.mark.s3
def test_a_gateway_that_is_away_is_unavailable(ceph_rgw: Ceph) -> None:
    with HttpFaultProxy(ceph_rgw.port) as proxy:
        proxy.refuse()
        each_raises(open_store(ceph_rgw.volume_url(BUCKET, "p", endpoint=proxy.endpoint)), StoreUnavailableError, "Could not connect")


# ---- scripted, in front of the real gateway


@pytest.fixture
def proxy(ceph_rgw: Ceph) -> Iterator[HttpFaultProxy]:
    with HttpFaultProxy(ceph_rgw.port) as proxy:
        yield proxy
        proxy.assert_all_fired()


@pytest.fixture
def store(ceph_rgw: Ceph, proxy: HttpFaultProxy, s3_prefix: str) -> Iterator[ObjectStore]:
    url = ceph_rgw.volume_url(BUCKET, s3_prefix, endpoint=proxy.endpoint)
    store = open_store(url, options=StoreOptions(read_timeout_s=10))
    store.put("a", bytes(range(256)) * 1000)
    yield store
    store.close()


def xml(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>because</Message></Error>".encode()


@pytest.mark.s3
@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (500, "InternalError", StoreUnavailableError),
        (503, "SlowDown", StoreUnavailableError),
        (503, "ServiceUnavailable", StoreUnavailableError),
        (502, None, StoreUnavailableError),
        (504, None, StoreUnavailableError),
        (429, "TooManyRequests", StoreUnavailableError),
        (400, "RequestTimeout", StoreUnavailableError),
        (400, "XAmzContentSHA256Mismatch", StoreUnavailableError),
        (409, "OperationAborted", StoreUnavailableError),
        (507, "XMinioStorageFull", StoreFullError),
        (507, None, StoreFullError),
        (400, "EntityTooLarge", StoreFullError),
        (403, "RequestTimeTooSkewed", StoreDeniedError),
        (403, "AccessDenied", StoreDeniedError),
        (401, None, StoreDeniedError),
        (400, "ExpiredToken", StoreDeniedError),
        (400, "InvalidRequest", StoreDeniedError),
        (404, "NoSuchBucket", BucketMissingError),
        (404, None, BucketMissingError),
    ],
)
def test_an_error_answer_to_a_write_means(
    store: ObjectStore, proxy: HttpFaultProxy, status: int, code: str | None, expected: type[NovaError]
) -> None:
    body = xml(code) if code else b"<html>oops</html>"
    proxy.script(Answer(method="PUT", status=status, body=body, times=None))
    for call in (lambda: store.create("b", b"x"), lambda: store.put("b", b"x")):
        with pytest.raises(expected, match=code or str(status) if expected is not BucketMissingError else "bucket"):
            call()


@pytest.mark.s3
def test_an_answer_that_is_no_s3_is_unavailable(store: ObjectStore, proxy: HttpFaultProxy) -> None:
    for page in [b"<html>a captive portal</html>", b"}", b""]:
        proxy.clear()
        proxy.script(Answer(status=200, body=page, times=None))
        for operation in ["get", "create", "put", "list", "head"]:
            with pytest.raises(StoreUnavailableError):
                CALLS[operation](store)


@pytest.mark.s3
@pytest.mark.parametrize("fault", [Reset, LoseAnswer], ids=["reset", "lost answer"])
def test_a_connection_that_breaks_is_unavailable(store: ObjectStore, proxy: HttpFaultProxy, fault: type[Fault]) -> None:
    proxy.script(fault(times=None))
    each_raises(store, StoreUnavailableError, r"127\.0\.0\.1")


@pytest.mark.s3
@pytest.mark.parametrize("after", [0, 1, 100_000])
def test_a_body_that_ends_early_is_never_returned_short(store: ObjectStore, proxy: HttpFaultProxy, after: int) -> None:
    proxy.script(Cut(after, method="GET", times=2))
    with pytest.raises(StoreUnavailableError, match="reading a"):
        store.get("a")
    with pytest.raises(StoreUnavailableError, match="reading a"):
        store.get("a", 10, 200_000)
    assert len(store.get("a")) == 256_000


@pytest.mark.s3
def test_a_listing_that_is_cut_is_unavailable(store: ObjectStore, proxy: HttpFaultProxy) -> None:
    proxy.script(Cut(100, method="GET"))
    with pytest.raises(StoreUnavailableError, match="listing"):
        store.list("")
    assert len(store.list("")) == 1


def listing(*keys: str) -> bytes:
    rows = "".join(f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00Z</LastModified><Size>1</Size></Contents>" for key in keys)
    return f"<?xml version='1.0'?><ListBucketResult><IsTruncated>true</IsTruncated>{rows}</ListBucketResult>".encode()


@pytest.mark.s3
def test_a_listing_that_goes_on_without_a_token_goes_on_after_its_last_name(
    store: ObjectStore, proxy: HttpFaultProxy, s3_prefix: str
) -> None:
    store.put("b", b"x")
    proxy.script(Answer(method="GET", status=200, body=listing(f"{s3_prefix}/a")))
    assert [row.name for row in store.list("")] == ["a", "b"]
    proxy.script(Answer(method="GET", status=200, body=listing()))
    with pytest.raises(StoreUnavailableError, match="there is more, but not where"):
        store.list("")


@pytest.mark.s3
@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Range": "bytes 0-9/256000"},
        {"Content-Range": "bytes 5-24/256000"},
        {"Content-Range": "bytes 5-9/256000"},
        {"Content-Range": "nonsense"},
        {},
    ],
    ids=["other start", "too long", "too short", "no range", "none"],
)
def test_an_answer_for_another_range_than_asked_for_is_refused(store: ObjectStore, proxy: HttpFaultProxy, headers: dict[str, str]) -> None:
    proxy.script(Answer(method="GET", status=206, body=bytes(10), headers={"ETag": '"x"', **headers}))
    with pytest.raises(StoreUnavailableError, match="reading a"):
        store.get("a", 5, 10)


@pytest.mark.s3
@pytest.mark.parametrize("quick", [True, False], ids=["direct", "SDK"])
def test_a_part_is_never_taken_for_the_rest(store: ObjectStore, proxy: HttpFaultProxy, quick: bool) -> None:
    assert isinstance(store, S3Store)
    if not quick:
        store._direct = None
    parts = [(5, 10, "bytes 5-9/256000", 5), (5, None, "bytes 5-9/256000", 5), (0, None, "bytes 0-9/256000", 10), (0, None, "", 10)]
    for start, length, content_range, size in parts:
        headers = {"Content-Range": content_range} if content_range else {}
        proxy.script(Answer(method="GET", status=206, body=bytes(size), headers={**TAG, **headers}))
        with pytest.raises(StoreUnavailableError, match="reading a"):
            store.get("a", start, length)
    assert store.get("a", 255_999, 10) == b"\xff"


@pytest.mark.s3
@pytest.mark.parametrize("quick", [True, False], ids=["direct", "SDK"])
def test_what_a_proxy_has_compressed_is_no_damaged_object(store: ObjectStore, proxy: HttpFaultProxy, quick: bool) -> None:
    assert isinstance(store, S3Store)
    if not quick:
        store._direct = None
    proxy.script(Answer(method="GET", status=200, body=gzip.compress(b"x"), headers={**TAG, "Content-Encoding": "gzip"}))
    with pytest.raises(StoreUnavailableError, match="proxies"):
        store.get("a")


@pytest.mark.s3
def test_answers_without_a_length_count(store: ObjectStore, proxy: HttpFaultProxy) -> None:
    """A create that has succeeded is not asked for again, which would say that the name is taken."""
    proxy.script(Chunked(times=None))
    for _ in range(4):
        assert len(store.get("a")) == 256_000
        store.create(f"c/{secrets.token_hex(8)}", b"x")
    assert proxy.count("PUT", "/c/") == 4


@pytest.mark.s3
@pytest.mark.parametrize("operation", ["get", "create"])
def test_no_answer_is_waited_for_once(ceph_rgw: Ceph, proxy: HttpFaultProxy, s3_prefix: str, operation: str) -> None:
    hold = Hold(times=None)
    proxy.script(hold)
    store = open_store(ceph_rgw.volume_url(BUCKET, s3_prefix, endpoint=proxy.endpoint), options=StoreOptions(read_timeout_s=0.2))
    with pytest.raises(StoreUnavailableError, match="timeout"):
        CALLS[operation](store)
    assert len(proxy.seen) == 1
    hold.release()
    store.close()


@pytest.mark.s3
@pytest.mark.parametrize(("operation", "method"), [("get", "GET"), ("create", "PUT")])
def test_a_store_that_is_overloaded_is_not_asked_twice(store: ObjectStore, proxy: HttpFaultProxy, operation: str, method: str) -> None:
    before = proxy.count(method)
    proxy.script(Answer(503, xml("SlowDown"), method=method))
    with pytest.raises(StoreUnavailableError, match="SlowDown"):
        CALLS[operation](store)
    assert proxy.count(method) == before + 1


@pytest.mark.s3
def test_requests_spare_the_sdk_again_some_time_after_they_were_refused(store: ObjectStore, proxy: HttpFaultProxy) -> None:
    assert isinstance(store, S3Store)
    asked: list[str] = []
    store._client().meta.events.register("before-call.s3", lambda model, **_: asked.append(model.name))
    proxy.script(Answer(403, xml("ExpiredToken"), method="GET", times=2 * FAILURES_MAX))
    for _ in range(FAILURES_MAX):
        with pytest.raises(StoreDeniedError):
            store.get("a")
    del asked[:]
    assert store._direct is not None
    assert (len(store.get("a")), asked) == (256_000, ["GetObject"])
    store._direct._rests_until_s = 0
    assert (len(store.get("a")), asked) == (256_000, ["GetObject"])


@pytest.mark.s3
def test_a_sessions_token_goes_along(ceph_rgw: Ceph, proxy: HttpFaultProxy, s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = ceph_rgw.volume_url(BUCKET, s3_prefix, endpoint=proxy.endpoint)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-this-session")
    proxy.script(Answer(status=200, body=b"x", headers=TAG, times=2))
    store = open_store(url)
    assert store.get("a") == b"x"
    store.create("a", b"x")
    for seen in proxy.seen:
        assert seen.headers["x-amz-security-token"] == "of-this-session"
        assert "x-amz-security-token" in seen.headers["authorization"]
    store.close()


def test_credentials_that_come_expired_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "b", "SessionToken": "t", "Expiration": "2020-01-01T00:00:00Z"}
    (tmp_path / "given").write_text(json.dumps(given))
    (tmp_path / "config").write_text(f"[profile role]\ncredential_process = cat {tmp_path / 'given'}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for call in CALLS.values():
        store = S3Store("s3://", "bucket", endpoint="http://127.0.0.1:1", profile="role")
        with pytest.raises(StoreDeniedError, match="renew"):
            call(store)
    with pytest.raises(StoreDeniedError, match="renew"):
        store.renew()
    (tmp_path / "config").write_text("")
    with pytest.raises(ConfigError, match="role"):
        store.renew()


@pytest.mark.parametrize(("region", "host"), [("eu-central-1", "s3.eu-central-1.amazonaws.com"), ("us-east-1", "s3.amazonaws.com")])
def test_requests_go_to_the_buckets_own_region(monkeypatch: pytest.MonkeyPatch, region: str, host: str) -> None:
    use(monkeypatch, Credentials("nobody", "nothing"))
    store = S3Store("s3://", "bucket", region=region)
    store._client()
    assert store._direct is not None
    assert (store._direct._base, store._direct._region) == (f"https://bucket.{host}/", region)
    store.close()


@pytest.mark.s3
def test_a_server_that_ignores_ranges_is_understood(store: ObjectStore, proxy: HttpFaultProxy) -> None:
    proxy.script(Answer(method="GET", status=200, body=bytes(range(100)), headers=TAG, times=2))
    assert store.get("a", 5, 10) == bytes(range(5, 15))
    assert store.get("a", 90, 100) == bytes(range(90, 100))


@pytest.mark.s3
def test_a_conflict_between_creates_is_asked_again(store: ObjectStore, proxy: HttpFaultProxy) -> None:
    proxy.script(Answer(method="PUT", status=409, body=xml("ConditionalRequestConflict"), times=3))
    store.create("b", b"x")
    assert store.get("b") == b"x"
    assert proxy.count("PUT", "/b") == 4


@pytest.mark.s3
def test_a_conflict_that_does_not_end_is_unavailable(store: ObjectStore, proxy: HttpFaultProxy) -> None:
    proxy.script(Answer(method="PUT", status=409, body=xml("ConditionalRequestConflict"), times=None))
    with pytest.raises(StoreUnavailableError, match="ConditionalRequestConflict"):
        store.create("b", b"x")


@pytest.mark.s3
def test_a_gateway_that_does_not_answer_is_unavailable_in_time(ceph_rgw: Ceph, proxy: HttpFaultProxy, s3_prefix: str) -> None:
    hold = Hold(times=None)
    proxy.script(hold)
    url = ceph_rgw.volume_url(BUCKET, s3_prefix, endpoint=proxy.endpoint)
    store = open_store(url, options=StoreOptions(read_timeout_s=0.2))
    with pytest.raises(StoreUnavailableError, match="timeout"):
        store.get("a")
    hold.release()
    store.close()


@pytest.mark.s3
def test_the_stores_own_retries_are_off_unless_asked_for(ceph_rgw: Ceph, store: ObjectStore, proxy: HttpFaultProxy) -> None:
    proxy.script(Answer(method="GET", status=503, times=2))
    with pytest.raises(StoreUnavailableError):
        store.get("a")
    patient = open_store(store.url, options=StoreOptions(retries_max=1))
    assert len(patient.get("a")) == 256_000
    patient.close()
    assert proxy.count("GET", "/a") == 3


@pytest.mark.s3
def test_objects_that_can_not_be_deleted_are_reported_after_the_rest_was_tried(
    store: ObjectStore, proxy: HttpFaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(*codes: str) -> bytes:
        errors = "".join(f"<Error><Key>x/{code}</Key><Code>{code}</Code><Message>m</Message></Error>" for code in codes)
        return f"<?xml version='1.0'?><DeleteResult>{errors}</DeleteResult>".encode()

    for codes, expected in [
        (["NoSuchKey"], None),
        (["NoSuchKey", "AccessDenied"], StoreDeniedError),
        (["InternalError"], StoreUnavailableError),
        (["SomethingNew"], StoreUnavailableError),
    ]:
        proxy.script(Answer(method="POST", status=200, body=rows(*codes)))
        if expected is None:
            store.delete_many(["b"])
        else:
            with pytest.raises(expected, match=codes[-1]):
                store.delete_many(["b"])
    monkeypatch.setattr("novafs.objectstore.s3.PAGE_MAX", 1)
    store.put("b", b"x")
    proxy.script(Answer(method="POST", status=503))
    with pytest.raises(StoreUnavailableError):
        store.delete_many(["a", "b"])
    assert [row.name for row in store.list("")] == ["a"]


@pytest.mark.s3
def test_deleting_what_a_gateway_calls_missing_is_no_error(store: ObjectStore, proxy: HttpFaultProxy) -> None:
    proxy.script(Answer(method="DELETE", status=404, body=xml("NoSuchKey")))
    store.delete("b")


@pytest.mark.s3
def test_a_store_that_ignores_the_condition_is_found_out(store: ObjectStore, proxy: HttpFaultProxy) -> None:
    proxy.script(Answer(method="PUT", path="/probe/", status=200, headers=TAG, times=None))
    proxy.script(Answer(method="GET", path="/probe/", status=200, body=b"4", headers=TAG))
    assert store.probe_create_only() is False


@pytest.mark.s3
def test_a_store_that_looks_first_and_writes_then_is_found_out(store: ObjectStore, proxy: HttpFaultProxy) -> None:
    # The last of five creates is refused as it should be, but two of the four at once have won.
    proxy.script(Answer(method="PUT", path="/probe/", status=200, headers=TAG, times=2))
    proxy.script(Answer(method="PUT", path="/probe/", nth=3, status=412, body=xml("PreconditionFailed"), times=3))
    proxy.script(Answer(method="GET", path="/probe/", status=200, body=b"0", headers=TAG))
    assert store.probe_create_only() is False


@pytest.mark.s3
def test_a_time_that_is_none_is_unavailable(store: ObjectStore, proxy: HttpFaultProxy) -> None:
    proxy.script(Answer(method="HEAD", status=200, headers={"Date": "yesterday"}))
    with pytest.raises(StoreUnavailableError, match="yesterday"):
        store.clock_s()


@pytest.mark.s3
def test_secrets_are_in_no_message(ceph_rgw: Ceph, store: ObjectStore, proxy: HttpFaultProxy) -> None:
    proxy.script(Answer(times=None, status=403, body=xml("SignatureDoesNotMatch")))
    for call in CALLS.values():
        with pytest.raises(NovaError) as caught:
            call(store)
        error: BaseException | None = caught.value
        while error is not None:
            assert ceph_rgw.credentials.secret_key not in str(error)
            error = error.__cause__ or error.__context__


# ---- the table itself


def test_botocores_exceptions_have_their_meaning(tmp_path: Path) -> None:
    table: list[tuple[Exception, type[NovaError]]] = [
        (boto.EndpointConnectionError(endpoint_url="u"), StoreUnavailableError),
        (boto.ConnectTimeoutError(endpoint_url="u"), StoreUnavailableError),
        (boto.ReadTimeoutError(endpoint_url="u"), StoreUnavailableError),
        (boto.ConnectionClosedError(endpoint_url="u"), StoreUnavailableError),
        (boto.IncompleteReadError(actual_bytes=1, expected_bytes=2), StoreUnavailableError),
        (boto.SSLError(endpoint_url="u", error="EOF occurred"), StoreUnavailableError),
        (ConnectionResetError("reset"), StoreUnavailableError),
        (TimeoutError(), StoreUnavailableError),
        (boto.SSLError(endpoint_url="u", error="CERTIFICATE_VERIFY_FAILED"), StoreDeniedError),
        (boto.NoCredentialsError(), StoreDeniedError),
        (boto.CredentialRetrievalError(provider="p", error_msg="m"), StoreDeniedError),
        (boto.TokenRetrievalError(provider="p", error_msg="m"), StoreDeniedError),
        (boto.ProfileNotFound(profile="p"), ConfigError),
        (boto.ParamValidationError(report="bucket"), ConfigError),
        (boto.InvalidRegionError(region_name="r"), ConfigError),
        (boto.ClientError({"Error": {}, "ResponseMetadata": {"HTTPStatusCode": 412}}, "PutObject"), ObjectExistsError),
        (boto.ClientError({"Error": {}, "ResponseMetadata": {"HTTPStatusCode": 404}}, "GetObject"), ObjectNotFoundError),
        (boto.ClientError({}, "GetObject"), StoreDeniedError),
    ]
    for error, expected in table:
        ours = s3errors.from_exception(error, doing="reading a", url="s3://bucket/p", name="a")
        assert type(ours) is expected, error
        assert "s3://bucket/p" in str(ours)
