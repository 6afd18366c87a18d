"""GPTQ checkpoints against a loop over their layout, literal words, other tools' habits, and damage."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.artifact.gptq import GPTQ
from qtool.artifact.gptq._layout import encode
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import CheckpointError, PlanError
from qtool.formats._base import Quantized
from qtool.formats.int import Int
from qtool.formats.q4_0 import Q4_0
from qtool.formats.q4_1 import Q4_1
from tests.artifact.conftest import assert_same_model, quantize
from tests.reference import packed

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
SYM4 = Int(bits=4, group=32)


def write(model, folder):
    folder.mkdir(exist_ok=True)
    return GPTQ().write(model, folder, {})


def stored(folder, module):
    tensors = load_file(folder / "model.safetensors")
    return {name.rpartition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{module}.")}


def configuration(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


HELD = [Int(bits=b, group=32, symmetric=s) for b in (2, 3, 4, 8) for s in (True, False)]
HELD += [Int(bits=4, group="channel"), Int(bits=3, group="channel", symmetric=False), Int(bits=4, group=64)]


@pytest.mark.parametrize("fmt", HELD, ids=lambda f: f.label)
def test_comes_back_and_a_loop_over_the_layout_decodes_it(fmt, tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), fmt)
    files = write(model, tmp_path)
    assert sorted(files) == sorted(tmp_path.iterdir())
    found = GPTQ().open(tmp_path)
    assert found.layers == model.layers
    assert_same_model(found, model)
    expected = packed.gptq(stored(tmp_path, UP), fmt.bits, plus=1 if fmt.symmetric else 0)
    assert torch.equal(expected.float(), model.tensor(f"{UP}.weight"))


def test_every_family_comes_back(tiny_folder, tmp_path):
    model = quantize(tiny_folder, Int(bits=4, group=32, symmetric=False, scale_dtype="fp16"))
    model.config["dtype"] = "float16"
    write(model, tmp_path)
    assert_same_model(GPTQ().open(tmp_path), model)


def words(codes, bits, zero=None):
    """The tensors of a matrix [N, K] of codes with scales of 1."""
    fmt = Int(bits=bits, group="channel", symmetric=zero is None)
    params = {"scale": torch.ones(len(codes), 1)}
    if zero is not None:
        params["zero"] = torch.tensor(zero, dtype=torch.int8).view(-1, 1)
    return encode(Quantized(codes.to(torch.uint8), params, fmt), 1 if zero is None else 0)


def unsigned(tensor):
    return [word & 0xFFFFFFFF for word in tensor.flatten().tolist()]


def test_golden_words():
    """Published: GPTQModel's packing of 3 and 4 bits, and the zero points of symmetric codes less 1."""
    rows = torch.arange(8).repeat(32, 4)
    found = words(rows, 3)
    assert unsigned(found["qweight"][:, 0]) == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
    found = words(rows, 4)
    assert unsigned(found["qweight"][:, 0]) == [0x76543210] * 4
    assert unsigned(found["qzeros"]) == [0x77777777] * 4
    found = words(rows, 4, zero=[0] * 32)
    assert unsigned(found["qzeros"]) == [0x88888888] * 4
    found = words(torch.zeros(8, 32), 4, zero=list(range(-8, 0)))
    assert unsigned(found["qzeros"]) == [0x76543210]


def test_configuration_of_a_uniform_model(tiny_checkpoint, tmp_path):
    write(quantize(tiny_checkpoint("llama-tied"), SYM4), tmp_path)
    how = configuration(tmp_path)
    assert how == json.loads((tmp_path / "quantize_config.json").read_text())
    assert how.pop("meta")["quantizer"][0].startswith("qtool:")
    assert how == {
        "quant_method": "gptq",
        "method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "format": "gptq",
        "pack_dtype": "int32",
        "dynamic": {},
    }


