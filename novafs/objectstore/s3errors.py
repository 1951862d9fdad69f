"""What an S3 answer or a broken connection means: one place that turns botocore's errors into ours.

The service's error code decides where it is known, else the HTTP status. Services differ: HEAD answers have no body and so
no code; Ceph's gateway says QuotaExceeded with 403, MinIO XMinioStorageFull with 507, AWS SlowDown with 503.
"""

from __future__ import annotations

from typing import Any, Final

from botocore import exceptions as boto
from urllib3.exceptions import HTTPError

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

_CREDENTIALS_HELP: Final = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile that is used"

NO_CREDENTIALS: Final = (
    "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, write ~/.aws/credentials, or give the machine a role"
)

FULL_CODES: Final = frozenset(
    {
        "EntityTooLarge",
        "InsufficientStorage",
        "QuotaExceeded",
        "TooManyObjects",
        "XMinioAdminBucketQuotaExceeded",
        "XMinioStorageFull",
    }
)
DENIED_HELP: Final = {
    "AccessDenied": "these credentials may not do this; the bucket's policy must allow s3:GetObject, s3:PutObject, s3:DeleteObject"
    " and s3:ListBucket",
    "AccountProblem": "ask the service's support",
    "AllAccessDisabled": "ask the bucket's owner",
    "AuthorizationHeaderMalformed": "most likely the region is wrong; give region= in the volume's URL",
    "ExpiredToken": "renew the session's credentials",
    "InvalidAccessKeyId": _CREDENTIALS_HELP,
    "InvalidToken": "renew the session's credentials",
    "PermanentRedirect": "the bucket lies in another region; give region= in the volume's URL",
    "RequestTimeTooSkewed": "the clocks of this host and of the store differ by more than 15 minutes; check NTP on both",
    "SignatureDoesNotMatch": _CREDENTIALS_HELP,
}
RETRY_CODES: Final = frozenset(
    {
        "BadDigest",  # the body was damaged on its way
        "ConditionalRequestConflict",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "Throttling",
        "XAmzContentSHA256Mismatch",  # as BadDigest, in a request signed with its body's hash
    }
)
CONFLICT_CODES: Final = frozenset({"ConditionalRequestConflict", "OperationAborted"})


def code_of(error: boto.ClientError) -> str:
    """The service's error code, or the HTTP status as text where the answer had no body."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: boto.ClientError) -> int:
    """The HTTP status, 0 where the answer does not tell."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def from_code(code: str, status: int, message: str, *, doing: str, url: str, name: str | None) -> NovaError:
    """Our error for an error answer. doing: "reading packs/…"; url: of the store; name: the object that the request was about."""
    says = f"{url}: {doing}: {code or status}{f' ({message})' if message and message != 'None' else ''}"
    if code == "NoSuchBucket":
        return BucketMissingError(f"{says}; make the bucket first, or correct the URL")
    if code in ("NoSuchKey", "NoSuchVersion") or (status == 404 and name is not None):
        return ObjectNotFoundError(f"no object {name} in {url}")
    if code == "PreconditionFailed" or status == 412:
        return ObjectExistsError(f"object {name} in {url}: the name is taken")
    if code in FULL_CODES or status in (413, 507):
        return StoreFullError(f"{says}; free space there, raise the quota, or run 'novafs gc'")
    if code in RETRY_CODES or status in (408, 409, 425, 429) or status >= 500:
        return StoreUnavailableError(f"{says} (HTTP {status})")
    if status == 404:
        return BucketMissingError(f"{says}; make the bucket first, or correct the URL")
    return StoreDeniedError(f"{says} (HTTP {status}); {DENIED_HELP.get(code, 'the store refuses the request; ' + _CREDENTIALS_HELP)}")


def from_exception(error: Exception, *, doing: str, url: str, name: str | None = None) -> NovaError:
    """Our error for whatever botocore raised."""
    says = f"{url}: {doing}"
    match error:
        case boto.ClientError():
            details: dict[str, Any] = dict(error.response.get("Error", {}))
            return from_code(code_of(error), status_of(error), str(details.get("Message", "")), doing=doing, url=url, name=name)
        case boto.NoCredentialsError():
            return StoreDeniedError(f"{says}: {NO_CREDENTIALS}")
        case boto.PartialCredentialsError() | boto.CredentialRetrievalError() | boto.TokenRetrievalError() | boto.SSOError():
            return StoreDeniedError(f"{says}: {error}; {_CREDENTIALS_HELP}")
        case boto.SSLError() if "X509" in str(error):
            return ConfigError(f"{says}: {error}; ca_bundle= of the volume's URL must name a file of certificates as PEM")
        case boto.SSLError() if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return StoreDeniedError(f"{says}: {error}; give the authority's certificates with ca_bundle= in the volume's URL")
        case (
            boto.ProfileNotFound()
            | boto.ParamValidationError()
            | boto.InvalidRegionError()
            | boto.InvalidConfigError()
            | boto.ConfigParseError()
            | boto.InvalidDNSNameError()
            | boto.EndpointResolutionError()
            | boto.InvalidProxiesConfigError()
        ):
            return ConfigError(f"{says}: {error}; correct the volume's URL or the AWS configuration")
        case _:
            # Connections refused, reset, cut or timed out, and answers that are no S3: they may be better next time.
            return StoreUnavailableError(f"{says}: {error or type(error).__name__}")


def expired(error: RuntimeError, *, doing: str, url: str) -> StoreDeniedError:
    """Our error where new credentials were asked for, and those that came had expired already."""
    return StoreDeniedError(f"{url}: {doing}: {error} {DENIED_HELP['ExpiredToken']}")


FAILURES: Final = (boto.BotoCoreError, boto.ClientError, HTTPError, OSError)
"""All that a boto3 call raises where the arguments are in order."""
