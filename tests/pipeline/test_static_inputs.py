"""Runs whose inputs have one scale for all tokens, against plain forward passes of transformers."""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from transformers import AutoModelForCausalLM

from qtool.artifact.compressed_tensors import CompressedTensors
from qtool.artifact.compressed_tensors._kinds import spelled
from qtool.artifact.modelopt import ModelOpt
from qtool.artifact.qtool import Qtool
from qtool.calibrate.tokens import load_tokens
from qtool.calibrate.walker import Walker
from qtool.checkpoint.open import open_checkpoint
from qtool.errors import PlanError
from qtool.pipeline.calibrate import CalibrateOptions
from qtool.pipeline.calibrate import run as calibrate
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.recipe.load import load_recipe

STATIC = """
recipe: 1
name: static
calibration: {samples: 3, length: 48, propagate: PROPAGATE}
layers:
  - match: "*"
    weights: int8-channel
    method: METHOD
    activations: {type: int, bits: 8, group: tensor, scales: minmax}
export: [{to: qtool}, {to: compressed-tensors}]
"""


def recipe(folder, method="rtn", propagate="quantized"):
    path = folder / "static.yaml"
    path.write_text(STATIC.replace("METHOD", method).replace("PROPAGATE", propagate))
    return str(path)


def int8(x, static):
    return (x / static.scale).round().clamp(-128, 127) * static.scale


def nvfp4(x, static):
    """By compressed-tensors' own code."""
    told = spelled(4, "float", "tensor_group", 16, dynamic="local", scale_dtype="torch.float8_e4m3fn")
    args, multiplier = QuantizationArgs.model_validate(told), torch.tensor([1 / static.scale])
    scales, zeros = compute_dynamic_scales_and_zp(x, args, None, multiplier)
    return fake_quantize(x, scales, zeros, args, multiplier)


def largest_inputs(folder, layers, weights, tokens, rounded=int8):
    """Of every layer; with `weights`, those are put in, and inputs are rounded after they were looked at."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}

    def hook(name):
        def look(_, inputs):
            found[name] = float(inputs[0].abs().max())
            return rounded(inputs[0], layers[name].static) if weights else None

        return look

    for name in layers:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(hook(name))
        if weights:
            module.weight.data = weights.matrix(name).decode()
    with torch.no_grad():
        logits = model(tokens).logits
    return found, logits


@pytest.mark.parametrize(("method", "propagate"), [("rtn", "quantized"), ("rtn", "float"), ("gptq", "quantized")])
def test_scales_cover_what_plain_forward_passes_see(method, propagate, tiny_checkpoint, tmp_path):
    source, path = tiny_checkpoint("qwen3"), recipe(tmp_path, method, propagate)
    run(QuantizeOptions(str(source), path, tmp_path / "out", dtype="fp32"))
    found = Qtool().open(tmp_path / "out" / "qtool")
    tokens = load_tokens(load_recipe(path).calibration, open_checkpoint(str(source)))
    largest, _ = largest_inputs(source, found.layers, found if propagate == "quantized" else None, tokens)
    assert len(largest) == 3 * 7 + 1
    for name, layer in found.layers.items():
        assert layer.static.scale == pytest.approx(largest[name] / 127.5, rel=2**-8), name  # bfloat16 has 8 digits
    for first, other in (("q", "k"), ("q", "v")):
        scales = [found.layers[f"model.layers.1.self_attn.{role}_proj"].static for role in (first, other)]
        assert scales[0] == scales[1]
    again = CompressedTensors().open(tmp_path / "out" / "compressed-tensors")
    assert {n: layer.static for n, layer in again.layers.items()} == {
        n: layer.static for n, layer in found.layers.items()
    }


NVFP4 = """
recipe: 1
name: nvfp4
calibration: {samples: 3, length: 48}
layers: [{match: "*", weights: nvfp4, method: gptq, activations: nvfp4}]
export: [{to: qtool}, {to: compressed-tensors}, {to: modelopt}]
"""


def test_nvfp4_inputs_get_the_power_of_two_that_covers_them(tiny_checkpoint, tmp_path):
    source, path = tiny_checkpoint("qwen3"), tmp_path / "nvfp4.yaml"
    path.write_text(NVFP4)
    run(QuantizeOptions(str(source), str(path), tmp_path / "out", dtype="fp32"))
    found = Qtool().open(tmp_path / "out" / "qtool")
    tokens = load_tokens(load_recipe(str(path)).calibration, open_checkpoint(str(source)))
    largest, _ = largest_inputs(source, found.layers, found, tokens, nvfp4)
    assert len(largest) == 3 * 7 + 1
    for name, layer in found.layers.items():
        assert layer.static.scale == 2 ** math.ceil(math.log2(largest[name] / (6 * 448))), name
    for other in (CompressedTensors(), ModelOpt()):
        again = other.open(tmp_path / "out" / type(other).__module__.rpartition(".")[2].replace("_", "-"))
        assert again.layers == found.layers
    assert_simulates(found, source, nvfp4)


def test_evaluation_rounds_as_declared(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("qwen3")
    run(QuantizeOptions(str(source), recipe(tmp_path), tmp_path / "out", dtype="fp32"))
    assert_simulates(Qtool().open(tmp_path / "out" / "qtool"), source, int8)


def assert_simulates(found, source, rounded):
    """Our logits are those of a model whose inputs are rounded so."""
    tokens = torch.arange(4, 44).view(1, -1)
    walker = Walker(found, torch.device("cpu"), torch.float32)
    hidden = walker.embed(tokens)
    for i in range(3):
        walker.advance(walker.load_block(i), i, hidden)
    _, wanted = largest_inputs(source, found.layers, found, tokens, rounded)
    _, plain = largest_inputs(source, found.layers, None, tokens)
    assert float((walker.logits(hidden, 0) - wanted[0]).norm() / (wanted - plain).norm()) < 0.02


def test_stored_statistics_do_not_say_enough(tiny_checkpoint, tmp_path):
    source, path = str(tiny_checkpoint("qwen3")), recipe(tmp_path)
    calibrate(CalibrateOptions(source, path, tmp_path / "stats"))
    with pytest.raises(PlanError, match="inputs that holds for all tokens needs values, which it does not hold"):
        run(QuantizeOptions(source, path, tmp_path / "out", stats=tmp_path / "stats"))


def test_stored_histograms_of_the_original_model_give_the_same_scales(tiny_checkpoint, tmp_path):
    source, path, override = str(tiny_checkpoint("qwen3")), recipe(tmp_path), ("calibration.propagate=float",)
    calibrate(CalibrateOptions(source, path, tmp_path / "stats", override))
    run(QuantizeOptions(source, path, tmp_path / "stored", override, stats=tmp_path / "stats"))
    run(QuantizeOptions(source, path, tmp_path / "walked", override))
    stored, walked = (Qtool().open(tmp_path / name / "qtool").layers for name in ("stored", "walked"))
    assert stored == walked and any(layer.static for layer in stored.values())
