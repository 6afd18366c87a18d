"""Mixtures of experts: one matrix per expert and projection, however the file stores them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool import registry
from qtool.checkpoint import hf
from qtool.checkpoint._base import TensorInfo
from qtool.checkpoint.families._base import Family
from qtool.checkpoint.families._parts import stacked
from qtool.checkpoint.hf import HFCheckpoint
from qtool.checkpoint.modules import modules
from qtool.checkpoint.safetensors_io import SafetensorsFile, SafetensorsWriter
from qtool.errors import CheckpointError
from tests.conftest import MIXTURES

CONFIG: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "num_experts": 3,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 80,
    "sliding_window": 16,
}


def family(name: str) -> Family:
    found: Family = registry.load("checkpoint/families", name)()
    return found


def write(folder: Path, like: Path, tensors: dict[str, Tensor]) -> Path:
    """A folder with the side files of another."""
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with SafetensorsWriter(folder / "model.safetensors", infos) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return folder


def state_dict(folder: Path) -> dict[str, Tensor]:
    """transformers' own, in which experts are stacked."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(params=MIXTURES)
def name(request) -> str:
    return str(request.param)


def expected(state: dict[str, Tensor], model_type: str, path: str) -> Tensor:
    """An expert's weight or bias by its name here, cut out of the stacked tensors by plain indexing."""
    whole, e = stacked(path.replace("block_sparse_moe", "mlp"))
    place, projection, kind = whole.rsplit(".", 2)
    down = projection in ("down_proj", "w2")
    tensor = state[f"{place}.{'down_proj' if down else 'gate_up_proj'}{'_bias' if kind == 'bias' else ''}"][e]
    if model_type.startswith("gpt_oss"):
        tensor = tensor.T if kind == "weight" else tensor
        return tensor if down else tensor[["gate_proj", "up_proj"].index(projection) :: 2]
    half = len(tensor) // 2
    return tensor if down else tensor[:half] if projection in ("gate_proj", "w1") else tensor[half:]


