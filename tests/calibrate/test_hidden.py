"""Hidden states in memory and in a file are the same values."""

from __future__ import annotations

import errno
import os
import tempfile

import pytest
import torch

from qtool.calibrate.hidden import Hidden
from qtool.calibrate.walker import Walker
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import StorageError

SHAPE = (5, 7, 12)


@pytest.fixture
def spill(tmp_path, monkeypatch):
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def mapped_files(folder):
    """Files below a folder that this process has mapped."""
    with open("/proc/self/maps") as maps:
        return [line.split(maxsplit=5)[5].strip() for line in maps if str(folder) in line]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_file_gives_the_same_values(dtype, spill):
    nbytes = 5 * 7 * 12 * dtype.itemsize
    memory, file = Hidden(*SHAPE, dtype, limit=nbytes), Hidden(*SHAPE, dtype, limit=nbytes - 1)
    assert len(mapped_files(spill)) == 1
    generator = torch.Generator().manual_seed(4)
    for part in (slice(0, 2), slice(2, 5), slice(1, 3)):
        x = torch.randn(part.stop - part.start, 7, 12, generator=generator)
        for hidden in (memory, file):
            hidden[part] = x
            assert hidden[part].dtype == dtype
            assert torch.equal(hidden[part], x.to(dtype))
    assert (file.samples, file.length, file.values.shape) == (5, 7, SHAPE)
    assert torch.equal(memory.values, file.values)


def test_the_file_has_no_name_and_goes_with_the_values(spill):
    hidden = Hidden(*SHAPE, torch.float32, limit=0)
    assert list(spill.iterdir()) == []
    assert len(mapped_files(spill)) == 1
    values = hidden.values
    del hidden
    assert len(mapped_files(spill)) == 1
    del values
    assert mapped_files(spill) == []


def test_a_walk_over_a_file(spill, tiny_checkpoint):
    walker = Walker(HFCheckpoint(tiny_checkpoint("llama")), torch.device("cpu"), torch.float32)
    tokens = torch.randint(512, (4, 20), generator=torch.Generator().manual_seed(1))
    memory, file = walker.embed(tokens), Hidden(4, 20, 64, torch.float32, limit=0)
    file[0:4] = memory.values
    for i in range(2):
        for hidden in (memory, file):
            walker.advance(walker.load_block(i), i, hidden)
    assert mapped_files(spill)
    assert torch.equal(memory.values, file.values)


def test_a_full_disk_is_noticed_before_anything_is_written(spill, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError) as caught:
        Hidden(1000, 1000, 12, torch.float32, limit=0)
    assert str(caught.value) == (
        f"hidden states do not fit into {spill}: No space left on device: wanted 0.0 GB; "
        "set TMPDIR to a larger disk, or lower calibration.samples"
    )
    assert list(spill.iterdir()) == []


def test_room_is_reserved_at_once(spill, monkeypatch):
    asked = []
    reserve = os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, start, n: (asked.append((start, n)), reserve(fd, start, n)))
    Hidden(*SHAPE, torch.float32, limit=0)
    assert asked == [(0, 5 * 7 * 12 * 4)]


def test_where_room_cannot_be_reserved(spill, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    hidden = Hidden(*SHAPE, torch.float32, limit=0)
    hidden[0:5] = torch.ones(SHAPE)
    assert float(hidden.values.sum()) == 5 * 7 * 12