def test_mixed_formats_are_listed_for_names_before_and_after_merging(tiny_checkpoint, tmp_path):
    asym8 = Int(bits=8, group="channel", symmetric=False)
    model = quantize(tiny_checkpoint("llama"), SYM4, gate=asym8, up=asym8, o=None, head=Int(bits=2, group=64))
    write(model, tmp_path)
    how = configuration(tmp_path)
    assert (how["bits"], how["group_size"], how["sym"], how["checkpoint_format"]) == (4, 32, True, "gptq_v2")
    assert how["lm_head"] is True

    def treatment(name):
        """As vLLM looks it up: the first entry that matches."""
        for pattern, changes in how["dynamic"].items():
            if re.match(pattern[2:], name):
                return changes if pattern.startswith("+:") else None
        return {}

    for block in range(2):
        prefix = f"model.layers.{block}."
        for name in ("self_attn.q_proj", "self_attn.qkv_proj", "mlp.down_proj"):
            assert treatment(prefix + name) == {}
        for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"):
            assert treatment(prefix + name) == {"bits": 8, "group_size": -1, "sym": False}
        assert treatment(prefix + "self_attn.o_proj") is None
    assert treatment("lm_head") == {"bits": 2, "group_size": 64, "sym": True}
    assert treatment("model.layers.10.mlp.up_proj") == {}
    assert_same_model(GPTQ().open(tmp_path), model)


def test_blocks_of_gguf_without_minimum_are_integers(tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("mistral"), Q4_0())
    write(model, tmp_path)
    found = GPTQ().open(tmp_path)
    assert {layer.format.label for layer in found.layers.values()} == {"int4-g32"}
    for name in model.names():
        assert torch.equal(found.tensor(name), model.tensor(name))


REFUSED = {
    "width": ({"fmt": Int(bits=5, group=32)}, "holds integers of 2, 3, 4 or 8 bits .* not int5-g32"),
    "minima": ({"fmt": Q4_1()}, "not q4_1"),
    "inputs": ({"fmt": SYM4, "activations": Int(bits=8, group="token")}, "cannot say how activations are quantized"),
    "embedding": ({"fmt": None, "embedding": SYM4}, "token embedding stays unquantized"),
    "fused": ({"fmt": SYM4, "k": Int(bits=8, group=32)}, "layers that become one tensor"),
    "scales": ({"fmt": Int(bits=4, group=32, scale_dtype="fp32")}, "stored as float32 are not exact in bfloat16"),
}