def test_stacked_and_separate_experts_read_alike(name, tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint(name)
    state = state_dict(folder)
    separate = HFCheckpoint(folder)
    fused = HFCheckpoint(write(tmp_path / "fused", folder, state))
    assert fused.names() == separate.names() == list(separate.family.shapes(separate.config))
    experts = [n for n in fused.names() if stacked(n)[1] is not None]
    assert len(experts) == 2 * 3 * separate.family.experts(separate.config) * (2 if name.startswith("gpt_oss") else 1)
    for n in fused.names():
        assert fused.info(n) == separate.info(n)
        want = expected(state, name, n) if n in experts else separate.tensor(n)
        for checkpoint in (fused, separate):
            assert torch.equal(checkpoint.tensor(n), want)
            assert checkpoint.tensor(n).is_contiguous()
            assert torch.equal(checkpoint.rows(n, 1, max(1, len(want) - 1)), want[1 : max(1, len(want) - 1)])
            assert torch.equal(checkpoint.rows(n, len(want), len(want)), want[:0])


def test_no_more_than_one_expert_is_read(tiny_checkpoint, tmp_path, monkeypatch):
    """Rows of a plain stack cost their own bytes; those of a transposed one cost the expert's matrix."""
    sizes: list[int] = []
    read = SafetensorsFile.read

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        tensor = read(*args, **kwargs)
        sizes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(SafetensorsFile, "read", counted)
    for name, path, cost in (
        ("qwen3_moe", "model.layers.1.mlp.experts.4.up_proj.weight", 5 * 64 * 4),
        ("gpt_oss", "model.layers.1.mlp.experts.3.up_proj.weight", 2 * 128 * 64 * 4),
    ):
        folder = tiny_checkpoint(name)
        checkpoint = HFCheckpoint(write(tmp_path / name, folder, state_dict(folder)))
        sizes.clear()
        checkpoint.rows(path, 10, 15)
        assert sizes == [cost]


def test_a_checkpoint_of_half_stacked_tensors(tiny_checkpoint, tmp_path):
    """A tensor that is stored twice is no model; one that is stacked wrongly neither."""
    folder = tiny_checkpoint("qwen3_moe")
    separate, state = HFCheckpoint(folder), state_dict(folder)
    own = "model.layers.0.mlp.experts.2.down_proj.weight"
    with pytest.raises(CheckpointError, match=r"experts\.2\.down_proj\.weight by itself and as part of a larger"):
        HFCheckpoint(write(tmp_path / "twice", folder, state | {own: separate.tensor(own)}))
    stack = "model.layers.1.mlp.experts.gate_up_proj"
    for i, wrong in enumerate((state[stack][:5], state[stack].mT.contiguous(), state[stack][0].clone())):
        with pytest.raises(CheckpointError, match=rf"{stack} does not fit .*: wanted \[6, 64, 64\], found \[") as e:
            HFCheckpoint(write(tmp_path / f"wrong-{i}", folder, state | {stack: wrong[:, :60] if i == 1 else wrong}))
        assert "\n" not in str(e.value)


def test_the_fingerprint_follows_what_is_stacked(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("mixtral")
    state = state_dict(folder)
    first = HFCheckpoint(write(tmp_path / "a", folder, state)).fingerprint()
    assert HFCheckpoint(write(tmp_path / "b", folder, dict(reversed(state.items())))).fingerprint() == first
    state["model.layers.0.mlp.experts.down_proj"][0, 0, 0] += 1
    assert HFCheckpoint(write(tmp_path / "c", folder, state)).fingerprint() != first


def test_what_modules_say(name, tiny_checkpoint):
    checkpoint = HFCheckpoint(tiny_checkpoint(name))
    found = {m.name: m for m in modules(checkpoint)}
    part = "block_sparse_moe" if name == "mixtral" else "mlp"
    gate, up, down = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    expert = f"model.layers.1.{part}.experts.2"
    one, two, three = (found[f"{expert}.{x}"] for x in (gate, up, down))
    assert [m.role for m in (one, two, three)] == ["gate", "up", "down"]
    assert {m.expert for m in (one, two, three)} == {2}
    assert one.reads == two.reads != three.reads
    assert one.fused == two.fused is not None
    assert three.fused is None
    assert one.stack == f"model.layers.1.{part}.experts.{gate}" != two.stack
    assert one.shape == two.shape == three.shape[::-1]
    assert len({m.reads for m in found.values() if m.expert is not None}) == 2 * 2 * checkpoint.family.experts(
        checkpoint.config
    )
    routers = [m for m in found.values() if m.kind == "router"]
    assert {m.role for m in routers} == {"router"}
    assert len(routers) == (4 if name == "qwen2_moe" else 2)
    assert all(m.stack is None and m.expert is None for m in routers)
    first = next(n for n in checkpoint.names() if n.endswith(("gate.weight", "router.weight")))
    assert f"{routers[0].name}.weight" == first


@pytest.mark.parametrize(
    ("change", "sparse"),
    [({}, [0, 1, 2, 3]), ({"mlp_only_layers": [0, 2]}, [1, 3]), ({"decoder_sparse_step": 2}, [1, 3])],
    ids=["all", "listed", "every-second"],
)
def test_blocks_without_experts(change, sparse, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("qwen3_moe", **CONFIG | {"num_hidden_layers": 4, "head_dim": 16} | change)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    checkpoint = HFCheckpoint(tmp_path)  # whose names and shapes are compared with the family's
    assert sorted({m.block for m in modules(checkpoint) if m.expert is not None}) == sparse
    if sparse != [0, 1, 2, 3]:
        with pytest.raises(CheckpointError, match="wanted experts in every block, found none in block 0"):
            checkpoint.family.gguf_metadata(checkpoint.config | {"norm_topk_prob": True})


def test_gguf_metadata():
    told = {
        name: family(name).gguf_metadata(CONFIG | family_config(name))
        for name in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
    }
    assert told["mixtral"]["llama.expert_count"] == told["qwen3_moe"]["qwen3moe.expert_count"] == 3
    assert told["mixtral"]["llama.expert_used_count"] == told["gpt_oss"]["gpt-oss.expert_used_count"] == 2
    assert told["mixtral"]["llama.feed_forward_length"] == told["qwen3_moe"]["qwen3moe.feed_forward_length"] == 96
    assert told["qwen2_moe"]["qwen2moe.expert_feed_forward_length"] == 32
    assert told["qwen3_moe"]["qwen3moe.expert_feed_forward_length"] == 32
    assert told["gpt_oss"]["gpt-oss.expert_feed_forward_length"] == 96
    assert told["qwen2_moe"]["qwen2moe.expert_shared_feed_forward_length"] == 80
    assert told["gpt_oss"]["gpt-oss.attention.sliding_window"] == 16
    assert told["mixtral"]["llama.attention.sliding_window"] == 16
    assert told["gpt_oss"]["gpt-oss.rope.scaling.type"] == "yarn"  # what silence means there
    assert told["gpt_oss"]["gpt-oss.rope.freq_base"] == 150000.0
    rope = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
    said = family("gpt_oss").gguf_metadata(CONFIG | {"rope_scaling": rope, "rope_theta": 150000})
    assert said == {key: value for key, value in told["gpt_oss"].items() if "beta" not in key}


def family_config(name: str) -> dict[str, Any]:
    return {"norm_topk_prob": name != "qwen2_moe"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "qwen3moe weighs experts: wanted norm_topk_prob: True, found False"),
        ("qwen2_moe", {"norm_topk_prob": True}, "qwen2moe weighs experts: wanted norm_topk_prob: False, found True"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 2}, "cannot hold these layer_types"),
        ("gpt_oss", {"layer_types": 7}, "cannot hold these layer_types: .* found 7"),
        ("gpt_oss", {"swiglu_alpha": 2.0}, "gpt-oss models with one swiglu_alpha only: wanted 1.702, found 2.0"),
        ("gpt_oss", {"swiglu_limit": 9.0}, "gpt-oss models with one swiglu_limit only: wanted 7.0, found 9.0"),
    ],
)
def test_gguf_has_no_word_for(name, change, message):
    with pytest.raises(CheckpointError, match=message):
        family(name).gguf_metadata(CONFIG | family_config(name) | change)


