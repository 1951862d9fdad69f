"""Readers of block traces: every format gives the requests that were written, and damage is an error with a name."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import zstandard

from novafs.errors import SourceError
from novafs.traces import READ, UNKNOWN, WRITE, Requests, chunk_runs, open_trace
from tests.support.traces import traces_folder

ROWS = [(0, READ, 4096, 512), (700, WRITE, 65536 * 3 - 1, 2), (900, READ, 0, 1)]


def rows_of(path: Path) -> list[tuple[int, int, int, int]]:
    blocks = list(open_trace(path).blocks())
    columns = [np.concatenate([getattr(block, name) for block in blocks]).tolist() for name in ("time_us", "op", "offset", "size")]
    return list(zip(*columns, strict=True))


def own_csv(header: bool = False) -> bytes:
    lines = ["t_us,op,offset,length"] if header else []
    lines += [f"{time},{'rw'[op]},{offset},{size}" for time, op, offset, size in ROWS[:2]]
    lines += ["800,f,0,0", *(f"{time},{'rw'[op]},{offset},{size}" for time, op, offset, size in ROWS[2:])]
    return "\n".join(lines).encode() + b"\n"


def vscsi(version: int) -> bytes:
    records = []
    for number, (time, op, offset, size) in enumerate([(0, READ, 512, 4096), (5, WRITE, 1024, 512), (9, READ, 0, 512)]):
        command = 0x2A if op == WRITE else 0x28
        if version == 1:
            records.append(struct.pack("<IIIHHQQ", number, size, 1, command, version << 8, offset // 512, time))
        else:
            records.append(struct.pack("<HHIIIQQQ", command, version << 8, number, size, 1, offset // 512, time, 3))
    return b"".join(records)


def npz(**arrays: np.ndarray) -> bytes:
    target = io.BytesIO()
    np.savez(target, **arrays)  # type: ignore[arg-type]
    return target.getvalue()


@pytest.mark.parametrize("header", [False, True])
def test_our_csv_is_read_plain_and_compressed_and_flushes_are_left_out(tmp_path: Path, header: bool) -> None:
    for name, data in (("a.csv", own_csv(header)), ("a.csv.gz", gzip.compress(own_csv(header)))):
        (tmp_path / name).write_bytes(data)
        assert rows_of(tmp_path / name) == ROWS
        assert open_trace(tmp_path / name).timed


def test_the_msr_format_is_told_by_its_columns(tmp_path: Path) -> None:
    (tmp_path / "hm_1.csv").write_text(
        "128166372003061629,hm,1,Read,383496192,32768,413\n128166372016382155,hm,1,Write,2822144,4096,5\n128166372026382245,hm,0,Read,0,512,3\n"
    )
    trace = open_trace(tmp_path / "hm_1.csv")
    (block,) = list(trace.blocks())
    assert block.offset.tolist() == [383496192, 2822144, 0]
    assert block.op.tolist() == [READ, WRITE, READ]
    assert block.device.tolist() == [1, 1, 0]
    assert np.diff(block.time_us).tolist() == [1332053, 1000009]


@pytest.mark.parametrize("version", [1, 2])
def test_vscsi_records_of_both_versions_are_read(tmp_path: Path, version: int) -> None:
    path = tmp_path / "vm.vscsi"
    path.write_bytes(vscsi(version))
    assert rows_of(path) == [(0, READ, 512, 4096), (5, WRITE, 1024, 512), (9, READ, 0, 512)]
    (tmp_path / "vm.vscsi.zst").write_bytes(zstandard.compress(vscsi(version)))
    assert rows_of(tmp_path / "vm.vscsi.zst") == rows_of(path)


def test_an_object_counts_as_one_chunk(tmp_path: Path) -> None:
    path = tmp_path / "x.oracleGeneral.bin.zst"
    records = b"".join(struct.pack("<IQIq", second, key, 100_000, -1) for second, key in ((1, 7), (2, 1 << 63), (5, 7)))
    path.write_bytes(zstandard.compress(records))
    (block,) = list(open_trace(path).blocks())
    firsts, lasts = chunk_runs(block, 65536)
    assert firsts.tolist() == lasts.tolist()
    assert firsts[0] == firsts[2] == 7
    assert 0 <= firsts[1] < 1 << 40
    assert block.op.tolist() == [UNKNOWN] * 3
    assert block.time_us.tolist() == [1_000_000, 2_000_000, 5_000_000]


def test_npz_arrays_are_read_and_a_sequence_number_is_no_clock(tmp_path: Path) -> None:
    path = tmp_path / "n.npz"
    path.write_bytes(npz(time_us=np.arange(5), offset=np.arange(5) * 4096, size=np.full(5, 512, dtype=np.uint32)))
    trace = open_trace(path)
    assert not trace.timed
    assert trace.name == "n"
    assert rows_of(path) == [(number, UNKNOWN, number * 4096, 512) for number in range(5)]


def test_requests_touch_every_chunk_they_reach_into() -> None:
    column = np.array([0])
    block = Requests(column, column, np.array([65535]), np.array([2]), column)
    assert [part.tolist() for part in chunk_runs(block, 65536)] == [[0], [1]]
    empty = Requests(column, column, np.array([65536]), np.array([0]), column)
    assert [part.tolist() for part in chunk_runs(empty, 65536)] == [[1], [1]]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.csv", b"1,r,0,4096\n2,r,0\n", "line 2"),
        ("a.csv", b"1,x,0,4096\n", "'x'"),
        ("a.csv", b"1,r,minus,4096\n", "line 1"),
        ("a.csv", b"1,r,-5,4096\n", "out of range"),
        ("a.csv", b"1,r,0,99999999999\n", "request 0"),
        ("a.csv", b"\xff\xfe\x00", "a.csv"),
        ("a.csv", b"", "no request"),
        ("a.csv.gz", b"not gzip", "a.csv.gz"),
        ("a.csv.gz", gzip.compress(own_csv())[:-12], "a.csv.gz"),
        ("a.npz", b"PK\x03\x04 rubbish", "no .npz archive"),
        ("a.npz", b"PK12", "no .npz archive"),
        ("a.npz", npz(offset=np.arange(3)), "'size'"),
        ("a.npz", npz(offset=np.arange(3), size=np.arange(2)), "differ"),
        ("a.npz", npz(offset=np.arange(3) * 1.5, size=np.arange(3)), "float64"),
        ("a.npz", npz(offset=np.array([b"x"], dtype=object), size=np.arange(1)), "holds objects"),
        ("a.vscsi", vscsi(2)[:-7], "33 bytes into record 2"),
        ("a.vscsi", b"\x00" * 80, "version"),
        ("a.oracleGeneral", b"\x01" * 30, "6 bytes into record 1"),
        ("a.vscsi.zst", b"no zstd", "a.vscsi.zst"),
        ("a.txt", b"1 2 3", ".csv"),
        ("a", b"1 2 3", ".csv"),
    ],
)
def test_what_is_no_trace_is_an_error_that_names_the_file(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(SourceError) as caught:
        list(open_trace(path).blocks())
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.csv"):
        open_trace(tmp_path / "none.csv")


@pytest.mark.traces
def test_the_shared_traces_have_the_sizes_that_their_readme_states() -> None:
    folder = traces_folder()
    assert folder is not None
    for name, requests, accesses, timed in (("hplajw_1992", 44519, 51940, True), ("msr_hm1_prefix", 33304, 43773, False)):
        trace = open_trace(folder / f"{name}.npz")
        blocks = list(trace.blocks())
        assert sum(map(len, blocks)) == requests
        touched = 0
        for block in blocks:
            firsts, lasts = chunk_runs(block, 65536)
            touched += int((lasts - firsts + 1).sum())
        assert touched == accesses
        assert trace.timed is timed
