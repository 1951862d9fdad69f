"""From the URL of a volume to its object store.

    file:///var/lib/novafs/v      /var/lib/novafs/v      ./v
    s3://bucket/prefix?endpoint=http://127.0.0.1:7480&region=us-east-1

What is promised: a URL means exactly one store or raises ConfigError that says what is known; credentials in one are
refused, and no message repeats them. Parsing touches neither disk nor network, except that a CA bundle must be there.
Opening makes nothing: `create_root` does, for ``init``.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from novafs.errors import ConfigError
from novafs.objectstore.base import ObjectStore
from novafs.objectstore.file import FileStore
from novafs.objectstore.file import create_root as create_file_root
from novafs.objectstore.names import is_name
from novafs.objectstore.options import StoreOptions

if TYPE_CHECKING:
    from novafs.objectstore.s3 import S3Store

__all__ = ["FileUrl", "S3Url", "StoreOptions", "create_root", "open_store", "parse_store_url"]

SCHEMES: Final = ("file", "s3")
S3_KEYS: Final = ("ca_bundle", "endpoint", "path_style", "profile", "region", "verify")
PREFIX_BYTES_MAX: Final = 256

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]", re.ASCII)
_SECRET_KEY: Final = re.compile(r"access_?key|secret|password|passwd|token|credential", re.IGNORECASE)
_BOOLEANS: Final = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_DEFAULTS: Final = StoreOptions()


@dataclass(frozen=True, slots=True)
class FileUrl:
    """A local directory. path: absolute."""

    path: Path

    def __str__(self) -> str:
        return "file://" + quote(str(self.path))


@dataclass(frozen=True, slots=True)
class S3Url:
    """A prefix of a bucket; None where the URL does not say. prefix: without slashes at its ends, "" for the whole bucket."""

    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    path_style: bool | None = None
    verify: bool = True
    ca_bundle: str | None = None
    profile: str | None = None

    def __str__(self) -> str:
        values = {
            "endpoint": self.endpoint,
            "region": self.region,
            "path_style": None if self.path_style is None else str(self.path_style).lower(),
            "verify": None if self.verify else "false",
            "ca_bundle": self.ca_bundle,
            "profile": self.profile,
        }
        query = urlencode({key: value for key, value in values.items() if value is not None}, safe=":/")
        return f"s3://{self.bucket}/{self.prefix}" + (f"?{query}" if query else "")


StoreUrl = FileUrl | S3Url


def parse_store_url(url: str) -> StoreUrl:
    """What the URL names; ``str()`` of it is the one way of writing it, without credentials. Raises ConfigError.

    An absolute path, or a relative one that starts with ``./`` or ``../``, counts as ``file://``.
    """
    if "\0" in url:
        raise ConfigError("a volume's URL has a NUL character in it; no path or bucket can have one")
    if url in (".", "..") or url.startswith(("/", "./", "../")):
        return FileUrl(_absolute(url))
    match = _SCHEME.match(url)
    if match is None:
        raise ConfigError(f"{_quoted(url)} is no volume's URL: write ./{_bare(url)} for a directory, or s3://BUCKET/PREFIX")
    scheme = match[1].lower()
    if scheme not in SCHEMES:
        raise ConfigError(
            f"URL scheme {scheme}:// is unknown: known are {_known(f'{known}://' for known in SCHEMES)}{_nearest(scheme, SCHEMES)}"
        )
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"a volume's {scheme}:// URL does not parse: {error}") from error
    if "@" in parts.netloc:
        raise ConfigError(
            f"a volume's {scheme}:// URL has credentials in it; leave them out, URLs end up in logs and process lists:"
            " set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile with profile="
        )
    if parts.fragment:
        raise ConfigError(f"{_quoted(url)} has a '#' in it; write it as %23 where it is part of a name")
    return _parse_file(parts) if scheme == "file" else _parse_s3(parts)


def open_store(url: str, *, options: StoreOptions = _DEFAULTS) -> ObjectStore:
    """The store; nothing is made and no request sent. Raises ConfigError."""
    parsed = parse_store_url(url)
    return FileStore(parsed.path) if isinstance(parsed, FileUrl) else _open_s3(parsed, options)


def create_root(url: str, *, options: StoreOptions = _DEFAULTS) -> None:
    """Get the place of a new volume ready: make the directory, durably; or see that the bucket is there and ours (none is made).

    Repeating it does no harm. Raises ConfigError, BucketMissingError, StoreDeniedError, StoreFullError, StoreUnavailableError.
    """
    parsed = parse_store_url(url)
    if isinstance(parsed, FileUrl):
        create_file_root(parsed.path)
        return
    store = _open_s3(parsed, options)
    try:
        store.check_bucket()
    finally:
        store.close()


def _open_s3(parsed: S3Url, options: StoreOptions) -> S3Store:
    # boto3 takes longer to import than a command on a local volume takes to run.
    from novafs.objectstore.s3 import S3Store

    return S3Store(
        str(parsed),
        parsed.bucket,
        parsed.prefix,
        endpoint=parsed.endpoint,
        region=parsed.region,
        path_style=parsed.path_style,
        verify=parsed.verify,
        ca_bundle=parsed.ca_bundle,
        profile=parsed.profile,
        options=options,
    )


def _parse_file(parts: SplitResult) -> FileUrl:
    if parts.query:
        raise ConfigError(f"a file:// URL takes no options, found {_keys(parts)}; write '?' as %3F where it is part of a name")
    if parts.netloc not in ("", "localhost"):
        raise ConfigError(
            f"file://{parts.netloc}… names a host: write three slashes for an absolute path, or ./{parts.netloc}… without file://"
        )
    path = unquote(parts.path)
    if not path.startswith("/") or "\0" in path:
        raise ConfigError("a file:// URL needs an absolute path: file:///var/lib/novafs/v")
    return FileUrl(_absolute(path))


def _absolute(path: str) -> Path:
    # Not resolve(), which would follow links that may change. POSIX lets two leading slashes mean something; Linux does not.
    return Path("/" + os.path.abspath(path).lstrip("/"))  # noqa: PTH100


def _parse_s3(parts: SplitResult) -> S3Url:
    bucket, prefix = parts.netloc, unquote(parts.path).strip("/")
    if _BUCKET.fullmatch(bucket) is None:
        raise ConfigError(
            f"{bucket!r} is no bucket name: expected s3://BUCKET/PREFIX with 3 to 255 letters, digits, dots and hyphens as BUCKET"
        )
    if prefix and (len(prefix) > PREFIX_BYTES_MAX or not is_name(prefix)):
        raise ConfigError(
            f"s3://{bucket}: prefix {prefix[:100]!r}: expected at most {PREFIX_BYTES_MAX} characters of A-Z a-z 0-9 . _ -"
            " between single slashes"
        )
    options = _options(parts)
    verify = _boolean(options, "verify")
    ca_bundle = options.get("ca_bundle")
    if ca_bundle is not None and verify is False:
        raise ConfigError(f"s3://{bucket}: verify=false and ca_bundle= contradict each other; leave one out")
    if ca_bundle is not None and not Path(ca_bundle).is_file():
        raise ConfigError(f"s3://{bucket}: ca_bundle={ca_bundle}: there is no such file; it must hold the authority's certificates as PEM")
    return S3Url(
        bucket=bucket,
        prefix=prefix,
        endpoint=_endpoint(options.get("endpoint")),
        region=options.get("region"),
        path_style=_boolean(options, "path_style"),
        verify=verify is not False,
        ca_bundle=ca_bundle,
        profile=options.get("profile"),
    )


def _options(parts: SplitResult) -> dict[str, str]:
    options: dict[str, str] = {}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if key not in S3_KEYS:
            if _SECRET_KEY.search(key):
                raise ConfigError(
                    f"option {key!r} of a volume's URL: credentials are not taken from there, URLs end up in logs and process lists;"
                    " set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile with profile="
                )
            raise ConfigError(f"option {key!r} of an s3:// URL is unknown: known are {_known(S3_KEYS)}{_nearest(key, S3_KEYS)}")
        if key in options:
            raise ConfigError(f"option {key!r} stands twice in an s3:// URL; leave one out")
        if not value:
            raise ConfigError(f"option {key!r} of an s3:// URL has no value; write {key}=VALUE or leave it out")
        options[key] = value
    return options


def _boolean(options: dict[str, str], key: str) -> bool | None:
    text = options.get(key)
    if text is None:
        return None
    value = _BOOLEANS.get(text.lower())
    if value is None:
        raise ConfigError(f"{key}={text} in an s3:// URL: expected true or false")
    return value


def _endpoint(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        parts = urlsplit(text)
        good = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.path in ("", "/")
            and not parts.query
            and not parts.fragment
        )
        _ = parts.port  # raises where it is no number
    except ValueError:
        good = False
        parts = SplitResult("", "", "", "", "")
    if "@" in text:
        raise ConfigError(
            "endpoint= of an s3:// URL has credentials in it; leave them out and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if not good:
        raise ConfigError(f"endpoint={text} of an s3:// URL: expected http://HOST:PORT or https://HOST:PORT")
    return f"{parts.scheme}://{parts.netloc}"


def _keys(parts: SplitResult) -> str:
    return ", ".join(repr(key) for key, _ in parse_qsl(parts.query, keep_blank_values=True)) or "'?'"


def _known(words: Iterable[str]) -> str:
    return ", ".join(words)


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _bare(url: str) -> str:
    return "DIRECTORY" if "@" in url or _SECRET_KEY.search(url) or len(url) > 60 else url


def _quoted(url: str) -> str:
    """The URL for a message, or a stand-in where it may hold a secret."""
    return "the given text" if "@" in url or _SECRET_KEY.search(url) else repr(url[:200])
