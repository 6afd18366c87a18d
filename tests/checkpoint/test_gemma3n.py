"""Gemma 3n in llama.cpp, which knows by heart how many blocks share keys and are sparse: a tiny model has as many.

llama.cpp looks its activation up in a table of 16-bit floats: gates are so large here that it is one side of it or the
other. And where activations are sparse, it divides the sum of squares by one less than there are numbers, which matters
where there are few; transformers is made to do so as well.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma3nConfig
from transformers.models.gemma3n import modeling_gemma3n

from benchmarks import tiny
from benchmarks.architectures import logits_of
from benchmarks.tiny import save_tiny
from qtool.api import quantize
from qtool.artifact.gguf import GGUF
from qtool.checkpoint.conversions._base import conversion_of
from qtool.checkpoint.hf import HFCheckpoint
from qtool.checkpoint.language import LanguageModel
from qtool.errors import CheckpointError
from qtool.evaluate.llamacpp import try_file
from qtool.evaluate.twin import prove_twin
from qtool.models import fit
from tests.artifact.conftest import InMemory
from tests.conftest import make_tokenizer

KIND, COUNT = "gemma3n_text", 25
FIELDS = {
    "layer_types": None,
    "hidden_size_per_layer_input": 256,
    "laurel_rank": 64,
    "vocab_size_per_layer_input": 500,
    "pad_token_id": 499,
}
TOKENS = [1 + (7 * i * i + 3 * i) % 480 for i in range(39)] + [505]
"""The last one has no embeddings for blocks."""


def of(count, width=96):
    """What config.json says of so many blocks of such a width."""
    sparse = [0.95] * 10 + [0.0] * (count - 10)
    told = {"num_hidden_layers": count, "num_kv_shared_layers": count - 20, "activation_sparsity_pattern": sparse}
    return {**FIELDS, **told, "intermediate_size": [width] * count}


def calm(name):
    """What a parameter is multiplied with, so that rounding stays small: see above, and attention is not sharp."""
    return 1e4 if "gate" in name else 0.25 if "q_norm" in name else 1.0


def save(folder, fields):
    """Saves a tiny model. Returns it."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setitem(tiny.PARTICULAR, KIND, fields)
        model = save_tiny(KIND, folder)
        for name, parameter in model.named_parameters():
            parameter.mul_(calm(name))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture
def one_less(monkeypatch):
    """Has transformers divide as llama.cpp does."""
    own = torch.std
    monkeypatch.setattr(torch, "std", lambda x, dim, keepdim, unbiased: own(x, dim=dim, keepdim=keepdim))


def distance(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def test_llama_cpp_computes_what_transformers_computes(one_less, tmp_path):
    model = save(tmp_path, of(COUNT))
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
    source = HFCheckpoint(tmp_path)
    reason = GGUF().supports(source).reason
    assert "changed as llama.cpp wants them (embeddings for every block of all tokens) if GGUF is all" in reason
    changed = InMemory(fit(source, ["gguf"]), lambda module: None)
    (out := tmp_path / "out").mkdir()
    (path,) = GGUF().write(changed, out, {})
    assert path.stat().st_size == GGUF().footprint(changed, {}).total
    found = try_file(path, TOKENS)
    assert distance(found, wanted) < 1e-4 and distance(1.01 * found, wanted) > 5e-3
    back = GGUF().open(path)
    assert back.config["model_type"] == KIND and prove_twin(GGUF(), back) is None
    assert distance(logits_of(back, torch.tensor([TOKENS]))[0], wanted) < 1e-5
    assert back.names() == changed.names()
    for name in changed.names():
        assert torch.equal(back.tensor(name), changed.tensor(name))


class Tower(torch.nn.Module):
    """In place of what sees and hears, which packages compute that are not installed."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 4))


@pytest.mark.slow
def test_the_language_model_of_the_whole(one_less, monkeypatch, tmp_path):
    build = modeling_gemma3n.AutoModel.from_config
    parts = SimpleNamespace(
        from_config=lambda config, **more: build(config, **more) if KIND in str(config) else Tower()
    )
    monkeypatch.setattr(modeling_gemma3n, "AutoModel", parts)
    monkeypatch.setitem(tiny.PARTICULAR, KIND, of(COUNT))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        config = Gemma3nConfig(text_config=tiny.tiny_config(KIND).to_dict())
        model = modeling_gemma3n.Gemma3nForConditionalGeneration(config).float().eval()
        for name, parameter in model.model.language_model.named_parameters():
            parameter.normal_(float(parameter.ndim == 1), parameter.shape[-1] ** -0.5)
            parameter.mul_(calm(name))
        wanted = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    changed = InMemory(fit(HFCheckpoint(tmp_path), ["gguf"]), lambda module: None)
    part = GGUF().part(changed)
    assert isinstance(part, LanguageModel) and not any("tower" in name for name in part.names())
    (out := tmp_path / "out").mkdir()
    (path,) = GGUF().write(changed, out, {})
    assert distance(try_file(path, TOKENS), wanted) < 1e-4
    assert GGUF().open(path).names() == part.names()


@pytest.mark.proven
@pytest.mark.slow
def test_a_run_rounds_it_and_proves_it(tmp_path):
    save(folder := tmp_path / "model", of(21, 1024))
    layers = [
        {"match": "re:.*layers.[0-3][.].*(self_attn|mlp|laurel).*_(proj|left|right)", "weights": "q8_0"},
        {"match": "model.embed_tokens", "weights": "q6_k"},
        {"match": "*", "keep": True},
    ]
    asked = {"recipe": 1, "name": "test", "layers": layers, "export": [{"to": "gguf"}]}
    report = quantize(str(folder), asked, tmp_path / "out", device="cpu", dtype="fp32")
    assert report.artifacts[0].verified and report.artifacts[0].proof.words.startswith("runs in llama.cpp")
    assert len(GGUF().open(tmp_path / "out").layers) > 30


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"num_kv_shared_layers": 6}, "num_kv_shared_layers only: wanted 5, found 6"),
        ({"activation_sparsity_pattern": [0.95] * 9 + [0.0] * 16}, "one activation_sparsity_pattern only"),
        ({"intermediate_size": [96] * 24 + [128]}, "one intermediate_size only"),
        ({"layer_types": ["sliding_attention", "full_attention"] * 12 + ["full_attention"]}, "one layer_types only"),
        ({"laurel_rank": 8}, "one laurel_rank only: wanted 64, found 8"),
        ({"vocab_size_per_layer_input": 600}, "one vocab_size_per_layer_input only: wanted 512, found 600"),
    ],
)
def test_what_llama_cpp_does_not_know_is_refused(fields, why, monkeypatch):
    told = {"vocab_size_per_layer_input": 512, **fields}
    monkeypatch.setitem(tiny.PARTICULAR, KIND, {**of(COUNT), **told})
    with pytest.raises(CheckpointError, match=why):
        conversion_of(KIND).metadata(tiny.tiny_config(KIND).to_dict())
