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


@pytest.mark.parametrize("name", ["self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_an_evaluation_names_block_and_layer(name, scaled, text):
    folder = scaled(f"model.layers.1.{name}.weight", 3e38)
    begins = rf"it begins in the outputs of model\.layers\.1\.{name}, computed in float32"
    message = rf"behind block 1 of .*model is not finite: found -?(inf|nan) at .* values; {begins}"
    with pytest.raises(NumericsError, match=message):
        evaluate(EvaluateOptions(str(folder), None, text, context=16, chunks=2, device="cpu"))


def measure(folder, place, source="builtin"):
    recipe = place / "r.yaml"
    recipe.write_text(RECIPE.replace("{samples", f"{{data: {source}, samples"))
    calibrate(CalibrateOptions(str(folder), str(recipe), place / "stats", device="cpu", dtype="fp32"))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("mlp.down_proj", r"tensor of hidden states behind block 0 of .*outputs of model\.layers\.0\.mlp\.down_proj,"),
        ("self_attn.v_proj", r"inputs of model\.layers\.0\.self_attn\.o_proj of .*model are not finite"),
        ("mlp.up_proj", r"inputs of model\.layers\.0\.mlp\.down_proj of .*model are not finite"),
    ],
)
def test_a_calibration_names_block_and_layer(name, place, scaled, tmp_path):
    folder = scaled(f"model.layers.0.{name}.weight", 3e38)
    with pytest.raises(NumericsError, match=place):
        measure(folder, tmp_path)
    assert not (tmp_path / "stats").exists()


def test_so_does_one_whose_inputs_have_infinite_squares(scaled, tmp_path):
    """All numbers are finite, their sums of squares are not."""
    folder = scaled("model.layers.1.post_attention_layernorm.weight", 1e25)
    with pytest.raises(NumericsError, match=r"inputs of model\.layers\.1\.mlp\.gate_proj .* found a channels of inf"):
        measure(folder, tmp_path)


def test_so_does_one_with_text_that_the_model_writes(scaled, tmp_path):
    folder = scaled("model.layers.1.mlp.up_proj.weight", 3e38)
    with pytest.raises(
        NumericsError, match=r"logits is not finite: .* in the outputs of model\.layers\.1\.mlp\.up_proj"
    ):
        measure(folder, tmp_path, "self")


def test_logits_that_overflow_are_no_evaluation(scaled, text):
    folder = scaled("lm_head.weight", 3e38)
    with pytest.raises(NumericsError, match=r"logits of .*model, chunk 1 is not finite"):
        evaluate(EvaluateOptions(str(folder), None, text, context=16, chunks=2, device="cpu"))
