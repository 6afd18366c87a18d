"""Files of a model whose tensors come from memory and from other files."""

from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import load_file

from qtool.artifact._shards import write_shards
from qtool.checkpoint._base import TensorInfo
from qtool.checkpoint.raw_bytes import Stretch
from qtool.errors import CheckpointError


@pytest.fixture
def content(tmp_path):
    """Eight sets of a tensor that is copied and one that is not, what reads them, and what they hold."""
    data = torch.arange(800).view(8, 100).byte()
    (tmp_path / "source").write_bytes(bytes(data.view(-1).tolist()))
    pieces = {
        str(i): {f"{i}.b": TensorInfo((100,), torch.uint8), f"{i}.a": TensorInfo((3,), torch.float32)} for i in range(8)
    }

    def read(key):
        place = Stretch(tmp_path / "source", 100 * int(key), 100, key)
        return {f"{key}.b": place, f"{key}.a": torch.full((3,), float(key))}

    wanted = {f"{i}.b": data[i] for i in range(8)} | {f"{i}.a": torch.full((3,), float(i)) for i in range(8)}
    return pieces, read, wanted


def test_what_is_copied_and_what_is_not(content, tmp_path, use_threads):
    """The same bytes with any number of threads."""
    pieces, read, wanted = content
    written = []
    for threads in (1, 3):
        use_threads(threads)
        (tmp_path / str(threads)).mkdir()
        files = write_shards(tmp_path / str(threads), pieces, read, 230)
        assert len(files) == 4 + 1
        found = {name: tensor for path in files[:-1] for name, tensor in load_file(path).items()}
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        written.append([path.read_bytes() for path in files])
    assert written[0] == written[1]


def test_files_are_copied_side_by_side(content, tmp_path, use_threads, monkeypatch):
    pieces, read, _ = content
    met, copy = threading.Barrier(2, timeout=30), Stretch.copy

    def meet(self, *place):
        met.wait()
        return copy(self, *place)

    use_threads(2)
    monkeypatch.setattr(Stretch, "copy", meet)
    write_shards(tmp_path, pieces, read, 230)


def test_a_source_that_ends_early_is_said(content, tmp_path, use_threads):
    pieces, read, _ = content
    use_threads(2)
    (tmp_path / "source").write_bytes(bytes(799))
    with pytest.raises(CheckpointError, match=r"source ends inside '7'"):
        write_shards(tmp_path, pieces, read, 230)
