"""What mlx-lm's model classes read of config.json, and what they take for granted; found with version 0.32.

Source: https://github.com/ml-explore/mlx-lm, mlx_lm/models
"""

from __future__ import annotations

from typing import Any

from qtool.checkpoint._base import Checkpoint
from qtool.checkpoint.families._rope import rope_parameters

ORIGINAL = "original_max_position_embeddings"
SCALINGS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", ORIGINAL},
    "yarn": {"factor", ORIGINAL, "beta_fast", "beta_slow"},
}
"""Kinds of rotary scaling, and what is read of each."""
UNSCALED = {"gemma2", "mixtral", "phi3", "qwen2_moe", "qwen3_moe"}
"""Families that know the first of them only."""
DERIVED = {"mixtral", "phi3", "qwen2", "qwen2_moe"}
"""Families whose head dimension is the hidden size over the number of heads."""
SLIDING = {"gemma3_text"}
"""Families whose sliding windows are computed."""
OPTIONAL_WINDOW = {"qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "smollm3"}
"""Families that have one only if `use_sliding_window` says so."""
FIXED: dict[str, dict[str, Any]] = {
    "gemma2": {"tie_word_embeddings": True},
    "gemma3_text": {"final_logit_softcapping": None, "use_bidirectional_attention": False},
    "qwen2_moe": {"norm_topk_prob": False, "qkv_bias": True, "tie_word_embeddings": False}
    | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen3": {"attention_bias": False},
    "qwen3_moe": {"attention_bias": False},
}
"""Fields that are not read, and what they are taken for."""
TRIED = {"cohere", "cohere2", "dbrx", "deepseek_v3", "ernie4_5", "falcon_mamba", "glm4_moe_lite", "gpt_bigcode"} | {
    *("granite", "granitemoe", "helium", "hunyuan_v1_dense", "internlm3", "iquestcoder", "lfm2_moe", "mamba"),
    *("olmo2", "olmoe", "seed_oss"),
}
"""Types without a family file of which mlx-lm computes tiny models as transformers does."""
TAKEN_APART = {"deepseek_v3", "deepseek_v32", "glm4_moe_lite", "kimi_linear", "longcat_flash", "mistral4"}
"""Types whose `kv_b_proj` mlx-lm decodes, takes apart and rounds again."""
PERIOD = 6
"""Attention of Gemma 3 slides in all blocks but every sixth one."""


def refusal(model: Checkpoint) -> str | None:
    """Why mlx-lm would not load a model, or compute another one; None if it computes this one."""
    family, config, kind = model.family, model.config, model.config["model_type"]
    field, function = family.activation
    fixed = FIXED.get(kind, {}) | {field: function}
    if kind in SLIDING:
        turns = ["sliding_attention"] * (PERIOD - 1) + ["full_attention"]
        fixed |= {"layer_types": [turns[i % PERIOD] for i in range(family.blocks(config))]}
    for name, wanted in fixed.items():
        if (found := config.get(name)) is not None and found != wanted:
            return f"mlx-lm computes {kind} models with {name} {wanted!r:.60} only, not {found!r:.60}"
    heads, _, dim = family.heads(config)
    if kind in DERIVED and heads * dim != config["hidden_size"]:
        return f"mlx-lm computes {kind} models with head_dim hidden_size / num_attention_heads only, not {dim}"
    return _rotary_refusal(model)


def _rotary_refusal(model: Checkpoint) -> str | None:
    """The same about the rotary embedding. Raises CheckpointError: a number of it is missing or none."""
    config, kind = model.config, model.config["model_type"]
    sliding = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    if rope_parameters({"rope_parameters": sliding})["rope_type"] != "default":
        return f"mlx-lm does not scale the rotary embedding where attention slides, as {kind} does here"
    rope = rope_parameters(model.family.rope(config))
    scaling = str(rope["rope_type"])
    known = ["default"] if kind in UNSCALED else list(SCALINGS)
    if scaling not in known:
        return f"mlx-lm computes {kind} models with rotary scaling {' or '.join(known)} only, not {scaling:.40}"
    declared = {name for name, value in rope.items() if value is not None and (name, value) != ("truncate", True)}
    if unread := declared - SCALINGS[scaling] - {"rope_type", "rope_theta"}:
        return f"mlx-lm does not read {', '.join(sorted(unread))} of the rotary embedding"
    return None


def caveats(model: Checkpoint) -> list[str]:
    """See `Artifact.caveats`."""
    kind, window = model.config["model_type"], ignored_window(model)
    said = f"mlx-lm lets attention of {kind} models see all tokens, also beyond the sliding window of {window}"
    untried = f"nobody has seen mlx-lm run {kind} models: verify this one where mlx-lm is installed"
    return [said] * bool(window) + [untried] * (model.family.derived and kind not in TRIED)


def ignored_window(model: Checkpoint) -> int | None:
    """A sliding window that mlx-lm does not apply; None: there is none."""
    config, kind = model.config, model.config["model_type"]
    window = config.get("sliding_window")
    if not window or kind in SLIDING or (kind in OPTIONAL_WINDOW and not config.get("use_sliding_window")):
        return None
    return int(window)


def rope_fields(model: Checkpoint) -> dict[str, Any]:
    """The rotary embedding as transformers 4 spelled it, because mlx-lm hardly knows `rope_parameters`."""
    config = model.config
    if not (declared := config.get("rope_parameters")):
        return {}
    rope = rope_parameters(model.family.rope(config))
    fields = {"rope_theta": rope.pop("rope_theta")}
    share = declared.get("partial_rotary_factor", 1)
    if share != 1 and "partial_rotary_factor" not in config:
        fields["partial_rotary_factor"] = share
    if sliding := declared.get("sliding_attention"):
        fields["rope_local_base_freq"] = rope_parameters({"rope_parameters": sliding})["rope_theta"]
    if rope["rope_type"] == "yarn":
        rope[ORIGINAL] = rope.get(ORIGINAL) or config["max_position_embeddings"]
    return fields if rope["rope_type"] == "default" else fields | {"rope_scaling": rope}
