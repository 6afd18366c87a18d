"""Corrections beside the codes come back from the neutral checkpoint, and only it takes them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qtool import registry
from qtool.artifact.qtool import Qtool
from qtool.checkpoint._base import Layer, Module
from qtool.errors import CheckpointError, NumericsError, PlanError
from qtool.formats.int import Int
from qtool.pipeline.verify import verify
from qtool.residuals._base import Correction, Matrix
from qtool.residuals.low_rank import LowRank
from qtool.residuals.sparse import Sparse
from tests.artifact.conftest import quantize

UP = "model.layers.0.mlp.up_proj"
RESIDUALS = (LowRank(rank=4), Sparse(share=0.01, sensitive=False))


@pytest.fixture
def model(tiny_checkpoint):
    """A model one of whose matrices has two corrections."""
    model = quantize(tiny_checkpoint("llama"), Int(bits=3, group=32))
    w, found = model.origin.tensor(f"{UP}.weight").float(), Matrix(model.matrices[UP])
    for residual in RESIDUALS:
        correction = Correction(residual, residual.fit(w - found.decode(), None))
        found = Matrix(found.quantized, (*found.residuals, correction))
    model.layers[UP] = replace(model.layers[UP], residuals=RESIDUALS)
    plain = model.matrix
    model.matrix = lambda module: found if module == UP else plain(module)
    return model


def test_corrections_come_back(model, tmp_path):
    Qtool().write(model, tmp_path, {})
    found = Qtool().open(tmp_path)
    assert found.layers == model.layers
    verify("verify", found, model, lambda event: None)
    for correction, wanted in zip(found.matrix(UP).residuals, model.matrix(UP).residuals, strict=True):
        assert correction.residual == wanted.residual
        assert correction.tensors.keys() == wanted.tensors.keys()
        assert all(torch.equal(tensor, wanted.tensors[name]) for name, tensor in correction.tensors.items())
    whole = found.tensor(f"{UP}.weight")
    assert torch.equal(whole, model.matrix(UP).decode())
    assert not torch.equal(whole, model.matrix(UP).quantized.decode())
    torch.testing.assert_close(found.rows(f"{UP}.weight", 3, 17), whole[3:17], rtol=1e-6, atol=1e-6)


def test_layout_on_disk(model, tmp_path):
    """By another reader, as the specification has it."""
    Qtool().write(model, tmp_path, {})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["version"] == 2
    low_rank, sparse = manifest["blocks"]["block-0"]["layers"][UP]["residuals"]
    assert low_rank == {"low_rank": {"turns": 0, "rank": 4, "whiten": True, "dtype": "fp16", "start": "error"}}
    assert sparse == {"sparse": {"turns": 0, "share": 0.01, "sensitive": False, "dtype": "fp16", "columns": "int32"}}
    with safe_open(tmp_path / "block-0.safetensors", "pt") as file:
        left, right = (file.get_tensor(f"{UP}.residual.0.{part}").double() for part in ("left", "right"))
        row, column, value = (file.get_tensor(f"{UP}.residual.1.{part}") for part in ("row", "column", "value"))
    assert len(value) == round(0.01 * 128 * 64)
    expected = model.matrix(UP).quantized.decode().double() + left @ right
    for i in range(128):
        for e in range(int(row[i]), int(row[i + 1])):
            expected[i, int(column[e])] += float(value[e])
    torch.testing.assert_close(Qtool().open(tmp_path).tensor(f"{UP}.weight").double(), expected, rtol=0, atol=1e-6)


def test_other_layouts_refuse_them(model, tmp_path):
    module = Module(UP, (), "linear", "up", 0, "model.layers.0.mlp_in", None, (128, 64))
    plain = Layer(Int(bits=4, group=32))
    carrying = {n for n in registry.names("artifact") if n != "qtool" and holds(n, module, plain)}
    assert len(carrying) > 2
    for name in registry.names("artifact"):
        verdict = registry.load("artifact", name)().can_carry(module, replace(plain, residuals=RESIDUALS), "source")
        assert verdict.possible == (name == "qtool")
        if name in carrying:
            first = "sparse share 0.01 sensitive False" if name == "compressed-tensors" else "low_rank rank 4"
            assert verdict.reason == f"it has no place for {first} beside the codes; qtool has"
    with pytest.raises(PlanError, match=f"no place for low_rank rank 4 beside the codes; qtool has: {UP}"):
        registry.load("artifact", "mlx")().check(model)
    model.layers[UP] = Layer(Int(bits=3, group=32))  # one that does not say so
    with pytest.raises(PlanError, match=r"no place for low_rank rank 4, sparse share 0\.01 .* beside the codes"):
        registry.load("artifact", "mlx")().write(model, tmp_path, {})


def holds(name, module, layer):
    return registry.load("artifact", name)().can_carry(module, layer, "source").possible


def test_a_difference_in_a_correction_is_seen(model, tmp_path):
    Qtool().write(model, tmp_path, {})
    path = tmp_path / "block-0.safetensors"
    tensors = load_file(path)
    tensors[f"{UP}.residual.0.left"] *= 1.01
    save_file(tensors, path)
    with pytest.raises(Exception, match=r"up_proj.weight read back differs"):
        verify("verify", Qtool().open(tmp_path), model, lambda event: None)


DAMAGE = {
    "shape": (
        lambda t: t.update({f"{UP}.residual.0.left": torch.zeros(128, 3).half()}),
        CheckpointError,
        "residual.0.left",
    ),
    "type": (lambda t: t.update({f"{UP}.residual.0.left": torch.zeros(128, 4)}), CheckpointError, "residual.0.left"),
    "missing": (lambda t: t.pop(f"{UP}.residual.1.row"), CheckpointError, "holds no tensor .*residual.1.row"),
    "infinite": (
        lambda t: t[f"{UP}.residual.1.value"].fill_(torch.inf),
        NumericsError,
        "value of sparse .*finite",
    ),
    "indices": (
        lambda t: t[f"{UP}.residual.1.column"].fill_(64),
        CheckpointError,
        "column: wanted indices",
    ),
    "superfluous": (
        lambda t: t.update({f"{UP}.residual.2.left": torch.zeros(1)}),
        CheckpointError,
        "a tensor that llama models do not have: found .*residual.2.left",
    ),
}


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_corrections(damage, error, message, model, tmp_path):
    Qtool().write(model, tmp_path, {})
    path = tmp_path / "block-0.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(error, match=message):
        Qtool().open(tmp_path).matrix(UP)


LIES = {
    "unknown": ({"high_rank": {}}, "no residual is called 'high_rank'; known: codes, low_rank"),
    "option": ({"low_rank": {"rang": 4}}, "rang"),
    "too much": ({"low_rank": {"rank": 65}}, "rank 65 is more than 128 x 64 matrices have"),
}


@pytest.mark.parametrize(("told", "message"), LIES.values(), ids=LIES)
def test_lies_about_corrections(told, message, model, tmp_path):
    Qtool().write(model, tmp_path, {})
    edit(tmp_path, lambda m: m["blocks"]["block-0"]["layers"][UP].update(residuals=[told]))
    with pytest.raises(CheckpointError, match=message):
        Qtool().open(tmp_path)


def test_version_1_has_none(model, tmp_path):
    Qtool().write(model, tmp_path, {})
    edit(tmp_path, lambda m: m.update(version=1))
    with pytest.raises(CheckpointError, match="residuals in block-0: wanted version 2, found version 1"):
        Qtool().open(tmp_path)


def edit(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


VERSION_1 = """{"version": 1, "run": {"recipe": null}, "keep": {}, "blocks": {"block-0": {"nbytes": 0, "sha256": "",
"layers": {"model.layers.0.mlp.up_proj":
{"format": "int4-g32", "activations": null, "shape": [32, 32], "static": null}},
"record": null, "cache": null}, "outside": {"nbytes": 0, "sha256": "", "layers": {}, "record": null, "cache": null}},
"kv_cache": null}"""
CONFIG = """{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 32,
"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 3, "rms_norm_eps": 1e-6,
"tie_word_embeddings": true, "max_position_embeddings": 32, "hidden_act": "silu"}"""


def test_a_folder_of_version_1(tmp_path):
    """As qtool 0.1.0 wrote it: row i has the codes 0 to 15 twice, low nibble first, and the scale 2^(i % 4)."""
    codes = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2] * 32, dtype=torch.uint8)
    scale = torch.tensor([[1.0], [2.0], [4.0], [8.0]] * 8, dtype=torch.bfloat16)
    block = {f"{UP}.weight.codes": codes, f"{UP}.weight.scale": scale}
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.down"):
        block[f"model.layers.0.{name}_proj.weight"] = torch.eye(32)
    for name in ("input_layernorm", "post_attention_layernorm"):
        block[f"model.layers.0.{name}.weight"] = torch.ones(32)
    save_file(block, tmp_path / "block-0.safetensors")
    outside = {"model.embed_tokens.weight": torch.ones(3, 32), "model.norm.weight": torch.ones(32)}
    save_file(outside, tmp_path / "outside.safetensors")
    (tmp_path / "manifest.json").write_text(VERSION_1)
    (tmp_path / "config.json").write_text(CONFIG)
    found = Qtool().open(tmp_path)
    assert found.layers == {UP: Layer(Int(bits=4, group=32))}
    expected = torch.tensor([[2.0 ** (i % 4) * (code - 8) for code in [*range(16)] * 2] for i in range(32)])
    assert torch.equal(found.tensor(f"{UP}.weight"), expected)
    assert torch.equal(found.matrix(UP).decode(), expected)
    (tmp_path / "again").mkdir()
    Qtool().write(found, tmp_path / "again", {})
    assert json.loads((tmp_path / "again" / "manifest.json").read_text())["version"] == 2
    assert torch.equal(Qtool().open(tmp_path / "again").tensor(f"{UP}.weight"), expected)
