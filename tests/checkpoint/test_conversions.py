"""GGUF files of models whose families are derived: llama.cpp computes what transformers does, and they come back."""

from __future__ import annotations

import json
import re

import pytest
import torch

from benchmarks import tiny
from benchmarks.architectures import logits_of
from benchmarks.gguf_biases import added, content, save
from benchmarks.gguf_scales import applied
from benchmarks.tiny import save_tiny
from qtool import registry
from qtool.artifact.gguf import GGUF
from qtool.checkpoint._base import Layer
from qtool.checkpoint.config import complete
from qtool.checkpoint.conversions._base import ROOM, conversion_of
from qtool.checkpoint.conversions._refused import REFUSED
from qtool.checkpoint.conversions.falcon_h1 import NONE
from qtool.checkpoint.families._biases import READ
from qtool.checkpoint.families._scales import SCALED
from qtool.checkpoint.hf import HFCheckpoint
from qtool.checkpoint.modules import modules
from qtool.errors import CheckpointError, PlanError, VerifyError
from qtool.evaluate.llamacpp import try_file
from qtool.evaluate.proof import prove
from qtool.evaluate.twin import _proven, prove_twin
from qtool.formats.mxfp4 import MXFP4
from qtool.formats.nvfp4 import NVFP4
from qtool.models import fit
from qtool.pipeline.prepare import prepare
from tests.artifact.conftest import InMemory
from tests.conftest import make_tokenizer
from tests.evaluate.test_proof import scaled

TOKENS = [(7 * i * i + 3 * i) % 500 for i in range(40)]
KINDS = [kind for kind in registry.names(ROOM) if kind != "gemma3n_text"]
"""All but one, which wants so many blocks that it has tests of its own."""
MULTIPLIED = ("embedding", "lm_head", "key", "attention_in", "attention_out", "ssm_in", "ssm_out")
PARTICULAR = {
    "starcoder2": {"sliding_window": None},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    "dots1": {"num_key_value_heads": 4, "layer_types": ["full_attention"] * 4},
    "deepseek_v2": {"num_key_value_heads": 4, "topk_method": "greedy", "norm_topk_prob": False},
    "olmoe": {"num_key_value_heads": 4, "norm_topk_prob": False},
    "qwen3_5_text": {"linear_num_value_heads": 6, "head_dim": 64},
    "qwen3_5_moe_text": {"linear_num_value_heads": 4, "head_dim": 64},
    "falcon_h1": {
        **{f"{name}_multiplier": 0.6 + 0.1 * i for i, name in enumerate(MULTIPLIED)},
        "mlp_multipliers": [0.7, 1.3],
        "ssm_multipliers": [0.5, 0.8, 1.1, 1.2, 0.9],
        "mamba_n_groups": 2,
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "global_head_dim": 32,
        "num_experts": None,
        "hidden_size_per_layer_input": 64,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mamba_n_groups": 2,
        "position_embedding_type": "rope",
    },
    "llama4_text": {"intermediate_size_mlp": 80, "interleave_moe_layer_step": 2},
}
"""What a tiny model of a type needs that llama.cpp shall compute."""
TABLES = ("gemma", "phi", "starcoder2", "gpt_neox", "gemma4_text")
"""Types whose activation llama.cpp looks up in a table of 16-bit floats."""
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
UNROUNDED = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "truncate": False}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a tiny model of a type, and transformers' logits of some tokens."""
    tokenizer, made = make_tokenizer(), {}

    def make(kind, **fields):
        key = kind, json.dumps(fields)
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            with pytest.MonkeyPatch.context() as patch:
                told = tiny.PARTICULAR.get(kind, {}) | PARTICULAR.get(kind, {}) | fields
                patch.setitem(tiny.PARTICULAR, kind, told)
                model = save_tiny(kind, folder)
            tokenizer.save_pretrained(folder)
            with torch.no_grad():
                made[key] = folder, model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
        return made[key]

    return make


