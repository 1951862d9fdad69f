"""The URLs of L2."""

from __future__ import annotations

from pathlib import Path

import pytest

from novafs.cache.redis import open_l2
from novafs.cache.redis_address import TlsOptions, parse_redis_url
from novafs.errors import ConfigError


def test_one_server() -> None:
    address = parse_redis_url("redis://cache.example")
    assert (address.hosts, address.database, address.username, address.password, address.tls) == (
        (("cache.example", 6379),),
        0,
        None,
        None,
        None,
    )
    assert address.text == "redis://cache.example"
    full = parse_redis_url("redis://us%65r:p%40ss%2Fw%3Ard@[fd00::1]:7000/3?shards=64")
    assert (full.hosts, full.database, full.username, full.password, full.shards) == ((("fd00::1", 7000),), 3, "user", "p@ss/w:rd", 64)


def test_tls(tmp_path: Path) -> None:
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (tmp_path / name).touch()
    address = parse_redis_url(
        f"rediss://:secret@host:1/?ca={tmp_path}/ca.pem&cert={tmp_path}/cert.pem&key={tmp_path}/key.pem&verify=authority"
    )
    assert address.tls == TlsOptions(f"{tmp_path}/ca.pem", f"{tmp_path}/cert.pem", f"{tmp_path}/key.pem", "authority")
    assert parse_redis_url("rediss://host").tls == TlsOptions()


def test_unix_socket() -> None:
    address = parse_redis_url("unix://:secret@/run/redis/my%20socket?db=2")
    assert (address.path, address.database, address.password) == ("/run/redis/my socket", 2, "secret")


def test_sentinel() -> None:
    address = parse_redis_url("redis+sentinel://user:pw@a,b:1,[::1]:2/mymaster/4?sentinel_username=watch&sentinel_password=dog")
    assert address.hosts == (("a", 26379), ("b", 1), ("::1", 2))
    assert (address.service, address.database, address.password) == ("mymaster", 4, "pw")
    assert (address.sentinel_username, address.sentinel_password) == ("watch", "dog")
    assert parse_redis_url("rediss+sentinel://a/m").tls is not None


def test_cluster() -> None:
    address = parse_redis_url("redis+cluster://a:1,b")
    assert (address.cluster, address.hosts) == (True, (("a", 1), ("b", 6379)))
    assert parse_redis_url("rediss+cluster://a").tls is not None


def test_a_password_may_stand_in_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("from file\nsecond line\n")
    assert parse_redis_url(f"redis://host?password_file={secret}").password == "from file"
    assert parse_redis_url(f"redis+sentinel://host/m?sentinel_password_file={secret}").sentinel_password == "from file"
    assert parse_redis_url(f"redis://user@host?password_file={secret}").username == "user"
    secret.write_text("\n")
    for url in (f"redis://host?password_file={secret}", f"redis://host?password_file={tmp_path}/none"):
        with pytest.raises(ConfigError, match="password_file"):
            parse_redis_url(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://host", "found scheme 'http'"),
        ("redsi://host", "did you mean 'redis'"),
        ("host:6379", "no scheme"),
        ("redis://", "expected host"),
        ("redis://:6379", "expected host"),
        ("redis://host:port", "port: expected a number from 1 to 65535, found 'port'"),
        ("redis://host:0", "port"),
        ("redis://host:99999", "port"),
        ("redis://::1", "IPv6 address stands in brackets"),
        ("redis://[::1", r"expected \[address\]:port"),
        ("redis://host/abc", "database: expected a number"),
        ("redis://host/0/1", "after the database"),
        ("redis://a,b", r"several need redis\+sentinel:// or redis\+cluster://"),
        ("redis://host?timeout=3", "unknown parameter 'timeout': known here are password_file, shards"),
        ("redis://host?shard=4", "did you mean 'shards'"),
        ("redis://host?shards=3", "power of two"),
        ("redis://host?shards=512", "expected a number from 1 to 256"),
        ("redis://host?ca=/x", "unknown parameter 'ca'"),
        ("rediss://host?ca=/no/such/file", "ca: no such file"),
        ("rediss://host?verify=maybe", "expected one of yes, authority, no, found 'maybe'"),
        ("redis+sentinel://host", "name of the service"),
        ("redis+sentinel://host/", "name of the service"),
        ("redis+cluster://host/1", "no databases"),
        ("unix://relative", "absolute path"),
        ("unix:///s?db=x", "db: expected a number"),
        ("redis://:pw@host?password_file=/x", "leave one out|cannot read"),
    ],
)
def test_what_is_no_address_is_refused_by_name(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_redis_url(url)


def test_passwords_are_in_no_message_and_no_repr() -> None:
    for url in (
        "redis://user:hunter2@host:bad",
        "redis://:hunter2@host/bad",
        "redsi://user:hunter2@host",
        "redis+sentinel://:hunter2@host",
        "redis://:hunter2@host?nonsense=1",
        "redis+sentinel://host/m?sentinel_password=hunter2&x=1",
        ":hunter2@host",
    ):
        with pytest.raises(ConfigError) as caught:
            parse_redis_url(url)
        assert "hunter2" not in str(caught.value)
    address = parse_redis_url("redis+sentinel://u:hunter2@host/m?sentinel_password=hunter3")
    assert "hunter" not in repr(address)
    assert "hunter" not in address.text
    assert address.scrub("AUTH hunter2 and hunter3 failed") == "AUTH … and … failed"


def test_none_is_no_tier_and_a_word_that_is_none_is_refused(tmp_path: Path) -> None:
    assert open_l2("none", capacity_bytes=1 << 20, volume_id="v", state_dir=tmp_path) is None
    for word, hint in (("embeded", r"; did you mean 'embedded'\?"), ("", ""), ("off", "")):
        with pytest.raises(ConfigError, match=rf"l2 url: expected one of redis://.*embedded, none; found no scheme{hint}$"):
            open_l2(word, capacity_bytes=1 << 20, volume_id="v", state_dir=tmp_path)
