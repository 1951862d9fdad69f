"""Fixtures for tests on a real mount; a pytest plugin. Tests that use them carry the marker `fuse`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.image_files import ImageFiles
from tests.support.mounted import Mount, mounted


@pytest.fixture(name="mounted")
def mounted_fixture(tmp_path: Path) -> Iterator[Mount]:
    """A new, empty volume, mounted for this test alone."""
    with mounted(tmp_path) as mount:
        yield mount


@pytest.fixture(scope="session")
def shared_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """One mount for all tests that need no daemon of their own."""
    with mounted(tmp_path_factory.mktemp("shared")) as mount:
        yield mount


@pytest.fixture
def place(shared_mount: Mount, request: pytest.FixtureRequest) -> Path:
    """A new directory, named after the test, in the shared mount."""
    directory = shared_mount.path / re.sub(r"\W+", "_", request.node.name)[:200]
    directory.mkdir()
    return directory


@pytest.fixture(scope="session")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> ImageFiles:
    """Small ext4 images, each built once a session."""
    return ImageFiles(tmp_path_factory.mktemp("images"))