def distance(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def opened(folder):
    """A model, as a recipe that exports GGUF alone opens it."""
    return fit(HFCheckpoint(folder), ["gguf"])


def converted(folder, out):
    """A GGUF file in float32, and what it was written from."""
    out.mkdir()
    model = InMemory(opened(folder), lambda module: None)
    GGUF().write(model, out, {})
    return next(out.glob("*.gguf")), model


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_what_transformers_computes(kind, saved, tmp_path):
    folder, wanted = saved(kind)
    path, model = converted(folder, tmp_path / "out")
    found = try_file(path, TOKENS)
    assert distance(found, wanted) < (2e-3 if kind == "gemma4_text" else 5e-4 if kind in TABLES else 1e-5)
    assert distance(1.01 * found, wanted) > 5e-3
    back = GGUF().open(tmp_path / "out")
    assert back.family.derived and back.config["model_type"] == kind
    assert distance(logits_of(back, torch.tensor([TOKENS]))[0], wanted) < 1e-5
    for name in model.names():
        assert torch.allclose(back.tensor(name), model.tensor(name), rtol=0, atol=1e-6)


UNTIED = [kind for kind in registry.names(ROOM) if conversion_of(kind).gguf_untied]


@pytest.mark.parametrize("kind", UNTIED)
def test_llama_cpp_gets_an_output_layer_of_its_own_where_it_wants_one(kind, saved, tmp_path):
    folder, wanted = saved(kind, tie_word_embeddings=True)
    path, model = converted(folder, tmp_path / "out")
    assert model.tied and not GGUF().open(tmp_path / "out").tied
    assert distance(try_file(path, TOKENS), wanted) < (
        2e-3 if kind == "gemma4_text" else 5e-4 if kind in TABLES else 1e-5
    )
    found = GGUF().footprint(model, {})
    assert found.total == path.stat().st_size


@pytest.mark.parametrize("kind", KINDS)
def test_twins_run_in_llama_cpp(kind, saved):
    _proven.cache_clear()
    found = prove_twin(GGUF(), opened(saved(kind)[0]))
    if kind == "mamba2":  # whose sizes are said in other words
        assert found is None
        return
    assert found and found.tokens == 240 and found.distance < (1.5e-3 if kind in TABLES else 1e-4)


PUBLISHED = {
    "deepseek_v3": {"n_group": 8, "topk_group": 4, "n_routed_experts": 32, "num_experts_per_tok": 8},
    "deepseek_v2": {"num_hidden_layers": 27, "q_lora_rank": None},
    "gpt_oss": {"rope_parameters": {**YARN, "truncate": False}},
}
"""Fields as models of these types have them, which a smaller one cannot have, or llama.cpp does not know."""


@pytest.mark.parametrize("kind", PUBLISHED)
def test_twins_of_published_models_are_proven(kind, tmp_path):
    _proven.cache_clear()
    fields = tiny.PARTICULAR.get(kind, {}) | PARTICULAR.get(kind, {}) | PUBLISHED[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.PARTICULAR, kind, fields)
        config = json.loads(tiny.tiny_config(kind).to_json_string())
    found = _proven(json.dumps(complete(config, tmp_path)[0]))
    assert found and found.tokens == 240 and found.distance < 1e-4


def test_a_range_that_llama_cpp_rounds_is_said(saved):
    told = [GGUF().caveats(HFCheckpoint(saved("gpt_oss", rope_parameters=rope)[0]), {}) for rope in (YARN, UNROUNDED)]
    assert told[0] == [] and "llama.cpp rounds the range of dimensions that YaRN blends" in told[1][0]


@pytest.mark.parametrize("ending", ["q_proj.bias", "k_proj.bias", "v_proj.bias", "3.self_attn.k_proj.bias"])
def test_a_bias_that_is_lost_is_seen(ending, saved, monkeypatch):
    """Even one of keys, which counts as far as it is rotated."""
    model = opened(saved("glm4")[0])
    _proven.cache_clear()
    assert prove_twin(GGUF(), model).limit == 5e-4  # nothing is looked up in a table of 16-bit floats
    _proven.cache_clear()
    monkeypatch.setattr(*scaled(ending, 0))
    with pytest.raises(VerifyError, match="computes something else"):
        prove_twin(GGUF(), model)
    _proven.cache_clear()


@pytest.mark.parametrize(
    ("kind", "fields", "why"),
    [
        ("stablelm", {"qk_layernorm": True}, "stablelm models with one qk_layernorm only: wanted False, found True"),
        ("cohere2", {"layer_types": ["full_attention"] * 4}, "cohere2 models with one layer_types only"),
        ("olmoe", {"norm_topk_prob": True}, "olmoe models with one norm_topk_prob only: wanted False, found True"),
        ("olmoe", {"clip_qkv": 8.0}, "olmoe models with one clip_qkv only: wanted None, found 8.0"),
        ("dots1", {"num_key_value_heads": 2}, "dots1 models with one num_key_value_heads only: wanted 4, found 2"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "deepseek2 models with one topk_method only"),
        ("nemotron", {"hidden_act": "silu"}, "activation function: wanted relu2, found silu"),
        ("qwen3_next", {"layer_types": ["full_attention"] * 4}, "qwen3next models with one layer_types only"),
        ("gemma4_text", {"vocab_size_per_layer_input": 256}, "gemma4 models with one vocab_size_per_layer_input only"),
        ("gemma4_text", {"enable_moe_block": True, "top_k_experts": 2, "num_experts": 4}, "one enable_moe_block only"),
        (
            "falcon_h1",
            {**NONE, "mamba_norm_before_gate": True},
            "falcon-h1 models with one mamba_norm_before_gate only",
        ),
        ("mamba2", {"time_step_limit": [0.0, 5.0]}, "mamba2 models with one time_step_limit only"),
        ("mamba2", {"n_groups": 2}, "mamba2 models with one n_groups only: wanted 1, found 2"),
        ("llama4_text", {"attention_chunk_size": 16}, "llama4 models with one attention_chunk_size only: wanted 8192"),
        ("llama4_text", {"use_qk_norm": False}, "llama4 models with one use_qk_norm only: wanted True, found False"),
        ("granitemoehybrid", {"mamba_proj_bias": True}, "granitehybrid models with one mamba_proj_bias only"),
        ("exaone4", {"sliding_window": 16}, "exaone4 models with one window only: wanted 0, found 16"),
        ("cohere", {"rope_parameters": HALF}, "command-r models with one partial_rotary_factor only: wanted 1.0"),
        ("olmo2", {"rope_parameters": HALF}, "olmo2 models with one partial_rotary_factor only: wanted 1.0"),
        ("cohere", {"use_qk_norm": True}, "command-r models with one use_qk_norm only: wanted False, found True"),
        ("deepseek_v3", {"rms_norm_eps": 1e-3}, "rms_norm_eps in norms of latent keys as well, transformers 1e-06"),
        ("deepseek_v2", {"rope_parameters": LINEAR}, "this rotary scaling: wanted default, yarn, found linear"),
        ("deepseek_v3", {"rope_parameters": YARN}, "this rotary scaling: wanted mscale and mscale_all_dim alike"),
        (
            "deepseek_v2",
            {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5}},
            "wanted mscale and mscale_all_dim alike, found {'mscale': 0.7, 'mscale_all_dim': 0.5}",
        ),
    ],
)
def test_what_llama_cpp_does_not_know_is_refused(kind, fields, why, tmp_path):
    fields = tiny.PARTICULAR.get(kind, {}) | PARTICULAR.get(kind, {}) | fields
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.PARTICULAR, kind, fields)
        config = tiny.tiny_config(kind).to_dict()
    with pytest.raises(CheckpointError, match=why):
        conversion_of(kind).metadata(config)


