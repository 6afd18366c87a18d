from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qtool import registry
from qtool.checkpoint.families._base import Family
from qtool.checkpoint.families._rope import llama3_factors, rope_config, rope_metadata, rope_parameters
from qtool.errors import CheckpointError

FAMILIES = registry.names("checkpoint/families")
CONFIG: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


def family(name: str) -> Family:
    found: Family = registry.load("checkpoint/families", name)()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_transformers(name: str) -> None:
    told = AutoConfig.for_model(name).to_dict()
    defaults = family(name).defaults
    assert defaults == {field: told[field] for field in defaults}
    silent = {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    assert {field: told[field] for field in silent if field in told} == {f: silent[f] for f in silent if f in told}
    for field in ("num_key_value_heads", "head_dim"):  # where nothing is said, heads and hidden / heads
        if field not in defaults and field in told:
            assert AutoConfig.for_model(name, num_attention_heads=16).to_dict()[field] in (16, 4096 // 16)


@pytest.mark.parametrize("name", FAMILIES)
def test_architecture_is_that_of_transformers(name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert family(name).architecture == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]


def test_heads() -> None:
    assert family("llama").heads(CONFIG) == (4, 2, 16)
    assert family("llama").heads(CONFIG | {"num_key_value_heads": None}) == (4, 4, 16)
    assert family("qwen3").heads(CONFIG | {"head_dim": 24}) == (4, 2, 24)


@pytest.mark.parametrize("name", FAMILIES)
def test_gguf_metadata(name: str) -> None:
    arch = {"mistral": "llama"}.get(name, name)
    assert family(name).gguf_metadata(CONFIG) == {
        f"{arch}.vocab_size": 512,
        f"{arch}.context_length": 2048,
        f"{arch}.embedding_length": 64,
        f"{arch}.block_count": 2,
        f"{arch}.feed_forward_length": 96,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": 2,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.dimension_count": 16,
        f"{arch}.rope.freq_base": 10000.0,
    }


def test_gguf_metadata_of_what_is_unusual() -> None:
    told = family("qwen3").gguf_metadata(CONFIG | {"head_dim": 32, "rope_theta": 1000000})
    assert told["qwen3.attention.key_length"] == told["qwen3.attention.value_length"] == 32
    assert told["qwen3.rope.dimension_count"] == 32
    assert isinstance(told["qwen3.rope.freq_base"], float)
    assert family("mistral").gguf_metadata(CONFIG | {"sliding_window": 4096})["llama.attention.sliding_window"] == 4096
    assert "llama.attention.sliding_window" not in family("mistral").gguf_metadata(CONFIG | {"sliding_window": None})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "cannot hold this activation function: wanted silu, found gelu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "cannot hold this rotary scaling.*found dynamic"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "cannot hold mscale of"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "cannot hold partial_rotary"),
    ],
)
def test_gguf_has_no_word_for(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        family("llama").gguf_metadata(CONFIG | fields)


@pytest.mark.parametrize("name", FAMILIES)
def test_gguf_names(name: str) -> None:
    names = family(name).gguf_names(CONFIG | {"tie_word_embeddings": True})
    assert names["model.embed_tokens.weight"] == "token_embd.weight"
    assert names["model.norm.weight"] == "output_norm.weight"
    assert names["lm_head.weight"] == "output.weight"
    below = {n.removeprefix("model.layers.1."): g for n, g in names.items() if n.startswith("model.layers.1.")}
    expected = {
        "self_attn.q_proj.weight": "attn_q.weight",
        "self_attn.k_proj.weight": "attn_k.weight",
        "self_attn.v_proj.weight": "attn_v.weight",
        "self_attn.o_proj.weight": "attn_output.weight",
        "mlp.gate_proj.weight": "ffn_gate.weight",
        "mlp.up_proj.weight": "ffn_up.weight",
        "mlp.down_proj.weight": "ffn_down.weight",
        "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "ffn_norm.weight",
    }
    if name == "qwen2":
        expected |= {f"self_attn.{x}_proj.bias": f"attn_{x}.bias" for x in "qkv"}
    if name == "qwen3":
        expected |= {f"self_attn.{x}_norm.weight": f"attn_{x}_norm.weight" for x in "qk"}
    assert below == {here: f"blk.1.{there}" for here, there in expected.items()}


@pytest.mark.parametrize(("role", "heads"), [("q", 4), ("k", 2)])
def test_gguf_rows(role: str, heads: int) -> None:
    """llama.cpp pairs neighbours: head by head, element i of the first half is followed by element i of the second."""
    expected = [head * 16 + half * 8 + i for head in range(heads) for i in range(8) for half in range(2)]
    for name in ("llama", "mistral"):
        order = family(name).gguf_rows(CONFIG, role)
        assert order is not None
        assert order.tolist() == expected


def test_gguf_rows_that_stay() -> None:
    assert all(family("llama").gguf_rows(CONFIG, role) is None for role in ("v", "o", "gate", "up", "down", ""))
    assert all(family(name).gguf_rows(CONFIG, role) is None for name in ("qwen2", "qwen3") for role in ("q", "k"))


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}},
    ],
    ids=["old", "transformers-4", "transformers-5"],
)
def test_spellings_of_rope(fields: dict[str, Any]) -> None:
    assert rope_parameters(fields) == {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}


@pytest.mark.parametrize(("theta", "dim", "factor"), [(500000.0, 128, 8.0), (500000.0, 64, 32.0), (10000.0, 16, 8.0)])
def test_llama3_factors(theta: float, dim: int, factor: float) -> None:
    rope = LLAMA3 | {"factor": factor, "rope_theta": theta}
    factors = llama3_factors({"rope_parameters": rope}, dim)
    sizes = {"hidden_size": 4 * dim, "num_attention_heads": 4, "max_position_embeddings": 2**17}
    config = AutoConfig.for_model("llama", **sizes, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = torch.tensor([theta ** (-i / dim) for i in range(0, dim, 2)])
    assert factors is not None
    assert factors.dtype == torch.float32
    torch.testing.assert_close(factors, plain / scaled, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 16.0},
        LLAMA3,
        LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 4096},
    ],
    ids=["none", "linear", "yarn", "llama3", "llama3-other"],
)
def test_rope_there_and_back(scaling: dict[str, Any] | None) -> None:
    config = {"rope_theta": 500000.0, "max_position_embeddings": 2048, "rope_scaling": scaling}
    told = {f"llama.{key}": value for key, value in rope_metadata(config).items()}
    back = rope_config(told, "llama", 128, llama3_factors(config, 128))
    assert rope_parameters(back) == rope_parameters(config)


@pytest.mark.parametrize("scale", [1.01, 0.99])
def test_other_rope_factors_are_refused(scale: float) -> None:
    factors = llama3_factors({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 128)
    assert factors is not None
    factors[len(factors) // 2 :] *= scale
    factors[-1] = 8.0 if scale < 1 else factors[-1]
    with pytest.raises(CheckpointError, match="does not follow Llama 3's rule"):
        rope_config({"llama.rope.freq_base": 5e5}, "llama", 128, factors)


def test_two_kinds_of_rope_scaling_at_once() -> None:
    with pytest.raises(CheckpointError, match=r"both rope_freqs.weight and rotary scaling yarn"):
        rope_config({"llama.rope.scaling.type": "yarn"}, "llama", 128, torch.ones(64))
