"""Draft layers and projectors beside a model: copied, or quantized where a rule names them."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext

import compressed_tensors
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny import save_tiny
from qtool.api import open_model, quantize
from qtool.checkpoint.modules import beside, modules, place_of
from qtool.errors import NumericsError, PlanError
from qtool.pipeline.prepare import prepare
from qtool.recipe.load import load_recipe

DRAFT = {
    "mtp.0.self_attn.q_proj.weight": (64, 64),
    "mtp.0.self_attn.k_proj.weight": (32, 64),
    "mtp.0.self_attn.v_proj.weight": (32, 64),
    "mtp.0.self_attn.q_norm.weight": (64,),
    "mtp.0.mlp.gate.weight": (4, 64),
    "mtp.0.mlp.experts.0.up_proj.weight": (32, 64),
    "mtp.0.mlp.experts.1.up_proj.weight": (32, 64),
    "mtp.embed_tokens.weight": (512, 64),
    "mtp.fc.weight": (64, 128),
    "multi_modal_projector.linear_1.weight": (64, 96),
    "multi_modal_projector.conv.weight": (8, 3, 4, 4),
}
LINEAR = [
    *(f"mtp.0.self_attn.{part}_proj" for part in "kqv"),
    *(f"mtp.0.mlp.experts.{i}.up_proj" for i in range(2)),
    "mtp.fc",
    "multi_modal_projector.linear_1",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model whose class knows nothing of some tensors; these, by name."""
    folder, draw = tmp_path_factory.mktemp("granite"), torch.Generator().manual_seed(0)
    save_tiny("granite", folder)
    others = {name: torch.randn(shape, generator=draw) for name, shape in DRAFT.items()}
    save_file(load_file(folder / "model.safetensors") | others, folder / "model.safetensors")
    return folder, others


def recipe(*rules, to="compressed-tensors"):
    layers = [*rules, {"match": "*_proj", "weights": "int4-g32", "method": "rtn"}, {"match": "*", "keep": True}]
    return {"recipe": 1, "name": "beside", "layers": layers, "export": [{"to": to}]}


def targets(folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    return {g["format"]: [re.compile(t.removeprefix("re:")) for t in g["targets"]] for g in groups}, config["ignore"]


def test_matrices_are_found_by_their_names(source):
    found = {module.name: module for module in beside(open_model(source[0]))}
    assert sorted(found) == sorted(LINEAR)
    assert {found[f"mtp.0.self_attn.{part}_proj"].fused for part in "qkv"} == {"mtp.0.self_attn.qkv"}
    assert found["mtp.0.mlp.experts.1.up_proj"].expert == 1
    assert {place_of(name) for name in LINEAR} == {"mtp.0", "mtp.fc", "multi_modal_projector.linear_1"}
    assert not found.keys() & {module.name for module in modules(open_model(source[0]))}


@pytest.mark.parametrize(("value", "fine"), [(-torch.inf, True), (torch.nan, False)])
def test_numbers_beside_may_be_bounds(value, fine, source, tmp_path):
    """Gemma 4's towers clip inputs of layers between numbers, which are infinite where nothing is clipped."""
    shutil.copytree(source[0], tmp_path / "model")
    stored = load_file(file := tmp_path / "model" / "model.safetensors")
    save_file(stored | {"mtp.fc.input_min": torch.tensor(value)}, file)
    with nullcontext() if fine else pytest.raises(NumericsError, match=r"mtp.fc.input_min is not finite"):
        quantize(str(tmp_path / "model"), recipe(), tmp_path / "out")
        assert float(load_file(tmp_path / "out" / "model.safetensors")["mtp.fc.input_min"]) == value
    save_file(stored | {"mtp.0.self_attn.q_norm.weight": torch.full((64,), value)}, file)
    with pytest.raises(NumericsError, match=r"q_norm.weight is not finite"):
        quantize(str(tmp_path / "model"), recipe(), tmp_path / "more")


def test_rules_of_the_model_leave_them_as_they_are(source, tmp_path):
    folder, others = source
    report = quantize(str(folder), recipe(), tmp_path / "out", verify=False)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in others.items())
    assert any("11 tensors beside GraniteForCausalLM" in text for text in report.warnings)
    assert set(LINEAR) < set(targets(tmp_path / "out")[1])


