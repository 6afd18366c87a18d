"""Stretches of files: read in pieces, copied and compared without holding all of them."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from qtool.checkpoint import raw_bytes
from qtool.checkpoint._base import TensorInfo
from qtool.checkpoint.raw_bytes import Stretch, same_stretches
from qtool.checkpoint.safetensors_io import SafetensorsFile, SafetensorsWriter
from qtool.errors import CheckpointError, StorageError

CONTENT = bytes(range(256)) * 3 + b"the end"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(raw_bytes, "PIECE", 64)


@pytest.fixture
def stretch(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    return Stretch(tmp_path / "a", 5, len(CONTENT) - 8, "w")


def test_pieces_are_the_whole(stretch):
    pieces = [bytes(piece.numpy()) for piece in stretch.pieces()]
    assert b"".join(pieces) == CONTENT[5:-3]
    assert {len(piece) for piece in pieces[:-1]} == {64}
    assert not list(Stretch(stretch.path, 5, 0, "w").pieces())


def without(monkeypatch, code):
    def refuse(*_):
        if not code:
            return 0
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refuse)


@pytest.mark.parametrize("code", [None, 0, errno.EXDEV, errno.EOPNOTSUPP])
def test_a_copy_is_at_its_place(code, stretch, tmp_path, monkeypatch):
    """By the system, and where that cannot, or says that it copied nothing."""
    if code is not None:
        without(monkeypatch, code)
    with (tmp_path / "b").open("wb") as file:
        assert stretch.copy(file.fileno(), 7) == stretch.count
    assert (tmp_path / "b").read_bytes() == bytes(7) + CONTENT[5:-3]
    assert same_stretches(stretch, Stretch(tmp_path / "b", 7, stretch.count, "w"))


def test_what_cannot_be_copied_is_said(stretch, tmp_path, monkeypatch):
    infos = {"w": TensorInfo((stretch.count,), torch.uint8)}
    writer = SafetensorsWriter(tmp_path / "b", infos)
    with pytest.raises(ValueError, match="w was announced with 767 bytes, found 3"):
        writer.copy("w", Stretch(stretch.path, 0, 3, "w"))
    stretch.path.write_bytes(CONTENT[:50])
    with pytest.raises(CheckpointError, match=r"a ends inside 'w': wanted 767 bytes, found 45"):
        writer.copy("w", stretch)
    with pytest.raises(CheckpointError, match=r"a ends inside 'w': wanted 767 bytes, found 45"):
        list(stretch.pieces())
    without(monkeypatch, errno.ENOSPC)
    with pytest.raises(StorageError, match="No space left on device"):
        writer.copy("w", stretch)


def test_a_copied_tensor_reads_as_one_that_was_added(tmp_path):
    tensor = torch.randn(40, 9)
    infos = {"w": TensorInfo((40, 9), torch.float32), "v": TensorInfo((3,), torch.uint8)}
    with SafetensorsWriter(tmp_path / "a", infos) as writer:
        writer.add("w", tensor)
        writer.add("v", torch.arange(3, dtype=torch.uint8))
    with SafetensorsWriter(tmp_path / "b", {"w": infos["w"]}, sync=False) as writer:
        writer.copy("w", SafetensorsFile(tmp_path / "a").stretch("w"))
    assert torch.equal(SafetensorsFile(tmp_path / "b").read("w"), tensor)


@pytest.mark.parametrize("place", [0, 63, 64, 700, 766])
def test_one_byte_that_differs_is_seen(place, stretch, tmp_path):
    other = bytearray(CONTENT)
    other[5 + place] ^= 128
    (tmp_path / "b").write_bytes(other)
    assert not same_stretches(stretch, Stretch(tmp_path / "b", 5, stretch.count, "w"))
    assert not same_stretches(stretch, Stretch(stretch.path, 5, stretch.count - 1, "w"))
