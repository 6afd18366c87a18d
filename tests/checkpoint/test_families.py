from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qtool import registry
from qtool.checkpoint.families._base import Family
from qtool.checkpoint.families._rope import (
    LLAMA3_TENSOR,
    llama3_factors,
    rope_config,
    rope_metadata,
    rope_parameters,
)
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
DENSE = [name for name in FAMILIES if not registry.load("checkpoint/families", name).mixture]
GEMMA = {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 512}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma2": CONFIG | GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": CONFIG | GEMMA | {"rope_parameters": {"full_attention": {"rope_theta": 10000.0}}},
}
"""Of families that have to say more."""
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


def family(name: str) -> Family:
    found: Family = registry.load("checkpoint/families", name)()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_transformers(name: str) -> None:
    told = AutoConfig.for_model(name).to_dict()
    told = {family(name).spellings.get(field, field): value for field, value in told.items()}
    defaults = family(name).defaults
    assert defaults == {field: told[field] for field in defaults}
    silent = {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    unsaid = [field for field in silent if field in told and field not in defaults]
    assert {field: told[field] for field in unsaid} == {field: silent[field] for field in unsaid}
    for field in ("num_key_value_heads", "head_dim"):  # where nothing is said, heads and hidden / heads
        if field not in defaults and field in told:
            assert AutoConfig.for_model(name, num_attention_heads=16).to_dict()[field] in (None, 16, 4096 // 16)


@pytest.mark.parametrize("name", FAMILIES)
def test_architecture_is_that_of_transformers(name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert family(name).architecture == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]


def test_heads() -> None:
    assert family("llama").heads(CONFIG) == (4, 2, 16)
    assert family("llama").heads(CONFIG | {"num_key_value_heads": None}) == (4, 4, 16)
    assert family("qwen3").heads(CONFIG | {"head_dim": 24}) == (4, 2, 24)


@pytest.mark.parametrize("name", DENSE)
def test_gguf_metadata(name: str) -> None:
    arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(name, name)
    own: dict[str, dict[str, Any]] = {
        "gemma2": {
            "gemma2.attention.sliding_window": 512,
            "gemma2.attn_logit_softcapping": 50.0,
            "gemma2.final_logit_softcapping": 30.0,
        },
        "gemma3_text": {"gemma3.attention.sliding_window": 512, "gemma3.rope.freq_base_swa": 10000.0},
        "phi3": {"phi3.attention.sliding_window": 0},
    }
    assert family(name).gguf_metadata(CONFIGS.get(name, CONFIG)) == own.get(name, {}) | {
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


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LONGROPE_CONFIG = CONFIG | {"rope_scaling": LONGROPE, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "cannot hold this activation function: wanted silu, found gelu"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "cannot hold this rotary scaling.*dynamic",
        ),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "cannot hold mscale of"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "cannot hold partial_rotary"),
        ("qwen2", {"rope_parameters": LLAMA3}, "cannot hold this rotary scaling: wanted .*yarn, found llama3"),
        ("gemma2", {"hidden_activation": "gelu"}, "wanted gelu_pytorch_tanh, found gelu"),
        ("gemma2", {"query_pre_attn_scalar": 20}, "with one query_pre_attn_scalar only: wanted 16, found 20"),
        ("gemma2", {"num_hidden_layers": 46, "head_dim": 32, "query_pre_attn_scalar": 32}, "wanted 16, found 32"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, r"one layer_types only: wanted \['sliding_attention'"),
        ("gemma2", {"tie_word_embeddings": False}, "one tie_word_embeddings only: wanted True"),
        ("gemma2", {"attn_logit_softcapping": None}, "caps all gemma2 models: config.json sets no attn_logit_soft"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "wanted None, found 30.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "one use_bidirectional_attention only"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": LLAMA3}}, "scaling of sliding attention.*'llama3'"),
        ("phi3", {"head_dim": 32}, r"phi3 models with one head_dim only: wanted 16\.0, found 32"),
        ("llama", {"rope_scaling": "linear"}, "impossible rope_scaling: wanted an object, found 'linear'"),
        ("llama", {"rope_parameters": [2.0]}, r"impossible rope_parameters: wanted an object, found \[2\.0\]"),
        ("phi3", {"partial_rotary_factor": 1.5}, "impossible partial_rotary_factor: wanted 0 to 1, found 1.5"),
        ("phi3", LONGROPE_CONFIG | {"rope_scaling": LONGROPE | {"long_factor": 2}}, "impossible long_factor"),
        ("smollm3", {"no_rope_layers": [1, 0]}, r"one no_rope_layers only: wanted \[1, 1\], found \[1, 0\]"),
        ("smollm3", {"no_rope_layer_interval": 2}, "one no_rope_layer_interval only: wanted 4, found 2"),
        ("smollm3", {"use_sliding_window": True}, "one use_sliding_window only"),
    ],
)
def test_gguf_has_no_word_for(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        family(name).gguf_metadata(CONFIGS.get(name, CONFIG) | fields)


def test_longrope() -> None:
    """Factor tensors, and the scale of attention that transformers computes from the lengths of contexts."""
    rope = LONGROPE | {"long_factor": [1.0 + i for i in range(8)]}
    config = LONGROPE_CONFIG | {"rope_scaling": rope}
    told, tensors = family("phi3").gguf_metadata(config), family("phi3").gguf_extra_tensors(config)
    theirs = AutoConfig.for_model("phi3", **CONFIG, rope_scaling=dict(rope), original_max_position_embeddings=512)
    plain = torch.tensor([10000.0 ** (-i / 16) for i in range(0, 16, 2)])
    for length, name in ((512, "short"), (513, "long")):
        frequencies, scale = ROPE_INIT_FUNCTIONS["longrope"](theirs, "cpu", seq_len=length)
        torch.testing.assert_close(plain / tensors[f"rope_factors_{name}.weight"], frequencies, rtol=1e-5, atol=0)
        assert told["phi3.rope.scaling.attn_factor"] == pytest.approx(scale)
    assert told["phi3.rope.scaling.original_context_length"] == 512
    own = family("phi3").gguf_metadata(config | {"rope_scaling": rope | {"type": "su", "attention_factor": 1.25}})
    assert own["phi3.rope.scaling.attn_factor"] == 1.25
    with pytest.raises(CheckpointError, match="long_factor of the rotary embedding: wanted 6 numbers, found 8"):
        family("phi3").gguf_extra_tensors(config | {"partial_rotary_factor": 0.75, "rope_scaling": LONGROPE})


def test_the_27_billion_gemmas_scale_scores_otherwise() -> None:
    config = CONFIGS["gemma2"] | {"num_hidden_layers": 46, "head_dim": 32, "query_pre_attn_scalar": 16}
    told = family("gemma2").gguf_metadata(config)
    assert family("gemma2").gguf_fields(told, ())["query_pre_attn_scalar"] == 16
    told = family("gemma2").gguf_metadata(config | {"num_hidden_layers": 2, "query_pre_attn_scalar": 32})
    assert family("gemma2").gguf_fields(told, ())["query_pre_attn_scalar"] == 32


@pytest.mark.parametrize("name", DENSE)
def test_gguf_names(name: str) -> None:
    names = family(name).gguf_names(CONFIG | {"tie_word_embeddings": True})
    assert names["model.embed_tokens.weight"] == "token_embd.weight"
    assert names["model.norm.weight"] == "output_norm.weight"
    assert names.get("lm_head.weight", "output.weight") == "output.weight"
    assert ("lm_head.weight" in names) == (name != "gemma2")  # which cannot have one
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
    if name.startswith("gemma"):
        expected["post_attention_layernorm.weight"] = "post_attention_norm.weight"
        expected["pre_feedforward_layernorm.weight"] = "ffn_norm.weight"
        expected["post_feedforward_layernorm.weight"] = "post_ffw_norm.weight"
    if name == "phi3":
        for path in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up"):
            del expected[f"{path}_proj.weight"]
        expected["self_attn.qkv_proj.weight"] = "attn_qkv.weight"
        expected["mlp.gate_up_proj.weight"] = "ffn_up.weight"
    if name in ("qwen3", "gemma3_text"):
        expected |= {f"self_attn.{x}_norm.weight": f"attn_{x}_norm.weight" for x in "qk"}
    assert below == {here: f"blk.1.{there}" for here, there in expected.items()}


def test_a_gguf_package_without_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gguf.MODEL_ARCH_NAMES", {})
    with pytest.raises(CheckpointError, match="the gguf package is too old for phi3; pip install -U gguf"):
        family("phi3").gguf_names(CONFIG | {"num_hidden_layers": 19})  # names that were asked for are kept


@pytest.mark.parametrize(("role", "heads"), [("q", 4), ("k", 2)])
def test_gguf_rows(role: str, heads: int) -> None:
    """llama.cpp pairs neighbours: head by head, element i of the first half is followed by element i of the second."""
    expected = [head * 16 + half * 8 + i for head in range(heads) for i in range(8) for half in range(2)]
    for name in ("llama", "mistral", "smollm3"):
        order = family(name).gguf_rows(CONFIG, role)
        assert order is not None
        assert order.tolist() == expected


def test_gguf_rows_that_stay() -> None:
    assert all(family("llama").gguf_rows(CONFIG, role) is None for role in ("v", "o", "gate", "up", "down", ""))
    stays = ("qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
    assert all(family(name).gguf_rows(CONFIG, role) is None for name in stays for role in ("q", "k", "qkv"))


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
    factors = llama3_factors(config, 128)
    back = rope_config(told, "llama", 128, {} if factors is None else {LLAMA3_TENSOR: factors})
    assert rope_parameters(back) == rope_parameters(config)


@pytest.mark.parametrize(
    "changed",
    [{"original_max_position_embeddings": 131072}, {"high_freq_factor": 8.0}, {"low_freq_factor": 2.0, "factor": 4.0}],
)
@pytest.mark.parametrize(("theta", "dim"), [(500000.0, 128), (10000.0, 32)])
def test_other_llama3_scalings_come_back_as_the_same_frequencies(changed: Any, theta: float, dim: int) -> None:
    factors = llama3_factors({"rope_parameters": LLAMA3 | changed | {"rope_theta": theta}}, dim)
    assert factors is not None
    back = rope_config({"llama.rope.freq_base": theta}, "llama", dim, {LLAMA3_TENSOR: factors})
    again = llama3_factors(back, dim)
    assert again is not None
    torch.testing.assert_close(again, factors, rtol=1e-5, atol=0)


def test_a_scaling_that_no_reader_could_tell_is_refused_before_it_is_written() -> None:
    told = LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 5000, "high_freq_factor": 3.3}
    with pytest.raises(CheckpointError, match=r"cannot say this rotary scaling: .*found .*'high_freq_factor': 3\.3"):
        family("llama").gguf_extra_tensors(CONFIG | {"rope_parameters": told, "head_dim": 128})


@pytest.mark.parametrize("scale", [1.01, 0.99])
def test_other_rope_factors_are_refused(scale: float) -> None:
    factors = llama3_factors({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 128)
    assert factors is not None
    factors[len(factors) // 2 :] *= scale
    factors[-1] = 8.0 if scale < 1 else factors[-1]
    with pytest.raises(CheckpointError, match="does not follow Llama 3's rule"):
        rope_config({"llama.rope.freq_base": 5e5}, "llama", 128, {LLAMA3_TENSOR: factors})


def test_two_kinds_of_rope_scaling_at_once() -> None:
    with pytest.raises(CheckpointError, match=r"both rope_freqs.weight and rotary scaling yarn"):
        rope_config({"llama.rope.scaling.type": "yarn"}, "llama", 128, {LLAMA3_TENSOR: torch.ones(64)})
