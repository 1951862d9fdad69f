"""Does a store really refuse to replace? Some gateways ignore ``If-None-Match: *`` and answer 200."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier
from typing import Final

from novafs.errors import NovaError, ObjectExistsError
from novafs.objectstore.base import ObjectStore

WRITERS: Final = 4


def probe_create_only(store: ObjectStore) -> bool:
    """Try it on a scratch object: several writers at once, then one more; exactly one may have won, and its bytes must be there.

    The writers at once catch a gateway that looks first and writes then. The object is deleted again; one that a crash leaves
    under ``probe/`` is in nobody's way. Raises what `create`, `get` and `delete` raise, but not ObjectExistsError.
    """
    name = f"probe/{secrets.token_hex(16)}"
    together = Barrier(WRITERS)

    def create(data: bytes, barrier: Barrier | None) -> bool:
        if barrier is not None:
            barrier.wait()
        try:
            store.create(name, data)
        except ObjectExistsError:
            return False
        return True

    contents = [b"%d" % writer for writer in range(WRITERS + 1)]
    try:
        with ThreadPoolExecutor(WRITERS) as pool:
            attempts = [pool.submit(create, data, together) for data in contents[:WRITERS]]
        won = [attempt.result() for attempt in attempts]
        late = create(contents[WRITERS], None)
        found = store.get(name)
    except NovaError:
        with suppress(NovaError):  # the first error tells more than one of cleaning up after it
            store.delete(name)
        raise
    store.delete(name)
    # No winner at all is possible: a create whose answer was lost is refused when it is tried again.
    return not late and sum(won) <= 1 and found in contents[:WRITERS] and (not any(won) or found == contents[won.index(True)])
