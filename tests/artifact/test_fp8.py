"""FP8 in blocks against loops and damage; gpt-oss's experts in MXFP4 against transformers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qtool.artifact._floats import from_bits, to_bits
from qtool.artifact._integers import exact
from qtool.artifact.compressed_tensors._floats import is_block
from qtool.artifact.fp8 import FP8
from qtool.artifact.gguf import GGUF
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import CheckpointError, PlanError
from qtool.formats._spelling import parse_format
from qtool.formats.int import Int
from qtool.formats.mxfp4 import MXFP4
from qtool.formats.mxfp8 import MXFP8
from qtool.models import find_artifact, open_artifact, open_model
from qtool.numerics.grids.bits import pack
from tests.artifact.conftest import quantize

BLOCK, INPUTS = parse_format("fp8-block"), parse_format("fp8-g128")
DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"


def only_down(folder):
    """The only rows of the tiny model that are whole blocks."""
    return quantize(folder, None, INPUTS, down=BLOCK)


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("fmt", [MXFP4(), MXFP8(), MXFP8(element="e5m2"), BLOCK, parse_format("fp6-e2m3-g32")])
def test_bit_patterns(fmt):
    codes = torch.arange(len(fmt.levels()), dtype=torch.uint8)
    bits = to_bits(codes, fmt)
    assert torch.equal(from_bits(bits, fmt), codes)
    if fmt.code_bits == 8:
        kind = torch.float8_e5m2 if "e5m2" in fmt.label else torch.float8_e4m3fn
        assert torch.equal(bits.view(kind).float(), fmt.levels())
        everything = torch.arange(256, dtype=torch.uint8)
        finite = everything.view(kind).float().isfinite()
        assert torch.equal(from_bits(everything, fmt) == 255, ~finite)


def test_comes_back_and_a_loop_over_blocks_decodes_it(tiny_checkpoint, tmp_path):
    model = only_down(tiny_checkpoint("llama"))
    files = FP8().write(model, tmp_path, {})
    assert sorted(files) == sorted(tmp_path.iterdir())
    found = FP8().open(tmp_path)
    assert found.config == model.config
    assert found.layers == {f"model.layers.{i}.mlp.down_proj": found.layers[DOWN] for i in range(2)}
    assert (found.layers[DOWN].format.label, found.layers[DOWN].activations.label) == ("fp8-block", "fp8-g128")
    tensors = load_file(tmp_path / "model.safetensors")
    weight, scale = tensors[f"{DOWN}.weight"].float(), tensors[f"{DOWN}.weight_scale_inv"]
    assert scale.shape == (1, 1)
    for name in model.names():
        assert torch.equal(found.tensor(name), model.tensor(name)), name
    assert torch.equal(model.tensor(f"{DOWN}.weight"), weight * float(scale))
    assert torch.equal(found.rows(f"{DOWN}.weight", 5, 9), model.tensor(f"{DOWN}.weight")[5:9])
    how = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert DOWN not in how.pop("modules_to_not_convert")
    assert how == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }


@pytest.mark.parametrize(("label", "said"), [("fp8-block", True), ("int4-g32", False)])
def test_scales_that_bfloat16_does_not_hold_have_a_place_here(label, said):
    """compressed-tensors gives scales the model's type, as its runtimes do."""
    scale = torch.tensor([[1 + 2.0**-12]])
    with pytest.raises(PlanError, match=r"not exact in bfloat16; .*quantize with `scale_dtype`") as refused:
        exact(scale, "m", torch.bfloat16, blocks=is_block(parse_format(label)))
    assert ("export to fp8, whose scales are float32" in str(refused.value)) == said
    assert torch.equal(exact(scale, "m", torch.float32), scale)


def test_many_blocks_and_rows_that_end_inside_of_one(tiny_checkpoint, tmp_path):
    """A published checkpoint has a scale for the rest of every dimension."""
    FP8().write(only_down(tiny_checkpoint("llama")), tmp_path, {})
    head = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scales = torch.tensor([[0.5], [0.25], [2.0], [3.0]])
    edit(tmp_path, lambda t: t.update({"lm_head.weight": head, "lm_head.weight_scale_inv": scales}))
    found = FP8().open(tmp_path)
    expected = torch.cat([head.float()[i * 128 : i * 128 + 128] * float(scales[i]) for i in range(4)])
    assert torch.equal(found.tensor("lm_head.weight"), expected)
    assert torch.equal(found.rows("lm_head.weight", 100, 300), expected[100:300])
    assert found.decoded == {"lm_head": "its rows end inside of a block of 128 columns"}


REFUSED = {
    "inputs": (
        {"fmt": None, "down": BLOCK},
        "hold fp8-block with fp8-g128 inputs, not fp8-block with unquantized inputs",
    ),
    "format": (
        {"fmt": None, "activations": INPUTS, "down": parse_format("fp8-channel")},
        "not fp8-channel with fp8-g128 inputs",
    ),
    "embedding": ({"fmt": None, "embedding": Int(bits=4, group=32)}, "token embedding stays unquantized"),
}


