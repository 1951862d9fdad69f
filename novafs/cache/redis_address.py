"""Where L2 is: the URL of a Redis (or Valkey) server, parsed once, with secrets that never reach a message.

    redis://[user:password@]host[:port][/db]                    one server
    rediss://…                                                  the same under TLS
    unix://[user:password@]/path/of/socket[?db=0]               one server on this host
    redis+sentinel://[user:password@]host[:port],…/service[/db] the primary that the Sentinels name; rediss+sentinel:// for TLS
    redis+cluster://[user:password@]host[:port],…               Redis Cluster, found from these nodes; rediss+cluster:// for TLS
    embedded                                                    a server that the processes of this state directory share
    none                                                        no L2

Parameters (`?key=value&…`): `password_file` (its first line is the password, so that none stands in the URL), `shards` (see
`novafs.cache.redis`); under TLS `ca`, `cert`, `key` (PEM files) and `verify` (`yes`, the default; `authority`: any certificate
of a trusted authority, whatever host it names; `no`); with Sentinel `sentinel_username`, `sentinel_password`, `sentinel_password_file`.
User, password, path and parameters are percent-decoded. An IPv6 address stands in brackets.

Parsing touches no network, and of the disk only the files that the URL names.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from novafs.errors import ConfigError

SCHEMES: Final = ("redis", "rediss", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster", "unix")
KNOWN: Final = "redis://, rediss://, redis+sentinel://, rediss+sentinel://, redis+cluster://, rediss+cluster://, unix://, embedded, none"
SHARDS_DEFAULT: Final = 16
SHARDS_MAX: Final = 256

_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379
_COMMON: Final = ("password_file", "shards")
_TLS: Final = ("ca", "cert", "key", "verify")
_SENTINEL: Final = ("sentinel_username", "sentinel_password", "sentinel_password_file")
_VERIFY: Final = ("yes", "authority", "no")


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """ca, cert, key: PEM files, None for the system's authorities and no client certificate. verify: `yes`, `authority` or `no`."""

    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    verify: str = "yes"


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """One of: a `path` (Unix socket); `hosts` with a Sentinel `service`; `hosts` of a `cluster`; one host."""

    text: str
    """The URL without secrets and parameters: for messages and logs."""
    hosts: tuple[tuple[str, int], ...] = ()
    path: str | None = None
    service: str | None = None
    cluster: bool = False
    database: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    tls: TlsOptions | None = None
    shards: int = SHARDS_DEFAULT

    def scrub(self, message: str) -> str:
        """`message` without the passwords, should a library have put one there."""
        for secret in (self.password, self.sentinel_password):
            if secret:
                message = message.replace(secret, "…")
        return message


