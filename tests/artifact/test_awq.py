"""AWQ checkpoints against a loop over their layout, literal words, other tools' habits, and damage."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.artifact.awq import AWQ, encode
from qtool.errors import CheckpointError, PlanError
from qtool.formats._base import Quantized
from qtool.formats.int import Int
from qtool.formats.q4_0 import Q4_0
from qtool.formats.q8_0 import Q8_0
from tests.artifact.conftest import assert_same_model, quantize
from tests.reference import packed

UP = "model.layers.0.mlp.up_proj"
ASYM, SYM = Int(bits=4, group=32, symmetric=False), Int(bits=4, group=32)


def write(model, folder):
    folder.mkdir(exist_ok=True)
    return AWQ().write(model, folder, {})


def stored(folder, module):
    tensors = load_file(folder / "model.safetensors")
    return {name.rpartition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{module}.")}


@pytest.mark.parametrize("fmt", [ASYM, SYM, Int(bits=4, group="channel", symmetric=False)], ids=lambda f: f.label)
def test_comes_back_and_a_loop_over_the_layout_decodes_it(fmt, tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), fmt)
    files = write(model, tmp_path)
    assert sorted(files) == sorted(tmp_path.iterdir())
    found = AWQ().open(tmp_path)
    assert found.layers == model.layers
    assert_same_model(found, model)
    expected = packed.awq(stored(tmp_path, UP), fmt.group_columns or 64)
    assert torch.equal(expected.float(), model.tensor(f"{UP}.weight"))


def test_every_family_comes_back(tiny_folder, tmp_path):
    model = quantize(tiny_folder, Int(bits=4, group=32, symmetric=False, scale_dtype="fp16"), k=SYM, q=SYM, v=SYM)
    model.config["dtype"] = "float16"
    write(model, tmp_path)
    found = AWQ().open(tmp_path)
    for name in model.names():
        assert torch.equal(found.tensor(name), model.tensor(name))
    assert {m: layer.format.label for m, layer in found.layers.items()} == {
        m: layer.format.label for m, layer in model.layers.items()
    }


def test_golden_word():
    """Published: outputs 0 to 7 with codes 0 to 7; zero points in the same order, and 8 where there are none."""
    codes = torch.arange(8, dtype=torch.uint8).view(8, 1)
    scale = torch.ones(8, 1)
    fmt = Int(bits=4, group="channel", symmetric=False)
    zero = torch.arange(-8, 0, dtype=torch.int8).view(8, 1)
    found = encode(Quantized(codes, {"scale": scale, "zero": zero}, fmt))
    assert found["qweight"].tolist() == found["qzeros"].tolist() == [[0x75316420]]
    found = encode(Quantized(codes, {"scale": scale}, Int(bits=4, group="channel")))
    assert found["qzeros"].item() & 0xFFFFFFFF == 0x88888888


def test_configuration(tiny_checkpoint, tmp_path):
    write(quantize(tiny_checkpoint("llama-tied"), ASYM, o=None), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [*(f"model.layers.{i}.self_attn.o_proj" for i in range(3)), "lm_head"],
    }


REFUSED = {
    "width": ({"fmt": Int(bits=8, group=32)}, "holds 4-bit integers per group or channel, .* not int8-g32"),
    "blocks": ({"fmt": Q8_0()}, "not q8_0"),
    "inputs": ({"fmt": SYM, "activations": Int(bits=8, group="token")}, "cannot say how activations are quantized"),
    "embedding": ({"fmt": None, "embedding": SYM}, "token embedding stays unquantized"),
    "groups": (
        {"fmt": ASYM, "down": Int(bits=4, group=64)},
        "AWQ has one group size for all layers, not 32, 64: the model as a whole",
    ),
}


@pytest.mark.parametrize(("what", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_hold_is_refused(what, message, tiny_checkpoint, tmp_path):
    with pytest.raises(PlanError, match=message):
        write(quantize(tiny_checkpoint("llama"), **what), tmp_path)


def test_blocks_of_gguf_without_minimum_are_integers(tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("mistral"), Q4_0())
    write(model, tmp_path)
    found = AWQ().open(tmp_path)
    assert {layer.format.label for layer in found.layers.values()} == {"int4-g32"}
    for name in model.names():
        assert torch.equal(found.tensor(name), model.tensor(name))


def test_rows_that_do_not_begin_with_a_word(tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), ASYM)
    write(model, tmp_path)
    found = AWQ().open(tmp_path)
    for start, stop in ((0, 1), (3, 17), (7, 9), (120, 128)):
        assert torch.equal(found.rows(f"{UP}.weight", start, stop), model.tensor(f"{UP}.weight")[start:stop])


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, drop=(), **changes):
    config = json.loads((folder / "config.json").read_text())
    how = config["quantization_config"] | changes
    config["quantization_config"] = {key: value for key, value in how.items() if key not in drop}
    (folder / "config.json").write_text(json.dumps(config))


def test_the_first_tools_spelling(tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), ASYM)
    write(model, tmp_path)
    edit_config(tmp_path, drop=("bits", "group_size"), w_bit=4, q_group_size=32, version="GEMM")
    assert_same_model(AWQ().open(tmp_path), model)


DAMAGE = {
    "bits": (lambda f: edit_config(f, bits=8), "quantization_config: bits: .*found 8"),
    "version": (lambda f: edit_config(f, version="gemv"), "version of AWQ: wanted gemm, found 'gemv'"),
    "group": (lambda f: edit_config(f, group_size=0), "group_size: wanted a positive number.*found 0"),
    "no group": (lambda f: edit_config(f, drop=["group_size"]), "quantization_config: group_size"),
    "odd group": (lambda f: edit_config(f, group_size=48), "wanted rows in eights, columns in groups of 48"),
    "other group": (lambda f: edit_config(f, group_size=64), r"qzeros: wanted int32 \[1, 8\], found int32 \[2, 8\]"),
    "cut": (
        lambda f: edit(f, lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:-1].clone()})),
        r"qweight: wanted int32 \[64, 16\], found int32 \[63, 16\]",
    ),
    "type": (
        lambda f: edit(f, lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].float()})),
        r"qweight: wanted int32 \[64, 16\], found float32",
    ),
    "no zeros": (lambda f: edit(f, lambda t: t.pop(f"{UP}.qzeros")), f"lacks {UP}.qzeros"),
    "no scales": (lambda f: edit(f, lambda t: t.pop(f"{UP}.scales")), f"lacks {UP}.scales"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_files(damage, message, tiny_checkpoint, tmp_path):
    write(quantize(tiny_checkpoint("llama"), ASYM), tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        AWQ().open(tmp_path)


def test_narrow_groups_are_said(tiny_checkpoint):
    for group, told in ((16, True), (32, False), (128, False), ("channel", False)):
        model = quantize(tiny_checkpoint("llama"), None, down=Int(bits=4, group=group))
        text = "vLLM and SGLang run groups that are multiples of 32 columns only, not int4-g16"
        assert AWQ().caveats(model, model.layers) == ([text] if told else [])