@pytest.mark.parametrize(("what", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_hold_is_refused(what, message, tiny_checkpoint, tmp_path):
    with pytest.raises(PlanError, match=message):
        FP8().write(quantize(tiny_checkpoint("llama"), **what), tmp_path, {})


DAMAGE = {
    "no scales": (
        lambda f: edit(f, lambda t: t.pop(f"{DOWN}.weight_scale_inv")),
        f"{DOWN}.weight holds numbers without a scale: found torch.float8_e4m3fn",
    ),
    "size": (lambda f: edit_config(f, weight_block_size=[64, 64]), r"weight_block_size\.0.*found 64"),
    "no size": (lambda f: edit_config(f, weight_block_size=None), "quantization_config: weight_block_size"),
    "static": (lambda f: edit_config(f, activation_scheme="static"), "activation_scheme.*found 'static'"),
    "scales": (
        lambda f: edit(f, lambda t: t.update({f"{DOWN}.weight_scale_inv": torch.ones(2, 1)})),
        r"weight_scale_inv: wanted float32 \[1, 1\], found float32 \[2, 1\]",
    ),
    "weight": (
        lambda f: edit(f, lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"].float()})),
        r"weight: wanted float8_e4m3fn \[64, 128\], found float32",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_files(damage, message, tiny_checkpoint, tmp_path):
    FP8().write(only_down(tiny_checkpoint("llama")), tmp_path, {})
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        FP8().open(tmp_path)


def test_numbers_that_are_none(tiny_checkpoint, tmp_path):
    FP8().write(only_down(tiny_checkpoint("llama")), tmp_path, {})
    edit(tmp_path, lambda t: t[f"{DOWN}.weight"].view(torch.uint8)[3].fill_(0xFF))
    with pytest.raises(CheckpointError, match=f"codes of {DOWN}: wanted below 253, found larger"):
        FP8().open(tmp_path).tensor(f"{DOWN}.weight")


@pytest.fixture
def published(tiny_checkpoint, tmp_path):
    """A tiny gpt-oss as OpenAI publishes it: experts in MXFP4 blocks, and what they decode to."""
    folder = shutil.copytree(tiny_checkpoint("gpt_oss"), tmp_path / "gpt-oss")
    origin, tensors = HFCheckpoint(tiny_checkpoint("gpt_oss")), {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    fmt = MXFP4(search="floor")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts = tensors.pop(name).float().transpose(1, 2).contiguous()  # [E, rows, columns]
        params = [fmt.fit(w) for w in experts]
        blocks = [pack(to_bits(fmt.snap(w, p), fmt), 4) for w, p in zip(experts, params, strict=True)]
        tensors[f"{name}_blocks"] = torch.stack(blocks).reshape(*experts.shape[:2], -1, 16)
        tensors[f"{name}_scales"] = torch.stack([p["exponent"] for p in params])
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, tensors, origin


def test_experts_in_mxfp4_decode_as_in_transformers(published):
    folder, tensors, origin = published
    found = open_model(str(folder))
    assert find_artifact(folder)[0] == "mxfp4 experts"
    assert found.names() == origin.names()
    assert {layer.format.label for layer in found.layers.values()} == {"mxfp4"}
    for i in range(2):
        part = f"model.layers.{i}.mlp.experts"
        whole = {
            name: convert_moe_packed_tensors(
                tensors[f"{part}.{name}_blocks"], tensors[f"{part}.{name}_scales"], dtype=torch.float32
            )
            for name in ("gate_up_proj", "down_proj")
        }  # [E, columns, rows], as the class holds them
        for e in range(len(whole["down_proj"])):
            for name, expected in (
                ("gate_proj", whole["gate_up_proj"][e, :, ::2].T),
                ("up_proj", whole["gate_up_proj"][e, :, 1::2].T),
                ("down_proj", whole["down_proj"][e].T),
            ):
                weight = found.tensor(f"{part}.{e}.{name}.weight")
                assert torch.equal(weight, expected)
                assert torch.equal(found.rows(f"{part}.{e}.{name}.weight", 3, 20), expected[3:20])
                trained = origin.tensor(f"{part}.{e}.{name}.weight").float()
                assert 0.05 < float((weight - trained).norm() / trained.norm()) < 0.2
                bias = f"{part}.{e}.{name}.bias"
                assert torch.equal(found.tensor(bias), origin.tensor(bias))


def test_experts_in_mxfp4_go_to_gguf_as_they_are(published, tmp_path):
    folder, _, _ = published
    model = open_artifact(folder)
    GGUF().check(model)
    (tmp_path / "out").mkdir()
    GGUF().write(model, tmp_path / "out", {})
    found = open_artifact(tmp_path / "out")
    assert found.layers.keys() == model.layers.keys()
    for module in model.layers:
        assert torch.equal(found.tensor(f"{module}.weight"), model.tensor(f"{module}.weight"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: t.pop(f"{n}_scales"), "gate_up_proj_scales: wanted uint8 .*, found nothing"),
        (lambda t, n: t.update({f"{n}_blocks": t[f"{n}_blocks"][:, :-1].clone()}), "gate_up_proj_blocks: wanted uint8"),
        (lambda t, n: t.update({"model.x_blocks": t[f"{n}_blocks"].clone()}), "the model has no such experts"),
    ],
    ids=["no scales", "cut", "stranger"],
)
def test_damaged_experts(change, message, published):
    folder, tensors, _ = published
    change(tensors, "model.layers.0.mlp.experts.gate_up_proj")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_model(str(folder))
