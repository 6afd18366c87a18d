"""Models without a family file, quantized and read by transformers, which has to compute what we say it does."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.architectures import ALIKE, attempt, divergence
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


def test_divergence_notices_a_factor():
    logits = torch.randn(2, 5, 64)
    assert divergence(logits, logits) == 0 < ALIKE < divergence(logits, logits * 1.05)
