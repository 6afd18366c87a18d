"""Models without a family file, quantized and read by transformers, which has to compute what we say it does."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.architectures import ALIKE, attempt, divergence, recipe
from benchmarks.tiny import save_tiny
from qtool.errors import PlanError
from qtool.pipeline.prepare import prepare
from qtool.recipe.load import load_recipe
from tests.conftest import make_tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_next", "bert", "gemma3n_text", "llama4_text"])
def test_transformers_reads_what_was_written(kind, tmp_path):
    """Experts and linear attention; a layer outside of blocks that has to be left alone; shared keys and values;
    experts that are one tensor and become layers."""
    row = attempt(kind, make_tokenizer(), tmp_path)
    assert row.passed, row.why
    assert row.divergence is not None and row.divergence < ALIKE
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    if kind == "bert":
        assert "cls.predictions.transform.dense" in config["ignore"]


@pytest.mark.parametrize(
    ("kind", "wanted", "why"),
    [
        ("olmo2", {"kv_cache": "fp8-tensor"}, None),
        ("bloom", {"kv_cache": "fp8-tensor"}, None),
        ("qwen3_5_text", {"kv_cache": "fp8-tensor"}, "qwen3_5_text models: kv_cache: block 0 keeps something else"),
        ("deepseek_v3", {"kv_cache": "fp8-tensor"}, "kv_cache: block 0 keeps something else"),
        ("olmo2", {"calibration": {"token_weights": {}}}, "token_weights: the loss's gradients begin at the output"),
        ("olmo2", {"finish": ["distill"]}, "finish: distill: the loss's gradients"),
    ],
)
def test_what_only_family_files_tell_is_refused_in_the_plan(kind, wanted, why, tmp_path):
    save_tiny(kind, tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    asked = load_recipe(recipe(tmp_path / "text.txt") | wanted)
    if why is None:
        assert prepare(str(tmp_path / "model"), asked).plan.layers
        return
    with pytest.raises(PlanError, match=why):
        prepare(str(tmp_path / "model"), asked)


def test_divergence_notices_a_factor():
    logits = torch.randn(2, 5, 64)
    assert divergence(logits, logits) == 0 < ALIKE < divergence(logits, logits * 1.05)
