"""URLs of volumes: what they mean, and what is refused in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from novafs.errors import BucketMissingError, ConfigError
from novafs.objectstore.file import FileStore
from novafs.objectstore.s3 import S3Store
from novafs.objectstore.url import FileUrl, S3Url, StoreOptions, create_root, open_store, parse_store_url


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///var/lib/novafs/v", "/var/lib/novafs/v"),
        ("file://localhost/v", "/v"),
        ("FILE:///v/", "/v"),
        ("file:///a%20b%23c", "/a b#c"),
        ("file:///a/../b", "/b"),
        ("/var/lib/novafs/v", "/var/lib/novafs/v"),
        ("/a%20b#c?d", "/a%20b#c?d"),
        ("//v", "/v"),
    ],
)
def test_a_directory_is_named_by_a_url_or_an_absolute_path(url: str, path: str) -> None:
    parsed = parse_store_url(url)
    assert isinstance(parsed, FileUrl)
    assert parsed.path == Path(path)


def test_a_relative_path_is_taken_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path / "d")
    for url, path in [("./v", tmp_path / "d" / "v"), ("../v", tmp_path / "v"), (".", tmp_path / "d"), ("..", tmp_path)]:
        assert parse_store_url(url) == FileUrl(path)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket", S3Url("bucket")),
        ("s3://bucket/", S3Url("bucket")),
        ("s3://bucket/a/b/", S3Url("bucket", "a/b")),
        ("S3://bucket/a", S3Url("bucket", "a")),
        (
            "s3://bucket/prefix?endpoint=http://127.0.0.1:7480&region=us-east-1",
            S3Url("bucket", "prefix", endpoint="http://127.0.0.1:7480", region="us-east-1"),
        ),
        ("s3://bucket?endpoint=https%3A%2F%2Fs3.example%3A443%2F", S3Url("bucket", endpoint="https://s3.example:443")),
        ("s3://bucket?path_style=yes&verify=OFF", S3Url("bucket", path_style=True, verify=False)),
        ("s3://bucket?path_style=0&verify=true&profile=lab", S3Url("bucket", path_style=False, profile="lab")),
    ],
)
def test_a_bucket_is_named_by_an_s3_url(url: str, expected: S3Url) -> None:
    assert parse_store_url(url) == expected


def test_the_written_form_of_a_url_means_the_same(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("")
    for url in [
        "/a b#c?d%e",
        "s3://bucket",
        "s3://bucket/p/q?endpoint=http://[::1]:7480&region=eu&path_style=false&profile=x+y",
        f"s3://bucket?ca_bundle={tmp_path}/ca.pem",
        "s3://bucket?verify=no",
    ]:
        parsed = parse_store_url(url)
        assert parse_store_url(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "no volume's URL"),
        ("volume", "write ./volume for a directory, or s3://BUCKET/PREFIX"),
        ("a/b", "write ./a/b"),
        ("a\0b", "NUL"),
        ("/a\0b", "NUL"),
        ("s4://bucket", "scheme s4:// is unknown: known are file://, s3://; did you mean s3?"),
        ("fiel:///v", "did you mean file?"),
        ("gopher://v", r"known are file://, s3://$"),
        ("file://v/w", "names a host: write three slashes"),
        ("file://", "absolute path"),
        ("file:///v?region=x", "takes no options, found 'region'"),
        ("file:///v#w", "write it as %23"),
        ("file:///v%00w", "absolute path"),
        ("s3://", "no bucket name"),
        ("s3://b", "no bucket name"),
        ("s3://-bucket", "no bucket name"),
        ("s3://bu cket", "no bucket name"),
        ("s3://bucket:80/", "no bucket name"),
        ("s3://bucket/a//b", "prefix 'a//b'"),
        ("s3://bucket/../b", "prefix"),
        ("s3://bucket/a b", "prefix"),
        ("s3://bucket/" + "a/" * 200, "at most 256"),
        ("s3://bucket#x", "%23"),
        ("s3://bucket?regoin=x", "option 'regoin' of an s3:// URL is unknown: known are ca_bundle, .*; did you mean region?"),
        ("s3://bucket?zzz=x", r"known are ca_bundle, endpoint, path_style, profile, region, verify$"),
        ("s3://bucket?region=a&region=b", "stands twice"),
        ("s3://bucket?region=", "has no value"),
        ("s3://bucket?verify=maybe", "verify=maybe.*expected true or false"),
        ("s3://bucket?ca_bundle=/no/such/file", "ca_bundle=/no/such/file: there is no such file"),
        ("s3://bucket?ca_bundle=/etc/passwd&verify=no", "contradict"),
        ("s3://bucket?endpoint=127.0.0.1:7480", "endpoint=127.0.0.1:7480.*expected http://HOST:PORT"),
        ("s3://bucket?endpoint=ftp://h", "expected http://HOST:PORT"),
        ("s3://bucket?endpoint=http://h:port", "expected http://HOST:PORT"),
        ("s3://bucket?endpoint=http://h/path", "expected http://HOST:PORT"),
        ("s3://bucket?endpoint=http://[::1", "expected http://HOST:PORT"),
        ("s3://[::1", "does not parse"),
    ],
)
def test_what_is_no_volumes_url_is_refused_by_name(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_store_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEYID:HUNTER2@bucket/prefix",
        "s3://HUNTER2@bucket",
        "s3://bucket?endpoint=http://key:HUNTER2@host:1",
        "s3://bucket?access_key=HUNTER2",
        "s3://bucket?aws_secret_access_key=HUNTER2",
        "s3://bucket?session_token=HUNTER2",
        "s3://bucket?password=HUNTER2",
        "file://user:HUNTER2@host/v",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="credentials") as caught:
        parse_store_url(url)
    assert "HUNTER2" not in str(caught.value)


def test_a_text_that_may_hold_a_secret_is_not_repeated() -> None:
    for url in ["KEY:HUNTER2@bucket", "bucket?secret=HUNTER2", "s3://bucket?secret=HUNTER2#x", "https://k:HUNTER2@h"]:
        with pytest.raises(ConfigError) as caught:
            parse_store_url(url)
        assert "HUNTER2" not in str(caught.value)


def test_opening_makes_nothing_and_asks_nobody(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "v"))
    assert isinstance(store, FileStore)
    assert not (tmp_path / "v").exists()
    with pytest.raises(BucketMissingError):
        store.list("")
    other = open_store("s3://bucket/p?endpoint=http://127.0.0.1:1", options=StoreOptions(connect_timeout_s=1))
    assert isinstance(other, S3Store)
    assert other.url == "s3://bucket/p?endpoint=http://127.0.0.1:1"
    other.close()


def test_create_root_makes_the_directory(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/a/b"
    create_root(url)
    create_root(url)
    store = open_store(url)
    store.create("x", b"y")
    assert store.get("x") == b"y"
