"""The one exception tree.

The engine raises these and nothing else on purpose; it knows no errno. The mount maps classes to errnos
(`novafs_mount.errnos`), the command line maps them to exit status and one line on stderr.

    NovaError
    ├── UserError                 the caller can put it right; nothing was changed
    │   ├── ConfigError           a key, value, URL or size that is no such thing
    │   ├── InvalidNameError      a path with NUL, "..", an empty or too long component
    │   ├── NotFoundError         no such image, directory, attribute or snapshot
    │   │   └── NoAttributeError
    │   ├── ExistsError           the name is taken
    │   ├── NotDirectoryError / IsDirectoryError / NotEmptyError
    │   ├── ReadOnlyError         the volume, mount, snapshot or image can not be written now
    │   │   └── LeaseHeldError    another host holds the right to write the image
    │   ├── TooLargeError         beyond what a format or a limit can hold
    │   ├── BusyError             the thing is in use (a mount point, a state directory, an image)
    │   ├── ClosedError           a cache or a file of the library that was closed, or that belongs to the parent process
    │   ├── AccessDeniedError     not allowed: permissions, credentials
    │   ├── UnsupportedError      understood, and deliberately not offered
    │   ├── SourceError           an import source that is missing, truncated or no image
    │   ├── MountError            a mount point that is missing or busy
    │   │   └── NotInstalledError what a mount needs of the host: /dev/fuse, fusermount3, a package
    │   └── VolumeError           a URL that holds no volume, already holds one, or one of a newer format
    │       ├── NoVolumeError / VolumeExistsError / NewerFormatError
    ├── RetryableError            may succeed when tried again
    │   └── StoreUnavailableError the object store did not answer, or not in time
    ├── PermanentError            trying again will not help
    │   ├── StoreFullError        no space on the store (or the local disk)
    │   ├── StoreDeniedError      the store refuses the credentials or the request
    │   ├── BucketMissingError    the bucket or directory is not there
    │   ├── ObjectNotFoundError   the store has no object of that name
    │   └── ObjectExistsError     a create-only write found the name taken
    ├── StaleError                what a handle has been reading or holding was replaced by another host
    ├── LeaseLostError            the right to write went to another host; what was written since is kept aside
    ├── CorruptionError           bytes that do not match their checksum or identity
    │   ├── FrameCorruptError     a frame whose content is not its chunk id
    │   └── ObjectCorruptError    an object that does not parse or fails its checksum
    └── BugError                  an invariant does not hold: report it

A message names the object, what was expected, what was found and, where there is one, the next command to run.
"""

from __future__ import annotations


class NovaError(Exception):
    """Root of every error that NovaFS raises on purpose."""


class UserError(NovaError):
    """A mistake that the caller can put right; nothing was changed."""


class ConfigError(UserError):
    """A configuration key, value, URL or size that is no such thing."""


class InvalidNameError(UserError):
    """A path or name that no volume can hold."""


class NotFoundError(UserError):
    """No such image, directory or snapshot."""


class NoAttributeError(NotFoundError):
    """No such extended attribute."""


class ExistsError(UserError):
    """The name is taken."""


class NotDirectoryError(UserError):
    """A directory was expected."""


class IsDirectoryError(UserError):
    """An image was expected, a directory found."""


class NotEmptyError(UserError):
    """The directory still holds entries."""


class ReadOnlyError(UserError):
    """The volume, mount, snapshot or image can not be written now."""


class LeaseHeldError(ReadOnlyError):
    """Another host holds the right to write the image, and did not give it up."""


class TooLargeError(UserError):
    """Beyond what the format or a limit can hold."""


class BusyError(UserError):
    """The thing is in use."""


class ClosedError(UserError):
    """The cache, or the file of it, was closed, or belongs to the process that this one was forked from."""


class AccessDeniedError(UserError):
    """The caller is not allowed to do this."""


class UnsupportedError(UserError):
    """Understood, and deliberately not offered."""


class SourceError(UserError):
    """An import source that is missing, truncated or no image."""


class MountError(UserError):
    """A mount point that is missing or busy."""


class NotInstalledError(MountError):
    """The host lacks what a mount needs; trying again will not help before it is installed."""


class VolumeError(UserError):
    """A URL that does not hold the volume that was asked for."""


class NoVolumeError(VolumeError):
    """There is no volume at this URL."""


class VolumeExistsError(VolumeError):
    """There is a volume at this URL already."""


class NewerFormatError(VolumeError):
    """The volume was written by a newer NovaFS."""


class RetryableError(NovaError):
    """The same call may succeed later."""


class StoreUnavailableError(RetryableError):
    """The object store did not answer, or not in time."""


class PermanentError(NovaError):
    """The same call will fail again."""


class StoreFullError(PermanentError):
    """No space left on the store or the local disk."""


class StoreDeniedError(PermanentError):
    """The store refuses the credentials or the request."""


class BucketMissingError(PermanentError):
    """The bucket or the directory is not there."""


class ObjectNotFoundError(PermanentError):
    """The store has no object of that name."""


class ObjectExistsError(PermanentError):
    """A create-only write found the name taken (perhaps by its own earlier, unanswered try)."""


class StaleError(NovaError):
    """What a handle has been reading or holding was replaced by another host."""


class LeaseLostError(NovaError):
    """The right to write the image went to another host; what was written since is kept aside."""


class CorruptionError(NovaError):
    """Bytes that do not match their checksum or identity. Never answered with zeros."""


class FrameCorruptError(CorruptionError):
    """A frame whose content does not hash to its chunk id.

    Attributes: ``chunk_id`` (32 bytes), ``where`` (tier or pack, for people), ``offset`` (bytes into the pack, or -1).
    """

    def __init__(self, chunk_id: bytes, where: str, offset: int, found: str) -> None:
        self.chunk_id = chunk_id
        self.where = where
        self.offset = offset
        super().__init__(f"chunk {chunk_id.hex()} in {where} at {offset}: {found}; run 'novafs fsck --scrub' to find what it touches")


class ObjectCorruptError(CorruptionError):
    """An object that does not parse or fails its checksum."""


class BugError(NovaError):
    """An invariant does not hold. Please report it."""