def parse_redis_url(url: str) -> RedisAddress:
    """The address in `url` (not `embedded`, not `none`). Raises ConfigError, which never quotes a password."""
    scheme, separator, rest = url.strip().partition("://")
    if not separator or scheme not in SCHEMES:
        near = difflib.get_close_matches(scheme, [*SCHEMES, "embedded", "none"], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        # Without a scheme all of it may be a password: then nothing of it is shown.
        shown = f"scheme {scheme!r}" if separator else "no scheme"
        raise ConfigError(f"l2 url: expected one of {KNOWN}; found {shown}{hint}")

    rest, _, query = rest.partition("?")
    userinfo, at, place = rest.rpartition("@")
    user, colon, password = userinfo.partition(":")
    if not colon:
        # `redis://secret@host` is a user name by the scheme's registration, so it stays one.
        password = ""
    text = f"{scheme}://{place}"
    base, _, topology = scheme.partition("+")
    tls_wanted = base == "rediss"
    parameters = _parameters(text, query, tls=tls_wanted, sentinel=topology == "sentinel", unix=base == "unix")

    path = service = None
    hosts: tuple[tuple[str, int], ...] = ()
    database = 0
    if base == "unix":
        path = unquote(place)
        if not path.startswith("/"):
            raise ConfigError(f"l2 url {text}: expected the absolute path of a socket after unix://, found {path!r}")
        database = _number(text, "db", parameters.get("db", "0"), 0, 1 << 16)
    else:
        authority, _, tail = place.partition("/")
        hosts = tuple(_host(text, part, _SENTINEL_PORT if topology == "sentinel" else _PORT) for part in authority.split(","))
        parts = [unquote(part) for part in tail.split("/") if part]
        if topology == "sentinel":
            if not parts:
                raise ConfigError(
                    f"l2 url {text}: expected the name of the service that the Sentinels watch, as in {scheme}://host:26379/mymaster"
                )
            service = parts.pop(0)
        if topology == "cluster" and parts:
            raise ConfigError(f"l2 url {text}: Redis Cluster has no databases, found {'/'.join(parts)!r}")
        if parts:
            database = _number(text, "database", parts.pop(0), 0, 1 << 16)
        if parts:
            raise ConfigError(f"l2 url {text}: found {'/'.join(parts)!r} after the database")
        if not topology and len(hosts) > 1:
            raise ConfigError(f"l2 url {text}: one host expected; several need {base}+sentinel:// or {base}+cluster://")

    if at and "password_file" in parameters and password:
        raise ConfigError(f"l2 url {text}: a password and password_file; leave one out")
    shards = _number(text, "shards", parameters.get("shards", str(SHARDS_DEFAULT)), 1, SHARDS_MAX)
    if shards & (shards - 1):
        raise ConfigError(f"l2 url {text}: shards: expected a power of two up to {SHARDS_MAX}, found {shards}")
    return RedisAddress(
        text=text,
        hosts=hosts,
        path=path,
        service=service,
        cluster=topology == "cluster",
        database=database,
        username=unquote(user) or None,
        password=_secret(text, "password_file", parameters) or unquote(password) or None,
        sentinel_username=parameters.get("sentinel_username"),
        sentinel_password=_secret(text, "sentinel_password_file", parameters) or parameters.get("sentinel_password"),
        tls=_tls(text, parameters) if tls_wanted else None,
        shards=shards,
    )


def _parameters(text: str, query: str, *, tls: bool, sentinel: bool, unix: bool) -> dict[str, str]:
    known = [*_COMMON, *(_TLS if tls else ()), *(_SENTINEL if sentinel else ()), *(("db",) if unix else ())]
    found: dict[str, str] = {}
    for pair in query.split("&"):
        if not pair:
            continue
        name, _, value = pair.partition("=")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"l2 url {text}: unknown parameter {name!r}: known here are {', '.join(known)}{hint}")
        found[name] = unquote(value)
    return found


def _host(text: str, part: str, port_default: int) -> tuple[str, int]:
    host, port = part, ""
    if part.startswith("["):
        host, bracket, after = part[1:].partition("]")
        if not bracket or (after and not after.startswith(":")):
            raise ConfigError(f"l2 url {text}: expected [address]:port, found {part!r}")
        port = after[1:]
    elif ":" in part:
        host, _, port = part.rpartition(":")
    if not host or (":" in host and not part.startswith("[")):
        raise ConfigError(f"l2 url {text}: expected host[:port], found {part!r} (an IPv6 address stands in brackets)")
    return host, _number(text, "port", port, 1, 65535) if port else port_default


def _number(text: str, what: str, found: str, lowest: int, highest: int) -> int:
    if not found.isascii() or not found.isdigit() or not lowest <= int(found) <= highest:
        raise ConfigError(f"l2 url {text}: {what}: expected a number from {lowest} to {highest}, found {found!r}")
    return int(found)


def _secret(text: str, name: str, parameters: dict[str, str]) -> str | None:
    path = parameters.get(name)
    if path is None:
        return None
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"l2 url {text}: {name}: cannot read {path}: {error}") from error
    if not lines or not lines[0]:
        raise ConfigError(f"l2 url {text}: {name}: the first line of {path} is empty, expected the password")
    return lines[0]


def _tls(text: str, parameters: dict[str, str]) -> TlsOptions:
    verify = parameters.get("verify", "yes")
    if verify not in _VERIFY:
        raise ConfigError(f"l2 url {text}: verify: expected one of {', '.join(_VERIFY)}, found {verify!r}")
    for name in ("ca", "cert", "key"):
        path = parameters.get(name)
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"l2 url {text}: {name}: no such file: {path}")
    return TlsOptions(parameters.get("ca"), parameters.get("cert"), parameters.get("key"), verify)