def test_a_rule_quantizes_what_it_names(source, tmp_path):
    folder, others = source
    named = recipe({"match": "mtp.*", "weights": "nvfp4", "method": "rtn"})
    plan = prepare(str(folder), load_recipe(_saved(named, tmp_path))).plan
    report = quantize(str(folder), named, tmp_path / "out")
    entries = {entry.name: entry for entry in report.layers if entry.role == "beside"}
    assert set(entries) == {name for name in LINEAR if name.startswith("mtp")}
    assert all(entry.format == "nvfp4" and 18 < entry.weight_error_db < 24 for entry in entries.values())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    matrices = sum(entry.nbytes for entry in report.layers)
    assert plan.predicted_bytes == matrices + plan.other_bytes == matrices + report.other_bytes
    for name, tensor in others.items():
        if name.removesuffix(".weight") not in entries:
            assert torch.equal(tensors[name], tensor)
    whole = {float(tensors[f"mtp.0.self_attn.{part}_proj.weight_global_scale"]) for part in "qkv"}
    assert len(whole) == 1  # which runtimes that merge them want
    model, compressor = open_model(tmp_path / "out"), compressed_tensors.compressors.NVFP4PackedCompressor
    scheme = compressed_tensors.quantization.preset_name_to_scheme("NVFP4A16", ["Linear"])
    for name in entries:
        parts = {key: tensors[f"{name}.{key}"] for key in ("weight_packed", "weight_scale", "weight_global_scale")}
        theirs = compressor.decompress(parts, scheme)["weight"].float()
        assert torch.allclose(theirs, model.tensor(f"{name}.weight"), rtol=4e-3, atol=1e-6), name
        assert (theirs - others[f"{name}.weight"]).norm() < 0.12 * theirs.norm()
    groups, ignored = targets(tmp_path / "out")
    for name in LINEAR:
        hits = [fmt for fmt, expressions in groups.items() if any(e.match(name) for e in expressions)]
        assert hits == (["nvfp4-pack-quantized"] if name in entries else [])
        assert (name in ignored) == (name not in entries)
    assert "mtp.embed_tokens" in ignored


def _saved(content, folder):
    (folder / "recipe.yaml").write_text(json.dumps(content))
    return str(folder / "recipe.yaml")


@pytest.mark.parametrize(
    ("rule", "to", "line"),
    [
        ({"weights": "int4-g32", "method": "gptq"}, "compressed-tensors", "gptq measures inputs, which nobody does"),
        (
            {"weights": "fp8-channel", "activations": "fp8-tensor", "method": "rtn"},
            "compressed-tensors",
            "a scale of inputs for all tokens is measured, which nobody does",
        ),
        ({"weights": "int4-g32", "method": "rtn"}, "gptq", "what is beside the language model stays unquantized"),
    ],
)
def test_what_cannot_be_done_to_them_is_refused(rule, to, line, source, tmp_path):
    named = {"match": "mtp.fc", **rule}
    content = recipe(named, to=to)
    with pytest.raises(PlanError, match=f'layers\\[0\\] \\(match "mtp.fc"\\): mtp.fc: .*{line}') as refused:
        prepare(str(source[0]), load_recipe(_saved(content, tmp_path)))
    assert str(refused.value).count("layers[") == 1


def test_a_neutral_checkpoint_has_them(source, tmp_path):
    folder, _ = source
    quantize(
        str(folder), recipe({"match": "mtp.fc", "weights": "int4-g32", "method": "hqq"}, to="qtool"), tmp_path / "n"
    )
    model = open_model(tmp_path / "n")
    assert model.layers["mtp.fc"].format.label == "int4-g32"
    assert [module.name for module in modules(model) if module.kind == "beside"] == ["mtp.fc"]


def test_packed_ones_stay_packed_unless_the_layout_is_another(tmp_path, source):
    """As DeepSeek publishes draft layers: in FP8 like all the rest."""
    folder = tmp_path / "wide"
    shutil.copytree(source[0], folder)
    stored = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(1)
    for name in list(stored):
        if name.startswith(("mtp", "multi_modal")):
            del stored[name]
    stored["mtp.0.fc.weight"] = torch.randn(128, 256, generator=draw)
    save_file(stored, folder / "model.safetensors")
    rule = {"match": "mtp.*", "weights": "fp8-block", "activations": "fp8-g128", "method": "rtn"}
    content = {"recipe": 1, "name": "fp8", "layers": [rule, {"match": "*", "keep": True}], "export": [{"to": "fp8"}]}
    quantize(str(folder), content, tmp_path / "fp8", verify=False)
    first = load_file(tmp_path / "fp8" / "model.safetensors")
    assert first["mtp.0.fc.weight"].dtype == torch.float8_e4m3fn

    other = {"recipe": 1, "name": "same", "layers": [{"match": "*", "keep": True}], "export": [{"to": "fp8"}]}
    report = quantize(str(tmp_path / "fp8"), other, tmp_path / "again")
    (entry,) = (entry for entry in report.layers if entry.role == "beside")
    assert entry.method == "taken over"
    again = load_file(tmp_path / "again" / "model.safetensors")
    for part in ("weight", "weight_scale_inv"):
        assert torch.equal(again[f"mtp.0.fc.{part}"].view(torch.uint8), first[f"mtp.0.fc.{part}"].view(torch.uint8))

    report = quantize(str(tmp_path / "fp8"), recipe(), tmp_path / "int4", verify=False)
    found = load_file(tmp_path / "int4" / "model.safetensors")["mtp.0.fc.weight"]
    scale = first["mtp.0.fc.weight_scale_inv"].repeat_interleave(128, 1)
    assert torch.equal(found, first["mtp.0.fc.weight"].float() * scale)
    assert any("1 matrix is quantized already (fp8" in text and "stored decoded" in text for text in report.warnings)
