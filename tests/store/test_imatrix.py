"""Importance matrices in llama.cpp's layouts: literal bytes, gguf's own reader, and files that lie."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch

from qtool.errors import CheckpointError
from qtool.store.imatrix import ImportanceEntry, ImportanceMatrix, is_imatrix, read_imatrix, write_imatrix

DOWN, EXPERTS = "blk.0.ffn_down.weight", "blk.1.ffn_up_exps.weight"
MATRIX = ImportanceMatrix(
    {
        EXPERTS: ImportanceEntry(torch.arange(12.0).view(3, 4), torch.tensor([5.0, 0.0, 7.0])),
        DOWN: ImportanceEntry(torch.tensor([[0.5, 2.0, 3.0]]), torch.tensor([9.0])),
    },
    ("prose.txt", "code"),
    3,
    512,
)


def legacy(entries, tail=b""):
    """A .dat file: (name, calls, values) each."""
    data = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        data += struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values))
        data += struct.pack(f"<{len(values)}f", *values)
    return data + tail


TAIL = struct.pack("<ii", 40, 9) + b"prose.txt"
GOOD = legacy([(DOWN.encode(), 4, [2.0, 4.0, 6.0])], TAIL)


@pytest.fixture
def write(tmp_path):
    def write(data):
        (tmp_path / "m.dat").write_bytes(data)
        return tmp_path / "m.dat"

    return write


def test_what_gguf_reads(tmp_path):
    write_imatrix(tmp_path / "m.gguf", MATRIX)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": ["prose.txt", "code"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 512,
    }
    assert {name: reader.fields[f"imatrix.{name}"].types for name in ("chunk_count", "datasets")} == {
        "chunk_count": [gguf.GGUFValueType.UINT32],
        "datasets": [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING],
    }
    found = {t.name: (t.tensor_type.name, t.shape.tolist(), t.data.tolist()) for t in reader.tensors}
    assert list(found) == [f"{DOWN}.in_sum2", f"{DOWN}.counts", f"{EXPERTS}.in_sum2", f"{EXPERTS}.counts"]
    assert found[f"{DOWN}.in_sum2"] == ("F32", [3], [0.5, 2.0, 3.0])
    assert found[f"{DOWN}.counts"] == ("F32", [1], [9.0])
    assert found[f"{EXPERTS}.in_sum2"] == ("F32", [4, 3], [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])
    assert found[f"{EXPERTS}.counts"] == ("F32", [1, 3], [[5.0], [0.0], [7.0]])


def test_is_read_back(tmp_path):
    write_imatrix(tmp_path / "m.gguf", MATRIX)
    found = read_imatrix(tmp_path / "m.gguf")
    assert (found.datasets, found.chunks, found.chunk_size) == (MATRIX.datasets, 3, 512)
    for name, entry in MATRIX.entries.items():
        assert torch.equal(found.entries[name].sums, entry.sums)
        assert torch.equal(found.entries[name].counts, entry.counts)


def test_what_gguf_writes_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a"])
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", 256)
    writer.add_tensor(f"{DOWN}.counts", np.array([[512]], dtype=np.float32))
    writer.add_tensor(f"{DOWN}.in_sum2", np.array([[1, 2, 3]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_imatrix(tmp_path / "m.gguf")
    assert found.entries[DOWN].sums.tolist() == [[1, 2, 3]]
    assert (found.entries[DOWN].counts.tolist(), found.chunk_size) == ([512], 256)


def test_legacy_files_hold_means_times_calls(write):
    found = read_imatrix(write(GOOD))
    entry = found.entries[DOWN]
    assert (entry.sums / entry.counts).tolist() == [[0.5, 1.0, 1.5]]
    assert entry.counts.tolist() == [4 * 512]
    assert (found.datasets, found.chunks, found.chunk_size) == (("prose.txt",), 40, 512)


@pytest.mark.parametrize("tail", [b"", TAIL[:4], TAIL], ids=["neither", "chunks", "both"])
def test_what_follows_the_entries_may_be_missing(write, tail):
    assert list(read_imatrix(write(legacy([(b"a", 1, [1.0])], tail))).entries) == ["a"]


def test_kinds_of_files_are_told_apart(write, tmp_path):
    write_imatrix(tmp_path / "m.gguf", MATRIX)
    assert is_imatrix(tmp_path / "m.gguf")
    assert is_imatrix(write(GOOD))
    for other in (b"", b"GGU", struct.pack("<Q", 1000) + b'{"a":', b"\0" * 20):
        assert not is_imatrix(write(other))


INT = struct.Struct("<i").pack
HOSTILE = {
    "empty": (b"", "is truncated, or no importance matrix: wanted 4 bytes, found 0"),
    "no entries": (INT(0), "impossible number of entries: wanted 1 to 16777215, found 0"),
    "negative entries": (INT(-1), "impossible number of entries"),
    "many entries": (INT(2**30), "impossible number of entries"),
    "negative name": (INT(1) + INT(-5), "impossible length of a name: wanted 1 to 63, found -5"),
    "long name": (INT(1) + INT(2**31 - 1), "impossible length of a name"),
    "name not UTF-8": (legacy([(b"\xff", 1, [1.0])]), "a name is not UTF-8"),
    "unprintable name": (legacy([(b"a\n", 1, [1.0])]), "repeated or unprintable name"),
    "twice the same": (legacy([(b"a", 1, [1.0])] * 2), "repeated or unprintable name: found 'a'"),
    "no calls": (legacy([(b"a", 0, [1.0])]), "impossible number of calls of a"),
    "no values": (legacy([(b"a", 1, [])]), "impossible number of values of a"),
    "claims values": (
        legacy([(b"a", 1, [1.0])])[:-8] + INT(2**31 - 1),
        "is truncated, or no importance matrix: wanted",
    ),
    "cut": (GOOD[:30], "is truncated"),
    "cut name of the text": (GOOD[:-1], "is truncated"),
    "too long": (GOOD + b"x", "1 bytes too many"),
    "negative": (legacy([(b"a", 1, [-1.0])]), "a holds impossible numbers: wanted finite ones from 0"),
    "NaN": (legacy([(b"a", 1, [float("nan")])]), "a holds impossible numbers"),
    "infinite": (legacy([(b"a", 1, [float("inf")])]), "a holds impossible numbers"),
}


@pytest.mark.parametrize(("data", "expected"), HOSTILE.values(), ids=list(HOSTILE))
def test_legacy_files_that_lie(write, data, expected):
    with pytest.raises(CheckpointError, match=expected):
        read_imatrix(write(data))


def broken(tmp_path, metadata=None, **tensors):
    """A GGUF file with other tensors or metadata."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "")
    told = {"general.type": "imatrix", "imatrix.datasets": ["a"], "imatrix.chunk_count": 1, "imatrix.chunk_size": 8}
    for key, value in (told | (metadata or {})).items():
        add = {list: writer.add_array, str: writer.add_string, int: writer.add_uint32}[type(value)]
        add(key, value)
    for name, values in tensors.items():
        writer.add_tensor(f"a.weight.{name}", np.asarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m.gguf"


ONES = np.ones(4, np.float32)
ONE = np.ones(1, np.float32)


@pytest.mark.parametrize(
    ("metadata", "tensors", "expected"),
    [
        ({"general.type": "model"}, {"in_sum2": ONES, "counts": ONE}, "wanted general.type imatrix, found 'model'"),
        ({"imatrix.chunk_count": "x"}, {"in_sum2": ONES, "counts": ONE}, "is no importance matrix"),
        ({"imatrix.datasets": "x"}, {"in_sum2": ONES, "counts": ONE}, "is no importance matrix"),
        ({}, {}, "wanted pairs of"),
        ({}, {"counts": ONE}, "wanted pairs of"),
        ({}, {"in_sum2": ONES, "counts": ONE, "more": ONE}, "wanted pairs of"),
        ({}, {"in_sum2": ONES}, r"a.weight: wanted F32 .in_sum2 \[M, K\] and F32 .counts"),
        ({}, {"in_sum2": ONES.astype(np.float16), "counts": ONE}, "a.weight: wanted F32"),
        ({}, {"in_sum2": ONES, "counts": ONE.astype(np.float16)}, "a.weight: wanted F32"),
        ({}, {"in_sum2": np.ones((1, 2, 4), np.float32), "counts": ONE}, "a.weight: wanted F32"),
        ({}, {"in_sum2": ONES, "counts": np.ones((2, 2), np.float32)}, "a.weight: wanted F32"),
        ({}, {"in_sum2": np.ones((2, 4), np.float32), "counts": np.ones(3, np.float32)}, "wanted 2 counts, found 3"),
        ({}, {"in_sum2": ONES * np.nan, "counts": ONE}, "a.weight holds impossible numbers"),
        ({}, {"in_sum2": ONES, "counts": -ONE}, "a.weight holds impossible numbers"),
    ],
)
def test_gguf_files_that_lie(tmp_path, metadata, tensors, expected):
    with pytest.raises(CheckpointError, match=expected):
        read_imatrix(broken(tmp_path, metadata, **tensors))
