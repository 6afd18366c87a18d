"""Rounded KV caches, against transformers with hooks in its attention, from recipe to artifact."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qtool.artifact.qtool import Qtool
from qtool.calibrate.tokens import load_tokens
from qtool.calibrate.walker import Walker
from qtool.checkpoint.open import open_checkpoint
from qtool.errors import PlanError, RecipeError
from qtool.formats.fp import FP
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.recipe.load import load_recipe

CACHED = """
recipe: 1
name: cached
calibration: {samples: 3, length: 48}
layers:
  - {match: "*", weights: int8-channel}
kv_cache: FORMAT
export: [{to: LAYOUT}]
"""
COVERING = "{type: fp, element: e4m3, group: tensor, scales: minmax}"
TOKENS = torch.arange(4, 44).view(1, -1)


def recipe(folder, fmt, layout="qtool"):
    path = folder / "cached.yaml"
    path.write_text(CACHED.replace("FORMAT", fmt).replace("LAYOUT", layout))
    return str(path)


def quantized(folder, found):
    """transformers' model with decoded weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name in found.layers:
        model.get_submodule(name).weight.data = found.quantized(name).decode()
    return model


def forward(model, tokens, see):
    """Logits, with keys and values, [S, A, T, D], as `see(block, keys, values)` gives them back to attention."""

    def attention(module, query, key, value, *args, **kwargs):
        return sdpa_attention_forward(module, query, *see(module.layer_idx, key, value), *args, **kwargs)

    AttentionInterface.register("seen", attention)
    model.set_attn_implementation("seen")
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def walked(found):
    walker = Walker(found, torch.device("cpu"), torch.float32)
    hidden = walker.embed(TOKENS)
    for i in range(len(walker.blocks)):
        walker.advance(walker.load_block(i), i, hidden)
    return walker.logits(hidden, 0)


def assert_simulates(found, source, see):
    """Our logits are those of a model that rounds as `see` does."""
    wanted = forward(quantized(source, found), TOKENS, see)[0]
    plain = forward(quantized(source, found), TOKENS, lambda _, k, v: (k, v))[0]
    assert float((walked(found) - wanted).norm() / (wanted - plain).norm()) < 0.02


def test_scales_cover_keys_and_values_behind_the_rotary_embedding(tiny_checkpoint, tmp_path):
    source, path = tiny_checkpoint("qwen3"), recipe(tmp_path, COVERING)
    run(QuantizeOptions(str(source), path, tmp_path / "out", dtype="fp32"))
    found = Qtool().open(tmp_path / "out")
    assert isinstance(found.cache.format.keys, FP)
    largest = {}

    def see(block, keys, values):
        largest[block] = float(keys.abs().max()), float(values.abs().max())
        return keys, values

    tokens = load_tokens(load_recipe(path).calibration, open_checkpoint(str(source)))
    forward(quantized(source, found), tokens, see)
    assert len(found.cache.statics) == len(largest) == 3
    for block, statics in found.cache.statics.items():
        assert [s.scale * 448 for (s,) in statics] == pytest.approx(largest[block], rel=2**-8)  # bfloat16 has 8 digits

    def rounded(block, *cached):
        scales = [s.scale for (s,) in found.cache.statics[block]]
        pairs = zip(cached, scales, strict=True)
        return ((x / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s for x, s in pairs)

    assert_simulates(found, source, rounded)


def test_every_tokens_heads_are_rounded_by_themselves(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("qwen3")
    run(QuantizeOptions(str(source), recipe(tmp_path, "int4-token"), tmp_path / "out", dtype="fp32"))
    found = Qtool().open(tmp_path / "out")
    assert (found.cache.format.label, found.cache.statics) == ("int4-token", {})

    def rounded(_, *cached):
        for x in cached:
            scale = x.abs().amax(-1, keepdim=True) / 7.5
            yield (x / scale).round().clamp(-8, 7) * scale

    assert_simulates(found, source, rounded)


def test_what_a_layout_cannot_say_is_refused(tiny_checkpoint, tmp_path):
    source = str(tiny_checkpoint("qwen3"))
    with pytest.raises(PlanError, match="awq cannot hold this model: it cannot say how a KV cache is quantized"):
        run(QuantizeOptions(source, recipe(tmp_path, "int4-token", "awq"), tmp_path / "out"))
    with pytest.raises(RecipeError, match="wanted one scale per tensor, head, channel or token, such as fp8-head"):
        run(QuantizeOptions(source, recipe(tmp_path, "int4-g32"), tmp_path / "out"))