@pytest.mark.parametrize(
    ("kind", "fields", "tensor"),
    [
        ("arcee", {"attention_bias": True}, "attn_output"),
        ("arcee", {"mlp_bias": True}, "ffn_up"),
        ("ernie4_5", {"use_bias": True}, "attn_output"),
        ("seed_oss", {"attention_out_bias": True}, "attn_output"),
    ],
)
def test_biases_that_llama_cpp_does_not_add_are_refused(kind, fields, tensor, saved):
    reason = GGUF().supports(HFCheckpoint(saved(kind, **fields)[0])).reason
    arch = conversion_of(kind).gguf_arch
    assert reason.startswith(f"llama.cpp adds no bias of {tensor} in {arch} models: wanted biases of ")


@pytest.mark.parametrize(
    ("kind", "fields", "tensor"),
    [
        ("starcoder2", {"use_bias": False, "sliding_window": None}, "attn_"),
        ("gpt_oss", {"attention_bias": False}, "attn_"),
        ("qwen2_moe", {"qkv_bias": False}, "attn_"),
    ],
)
def test_biases_that_llama_cpp_wants_are_asked_for(kind, fields, tensor, saved):
    """Without them it does not load a file, or computes nothing."""
    assert re.match(
        rf"llama\.cpp wants a bias of {tensor}", GGUF().supports(HFCheckpoint(saved(kind, **fields)[0])).reason
    )


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("cohere", {"use_qk_norm": True, "num_hidden_layers": 64}),
        ("deepseek_v2", {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}),
        ("deepseek_v3", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "rms_norm_eps": 1e-5}),
        ("minimax_m2", {"rope_parameters": HALF}),
        ("glm4_moe", {"attention_bias": True, "use_qk_norm": True}),
        ("glm4_moe", {"norm_topk_prob": False}),
        ("glm4", {"attention_bias": False}),
        ("granite", {"attention_bias": True, "mlp_bias": True}),
        ("nemotron", {"attention_bias": True, "mlp_bias": True}),
        ("stablelm", {"use_qkv_bias": True}),
        ("seed_oss", {"attention_bias": False}),
    ],
)
def test_what_models_of_some_types_have(kind, fields, saved, tmp_path):
    folder, wanted = saved(kind, **fields)
    path, _ = converted(folder, tmp_path / "out")
    found = try_file(path, TOKENS)
    assert distance(found, wanted) < 5e-5 < 5e-3 < distance(1.01 * found, wanted)
    back = GGUF().open(tmp_path / "out")
    assert distance(logits_of(back, torch.tensor([TOKENS]))[0], wanted) < 1e-5


