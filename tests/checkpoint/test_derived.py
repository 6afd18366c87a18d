"""Models without a family file: what is found out about them, and that they compute as transformers does."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny import save_tiny
from qtool.calibrate.walker import Walker
from qtool.checkpoint.hf import HFCheckpoint
from qtool.checkpoint.modules import modules
from qtool.errors import CheckpointError

CPU = torch.device("cpu")
KINDS = [
    "qwen3_next",
    "deepseek_v3",
    "glm4",
    "cohere2",
    "granite",
    "stablelm",
    "mamba2",
    "bloom",
    "gemma4_unified_text",
    "gemma3n_text",
    "deepseek_v4",
    "olmo_hybrid",
    "zaya",
    "llama4_text",
]
"""Linear attention with experts, latent attention, norms behind, one stream for all, multipliers, biases, states,
kernels that checkpoints store apart, what routers hand on from block to block, experts that are one tensor."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder, and a few tokens with transformers' logits, of a type by name."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            model = save_tiny(kind, folder)
            tokens = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                made[kind] = folder, tokens, model(input_ids=tokens, use_cache=False).logits
        return made[kind]

    return make


def walked(folder, tokens, device=CPU):
    """Logits, block by block."""
    walker = Walker(HFCheckpoint(folder), device, torch.float32)
    hidden = walker.embed(tokens)
    for i in range(len(walker.blocks)):
        walker.advance(walker.load_block(i), i, hidden)
    return torch.stack([walker.logits(hidden, s) for s in range(len(tokens))])


def distance(found, wanted):
    return float((found - wanted).abs().max() / wanted.std())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, saved):
    folder, tokens, wanted = saved(kind)
    assert HFCheckpoint(folder).family.derived
    assert distance(walked(folder, tokens), wanted) < 1e-4
    assert distance(wanted * 1.01, wanted) > 1e-3


@pytest.mark.parametrize("kind", ["granite", "cohere2"])
def test_a_device_whose_tensors_call_it_otherwise(kind, saved):
    """As "cuda", whose tensors say "cuda:0"; what was read must not be taken for what is missing."""
    folder, tokens, _ = saved(kind)
    numbered = torch.device("cpu", 0)
    assert torch.zeros(1, device=numbered).device != numbered
    assert torch.equal(walked(folder, tokens, numbered), walked(folder, tokens))


def test_layers_that_read_the_same_input_are_found(saved):
    found = {m.name.removeprefix("model.layers."): m for m in modules(HFCheckpoint(saved("qwen3_next")[0]))}
    first = found["0.linear_attn.in_proj_qkvz"]
    assert first.reads == found["0.linear_attn.in_proj_ba"].reads != found["0.linear_attn.out_proj"].reads
    q, k = found["3.self_attn.q_proj"], found["3.self_attn.k_proj"]
    assert (q.role, q.fused, q.reads) == ("q", "model.layers.3.self_attn.qkv", k.reads)
    shared, expert = found["3.mlp.shared_expert.gate_proj"], found["3.mlp.experts.2.down_proj"]
    assert shared.reads == found["3.mlp.shared_expert_gate"].reads != q.reads
    assert (expert.shape, expert.role, expert.expert) == ((64, 32), "down", 2)
    assert found["3.mlp.shared_expert_gate"].kind == "router"
    assert found["3.mlp.experts.2.up_proj"].reads == found["3.mlp.experts.2.gate_proj"].reads


def test_experts_stored_as_one_tensor_are_the_same_model(saved, tmp_path):
    """State dicts of transformers' class hold all experts of a block in two tensors."""
    folder, tokens, wanted = saved("qwen3_next")
    stored = load_file(folder / "model.safetensors")
    for i in range(4):
        base = f"model.layers.{i}.mlp.experts"

        def take(role, e, base=base):
            return stored.pop(f"{base}.{e}.{role}_proj.weight")

        stored[f"{base}.gate_up_proj"] = torch.stack([torch.cat((take("gate", e), take("up", e))) for e in range(4)])
        stored[f"{base}.down_proj"] = torch.stack([take("down", e) for e in range(4)])
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert distance(walked(tmp_path, tokens), wanted) < 1e-4


def test_tensors_that_the_class_does_not_know_are_kept_as_they_are(saved, tmp_path):
    folder, tokens, wanted = saved("granite")
    draft = torch.arange(12, dtype=torch.int32).view(3, 4)
    save_file(load_file(folder / "model.safetensors") | {"mtp.0.proj.weight": draft}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    checkpoint = HFCheckpoint(tmp_path)
    assert torch.equal(checkpoint.tensor("mtp.0.proj.weight"), draft)
    assert "mtp.0.proj" not in {module.name for module in modules(checkpoint)}
    assert any("1 tensor" in note and "mtp" in note for note in checkpoint.notes)
    assert distance(walked(tmp_path, tokens), wanted) < 1e-4


def test_a_missing_tensor_is_named(saved, tmp_path):
    folder = saved("granite")[0]
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.2.mlp.up_proj.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"lacks 1 of the .* found no model\.layers\.2\.mlp\.up_proj\.weight"):
        HFCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("kind", "why"),
    [("gpt2", "no linear layers"), ("zamba2", "share weights|hidden states"), ("jetmoe", "cannot be followed")],
)
def test_what_does_not_go_through_says_why(kind, why, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(CheckpointError, match=f"{kind} models do not go through block by block: found .*({why})"):
        HFCheckpoint(tmp_path)


def test_counts_of_damaged_configs_are_refused(saved, tmp_path):
    config = json.loads((saved("granite")[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match="impossible num_hidden_layers"):
        HFCheckpoint(tmp_path)
