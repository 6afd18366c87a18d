"""No reader takes an infinite or missing number for a weight, wherever in a file it stands."""

from __future__ import annotations

import shutil

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qtool.errors import QtoolError
from qtool.models import open_model
from qtool.pipeline.content import read_content
from tests.fuzz.samples import write_samples


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    found = write_samples(tmp_path_factory.mktemp("samples"))
    return {name: place for name, place in found.items() if name.startswith("model-")}


def test_there_is_a_sample_of_every_layout(samples):
    assert len(samples) > 15
    for place in samples.values():
        read_content(open_model(str(place)))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_every_number_of_every_layout_is_checked(value, samples, tmp_path):
    accepted, tried = [], 0
    for sample, place in samples.items():
        for path in sorted(place.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            tensors = load_file(path)
            kinds = {
                name.rpartition(".")[2]: name for name, t in tensors.items() if t.is_floating_point() and t.numel()
            }
            for name in kinds.values():
                changed = tensors[name].float()
                changed.view(-1)[-1] = value
                changed = changed.to(tensors[name].dtype)
                if changed.isfinite().all() if changed.dtype.itemsize > 1 else not changed.float().isnan().any():
                    continue  # the type has no such number
                tried += 1
                copy = tmp_path / f"{sample}-{name}"
                shutil.copytree(place, copy)
                save_file(tensors | {name: changed}, copy / path.name, metadata)
                try:
                    read_content(open_model(str(copy)))
                except QtoolError as error:
                    assert "unexpected" not in str(error)
                else:
                    accepted.append(copy.name)
                shutil.rmtree(copy)
    assert accepted == []
    assert tried > 60
