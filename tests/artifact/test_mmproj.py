"""Vision towers beside GGUF models: llama.cpp's mtmd makes of a picture what transformers makes of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from qtool.api import quantize
from qtool.artifact.gguf import GGUF
from qtool.artifact.gguf._vision import TOWERS, VisionFile
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import CheckpointError
from qtool.models import open_model
from tests.artifact.conftest import InMemory
from tests.conftest import make_tokenizer
from tests.mtmd import embeddings

WIDTH = 64
TEXT = {
    "vocab_size": 512,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN = {"hidden_size": 80, "intermediate_size": 96, "depth": 4, "num_heads": 2, "out_hidden_size": WIDTH}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
PARTS = {
    "gemma3": (
        TEXT | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16},
        GEMMA | {"image_size": 112, "patch_size": 14, "vision_use_head": False},
        {"mm_tokens_per_image": 4},
    ),
    "qwen2_5_vl": (TEXT | {"rope_parameters": ROPE}, QWEN | {"fullatt_block_indexes": [1, 3]}, {}),
}


def save(kind, folder, **vision):
    """A tiny model of several parts, saved; with norms and biases as if trained."""
    text, tower, others = PARTS[kind]
    config = CONFIG_MAPPING[kind](text_config=dict(text), vision_config=tower | vision, **others)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5 * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def features(model, kind, pixels):
    """transformers' embeddings of a picture, uint8 [H, W, 3]: [tokens, WIDTH]."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (TOWERS[kind].mean, TOWERS[kind].std))
    x = (torch.tensor(pixels).permute(2, 0, 1).float() / 255 - mean) / std
    if kind == "gemma3":
        found = model.model.get_image_features(x[None])
    else:  # patches of two equal pictures, four of them together
        h, w = x.shape[1] // 14, x.shape[2] // 14
        patches = x[None].repeat(2, 1, 1, 1).reshape(1, 2, 3, h // 2, 2, 14, w // 2, 2, 14)
        patches = patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(h * w, -1)
        found = model.model.get_image_features(patches, torch.tensor([[1, h, w]]))
    found = getattr(found, "pooler_output", found)
    return torch.cat([part.reshape(-1, WIDTH) for part in found])


@pytest.mark.parametrize(("kind", "size"), [("gemma3", (112, 112)), ("qwen2_5_vl", (168, 140))])
def test_mtmd_makes_of_a_picture_what_transformers_makes(kind, size, tmp_path):
    model = save(kind, tmp_path)
    (out := tmp_path / "out").mkdir()
    source = InMemory(HFCheckpoint(tmp_path), lambda module: None)
    text, beside = GGUF(mmproj=str(tmp_path)).write(source, out, {})
    assert beside.name == f"mmproj-{text.name}"
    assert GGUF.recognizes(out) and GGUF().open(out).metadata["general.type"] == "model"
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    found = torch.from_numpy(embeddings(text, beside, pixels, WIDTH))
    with torch.no_grad():
        wanted = features(model, kind, pixels)
    assert found.shape == wanted.shape
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3
    assert float((1.01 * found - wanted).norm() / wanted.norm()) > 5e-3


@pytest.mark.parametrize(
    ("kind", "vision", "why"),
    [
        ("qwen2_5_vl", {"window_size": 56}, "one window_size only: wanted 112, found 56"),
        ("qwen2_5_vl", {"fullatt_block_indexes": [1, 2]}, "one fullatt_block_indexes only"),
        ("qwen2_5_vl", {"spatial_merge_size": 1}, "one spatial_merge_size only: wanted 2, found 1"),
        ("gemma3", {"hidden_act": "gelu"}, "one hidden_act only"),
    ],
)
def test_towers_that_llama_cpp_computes_otherwise_are_refused(kind, vision, why, tmp_path):
    save(kind, tmp_path, **vision)
    model = HFCheckpoint(tmp_path)
    assert GGUF().supports(model).possible
    assert why in GGUF(mmproj=str(tmp_path)).supports(model).reason


def test_models_without_a_known_tower_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="no vision tower that is written for llama"):
        VisionFile(tmp_path)


def test_a_run_writes_both_files_and_lists_them(tmp_path):
    save("qwen2_5_vl", source := tmp_path / "model")
    layers = [{"match": "*_proj", "weights": "q8_0", "method": "rtn"}, {"match": "*", "keep": True}]
    recipe = {"recipe": 1, "name": "test", "layers": layers, "export": [{"to": "gguf", "mmproj": str(source)}]}
    (artifact,) = quantize(str(source), recipe, tmp_path / "out").artifacts
    names = sorted(file.name for file in artifact.files if file.name.endswith(".gguf"))
    assert names == ["mmproj-model-test.gguf", "model-test.gguf"]
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert "only the language model is in this file" not in card
    with pytest.raises(CheckpointError, match="found 'clip'; name the language model's file beside it"):
        open_model(tmp_path / "out" / names[0])
