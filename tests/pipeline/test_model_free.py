"""Models that nobody has a class for: quantized by names and shapes of tensors, as with the class."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qtool.api import open_model, quantize
from qtool.checkpoint.modules import modules
from qtool.cli.app import app
from qtool.errors import CheckpointError, NumericsError, PlanError, VerifyError
from qtool.models import open_model_free
from qtool.pipeline.events import silent
from qtool.pipeline.prepare import prepare
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.pipeline.verify import verify
from qtool.recipe.load import load_recipe
from qtool.store.manifest import Manifest


def recipe(weights, activations=None, method="rtn"):
    rule = {"match": "*", "weights": weights, "method": method} | ({"activations": activations} if activations else {})
    layers = [{"match": "lm_head", "keep": True}, rule]
    return {"recipe": 1, "name": "free", "layers": layers, "export": [{"to": "compressed-tensors"}]}


@pytest.fixture
def unknown(tiny_checkpoint, tmp_path):
    """A model under a type that nobody knows."""

    def make(name):
        folder = tmp_path / "unknown"
        shutil.copytree(tiny_checkpoint(name), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "nobody", "architectures": ["Nobody"]}))
        return folder

    return make


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [
        ("fp8-channel", "fp8-token"),
        ("int8-channel", "int8-token"),
        ("int4-g32", None),
        ("mxfp4", None),
        ("nvfp4", None),
    ],
)
@pytest.mark.parametrize("name", ["qwen3", "qwen2_moe"])
def test_bytes_are_those_of_a_run_with_the_class(name, weights, inputs, unknown, tiny_checkpoint, tmp_path):
    quantize(str(tiny_checkpoint(name)), recipe(weights, inputs), tmp_path / "class")
    quantize(open_model_free(str(unknown(name))), recipe(weights, inputs), tmp_path / "free")
    runs = tmp_path / "class", tmp_path / "free"
    wanted, found = (load_file(run / "model.safetensors") for run in runs)
    assert found.keys() == wanted.keys()
    flat = {key: tensor.reshape(-1).view(torch.uint8) for key, tensor in wanted.items()}
    assert all(torch.equal(found[key].reshape(-1).view(torch.uint8), tensor) for key, tensor in flat.items())
    told = [json.loads((run / "config.json").read_text())["quantization_config"]["config_groups"] for run in runs]
    assert told[0] == told[1]
    shapes = [{module.name: module.shape for module in modules(open_model(run))} for run in runs]
    assert shapes[0] == shapes[1]


def test_what_is_beside_the_language_model_is_copied(unknown, tmp_path):
    folder = unknown("llama")
    beside = {
        "visual.blocks.0.attn.qkv.weight": torch.randn(48, 32),
        "model.layers.0.mlp.router.weight": torch.randn(4, 64),
        "mtp.layers.0.proj.weight": torch.randn(32, 32),
    }
    save_file(load_file(folder / "model.safetensors") | beside, folder / "model.safetensors")
    quantize(open_model_free(str(folder)), recipe("int4-g32"), tmp_path / "free")
    found = load_file(tmp_path / "free" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in beside.items())
    assert "model.layers.0.mlp.up_proj.weight_packed" in found


@pytest.fixture
def published(tmp_path):
    """(folder, tensors) as DeepSeek stores checkpoints: float32 scales of 128 x 128 weights, zeros of both signs."""
    folder, draw = tmp_path / "published", torch.Generator().manual_seed(0)
    folder.mkdir()
    tensors = {"model.embed_tokens.weight": torch.randn(64, 128, generator=draw).bfloat16()}
    tensors["lm_head.weight"] = torch.randn(64, 128, generator=draw).bfloat16()
    for i in range(2):
        for name, n, k in (("self_attn.q_proj", 128, 128), ("mlp.up_proj", 256, 128), ("mlp.down_proj", 128, 256)):
            base = f"model.layers.{i}.{name}.weight"
            tensors[base] = (torch.randn(n, k, generator=draw) * 90).to(torch.float8_e4m3fn)
            tensors[base].view(torch.uint8)[0, :2] = torch.tensor([0x80, 0], dtype=torch.uint8)
            tensors[f"{base}_scale_inv"] = torch.rand(n // 128, k // 128, generator=draw)
    save_file(tensors, folder / "model.safetensors")
    how = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps({"model_type": "nobody", "quantization_config": how}))
    return folder, tensors


def as_it_is():
    rule = {"match": "*", "weights": "fp8-block", "activations": "fp8-g128", "method": "rtn"}
    layers = [{"match": "lm_head", "keep": True}, rule]
    return {"recipe": 1, "name": "same", "layers": layers, "export": [{"to": "fp8"}]}


def test_published_fp8_is_taken_over_bit_for_bit(published, tmp_path):
    folder, tensors = published
    (tmp_path / "same.yaml").write_text(json.dumps(as_it_is()))
    options = QuantizeOptions(open_model_free(str(folder)), str(tmp_path / "same.yaml"), tmp_path / "free", keep=True)
    report = run(options)
    assert {entry.method for entry in report.layers if entry.format} == {"taken over"}
    assert {entry.weight_error_db for entry in report.layers if entry.format} == {math.inf}
    assert not load_file(tmp_path / "free.work" / "block-1.safetensors")  # nothing is copied on the way
    found = load_file(tmp_path / "free" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
    shapes = {module.name: module.shape for module in modules(open_model(tmp_path / "free"))}
    assert shapes["model.layers.1.mlp.up_proj"] == (256, 128)


def test_units_that_only_take_over_are_saved_once(published, tmp_path, monkeypatch):
    folder, _ = published
    saved, save = [], Manifest.save
    monkeypatch.setattr(Manifest, "save", lambda self, path: (saved.append(len(self.blocks)), save(self, path))[1])
    (tmp_path / "same.yaml").write_text(json.dumps(as_it_is()))
    run(QuantizeOptions(open_model_free(str(folder)), str(tmp_path / "same.yaml"), tmp_path / "free", keep=True))
    assert saved == [0, 2]
    assert Manifest.load(tmp_path / "free.work").blocks.keys() == {"block-0", "block-1"}


def test_a_byte_that_was_not_taken_over_is_noticed(published, tmp_path):
    folder, tensors = published
    quantize(open_model_free(str(folder)), as_it_is(), tmp_path / "free")
    model, name = open_model_free(str(folder)), "model.layers.1.mlp.up_proj.weight"
    verify("verify", open_model(tmp_path / "free"), model, silent)
    bits = tensors[name].view(torch.uint8)
    bits[7, 5] ^= 1
    save_file(tensors, tmp_path / "free" / "model.safetensors")
    with pytest.raises(VerifyError, match=r"up_proj\.weight read back differs: found 1 of 32768 numbers"):
        verify("verify", open_model(tmp_path / "free"), model, silent)


MIXED = {
    "no scale": (
        {"weight_scale_inv": None},
        r"q_proj\.weight holds numbers without a scale: found torch\.float8_e4m3fn; are",
    ),
    "gptq": (
        {"weight": None, "weight_scale_inv": None, "qweight": torch.int32},
        r"q_proj\.qweight is packed, and config",
    ),
    "packed": (
        {"weight": None, "weight_scale_inv": None, "weight_packed": torch.int32},
        r"lacks model\.layers\.1\.self_attn\.q_proj\.weight_scale",
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_matrices_that_are_not_packed_as_the_others_are_refused(name, published):
    folder, tensors = published
    changes, message = MIXED[name]
    for part, dtype in changes.items():
        if dtype is None:
            del tensors[f"model.layers.1.self_attn.q_proj.{part}"]
        else:
            tensors[f"model.layers.1.self_attn.q_proj.{part}"] = torch.zeros(16, 16, dtype=dtype)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_model_free(str(folder))


@pytest.mark.parametrize("wanted", ["quantization_config", "model_type"])
def test_what_config_json_does_not_say(wanted, published):
    folder, _ = published
    told = json.loads((folder / "config.json").read_text())
    del told[wanted]
    (folder / "config.json").write_text(json.dumps(told))
    found = {"quantization_config": r"_proj\.weight holds numbers without a scale", "model_type": "wrong model_type"}
    with pytest.raises(CheckpointError, match=found[wanted]):
        open_model_free(str(folder))


@pytest.mark.parametrize("bits", [0x7F, 0xFF])
def test_published_fp8_that_is_no_number_is_refused(bits, published, tmp_path):
    folder, tensors = published
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[3, 9] = bits
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        quantize(open_model_free(str(folder)), as_it_is(), tmp_path / "free")
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[3, 9] = 0
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"][0, 0] = torch.inf
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(NumericsError, match=r"model\.layers\.0\.mlp\.up_proj\.weight is not finite"):
        quantize(open_model_free(str(folder)), as_it_is(), tmp_path / "free")


def test_scales_that_an_artifact_cannot_hold_are_refused_in_the_plan(published):
    folder, tensors = published
    recipe = load_recipe(as_it_is() | {"export": [{"to": "compressed-tensors"}]})
    with pytest.raises(PlanError, match=r"proj: scales stored as float32 are not exact in bfloat16"):
        prepare(open_model_free(str(folder)), recipe)
    exact = {name: t.bfloat16().float() if name.endswith("scale_inv") else t for name, t in tensors.items()}
    save_file(exact, folder / "model.safetensors")
    assert prepare(open_model_free(str(folder)), recipe).plan.layers


def test_an_unknown_type_offers_it(unknown):
    folder = unknown("llama")
    found = CliRunner().invoke(app, ["plan", str(folder), "-r", "w4a16-rtn-g32"])
    assert found.exit_code == CheckpointError.exit_code
    assert "--model-free" in found.output
    found = CliRunner().invoke(app, ["plan", str(folder), "-r", "w4a16-rtn-g32", "--model-free"])
    assert found.exit_code == 0


def test_what_needs_the_class_is_refused_at_once(unknown):
    model = open_model_free(str(unknown("llama")))
    with pytest.raises(PlanError, match=r"gptq measures inputs(.|\n)*eval: runs the model"):
        prepare(model, "w4a16-gptq-g32", ["eval={text: text.txt}"])
    with pytest.raises(PlanError, match="gguf cannot hold this model: nothing says"):
        prepare(model, "gguf-q8_0")
    with pytest.raises(PlanError, match="qtool: export to compressed-tensors or fp8 instead"):
        prepare(model, "w4a16-rtn-g32", ["export=[{to: qtool}]"])


def test_tensors_without_blocks_are_refused(tmp_path):
    save_file({"a.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody"}))
    with pytest.raises(CheckpointError, match=r"do not look like a language model: .* found a\.weight"):
        open_model_free(str(tmp_path))


def test_a_config_is_no_link_out_of_its_folder(unknown, tmp_path):
    folder = unknown("llama")
    (folder / "config.json").rename(tmp_path / "elsewhere.json")
    (folder / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        open_model_free(str(folder))


@pytest.mark.parametrize(("weights", "inputs"), [("fp8-channel", "fp8-token"), ("fp8-tensor", None)])
def test_fp8_of_compressed_tensors_is_taken_over_bit_for_bit(weights, inputs, tiny_checkpoint, tmp_path):
    asked = recipe(weights, inputs)
    quantize(str(tiny_checkpoint("llama")), asked, tmp_path / "first", verify=False)
    (tmp_path / "same.yaml").write_text(json.dumps(asked))
    source = open_model_free(str(tmp_path / "first"))
    report = run(QuantizeOptions(source, str(tmp_path / "same.yaml"), tmp_path / "again", keep=True))
    assert {entry.method for entry in report.layers if entry.format} == {"taken over"}
    assert not load_file(tmp_path / "again.work" / "block-1.safetensors")  # nothing is copied on the way
    tensors, found = (load_file(tmp_path / run / "model.safetensors") for run in ("first", "again"))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))

    tensors["model.layers.1.mlp.up_proj.weight_scale"].view(-1)[-1] = torch.inf
    save_file(tensors, tmp_path / "first" / "model.safetensors")
    (tmp_path / "first" / "SHA256SUMS").unlink()
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        quantize(open_model_free(str(tmp_path / "first")), asked, tmp_path / "damaged")
