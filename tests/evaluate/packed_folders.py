"""GPTQ and AWQ folders of a tiny model, right ones and such with the mistakes that conversions make."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from qtool.artifact.awq import AWQ
from qtool.artifact.gptq import GPTQ
from qtool.formats._spelling import parse_format
from tests.artifact.conftest import quantize as in_memory
from tests.conftest import make_tokenizer

FORMATS = {GPTQ: "int4-g128", AWQ: "int4-g128-asym"}
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
MISTAKES = ("bias", "norm", "permutation", "rope")


def saved(folder: Path) -> Path:
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
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def written(artifact, source, out, spelling=""):
    """An artifact, opened, and what it was written from."""
    model = in_memory(source, parse_format(spelling or FORMATS[type(artifact)]))
    artifact.write(model, out, {})
    return artifact.open(out), model


def spoil(folder: Path, mistake: str) -> None:
    """Makes one of `MISTAKES` in a GPTQ folder."""
    if mistake == "rope":
        config = json.loads((folder / "config.json").read_text())
        config |= {"rope_theta": 100.0, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
        (folder / "config.json").write_text(json.dumps(config))
        return
    tensors = load_file(folder / "model.safetensors")
    if mistake == "norm":
        tensors["model.layers.0.input_layernorm.weight"].add_(1.0)
    elif mistake == "bias":
        tensors["model.layers.0.self_attn.q_proj.bias"].zero_()
    else:
        name = "model.layers.0.self_attn.q_proj.qweight"  # columns in another order
        tensors[name] = tensors[name].flip(1).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
