"""GPTQ and AWQ folders in vLLM itself: right ones pass, and mistakes of a conversion are caught.

And what it selects for every recipe is what docs/runtimes.md says. Without vLLM these tests say that they are skipped;
`make test-vllm` has it, in a virtual environment for itself, since it brings its own releases of what qtool builds on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import schemes
from qtool.artifact.awq import AWQ
from qtool.artifact.gptq import GPTQ
from qtool.errors import VerifyError
from qtool.evaluate.proof import prove
from qtool.formats._spelling import parse_format
from tests.artifact.conftest import quantize as in_memory
from tests.conftest import make_tokenizer

pytestmark = [pytest.mark.proven, pytest.mark.timeout(1800)]  # it starts for minutes on a busy processor
FORMATS = {GPTQ: "int4-g128", AWQ: "int4-g128-asym"}
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module", autouse=True)
def vllm():
    return pytest.importorskip("vllm", reason="needs vLLM; `make test-vllm` has it")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Qwen2, whose queries, keys and values have biases."""
    config = Qwen2Config(**SIZES, num_key_value_heads=2, vocab_size=512, max_position_embeddings=256)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).float().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder := tmp_path_factory.mktemp("qwen2"))
    make_tokenizer().save_pretrained(folder)
    return folder


def written(artifact, source, out):
    """An artifact, opened, and what it was written from."""
    model = in_memory(source, parse_format(FORMATS[type(artifact)]))
    artifact.write(model, out, {})
    return artifact.open(out), model


@pytest.mark.parametrize("kind", [GPTQ, AWQ])
def test_vllm_computes_what_we_compute(kind, source, tmp_path):
    found = prove(kind(), *written(kind(), source, tmp_path))
    assert found.reader.startswith("vLLM ") and found.tokens == 24
    assert found.distance < 5e-3


def permuted(tensors):
    """Columns of the packed queries in another order."""
    name = "model.layers.0.self_attn.q_proj.qweight"
    tensors[name] = tensors[name].flip(1).contiguous()


MISTAKES = {
    "permutation": permuted,
    "norm": lambda tensors: tensors["model.layers.0.input_layernorm.weight"].add_(1.0),
    "bias": lambda tensors: tensors["model.layers.0.self_attn.q_proj.bias"].zero_(),
}


@pytest.mark.parametrize("mistake", [*sorted(MISTAKES), "rope"])
def test_mistakes_are_caught(mistake, source, tmp_path):
    opened, model = written(GPTQ(), source, tmp_path)
    if mistake == "rope":
        config = json.loads((tmp_path / "config.json").read_text())
        config |= {"rope_theta": 100.0, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        tensors = load_file(tmp_path / "model.safetensors")
        MISTAKES[mistake](tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerifyError, match=r"vLLM \d.* computes something else"):
        prove(GPTQ(), opened, model)


def test_it_selects_what_the_table_says():
    assert schemes.selected(Path(sys.executable)) == schemes.stored()
