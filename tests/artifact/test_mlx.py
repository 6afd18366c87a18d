"""MLX checkpoints against a loop over their layout, words that MLX itself made, and damage."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny import save_tiny
from qtool.artifact._mlx_models import rope_fields
from qtool.artifact.gptq import GPTQ
from qtool.artifact.mlx import MLX, encode
from qtool.checkpoint._base import Layer
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import CheckpointError, NumericsError, PlanError
from qtool.formats._base import Quantized
from qtool.formats._spelling import parse_format
from qtool.formats.biased import Biased
from qtool.formats.int import Int
from qtool.formats.mxfp4 import MXFP4
from qtool.formats.mxfp8 import MXFP8
from qtool.models import open_model
from tests.artifact.conftest import InMemory, assert_same_model, quantize
from tests.conftest import TINY
from tests.reference import packed

UP = "model.layers.0.mlp.up_proj"
MLX_MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")


def write(model, folder):
    folder.mkdir(exist_ok=True)
    return MLX().write(model, folder, {})


def stored(folder, module):
    tensors = load_file(folder / "model.safetensors")
    return {name.rpartition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{module}.")}


OWN = [Biased(bits=b, group=32) for b in (2, 3, 4, 5, 6, 8)]
OWN += [Biased(bits=4, group=64, scale_dtype="fp32"), MXFP4(), MXFP8()]


@pytest.mark.parametrize("fmt", OWN, ids=lambda f: f.label)
def test_its_own_formats_come_back(fmt, tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), fmt, embedding=fmt)
    files = write(model, tmp_path)
    assert sorted(files) == sorted(tmp_path.iterdir())
    found = MLX().open(tmp_path)
    assert_same_model(found, model)
    if isinstance(fmt, Biased):
        assert found.layers == model.layers
        expected = packed.mlx(stored(tmp_path, UP), fmt.bits, fmt.group)
        assert torch.allclose(expected, model.tensor(f"{UP}.weight").double(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", [*(name for name in TINY if name != "phi3-long"), *MLX_MIXTURES])
def test_every_family_comes_back(name, tiny_checkpoint, tmp_path):
    fmt = Biased(bits=4, group=32, scale_dtype="fp16")
    model = quantize(tiny_checkpoint(name), fmt, router=None, embedding=Biased(bits=6, group=64, scale_dtype="fp16"))
    write(model, tmp_path)
    assert_same_model(MLX().open(tmp_path), model)


@pytest.mark.parametrize("roles", [{}, dict.fromkeys(("gate", "up", "down"))], ids=["packed", "kept"])
@pytest.mark.parametrize("name", MLX_MIXTURES)
def test_experts_are_stacked(roles, name, tiny_checkpoint, tmp_path):
    """As `switch_mlp`, whatever an expert's matrices are called; kept ones too, because some of mlx-lm's classes only
    stack others where block 0 has such."""
    fmt = Biased(bits=4, group=32, scale_dtype="fp32")
    model = quantize(tiny_checkpoint(name), fmt, router=None, **roles)
    write(model, tmp_path)
    part, names = ("block_sparse_moe", "w1 w3 w2") if name == "mixtral" else ("mlp", "gate_proj up_proj down_proj")
    tensors = load_file(tmp_path / "model.safetensors")
    assert not [key for key in tensors if ".experts." in key]
    for role, own in zip(("gate", "up", "down"), names.split(), strict=True):
        stack = stored(tmp_path, f"model.layers.1.{part}.switch_mlp.{role}_proj")
        assert set(stack) == ({"weight"} if roles else {"weight", "scales", "biases"})
        assert len(stack["weight"]) == model.family.experts(model.config)
        for e in range(len(stack["weight"])):
            expected = model.tensor(f"model.layers.1.{part}.experts.{e}.{own}.weight").double()
            one = {key: tensor[e] for key, tensor in stack.items()}
            found = one["weight"].double() if roles else packed.mlx(one, 4, 32)
            assert torch.allclose(found, expected, rtol=1e-7, atol=1e-7)
    assert_same_model(MLX().open(tmp_path), model)


def test_a_stack_has_one_format_and_the_configuration_names_it(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("qwen3_moe")
    model = quantize(folder, Biased(bits=4, group=32), router=None, gate=MXFP8())
    write(model, tmp_path)
    how = json.loads((tmp_path / "config.json").read_text())["quantization"]
    stacks = [f"model.layers.{i}.mlp.switch_mlp.gate_proj" for i in range(2)]
    assert {key for key, value in how.items() if isinstance(value, dict)} == set(stacks)
    assert_same_model(MLX().open(tmp_path), model)

    def choose(module):
        return Layer(MXFP8() if module.expert == 2 else MXFP4()) if module.expert is not None else None

    with pytest.raises(PlanError, match=r"different formats: model\.layers\.0\.mlp\.experts\.gate_proj and 5 more"):
        write(InMemory(HFCheckpoint(folder), choose), tmp_path / "other")


def test_a_stack_of_other_experts(tiny_checkpoint, tmp_path):
    write(quantize(tiny_checkpoint("qwen3_moe"), Biased(bits=4, group=32), router=None), tmp_path)
    name = "model.layers.0.mlp.switch_mlp.up_proj.scales"
    edit(tmp_path, lambda t: t.update({name: t[name][1:].clone()}))
    with pytest.raises(CheckpointError, match=f"{name}: wanted 6 matrices, found .5, 32, 2."):
        MLX().open(tmp_path)


@pytest.mark.parametrize(
    "fmt", [Biased(bits=4, group=32, scales="minmax"), MXFP4(search="fast")], ids=lambda f: f.label
)
def test_how_scales_were_chosen_is_no_matter(fmt, tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), fmt)
    write(model, tmp_path)
    for name in model.names():
        assert torch.equal(MLX().open(tmp_path).tensor(name), model.tensor(name)), name


EXACT = {
    "int4-g32": ("int4-g32", "bf16"),
    "int3-g64": ("int3-g64", "bf16"),
    "int7-g32": ("biased8-g32", "bf16"),
    "int8-channel": ("int8-g64", "bf16"),
    "int4-g64-asym": ("biased4-g64", "fp32"),
    "q4_1": ("biased4-g32", "fp16"),
    "q5_0": ("int5-g32", "fp16"),
    "q8_0": ("int8-g32", "fp16"),
}


@pytest.mark.parametrize(("label", "held", "dtype"), [(k, *v) for k, v in EXACT.items()], ids=EXACT)
def test_the_same_values_with_offsets(label, held, dtype, tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), parse_format(label), down=None)
    write(model, tmp_path)
    found = MLX().open(tmp_path)
    assert {(layer.format.label, layer.format.scale_dtype) for layer in found.layers.values()} == {(held, dtype)}
    for name in model.names():
        assert torch.equal(found.tensor(name), model.tensor(name)), name


def test_integers_without_zero_points_go_on_to_other_layouts(tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), parse_format("int4-g32"), down=parse_format("int8-g64"))
    write(model, tmp_path / "mlx")
    (tmp_path / "gptq").mkdir()
    GPTQ().write(MLX().open(tmp_path / "mlx"), tmp_path / "gptq", {})
    assert_same_model(GPTQ().open(tmp_path / "gptq"), model)


GOLDEN = {
    2: [0x6C6C6C6C, 0x6C6C6C6C],
    3: [0x47D63447, 0x3447D634, 0xD63447D6],
    4: [0xE5C3A10F, 0x6D4B2907, 0xE5C3A18F, 0x6D4B2907],
    5: [0x7835441F, 0xB9640775, 0x50FB748, 0x17F1593D, 0x3369B126],
    6: [0x23AB103F, 0x90073957, 0x59D92BCB, 0x33E8120F, 0x94177A5B, 0x9ADD3B08],
    8: [0xEAF100FF, 0xCED5DCE3, 0xB2B9C0C7, 0x969DA4AB, 0x7A81888F, 0x5E656C73, 0x42495057, 0x262D343B],
}
"""`mx.quantize` of mlx 0.32.4 (CPU) for codes 0, 2^b - 1, then 7 i mod 2^b, counted downwards from 3 bits on."""


@pytest.mark.parametrize("bits", GOLDEN)
def test_golden_words(bits):
    count = 1 << bits
    codes = torch.tensor([0, count - 1, *(7 * i % count for i in range(2, 32))])
    codes = (codes if bits == 2 else count - 1 - codes).to(torch.uint8).view(1, 32)
    params = {"scale": torch.ones(1, 1), "offset": torch.zeros(1, 1)}
    found = encode(Quantized(codes, params, Biased(bits=bits, group=32)))
    assert found["weight"].dtype == torch.uint32
    assert found["weight"].view(torch.int32).flatten().tolist() == [w - (w >> 31 << 32) for w in GOLDEN[bits]]


def test_golden_floats():
    """`mx.quantize` of mlx 0.32.4 in modes mxfp4 and mxfp8; negative zero is never written."""
    values = torch.tensor([[0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 0] * 2])
    exponent = {"exponent": torch.tensor([[127]], dtype=torch.uint8)}
    found = encode(Quantized(MXFP4().snap(values, exponent), exponent, MXFP4()))
    assert found["weight"].view(torch.int32).tolist() == [[0x76543210, 0x0FEDCBA9] * 2]
    values = torch.tensor([[0, 448, -448, 2**-9, 1.125, -240, 3.5, -0.015625] * 4])
    found = encode(Quantized(MXFP8().snap(values, exponent), exponent, MXFP8()))
    assert found["weight"].view(torch.int32)[0, :2].tolist() == [0x01FE7E00, 0x8846F739 - 2**32]
    assert found["scales"].tolist() == [[127]]


def test_configuration(tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), Biased(bits=4, group=64), o=None, head=MXFP8())
    write(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"] == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "lm_head": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    }


ROTARY = {
    "llama": (10000.0, None, None),
    "llama-rope3": (
        10000.0,
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 512},
        None,
    ),
    "qwen3-yarn": (10000.0, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, None),
    "gemma3_text": (1000000.0, {"rope_type": "linear", "factor": 8.0}, 5000.0),
}


@pytest.mark.parametrize("name", ROTARY)
def test_mlx_lm_finds_the_rotary_embedding(name, tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint(name), Biased(bits=4, group=32, scale_dtype="fp16"))
    write(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    found = config["rope_theta"], config.get("rope_scaling"), config.get("rope_local_base_freq")
    assert found == ROTARY[name]


def test_what_mlx_lm_reads_elsewhere_or_takes_for_something_else(tiny_checkpoint):
    model = HFCheckpoint(tiny_checkpoint("phi3"))
    model.config = model.config | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    assert rope_fields(model) == {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    model = HFCheckpoint(tiny_checkpoint("qwen3"))
    model.config = model.config | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0}}
    assert rope_fields(model)["rope_scaling"]["original_max_position_embeddings"] == 2048


OTHERWISE = {
    "activation": ("llama", {"hidden_act": "gelu"}, "with hidden_act 'silu' only, not 'gelu'"),
    "biases": ("qwen3", {"attention_bias": True}, "with attention_bias False only, not True"),
    "head": ("qwen2", {"head_dim": 32}, "with head_dim hidden_size / num_attention_heads only, not 32"),
    "capped": ("gemma3_text", {"final_logit_softcapping": 30.0}, "with final_logit_softcapping None only"),
    "turns": ("gemma3_text", {"layer_types": ["full_attention"] * 7}, "with layer_types .'sliding_attention', .* only"),
    "dense": ("qwen2_moe", {"mlp_only_layers": [0]}, "with mlp_only_layers .. only, not .0."),
    "longrope": ("phi3-long", {}, "phi3 models with rotary scaling default only, not longrope"),
    "unscaled": (
        "qwen3_moe",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        "qwen3_moe models with rotary scaling default only, not yarn",
    ),
    "factor": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "attention_factor": 1.5}},
        "does not read attention_factor of the rotary embedding",
    ),
    "sliding": (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
        "does not scale the rotary embedding where attention slides",
    ),
}


@pytest.mark.parametrize(("name", "fields", "reason"), OTHERWISE.values(), ids=OTHERWISE)
def test_what_mlx_lm_computes_otherwise_is_refused(name, fields, reason, tiny_checkpoint):
    model = HFCheckpoint(tiny_checkpoint(name))
    if fields:
        assert MLX().supports(model).possible
    model.config = model.config | fields
    assert re.search(reason, MLX().supports(model).reason)


def test_experts_that_transformers_knows_as_one_tensor_are_refused(tiny_checkpoint):
    assert "gguf holds them" in MLX().supports(HFCheckpoint(tiny_checkpoint("gpt_oss"))).reason


@pytest.mark.parametrize(("name", "window"), [("gemma2", 8), ("mixtral", 64), ("gemma3_text", 0), ("qwen3", 0)])
def test_sliding_windows_that_mlx_lm_ignores_are_said(name, window, tiny_checkpoint):
    text = f"mlx-lm lets attention of {name} models see all tokens, also beyond the sliding window of {window}"
    assert MLX().caveats(HFCheckpoint(tiny_checkpoint(name)), {}) == ([text] if window else [])


REFUSED = {
    "groups": ({"fmt": Int(bits=4, group=16)}, "holds integers in groups that are multiples of 32 .* not int4-g16"),
    "floats": ({"fmt": parse_format("fp8-channel")}, "not fp8-channel"),
    "other-floats": ({"fmt": MXFP8(element="e5m2")}, "not mxfp8-e5m2"),
    "inputs": (
        {"fmt": Int(bits=8, group="channel"), "activations": Int(bits=8, group="token")},
        "cannot say how activations are quantized",
    ),
}


@pytest.mark.parametrize(("kind", "said"), [("granite", False), ("minimax_m2", True)])
def test_types_that_nobody_has_seen_it_run_are_said(kind, said, tmp_path):
    save_tiny(kind, tmp_path)
    found = MLX().caveats(open_model(tmp_path), {})
    assert (f"nobody has seen mlx-lm run {kind} models: verify this one where mlx-lm is installed" in found) == said


@pytest.mark.parametrize(("what", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_hold_is_refused(what, message, tiny_checkpoint, tmp_path):
    with pytest.raises(PlanError, match=message):
        write(quantize(tiny_checkpoint("llama"), **what), tmp_path)


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, drop=(), **changes):
    config = json.loads((folder / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config[key] = {k: v for k, v in (config[key] | changes).items() if k not in drop}
    (folder / "config.json").write_text(json.dumps(config))


def test_older_configurations(tiny_checkpoint, tmp_path):
    """Without a mode, with entries of `false` for what is not packed, and under the first key only."""
    model = quantize(tiny_checkpoint("llama"), Biased(bits=4, group=32), o=None)
    write(model, tmp_path)
    edit_config(tmp_path, drop=["mode"], **{"model.layers.0.self_attn.o_proj": False})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert MLX.recognizes(tmp_path)
    assert_same_model(MLX().open(tmp_path), model)


def test_only_its_own_folders_are_recognized(tiny_checkpoint, tmp_path):
    assert not MLX.recognizes(tiny_checkpoint("llama"))
    assert not MLX.recognizes(tmp_path)


DAMAGE = {
    "bits": (lambda f: edit_config(f, bits=7), "quantization_config: bits: .*found 7"),
    "group": (lambda f: edit_config(f, group_size=48), "quantization_config: group_size: .*found 48"),
    "mode": (lambda f: edit_config(f, mode="nvfp4"), "quantization_config: mode: .*found 'nvfp4'"),
    "other mode": (lambda f: edit_config(f, mode="mxfp8"), "mxfp8: wanted 8 bits in groups of 32, found 4 in groups"),
    "other group": (lambda f: edit_config(f, group_size=64), r"scales: wanted bfloat16 \[64, 1\], found .*\[64, 2\]"),
    "large group": (lambda f: edit_config(f, group_size=128), "rows of 64 columns are not divisible by 128"),
    "other bits": (lambda f: edit_config(f, bits=8), r"weight: wanted uint32 \[64, 16\], found uint32 \[64, 8\]"),
    "no biases": (lambda f: edit(f, lambda t: t.pop(f"{UP}.biases")), f"lacks {UP}.biases"),
    "no scales": (lambda f: edit(f, lambda t: t.pop(f"{UP}.scales")), f"llama models do not have: found {UP}.biases"),
    "scale type": (
        lambda f: edit(f, lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].double()})),
        "scales: wanted bf16, fp16, fp32, found torch.float64",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_files(damage, message, tiny_checkpoint, tmp_path):
    write(quantize(tiny_checkpoint("llama"), Biased(bits=4, group=32)), tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        MLX().open(tmp_path)


@pytest.mark.parametrize("part", ["scales", "biases"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scales_that_are_not_finite(part, value, tiny_checkpoint, tmp_path):
    write(quantize(tiny_checkpoint("llama"), Biased(bits=4, group=32)), tmp_path)
    edit(tmp_path, lambda t: t[f"{UP}.{part}"][5].fill_(value))
    with pytest.raises(NumericsError, match=f"{UP}.weight is not finite: found NaN or infinite scales in "):
        MLX().open(tmp_path).matrix(UP)


def test_an_exponent_that_means_nan(tiny_checkpoint, tmp_path):
    write(quantize(tiny_checkpoint("llama"), MXFP4()), tmp_path)
    edit(tmp_path, lambda t: t[f"{UP}.scales"][5].fill_(255))
    with pytest.raises(NumericsError, match=f"{UP}.weight is not finite"):
        MLX().open(tmp_path).tensor(f"{UP}.weight")


def test_numbers_that_are_none(tiny_checkpoint, tmp_path):
    write(quantize(tiny_checkpoint("llama"), MXFP8()), tmp_path)
    edit(tmp_path, lambda t: t[f"{UP}.weight"].view(torch.int32).fill_(-1))
    with pytest.raises(CheckpointError, match=f"codes of {UP}: wanted below 253, found larger"):
        MLX().open(tmp_path).matrix(UP)