WINDOW = {"use_sliding_window": True, "sliding_window": 16}


@pytest.mark.parametrize(
    ("name", "change", "tokens"),
    [
        ("qwen2_moe", {}, 16),
        ("qwen2_moe", {"max_window_layers": 99}, 16),  # blocks before it slide, every second one
        ("qwen2_moe", {"layer_types": ["full_attention"] * 2}, None),
        ("qwen2_moe", {"use_sliding_window": False}, None),
        ("qwen3_moe", {"max_window_layers": 99}, 16),
        ("gpt_oss", {}, None),  # llama.cpp knows it
        ("qwen2", {}, None),  # 28 blocks do not slide
        ("qwen2", {"max_window_layers": 1}, 16),
        ("qwen2", {"max_window_layers": 2}, None),
        ("qwen3", {"max_window_layers": 99, "layer_types": ["full_attention", "sliding_attention"]}, 16),
    ],
)
def test_windows_are_those_of_transformers(name, change, tokens):
    """Up to how many tokens llama.cpp, which applies no window, computes the same."""
    assert family(name).gguf_window(CONFIG | WINDOW | change) == tokens


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_experts", 0, "impossible num_experts: wanted a positive integer, found 0"),
        ("num_experts", "six", "impossible num_experts"),
        ("num_local_experts", 10**6, "impossible number of experts: found 1000000"),
        ("moe_intermediate_size", None, "impossible moe_intermediate_size"),
        ("num_experts_per_tok", -1, "impossible num_experts_per_tok"),
        ("num_experts_per_tok", 7, "impossible num_experts_per_tok: wanted at most 6, the number of experts, found 7"),
        ("mlp_only_layers", 1, "wrong mlp_only_layers: wanted a list of block numbers, found 1"),
        ("decoder_sparse_step", 0, "impossible decoder_sparse_step"),
        ("num_local_experts", 5, "holds a tensor that qwen3_moe models do not have: found .*experts.5"),
        ("num_local_experts", 7, "lacks 6 of the .* tensors of a qwen3_moe model"),
    ],
)
def test_config_that_does_not_fit(field, value, message, tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("qwen3_moe")
    config = json.loads((folder / "config.json").read_text())
    config.pop("num_local_experts" if field == "num_experts" else "", None)
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    (tmp_path / "model.safetensors").hardlink_to(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        hf.HFCheckpoint(tmp_path)


def test_both_spellings_of_the_number_of_experts(tiny_checkpoint, tmp_path):
    """transformers 5 writes num_local_experts, what it reads and everybody else writes is num_experts."""
    folder = tiny_checkpoint("qwen3_moe")
    config = json.loads((folder / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").hardlink_to(folder / "model.safetensors")
    assert HFCheckpoint(tmp_path).config == HFCheckpoint(folder).config
