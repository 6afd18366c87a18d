"""What files hold in less room: any rows come back as they were, and sizes are those that plans foretell."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.checkpoint._base import Layer
from qtool.checkpoint.safetensors_io import SafetensorsFile
from qtool.errors import CheckpointError
from qtool.formats._base import Quantized
from qtool.formats.bilevel import Bilevel
from qtool.residuals._base import Matrix
from qtool.store.manifest import packed
from qtool.store.sizes import matrix_infos
from qtool.store.tight import loosened

FMT = Bilevel(bits=3, group=32, rows=8)
W = torch.randn(21, 160, generator=torch.Generator().manual_seed(1)) * 0.1


@pytest.fixture
def file(tmp_path):
    params = FMT.fit(W)
    tensors = packed(Matrix(Quantized(FMT.snap(W, params), params, FMT)))
    save_file(tensors, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors", params


def test_files_are_as_small_as_the_format_says(file):
    tensors = load_file(file[0])
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "weight.codes": (21, 60),
        "weight.scale": (21, 2),  # 5 codes of 3 bits
        "weight.zero": (21, 2),
        **{f"weight.{name}": (3, 5) for name in ("scale_step", "scale_low", "zero_step", "zero_low")},
    }
    infos = matrix_infos(Layer(FMT), 21, 160)
    assert {name: (i.shape, i.dtype) for name, i in infos.items()} == {
        name: (tuple(t.shape), t.dtype) for name, t in tensors.items()
    }
    assert 8 * sum(t.nbytes for t in tensors.values()) == FMT.storage_bits(21, 160)


@pytest.mark.parametrize("rows", [(0, 21), (0, 1), (7, 9), (8, 16), (13, 21), (20, 21)])
def test_any_rows_come_back(file, rows):
    path, params = file
    source = SafetensorsFile(path)
    for name, wanted in params.items():
        assert torch.equal(loosened(source, f"weight.{name}", FMT, *rows, 160), wanted[slice(*rows)]), name


def test_codes_of_another_type_are_refused(file):
    path, _ = file
    save_file(load_file(path) | {"weight.zero": torch.zeros(21, 2)}, path)
    with pytest.raises(CheckpointError, match=r"weight\.zero: wanted codes of 3 bits, found float32"):
        loosened(SafetensorsFile(path), "weight.zero", FMT, 0, 21, 160)
