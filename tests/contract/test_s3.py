"""What only a bucket has: pages, TLS, prefixes beside each other, other people's objects, the SDK underneath."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from botocore.credentials import Credentials

from novafs.errors import ConfigError, ObjectExistsError, ObjectNotFoundError, StoreDeniedError
from novafs.objectstore import s3, s3http
from novafs.objectstore.s3 import S3Store, parse_time
from novafs.objectstore.url import open_store, parse_store_url
from tests.support.ceph import Ceph, free_port
from tests.support.certificates import write_certificate
from tests.support.fault_proxy import HttpFaultProxy
from tests.support.fixtures import BUCKET

pytestmark = pytest.mark.s3


@pytest.fixture
def store(s3_url: str) -> Iterator[S3Store]:
    store = open_store(s3_url)
    assert isinstance(store, S3Store)
    yield store
    store.close()


def names(store: S3Store, prefix: str = "", after: str = "", limit: int | None = None) -> list[str]:
    return [row.name for row in store.list(prefix, after=after, limit=limit)]


def test_a_listing_goes_over_its_pages(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PAGE_MAX", 7)
    expected = sorted(f"packs/{number % 3}/{number:03d}" for number in range(30))
    for name in expected:
        store.put(name, b"")
    assert names(store, "packs/") == expected
    assert names(store, "packs/", limit=7) == expected[:7]
    assert names(store, "packs/", limit=20) == expected[:20]
    assert names(store, "packs/", after=expected[3], limit=20) == expected[4:24]
    store.delete_many(expected)
    assert names(store) == []


def test_keys_of_others_under_the_prefix_are_not_listed_and_do_not_shorten_a_listing(
    store: S3Store, ceph_rgw: Ceph, s3_prefix: str
) -> None:
    client = ceph_rgw.client()
    for key in ["My file.txt", ".hidden", "a//b", "a/ä", "b/"]:
        client.put_object(Bucket=BUCKET, Key=f"{s3_prefix}/{key}", Body=b"")
    client.put_object(Bucket=BUCKET, Key=f"{s3_prefix}-beside/x", Body=b"")
    for name in ["a/1", "a/2", "z"]:
        store.create(name, b"x")
    assert names(store) == ["a/1", "a/2", "z"]
    assert names(store, limit=2) == ["a/1", "a/2"]
    client.close()


def test_a_whole_bucket_is_a_store_as_well(ceph_rgw: Ceph) -> None:
    ceph_rgw.make_bucket("whole-bucket")
    store = open_store(ceph_rgw.volume_url("whole-bucket"))
    store.create("a/b", b"x")
    assert [row.name for row in store.list("")] == ["a/b"]
    assert ceph_rgw.client().get_object(Bucket="whole-bucket", Key="a/b")["Body"].read() == b"x"
    store.close()


def test_a_write_is_one_request_without_a_wait_for_permission(ceph_rgw: Ceph, s3_prefix: str) -> None:
    with HttpFaultProxy(ceph_rgw.port) as proxy:
        store = open_store(ceph_rgw.volume_url(BUCKET, s3_prefix, endpoint=proxy.endpoint))
        store.create("a", bytes(1 << 20))
        store.put("b", b"x")
        assert store.get("a", 5, 10) == bytes(10)
        store.list("", limit=1)
        store.delete_many(["a", "b"])
        store.close()
    assert [(seen.method, "expect" in seen.headers) for seen in proxy.seen] == [
        ("PUT", False),
        ("PUT", False),
        ("GET", False),
        ("GET", False),
        ("POST", False),
    ]
    assert [seen.headers.get("if-none-match") for seen in proxy.seen] == ["*", None, None, None, None]
    # Checksums only where the protocol demands one: gateways of some age refuse the others.
    assert [any(name.startswith("x-amz-checksum") for name in seen.headers) for seen in proxy.seen] == [False] * 4 + [True]


def test_connections_are_kept_and_acknowledge_at_once(store: S3Store) -> None:
    store.put("a", b"x")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: store.get("a"), range(40)))
    manager = store._client()._endpoint.http_session._manager  # type: ignore[attr-defined]
    pools = [manager.pools[key] for key in manager.pools.keys()]  # noqa: SIM118 - urllib3's container has no iterator
    assert [type(pool) for pool in pools] == [s3http.PromptPool]
    assert pools[0].num_connections <= 5
    assert not s3http.acknowledge_at_once(object())


def test_tls_is_verified_unless_the_url_says_otherwise(ceph_rgw: Ceph, s3_prefix: str, tmp_path: Path) -> None:
    url = ceph_rgw.volume_url(BUCKET, s3_prefix, endpoint=ceph_rgw.tls_endpoint)
    trusting = open_store(f"{url}&ca_bundle={ceph_rgw.ca_bundle}")
    trusting.create("a", b"x" * 100_000)
    assert trusting.get("a", 10, 5) == b"xxxxx"
    trusting.close()

    stranger = write_certificate(tmp_path, "stranger")
    for distrusting in (url, f"{url}&verify=true", f"{url}&ca_bundle={stranger.certificate}"):
        store = open_store(distrusting)
        with pytest.raises(StoreDeniedError, match="ca_bundle="):
            store.get("a")
        store.close()

    store = open_store(f"{url}&verify=false")
    with pytest.warns(match="Unverified HTTPS request"):  # on each request, by urllib3: nobody shall forget it
        assert len(store.get("a")) == 100_000
    store.close()


def test_a_ca_bundle_that_holds_none_is_a_configuration_error(ceph_rgw: Ceph, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing\n")
    store = open_store(ceph_rgw.volume_url(BUCKET, "p", endpoint=ceph_rgw.tls_endpoint) + f"&ca_bundle={tmp_path}/empty.pem")
    with pytest.raises(ConfigError, match="must name a file of certificates as PEM"):
        store.get("a")
    store.close()


def test_a_profile_of_the_usual_files_is_used(ceph_rgw: Ceph, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access, secret = ceph_rgw.credentials
    (tmp_path / "credentials").write_text(f"[lab]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store = open_store(s3_url + "&profile=lab")
    store.create("a", b"x")
    store.close()


def test_new_credentials_are_used_if_the_store_takes_them(
    ceph_rgw: Ceph, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "credentials"

    def write(access_key: str, secret_key: str) -> None:
        file.write_text(f"[default]\naws_access_key_id = {access_key}\naws_secret_access_key = {secret_key}\n")

    write(*ceph_rgw.credentials)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    store = open_store(s3_url)
    store.create("a", b"one")
    write("NOBODY", "x" * 40)
    with pytest.raises(StoreDeniedError, match="trying the credentials that are configured now"):
        store.renew()
    assert store.get("a") == b"one", "the old ones stay"
    write(*ceph_rgw.credentials)
    store.renew()
    assert store.get("a") == b"one"
    store.close()


def test_an_endpoint_is_spoken_to_in_path_style_unless_told_otherwise(ceph_rgw: Ceph, s3_prefix: str) -> None:
    with HttpFaultProxy(ceph_rgw.port) as proxy:
        url = ceph_rgw.volume_url(BUCKET, s3_prefix, endpoint=proxy.endpoint.replace("127.0.0.1", "localhost"))
        store = open_store(url)
        store.create("a", b"x")
        store.close()
    assert [seen.path.split("?")[0] for seen in proxy.seen] == [f"/{BUCKET}/{s3_prefix}/a"]


def test_the_time_of_an_answer_is_parsed_as_the_sdk_would() -> None:
    expected = datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)
    for text in [
        "2026-02-03T04:05:06Z",
        "2026-02-03T04:05:06.000Z",
        "Tue, 03 Feb 2026 04:05:06 GMT",
        "20260203T040506Z",
        "2026-02-03T04:05:06",
    ]:
        assert parse_time(text) == expected
    assert parse_time(expected.timestamp()) == expected
    with pytest.raises(ValueError, match="nonsense"):
        parse_time("nonsense")


def test_a_directory_needs_no_boto3() -> None:
    program = "import sys, novafs.objectstore.url as u; u.open_store('/v'); sys.exit('boto3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_cluster_of_the_tests_survives_its_gateway(ceph_rgw: Ceph) -> None:
    """The tool itself: what later tests kill and pause is this."""
    with Ceph(port=free_port(), memory_bytes=1 << 30) as ceph:
        ceph.make_bucket("bucket")
        url = ceph.volume_url("bucket")
        assert parse_store_url(url)
        ceph.client().put_object(Bucket="bucket", Key="a", Body=b"x")
        ceph.kill_gateway()
        ceph.start_gateway()
        assert ceph.client().get_object(Bucket="bucket", Key="a")["Body"].read() == b"x"
        directory = ceph.directory
    assert not directory.exists()


def sdk_calls(store: S3Store) -> list[str]:
    """The operations that the SDK is asked for from here on."""
    asked: list[str] = []
    store._client().meta.events.register("before-call.s3", lambda model, **_: asked.append(model.name))
    return asked


@pytest.mark.parametrize("beyond", ["", "/a b'(1)~+%20&=ä"])
def test_reads_and_creates_of_objects_spare_the_work_of_the_sdk(ceph_rgw: Ceph, s3_prefix: str, beyond: str) -> None:
    store = S3Store("s3://", BUCKET, s3_prefix + beyond, endpoint=ceph_rgw.endpoint, region="us-east-1")
    asked = sdk_calls(store)
    store.create("packs/a-b.c", b"0123456789")
    assert store.get("packs/a-b.c") == b"0123456789"
    assert store.get("packs/a-b.c", 3, 4) == b"3456"
    assert store.get("packs/a-b.c", 3) == b"3456789"
    assert asked == []
    assert [row.name for row in store.list("")] == ["packs/a-b.c"]
    store.close()


def test_what_is_no_plain_success_is_asked_of_the_sdk_and_told_as_ever(store: S3Store) -> None:
    store.create("a", b"x")
    asked = sdk_calls(store)
    with pytest.raises(ObjectExistsError):
        store.create("a", b"y")
    with pytest.raises(ObjectNotFoundError):
        store.get("b")
    assert store.get("a", 1, 5) == b""
    assert asked == ["PutObject", "GetObject", "GetObject"]
    assert store.get("a") == b"x"
    assert len(asked) == 3


def test_three_refusals_in_a_row_leave_all_to_the_sdk(ceph_rgw: Ceph, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    good = open_store(s3_url)
    good.create("a", b"x")
    store = open_store(s3_url)
    assert isinstance(store, S3Store)
    asked = sdk_calls(store)
    direct = store._direct
    assert direct is not None
    monkeypatch.setattr(direct, "_region", "elsewhere-1")
    monkeypatch.setattr(direct, "_credentials", Credentials("nobody", "nothing"))
    for _ in range(5):
        assert store.get("a") == b"x"
    assert asked == ["GetObject"] * 5
    monkeypatch.undo()
    assert store.get("a") == b"x"
    assert len(asked) == 6, "it was tried again"
    store.close()
    good.close()
