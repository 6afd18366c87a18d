"""The error of rounded caches: weights of each family's own attention, and ratios against plain sums."""

from __future__ import annotations

import math

import pytest
import torch

from qtool.calibrate.attention import LENGTH, SAMPLES, Weighing, attended, attention_errors, few
from qtool.calibrate.cache import RoundedCache, from_rows, in_rows, quantize_cached
from qtool.calibrate.hidden import Hidden
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Static
from qtool.checkpoint.hf import HFCheckpoint
from qtool.formats._spelling import parse_format
from qtool.recipe.cache import parse_cache
from tests.calibrate.conftest import load_reference

TOKENS = torch.arange(3, 43).view(2, 20)


def walker_of(folder):
    return Walker(HFCheckpoint(folder), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3", "gpt_oss", "mistral-sliding"])
def test_weights_are_those_that_transformers_gives(family, tiny_checkpoint, sliding):
    folder = sliding if family == "mistral-sliding" else tiny_checkpoint(family)
    walker = walker_of(folder)
    with torch.no_grad():
        wanted = load_reference(folder)(TOKENS, output_attentions=True).attentions
    hidden = walker.embed(TOKENS)
    for i, weights in enumerate(wanted):
        block = walker.load_block(i)
        with torch.inference_mode():
            found = attended(walker, block, i, hidden, Weighing(None))
        found = found.view(2, 20, -1, 20).transpose(1, 2)
        torch.testing.assert_close(found, weights, rtol=1e-4, atol=1e-5)
        walker.advance(block, i, hidden)


def test_ratios_are_those_of_weights_and_outputs(tiny_checkpoint):
    walker = walker_of(tiny_checkpoint("llama"))
    block, hidden = walker.load_block(0), walker.embed(TOKENS)
    cache = RoundedCache(parse_cache({"keys": "int3-token", "values": "fp8-head"}), ((), (Static(0.01), Static(0.02))))
    found = attention_errors(walker, block, 0, hidden, cache)
    with torch.inference_mode():
        exact, rounded = (attended(walker, block, 0, hidden, Weighing(c)).double() for c in (None, cache))
        assert found.scores_db == pytest.approx(decibels(exact, rounded), abs=1e-3)
        exact, rounded = (attended(walker, block, 0, hidden, c).double() for c in (None, cache))
        assert found.outputs_db == pytest.approx(decibels(exact, rounded), abs=1e-3)
    assert 5 < found.outputs_db < found.scores_db + 10 < 60
    assert hidden.values.equal(walker.embed(TOKENS).values)


def decibels(wanted, found):
    return 10 * math.log10(float(wanted.square().sum() / (wanted - found).square().sum()))


def test_only_the_beginning_is_looked_at():
    hidden = Hidden(SAMPLES + 2, LENGTH + 5, 3, torch.float32)
    hidden.values.copy_(torch.arange(hidden.values.numel()).view(hidden.values.shape))
    kept = hidden.values.clone()
    part = few(hidden)
    hidden[slice(None)] = torch.zeros_like(kept)
    assert torch.equal(part.values, kept[:SAMPLES, :LENGTH])
    assert (part.samples, part.length) == (SAMPLES, LENGTH)


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
def test_rows_share_a_scale(granularity):
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    rows = in_rows(x, granularity)
    wanted = {
        "tensor": [x.flatten()],
        "head": [x[:, a].flatten() for a in range(3)],
        "channel": [x[:, a, :, d].flatten() for a in range(3) for d in range(4)],
    }[granularity]
    assert torch.equal(rows, torch.stack(wanted))
    assert torch.equal(from_rows(rows, granularity, x), x)


@pytest.mark.parametrize("label", ["int4-channel-asym", "int8-head", "fp8-head", "int4-tensor"])
def test_numbers_are_rounded_one_by_one(label):
    fmt, x = parse_format(label), torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    count = {"tensor": 1, "head": 2, "channel": 8}[fmt.granularity]
    statics = tuple(Static(0.1 * (i + 1), i - 3 if label.endswith("asym") else 0) for i in range(count))
    found = quantize_cached(x, fmt, statics)
    for s, a, t, d in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        scale, zero = statics[{"tensor": 0, "head": a, "channel": 4 * a + d}[fmt.granularity]]
        v = float(x[s, a, t, d]) / scale
        if label.startswith("fp8"):
            wanted = float(torch.tensor(v).to(torch.float8_e4m3fn)) * scale
        else:
            half = 2 ** (fmt.bits - 1)
            wanted = (min(max(round(v + zero), -half), half - 1) - zero) * scale
        assert float(found[s, a, t, d]) == pytest.approx(wanted, rel=1e-6)