@pytest.mark.parametrize(("tensor", "loads"), [("attn_q", True), ("attn_output", False)])
def test_llama_cpp_itself_says_which_biases_it_adds(tensor, loads, saved, tmp_path):
    model = InMemory(HFCheckpoint(saved("arcee")[0]), lambda module: None)
    arch, metadata, tensors = content(model, tmp_path)
    assert added(metadata, tensors, tensor, tmp_path) is loads is (tensor in READ[arch].split())


@pytest.mark.parametrize(("tensor", "multiplies"), [("attn_v", True), ("ffn_up", False), ("output", False)])
def test_llama_cpp_itself_says_which_matrix_scales_it_applies(tensor, multiplies, saved, tmp_path):
    """Of some it loads them and does not look at them, of others it has no place for them."""
    model = InMemory(HFCheckpoint(saved("arcee")[0]), lambda module: None)
    arch, metadata, tensors = content(model, tmp_path)
    assert applied(metadata, tensors, tensor, tmp_path) is multiplies is (tensor in SCALED[arch].split())


def test_a_matrix_scale_that_llama_cpp_does_not_apply_is_refused(saved):
    model = HFCheckpoint(saved("arcee", intermediate_size=128)[0])
    verdicts = {m.role: GGUF().computed(model, m, Layer(NVFP4())) for m in modules(model) if m.block == 1}
    assert {role for role, verdict in verdicts.items() if verdict.possible} == {"q", "k", "v", "o"}
    why = "llama.cpp applies no matrix scale to ffn_up in arcee models, as nvfp4 has one; mxfp4 has none"
    assert verdicts["up"].reason == why
    assert all(GGUF().computed(model, m, Layer(MXFP4())).possible for m in modules(model))
    layers = [{"match": "*down_proj", "weights": "nvfp4", "method": "rtn"}, {"match": "*", "keep": True}]
    recipe = {"recipe": 1, "name": "test", "layers": layers, "export": [{"to": "gguf"}]}
    with pytest.raises(PlanError, match=r"gguf cannot hold this .*applies no matrix scale to ffn_down in arcee"):
        prepare(str(model.source), recipe)
    written = InMemory(model, lambda module: Layer(NVFP4()) if module.role == "down" else None)
    with pytest.raises(PlanError, match="applies no matrix scale to ffn_down in arcee models"):
        GGUF().check(written)


@pytest.mark.parametrize("block", [2, 3])
def test_the_bias_of_one_block_is_missed(block, saved, tmp_path):
    """Of keys, which a softmax hides most of: logits move by two thousandths."""
    model = InMemory(HFCheckpoint(saved("glm4")[0]), lambda module: None)
    _, metadata, tensors = content(model, tmp_path)
    assert prove(GGUF(), GGUF().open(tmp_path), model).distance < 1e-5
    name = f"blk.{block}.attn_k.bias"
    save(next(tmp_path.glob("*.gguf")), metadata, tensors | {name: torch.zeros_like(tensors[name])})
    with pytest.raises(VerifyError, match="computes something else"):
        prove(GGUF(), GGUF().open(tmp_path), model)


def test_a_window_that_llama_cpp_does_not_apply_is_said(saved):
    model = HFCheckpoint(saved("starcoder2", sliding_window=16)[0])
    assert model.family.gguf_window(model.config) == 16
    assert "up to 16 tokens" in GGUF().caveats(model, {})[0]


def test_what_llama_cpp_loads_and_is_not_written_says_why(saved):
    kind, model = "phimoe", HFCheckpoint(saved("phimoe")[0])
    assert GGUF().supports(model).reason == f"{kind} models are not written as GGUF: {REFUSED[kind]}"


@pytest.mark.parametrize(
    "fields",
    [
        {"num_local_experts": 0},
        {"position_embedding_type": None, "attention_multiplier": 0.3, "residual_multiplier": 0.7},
    ],
)
def test_granite_4_without_experts_and_without_positions(fields, saved, tmp_path):
    folder, wanted = saved("granitemoehybrid", **fields)
    path, _ = converted(folder, tmp_path / "out")
    assert distance(try_file(path, TOKENS), wanted) < 1e-5
    back = GGUF().open(tmp_path / "out")
    assert distance(logits_of(back, torch.tensor([TOKENS]))[0], wanted) < 1e-5


def test_types_without_a_conversion_are_refused(saved):
    model = HFCheckpoint(saved("bloom")[0])
    assert "nothing says what GGUF calls" in GGUF().supports(model).reason
