"""Some rows of a matrix are what the whole matrix has there, and the rest is not read."""

from __future__ import annotations

import pytest
import torch

from qtool.artifact.compressed_tensors import CompressedTensors
from qtool.checkpoint.safetensors_io import SafetensorsFile
from qtool.formats.int import Int
from qtool.store.neutral import NeutralCheckpoint, NeutralWriter
from tests.artifact.conftest import quantize


@pytest.fixture
def model(tiny_checkpoint):
    """Codes of an odd width with zero points in the blocks, embedding and head."""
    fmt = Int(bits=3, group=32, symmetric=False)
    return quantize(tiny_checkpoint("llama"), fmt, head=fmt, embedding=fmt)


def neutral(model, folder):
    writer = NeutralWriter(folder, {}, keep={"model.norm": "f16"})
    writer.enter("all", writer.write_block("all", {name: model.matrix(name) for name in model.layers}))
    return NeutralCheckpoint(folder, model.origin)


def compressed(model, folder):
    model.layers = {name: layer for name, layer in model.layers.items() if name != "model.embed_tokens"}
    folder.mkdir()
    CompressedTensors().write(model, folder, {})
    return CompressedTensors().open(folder)


@pytest.mark.parametrize("write", [neutral, compressed])
def test_rows_are_those_of_the_whole(write, model, tmp_path):
    checkpoint = write(model, tmp_path / "model")
    for name in checkpoint.names():
        whole = checkpoint.tensor(name)
        for start, stop in ((0, 7), (9, 32), (len(whole) - 1, len(whole))):
            part = checkpoint.rows(name, start, stop)
            assert part.dtype == whole.dtype
            assert torch.equal(part, whole[start:stop]), (name, start, stop)


@pytest.mark.parametrize("write", [neutral, compressed])
def test_the_rest_of_an_embedding_is_not_read(write, model, tmp_path, monkeypatch):
    checkpoint = write(model, tmp_path / "model")
    read, original = [], SafetensorsFile.read

    def noting(file, name, *rows):
        tensor = original(file, name, *rows)
        read.append(len(tensor))
        return tensor

    monkeypatch.setattr(SafetensorsFile, "read", noting)
    checkpoint.rows("model.embed_tokens.weight", 20, 31)
    assert set(read) == {11}
