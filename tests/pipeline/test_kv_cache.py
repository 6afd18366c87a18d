"""Rounded KV caches, against transformers with hooks in its attention, from recipe to artifact."""

from __future__ import annotations

import math

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
        model.get_submodule(name).weight.data = found.matrix(name).decode()
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


def test_groups_of_a_tokens_heads_share_exponents(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("qwen3")
    path = recipe(tmp_path, "{keys: bfp4-g8, values: int4-g16}")
    run(QuantizeOptions(str(source), path, tmp_path / "out", dtype="fp32"))
    found = Qtool().open(tmp_path / "out")
    assert (found.cache.format.label, found.cache.statics) == ("bfp4-g8 keys and int4-g16 values", {})

    def rounded(_, keys, values):
        groups = keys.unflatten(-1, (-1, 8))
        step = groups.abs().amax(-1, keepdim=True).log2().floor().exp2() / 4
        yield ((groups / step).round().clamp(-7, 7) * step).flatten(-2)
        groups = values.unflatten(-1, (-1, 16))
        scale = groups.abs().amax(-1, keepdim=True) / 7.5
        yield ((groups / scale).round().clamp(-8, 7) * scale).flatten(-2)

    assert_simulates(found, source, rounded)
    with pytest.raises(PlanError, match="bfp4-g24: heads of 32 columns are not divisible by 24"):
        run(QuantizeOptions(str(source), recipe(tmp_path, "bfp4-g24"), tmp_path / "other", dtype="fp32"))


def sylvester(order):
    """Sylvester's Hadamard matrix over sqrt(order), entry by entry: 1, or -1 for an odd number of bits in common."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(order)] for i in range(order)]
    return torch.tensor(signs, dtype=torch.float32) / order**0.5


@pytest.mark.parametrize("run_of", [16, 32])
def test_runs_of_keys_are_turned_before_they_are_rounded_and_queries_with_them(run_of, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("qwen3")
    path = recipe(tmp_path, f"{{keys: {spelled('token', 4, False)}, values: fp8-head, hadamard: {run_of}}}")
    report = run(QuantizeOptions(str(source), path, tmp_path / "out", dtype="fp32"))
    found = Qtool().open(tmp_path / "out")
    label = f"Hadamard matrices of {run_of}, then int4-token-asym"
    assert found.cache.format.label == f"{label} keys and fp8-head values"
    assert [entry.keys for entry in report.kv_cache] == [label] * 3
    h = torch.block_diag(*[sylvester(run_of)] * (32 // run_of))
    tokens = load_tokens(load_recipe(path).calibration, open_checkpoint(str(source)))

    def keys_of(keys):
        x = keys @ h
        scale, zero = covering(x, "token", 4, False)
        return ((x / scale + zero).round().clamp(-8, 7) - zero) * scale @ h.T

    def rounded(block, keys, values):
        scale = torch.tensor([s.scale for s in found.cache.statics[block][1]]).view(1, -1, 1, 1)
        yield keys_of(keys)
        yield (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    for block, (query, key, value, scaling) in collected(quantized(source, found), tokens).items():
        weights, _ = by_formula(query @ h, keys_of(key) @ h, value, scaling)  # as a runtime computes it
        exact = by_formula(query, key, value, scaling)[0]
        assert report.kv_cache[block].scores_error_db == pytest.approx(decibels(exact, weights), abs=0.08)
    assert_simulates(found, source, rounded)


def test_scales_of_turned_keys_cover_them_where_they_are_turned(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("qwen3")
    path = recipe(tmp_path, "{keys: fp8-head, values: fp8-head, hadamard: 32}")
    run(QuantizeOptions(str(source), path, tmp_path / "out", dtype="fp32"))
    found = Qtool().open(tmp_path / "out")
    tokens = load_tokens(load_recipe(path).calibration, open_checkpoint(str(source)))
    for block, (_, key, _, _) in collected(quantized(source, found), tokens).items():
        largest = (key @ sylvester(32)).abs().amax((0, 2, 3))
        assert [s.scale * 448 for s in found.cache.statics[block][0]] == pytest.approx(largest.tolist(), rel=2**-8)


def covering(x, granularity, bits, symmetric):
    """(scale, zero point) of keys or values, [S, A, T, D], as [1, A or 1, T or 1, D or 1]."""
    shared = {"head": (0, 2, 3), "channel": (0, 2), "token": (3,)}[granularity]
    low, high = x.amin(shared, keepdim=True).clamp(max=0), x.amax(shared, keepdim=True).clamp(min=0)
    if symmetric:
        return torch.maximum(-low, high) / (2 ** (bits - 1) - 0.5), torch.zeros_like(low)
    scale = (high - low) / (2**bits - 1)
    return scale, (-(2 ** (bits - 1)) - low / scale).round()


CASES = {  # keys, values: granularity, bits, symmetric
    "per head": (("head", 8, True), ("head", 8, False)),
    "keys per channel": (("channel", 4, False), ("token", 4, False)),
    "symmetric channels": (("channel", 8, True), ("head", 4, True)),
}


def spelled(granularity, bits, symmetric):
    told = f"type: int, bits: {bits}, group: {granularity}, symmetric: {str(symmetric).lower()}"
    return f"{{{told}, scales: minmax, scale_dtype: fp32}}"


def collected(model, tokens):
    """Queries, keys and values of every block, [S, heads, T, D] each, and how scores are scaled."""
    seen = {}

    def attention(module, query, key, value, *args, scaling, **kwargs):
        seen[module.layer_idx] = query, key, value, scaling
        return sdpa_attention_forward(module, query, key, value, *args, scaling=scaling, **kwargs)

    AttentionInterface.register("collected", attention)
    model.set_attn_implementation("collected")
    with torch.no_grad():
        model(tokens, use_cache=False)
    return seen


def by_formula(query, key, value, scaling):
    """Softmax weights and outputs of causal attention with grouped heads."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1).double() for x in (key, value))
    scores = (query.double() @ key.transpose(2, 3) * scaling).masked_fill(
        torch.ones(key.shape[2], key.shape[2]).triu(1).bool(), -torch.inf
    )
    return scores.softmax(-1), scores.softmax(-1) @ value


def decibels(wanted, found):
    return 10 * math.log10(float(wanted.square().sum() / (wanted - found).square().sum()))


@pytest.mark.parametrize("case", CASES)
def test_each_head_or_channel_has_its_scale_and_attention_its_error(case, tiny_checkpoint, tmp_path):
    source, sides = tiny_checkpoint("qwen3"), CASES[case]
    path = recipe(tmp_path, "{{keys: {}, values: {}}}".format(*(spelled(*side) for side in sides)))
    report = run(QuantizeOptions(str(source), path, tmp_path / "out", dtype="fp32"))
    found = Qtool().open(tmp_path / "out")
    tokens = load_tokens(load_recipe(path).calibration, open_checkpoint(str(source)))
    seen = collected(quantized(source, found), tokens)
    kept = {}

    def rounded(block, *cached):
        pairs = []
        for x, side, scales in zip(cached, sides, kept[block], strict=True):
            granularity, bits, _ = side
            scale, zero = covering(x, *side) if granularity == "token" else scales
            q = (x / scale + zero).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            pairs.append((q - zero) * scale)
        return pairs

    assert [(entry.block, entry.keys) for entry in report.kv_cache] == [
        (i, found.cache.format.keys.label) for i in range(3)
    ]
    for block, (query, key, value, scaling) in seen.items():
        kept[block] = [covering(x, *side) for x, side in zip((key, value), sides, strict=True)]
        for (scale, zero), statics, side in zip(kept[block], found.cache.statics[block], sides, strict=True):
            if side[0] == "token":
                assert statics == ()
                continue
            mine = [torch.tensor(numbers, dtype=torch.float32) for numbers in zip(*statics, strict=True)]
            torch.testing.assert_close(mine[0], scale.flatten(), rtol=1e-4, atol=0)
            assert int((mine[1] != zero.flatten()).sum()) <= 1  # a tie
            scale.copy_(mine[0].view_as(scale))
            zero.copy_(mine[1].view_as(zero))
        exact = by_formula(query, key, value, scaling)
        approximate = by_formula(query, *rounded(block, key, value), scaling)
        entry = report.kv_cache[block]
        assert entry.scores_error_db == pytest.approx(decibels(exact[0], approximate[0]), abs=0.08)
        assert entry.outputs_error_db == pytest.approx(decibels(exact[1], approximate[1]), abs=0.08)
    assert_simulates(found, source, rounded)


def test_what_a_layout_cannot_say_is_refused(tiny_checkpoint, tmp_path):
    source = str(tiny_checkpoint("qwen3"))
    with pytest.raises(PlanError, match="awq cannot hold this model: it cannot say how a KV cache is quantized"):
        run(QuantizeOptions(source, recipe(tmp_path, "int4-token", "awq"), tmp_path / "out"))
    with pytest.raises(RecipeError, match="wanted scales per tensor, head, channel or token, or of groups in a head"):
        run(QuantizeOptions(source, recipe(tmp_path, "nvfp4"), tmp_path / "out"))
    turned = "{keys: fp8-tensor, values: fp8-tensor, hadamard: RUN}"
    for layout in ("compressed-tensors", "modelopt"):
        with pytest.raises(PlanError, match="not Hadamard matrices of 32, then fp8-tensor keys and fp8-tensor values"):
            run(QuantizeOptions(source, recipe(tmp_path, turned.replace("RUN", "32"), layout), tmp_path / "out"))
    with pytest.raises(PlanError, match="keys of 32 channels cannot be cut into runs of 64"):
        run(QuantizeOptions(source, recipe(tmp_path, turned.replace("RUN", "64")), tmp_path / "out"))
    with pytest.raises(RecipeError, match="hadamard: no run of keys: wanted a power of two, such as 16, 32, 64 or 128"):
        run(QuantizeOptions(source, recipe(tmp_path, turned.replace("RUN", "12")), tmp_path / "out"))
