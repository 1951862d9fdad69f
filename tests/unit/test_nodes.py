"""The inode table."""

from __future__ import annotations

import pytest

from novafs.catalogtree import ROOT_ID, Entry, Kind
from novafs.errors import StaleError
from novafs_mount.nodes import INODE_MASK, ROOT_INODE, NodeTable


def entry(node_id: bytes, name: str = "a") -> Entry:
    return Entry(name, node_id, Kind.IMAGE, 0o644, 0, 0, 0, 0, 0)


def table() -> NodeTable:
    return NodeTable(Entry("", ROOT_ID, Kind.DIRECTORY, 0o755, 0, 0, 0, 0, 0))


def test_the_root_is_inode_one_and_is_never_forgotten() -> None:
    nodes = table()
    assert nodes.inode_of(ROOT_ID) == ROOT_INODE
    nodes.forget(ROOT_INODE, 5)
    assert nodes.at(ROOT_INODE) is nodes.root


def test_a_number_comes_from_the_node_id_alone() -> None:
    node_id = bytes.fromhex("8102030405060708ffffffffffffffff")
    assert table().inode_of(node_id) == table().looked_up(entry(node_id)).inode == 0x0102030405060708


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("top", [0, 1 << 63])
def test_a_node_id_that_would_be_no_number_or_the_root_gets_another(start: int, top: int) -> None:
    node_id = (start | top).to_bytes(8, "big") + b"\x07" * 8
    inode = table().inode_of(node_id)
    assert ROOT_INODE < inode <= INODE_MASK
    assert inode == table().inode_of(node_id)


def test_live_nodes_never_share_a_number() -> None:
    nodes = table()
    first, second = b"\x01" * 8 + b"a" * 8, b"\x01" * 8 + b"b" * 8
    a = nodes.looked_up(entry(first))
    expected = nodes.inode_of(second)
    b = nodes.looked_up(entry(second, "b"))
    assert a.inode != b.inode == expected
    assert nodes.at(b.inode) is b
    nodes.forget(a.inode, 1)
    assert nodes.find(second) is b
    assert nodes.inode_of(second) == b.inode


def test_a_node_stays_until_it_is_forgotten_as_often_as_it_was_looked_up() -> None:
    nodes = table()
    node = nodes.looked_up(entry(b"\x05" * 16))
    assert nodes.looked_up(entry(b"\x05" * 16, "renamed")) is node
    assert node.entry.name == "renamed"
    nodes.forget(node.inode, 1)
    assert nodes.at(node.inode) is node
    nodes.forget(node.inode, 1)
    assert nodes.find(b"\x05" * 16) is None
    with pytest.raises(StaleError, match="not known"):
        nodes.at(node.inode)
    nodes.forget(node.inode, 1)
    assert len(nodes) == 1


def test_an_open_node_outlives_its_last_lookup() -> None:
    nodes = table()
    node = nodes.looked_up(entry(b"\x05" * 16))
    node.handles = 1
    nodes.forget(node.inode, 1)
    assert nodes.known(node.inode) is node
    node.handles = 0
    nodes.let_go(node)
    assert nodes.known(node.inode) is None


def test_a_node_that_was_found_again_is_gone_no_more() -> None:
    """Moved by another host to a directory that this one had not looked at: it stayed without links, and chmod was lost."""
    nodes = table()
    node = nodes.looked_up(entry(b"\x05" * 16))
    node.gone = True
    assert nodes.looked_up(entry(b"\x05" * 16, "b")) is node
    assert not node.gone