@pytest.mark.parametrize(("what", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_hold_is_refused(what, message, tiny_checkpoint, tmp_path):
    with pytest.raises(PlanError, match=message):
        write(quantize(tiny_checkpoint("llama"), **what), tmp_path)


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("fmt", [SYM4, Int(bits=3, group=32, symmetric=False)], ids=lambda f: f.label)
def test_groups_in_activation_order_are_decoded_and_go_nowhere(fmt, tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), fmt)
    write(model, tmp_path)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    edit(tmp_path, lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"][order].contiguous()}))
    edit_config(tmp_path, desc_act=True)
    found = GPTQ().open(tmp_path)
    assert found.decoded == {UP: "its groups are in activation order (g_idx)"}
    assert UP not in found.layers
    weight = found.tensor(f"{UP}.weight")
    expected = packed.gptq(stored(tmp_path, UP), fmt.bits, plus=1 if fmt.symmetric else 0)
    assert torch.equal(weight, expected.float())
    assert not torch.equal(weight, model.tensor(f"{UP}.weight"))
    assert torch.equal(found.rows(f"{UP}.weight", 3, 17), weight[3:17])
    assert torch.equal(found.tensor(f"{DOWN}.weight"), model.tensor(f"{DOWN}.weight"))
    with pytest.raises(PlanError, match=rf"only `quantize` can take .*: its groups are in activation order .*: {UP}"):
        GPTQ().check(found)


def test_a_short_last_group_is_decoded(tiny_checkpoint, tmp_path):
    write(quantize(tiny_checkpoint("llama"), SYM4), tmp_path)

    def regroup(tensors):
        tensors[f"{UP}.g_idx"] = torch.arange(64, dtype=torch.int32) // 48
        tensors[f"{UP}.scales"][1] *= 3

    edit(tmp_path, regroup)
    edit_config(tmp_path, dynamic={UP: {"group_size": 48}})
    found = GPTQ().open(tmp_path)
    assert found.decoded == {UP: "the last group of a row is shorter than the others"}
    assert torch.equal(found.tensor(f"{UP}.weight"), packed.gptq(stored(tmp_path, UP), 4, plus=1).float())


def test_other_tools_habits(tiny_checkpoint, tmp_path):
    """No g_idx, biases of zeros, a group larger than the row, and keys that nobody here knows."""
    model = quantize(tiny_checkpoint("llama"), Int(bits=4, group="channel"))
    write(model, tmp_path)

    def habits(tensors):
        for name in [name for name in tensors if name.endswith(".g_idx")]:
            del tensors[name]
        tensors[f"{UP}.bias"] = torch.zeros(128)

    edit(tmp_path, habits)
    edit_config(
        tmp_path, group_size=256, damp_percent=0.1, true_sequential=True, provider="x", dynamic={"-:lm_head": {}}
    )
    assert_same_model(GPTQ().open(tmp_path), model)
    edit(tmp_path, lambda t: t[f"{UP}.bias"].add_(1))
    with pytest.raises(CheckpointError, match=rf"holds a tensor that llama models do not have: found {UP}.bias"):
        GPTQ().open(tmp_path)


def shorten(name):
    return lambda t: t.update({name: t[name][:-1].contiguous()})


DAMAGE = {
    "bits": (lambda f: edit_config(f, bits=5), "quantization_config: bits: .*found 5"),
    "no bits": (lambda f: edit_config(f, bits=None), "quantization_config: bits"),
    "group": (lambda f: edit_config(f, group_size=0), "group_size: wanted a positive number, or -1 .*found 0"),
    "other bits": (lambda f: edit_config(f, bits=8), r"qweight: wanted int32 \[16, 64\], found int32 \[8, 64\]"),
    "other group": (lambda f: edit_config(f, group_size=16), r"qzeros: wanted int32 \[4, 8\], found int32 \[2, 8\]"),
    "format": (lambda f: edit_config(f, checkpoint_format="marlin"), "wanted gptq or gptq_v2, found 'marlin'"),
    "label": (lambda f: edit_config(f, checkpoint_format="gptq_v2"), "zero points of symmetric codes: wanted 8"),
    "dynamic": (lambda f: edit_config(f, dynamic={"+:x": {"bits": "4"}}), r"dynamic: \+:x: quantization_config: bits"),
    "dynamic list": (lambda f: edit_config(f, dynamic=[1]), "quantization_config: dynamic"),
    "expression": (lambda f: edit_config(f, dynamic={"+:(": {}}), "no regular expression"),
    "cut": (lambda f: edit(f, shorten(f"{UP}.qweight")), r"up_proj.qweight: wanted int32 \[8, 128\], found"),
    "no scales": (lambda f: edit(f, lambda t: t.pop(f"{UP}.scales")), f"lacks {UP}.scales"),
    "no zeros": (lambda f: edit(f, lambda t: t.pop(f"{UP}.qzeros")), f"lacks {UP}.qzeros"),
    "no codes": (lambda f: edit(f, lambda t: t.pop(f"{UP}.qweight")), f"lacks 1 of the .*{UP}.weight"),
    "index": (lambda f: edit(f, lambda t: t[f"{UP}.g_idx"].add_(7)), "g_idx: wanted int32 from 0 to 1, found others"),
    "no index": (
        lambda f: (edit_config(f, desc_act=True), edit(f, lambda t: t.pop(f"{UP}.g_idx"))),
        f"lacks {UP}.g_idx, and its columns are in activation order",
    ),
    "scale type": (
        lambda f: edit(f, lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].int()})),
        "scales: wanted bf16, fp16, fp32, found torch.int32",
    ),
    "stranger": (
        lambda f: edit(f, lambda t: t.update({"model.x.qweight": torch.zeros(1)})),
        r"model\.x\.qweight is packed, but the model has no such module",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_files(damage, message, tiny_checkpoint, tmp_path):
    write(quantize(tiny_checkpoint("llama"), SYM4), tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        GPTQ().open(tmp_path).matrix("model.layers.0.self_attn.q_proj")


def test_only_its_own_folders_are_recognized(tiny_checkpoint, tmp_path):
    assert not GPTQ.recognizes(tiny_checkpoint("llama"))
    assert not GPTQ.recognizes(tmp_path)
    write(quantize(tiny_checkpoint("llama"), SYM4), tmp_path)
    assert GPTQ.recognizes(tmp_path)
    with pytest.raises(CheckpointError, match="already quantized"):
        HFCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("fmt", "told"),
    [
        (Int(bits=4, group=128), False),
        (Int(bits=8, group="channel"), False),
        (Int(bits=3, group=32), True),
        (Int(bits=4, group=32, symmetric=False), True),
        (Int(bits=4, group=16), True),
    ],
    ids=lambda value: getattr(value, "label", ""),
)
def test_what_vllm_does_not_load_is_said(fmt, told, tiny_checkpoint):
    model = quantize(tiny_checkpoint("llama"), None, down=fmt)
    text = "vLLM loads symmetric integers of 4 and 8 bits only, whole rows or groups of 32, 64 or 128, not"
    assert GPTQ().caveats(model, model.layers) == ([f"{text} {fmt.label}; GPTQModel does"] if told else [])
