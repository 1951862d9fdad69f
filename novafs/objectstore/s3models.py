"""The SDK's descriptions of services, found and read in a third of the time: each command that uses S3 waits for them once.

botocore looks into the directories of its four hundred services for one, and reads JSON into ordered dictionaries. What comes of it here is
the same (dictionaries keep their order anyway), from the same search paths.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import botocore.session
import msgspec
from botocore.loaders import JSONFileLoader, Loader, instance_cache


class QuickFiles(JSONFileLoader):
    """Reads a description, compressed or not."""

    def load_file(self, file_path: str) -> Any:
        """The content of the file, named without its suffix; None where there is none. Raises OSError, msgspec.DecodeError."""
        for suffix, opened in (".json", open), (".json.gz", gzip.open):
            try:
                with opened(file_path + suffix, "rb") as file:
                    return msgspec.json.decode(file.read())
            except (FileNotFoundError, NotADirectoryError):
                continue
        return None


class QuickLoader(Loader):
    """Finds them. A service counts as known by its directory; what is not in it is missed when it is read."""

    @instance_cache
    def list_available_services(self, type_name: str) -> list[str]:  # noqa: ARG002  # botocore's
        """See botocore."""
        places = [path for path in map(Path, self.search_paths) if path.is_dir()]
        return sorted({entry.name for place in places for entry in os.scandir(place) if entry.is_dir()})


def read_quickly(session: botocore.session.Session) -> None:
    """Have a session that has made no client yet find and read descriptions in this way."""
    usual = session.get_component("data_loader")
    quick = QuickLoader(extra_search_paths=usual.search_paths, file_loader=QuickFiles(), include_default_search_paths=False)
    session.register_component("data_loader", quick)
