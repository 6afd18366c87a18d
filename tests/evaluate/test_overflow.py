"""Numbers that overflow on the way through a model end an evaluation or a calibration, and say where."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.errors import NumericsError
from qtool.pipeline.calibrate import CalibrateOptions
from qtool.pipeline.calibrate import run as calibrate
from qtool.pipeline.evaluate import EvaluateOptions
from qtool.pipeline.evaluate import run as evaluate

RECIPE = (
    "recipe: 1\nname: r\ncalibration: {samples: 2, length: 32}\nlayers: [{match: '*', weights: q8_0}]\nexport: []\n"
)


@pytest.fixture
def scaled(tiny_checkpoint, tmp_path):
    """A model one of whose matrices is so large that its outputs overflow; every weight is finite."""

    def make(name, factor):
        folder = tmp_path / "model"
        shutil.copytree(tiny_checkpoint("llama-biased"), folder)
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            if name in tensors:
                tensors[name] = torch.full_like(tensors[name], factor)
                assert tensors[name].isfinite().all()
            save_file(tensors, path, {"format": "pt"})
        return folder

    return make


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Large numbers are the beginning of no wisdom. " * 30)
    return path


def test_an_evaluation_names_the_block(scaled, text):
    folder = scaled("model.layers.1.mlp.down_proj.weight", 3e38)
    with pytest.raises(NumericsError, match=r"behind block 1 of .*model.* is not finite: found -?(inf|nan)"):
        evaluate(EvaluateOptions(str(folder), None, text, context=16, chunks=2, device="cpu"))


def test_a_calibration_names_the_block(scaled, tmp_path):
    folder = scaled("model.layers.0.mlp.down_proj.weight", 3e38)
    (tmp_path / "r.yaml").write_text(RECIPE)
    with pytest.raises(NumericsError, match="hidden states behind block 0 of"):
        calibrate(
            CalibrateOptions(str(folder), str(tmp_path / "r.yaml"), tmp_path / "stats", device="cpu", dtype="fp32")
        )


def test_logits_that_overflow_are_no_evaluation(scaled, text):
    folder = scaled("lm_head.weight", 3e38)
    with pytest.raises(NumericsError, match=r"logits of .*model, chunk 1 is not finite"):
        evaluate(EvaluateOptions(str(folder), None, text, context=16, chunks=2, device="cpu"))
