"""An object store in memory that does what the contract says, no more: for simulations.

Every call that changes it is told to `record` when it takes effect. `fault` may raise before a call takes effect
("before") or after it did ("after": the answer is lost). `late` are calls of a host that has died, on their way still:
each takes effect after so many more requests, or (0) just before somebody else creates the same name.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

from novafs.errors import ObjectExistsError, ObjectNotFoundError
from novafs.objectstore.base import ObjectInfo, ObjectStore, StoreUsage

Change = tuple[str, str, bytes]
"""("create" | "put" | "delete", name, data)"""


class MemoryStore(ObjectStore):
    """Not thread-safe: simulations call it on one thread."""

    def __init__(self, objects: dict[str, bytes] | None = None, *, clock_s: Callable[[], float] = lambda: 0.0) -> None:
        self.url = "memory:"
        self.objects = dict(objects or {})
        self._names = sorted(self.objects)
        self._clock_s = clock_s
        self._modified_s = dict.fromkeys(self.objects, clock_s())
        self.record: Callable[[Change], None] = lambda change: None
        self.fault: Callable[[str, str, str], None] = lambda moment, operation, name: None
        self.late: list[tuple[int, Change]] = []
        self.requests = 0

    def _enter(self, operation: str, name: str) -> None:
        self.requests += 1
        due = [(n, c) for n, c in self.late if 0 < n <= self.requests or (not n and (operation, name) == c[:2])]
        self.late = [entry for entry in self.late if entry not in due]
        for _, change in due:
            self.apply(change)
        self.fault("before", operation, name)

    def apply(self, change: Change) -> bool:
        """Let a change take effect; False where it can not (a create of a name that is taken)."""
        operation, name, data = change
        if operation == "create" and name in self.objects:
            return False
        if operation == "delete":
            if name in self.objects:
                del self.objects[name]
                del self._names[bisect.bisect_left(self._names, name)]
        else:
            if name not in self.objects:
                bisect.insort(self._names, name)
            self.objects[name] = data
            self._modified_s[name] = self._clock_s()
        self.record(change)
        return True

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        self._enter("get", name)
        data = self._found(name)
        return data[start:] if length is None else data[start : start + length]

    def _found(self, name: str) -> bytes:
        if name not in self.objects:
            raise ObjectNotFoundError(f"no object {name}")
        return self.objects[name]

    def create(self, name: str, data: bytes) -> None:
        self._enter("create", name)
        if not self.apply(("create", name, bytes(data))):
            raise ObjectExistsError(f"{name}: taken")
        self.fault("after", "create", name)

    def put(self, name: str, data: bytes) -> None:
        self._enter("put", name)
        self.apply(("put", name, bytes(data)))
        self.fault("after", "put", name)

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[ObjectInfo]:
        self._enter("list", prefix)
        at = bisect.bisect_right(self._names, after) if after > prefix else bisect.bisect_left(self._names, prefix)
        found: list[ObjectInfo] = []
        while at < len(self._names) and self._names[at].startswith(prefix) and (limit is None or len(found) < limit):
            found.append(self._info(self._names[at]))
            at += 1
        return found

    def _info(self, name: str) -> ObjectInfo:
        return ObjectInfo(name, len(self._found(name)), self._modified_s[name])

    def head(self, name: str) -> ObjectInfo:
        self._enter("head", name)
        return self._info(name)

    def delete(self, name: str) -> None:
        self._enter("delete", name)
        self.apply(("delete", name, b""))
        self.fault("after", "delete", name)

    def clock_s(self) -> float:
        self._enter("clock_s", "")
        return self._clock_s()

    def usage(self) -> StoreUsage:
        return StoreUsage(None, None)

    def probe_create_only(self) -> bool:
        return True


def change_of(call: tuple[str, tuple[Any, ...]] | None) -> Change | None:
    """The change that a request would make (see `simulation.named`), None where it makes none."""
    if call is None or call[0] not in ("create", "put", "delete"):
        return None
    operation, arguments = call
    return operation, arguments[0], bytes(arguments[1]) if len(arguments) > 1 else b""
