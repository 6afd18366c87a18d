"""Which rewrites a family allows; that each leaves logits as they are is tested with the checkpoint that makes them."""

from __future__ import annotations

from typing import Any

import pytest

from qtool import registry
from qtool.checkpoint.families._edges import Edge
from tests.conftest import MIXTURES, TINY

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = registry.names("checkpoint/families")
GEMMA = ("gemma2", "gemma3_text")


def edges(name: str, i: int | None, kind: str) -> list[Edge]:
    family = registry.load("checkpoint/families", name)()
    config = family.defaults | SIZES | (TINY | MIXTURES)[name]
    return [edge for edge in family.edges(config, i) if edge.kind == kind]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_reader_of_a_norm_is_on_its_edge(name: str) -> None:
    family = registry.load("checkpoint/families", name)()
    config = family.defaults | SIZES | (TINY | MIXTURES)[name]
    columns = {
        "model.layers.1." + linear.path
        for linear in family.block_linears(config, 1)
        if linear.role not in ("o", "down")
    }
    attention, mlp = edges(name, 1, "norm")
    assert set(attention.readers) | set(mlp.readers) == columns
    assert all(".self_attn." in reader for reader in attention.readers)
    assert {edge.offset for edge in (attention, mlp)} == {1.0 if name in GEMMA else 0.0}
    assert edges(name, None, "norm") == [Edge("norm", ("model.norm",), ("lm_head",), 64, offset=attention.offset)]


def test_the_norm_in_front_of_the_mlp_is_the_family_s_own() -> None:
    prefix = "model.layers.0."
    assert edges("llama", 0, "norm")[1].source == (prefix + "post_attention_layernorm",)
    assert edges("gemma2", 0, "norm")[1].source == (prefix + "pre_feedforward_layernorm",)


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_can_be_turned_where_no_norm_feeds_them(name: str) -> None:
    assert bool(edges(name, 0, "stream")) == bool(edges(name, None, "stream")) == (name not in GEMMA)


def test_experts_write_the_stream_and_have_edges_of_their_own() -> None:
    (stream,) = edges("qwen2_moe", 0, "stream")
    downs = [f"model.layers.0.mlp.experts.{e}.down_proj" for e in range(5)]
    assert stream.source == ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.shared_expert.down_proj", *downs)
    products = edges("qwen2_moe", 0, "product")
    assert [edge.width for edge in products] == [96, *[32] * 5]
    assert products[2].source == ("model.layers.0.mlp.experts.1.up_proj",)
    assert products[2].readers == (downs[1],)


def test_no_factor_goes_through_a_clamped_product() -> None:
    assert edges("gpt_oss", 0, "product") == []


@pytest.mark.parametrize("name", FAMILIES)
def test_factors_go_from_keys_to_queries_where_no_norm_lies_between(name: str) -> None:
    found = edges(name, 0, "scores")
    if name in ("qwen3", "qwen3_moe", "gemma3_text"):
        assert found == []
        return
    dim = 32 if name in ("gemma2", "gpt_oss") else 16
    (scores,) = found
    assert (scores.width, scores.repeat, scores.dim, scores.readers) == (2 * dim, 2, dim, ())
    assert (scores.first, scores.rotary) == (64 if name == "phi3" else 0, dim)


def test_matrices_stored_as_one() -> None:
    (heads,), (product,) = edges("phi3", 0, "heads"), edges("phi3", 0, "product")
    assert (heads.width, heads.first, heads.repeat, heads.dim) == (32, 64 + 32, 2, 16)  # behind q and k
    assert (product.width, product.first) == (128, 128)  # behind gate
