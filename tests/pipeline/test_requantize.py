"""Quantizing, exporting and evaluating models that are quantized already."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import registry
from qtool.errors import NumericsError, PlanError
from qtool.formats.biased import Biased
from qtool.formats.int import Int
from qtool.formats.q4_1 import Q4_1
from qtool.models import open_artifact, open_model
from qtool.pipeline import export
from qtool.pipeline.prepare import prepare
from qtool.pipeline.quantize import QuantizeOptions, run
from tests.artifact.conftest import quantize

LAYOUTS = ["awq", "compressed-tensors", "gptq", "mlx", "qtool"]
TO = [*LAYOUTS, "gguf"]
INT4, ASYM4 = Int(bits=4, group=64, scale_dtype="fp16"), Int(bits=4, group=32, symmetric=False, scale_dtype="fp16")
UP = "model.layers.0.mlp.up_proj"


def source(layout, fmt, folder, tiny_checkpoint, family="mistral", **roles):
    """A quantized model in a layout, and what was written."""
    model = quantize(tiny_checkpoint(family), fmt, **roles)
    model.config["dtype"] = "float16"
    folder.mkdir()
    registry.load("artifact", layout)().write(model, folder, {"base_model": "tiny"})
    return model


def recipe(folder, weights, to, **fields):
    rules = [{"match": "lm_head", "keep": True}, {"match": "*", "weights": weights}]
    text = {"recipe": 1, "name": "again", "layers": rules, "export": [{"to": to}], **fields}
    (folder / "again.yaml").write_text(json.dumps(text))
    return str(folder / "again.yaml")


def requantize(folder, weights, to, **fields):
    report = run(QuantizeOptions(str(folder / "in"), recipe(folder, weights, to, **fields), folder / "out"))
    return report, open_artifact(folder / "out")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("weights", "to"), [("q4_0", "gguf"), ("int4-g32", "compressed-tensors"), ("int4-g64", "gptq")]
)
def test_codes_are_taken_over_where_the_wanted_format_has_the_same_values(
    layout, weights, to, tiny_checkpoint, tmp_path
):
    model = source(layout, INT4, tmp_path / "in", tiny_checkpoint)
    report, found = requantize(tmp_path, weights, to)
    for name in model.names():
        assert torch.equal(found.tensor(name).float(), model.tensor(name).float()), name
    stored = sum(path.stat().st_size for path in (tmp_path / "in").glob("*.safetensors"))
    assert 0.8 < report.source_bytes / stored < 1  # the file has headers, and zero points or indices as well
    quantized = [e for e in report.layers if e.format]
    assert {(e.method, e.format, e.weight_error_db, e.fallback) for e in quantized} == {
        ("taken over", weights, float("inf"), None)
    }
    assert f"14 matrices are quantized already (int4-g64) and taken over as {weights} wherever that is exact" in (
        report.warnings
    )


def test_what_the_wanted_format_lacks_is_rounded_again_and_said_so(tiny_checkpoint, tmp_path):
    model = source("awq", ASYM4, tmp_path / "in", tiny_checkpoint, down=INT4.model_copy(update={"group": 32}))
    report, found = requantize(tmp_path, "q4_0", "gguf")
    for e in report.layers:
        if e.role == "down":
            assert (e.method, e.fallback) == ("taken over", None)
        elif e.format:
            assert e.method == "rtn"
            assert e.fallback == "rounded a second time: the zero points of int4-g32-asym do not fit q4_0"
            assert 10 < e.weight_error_db < 40
    name = f"{UP}.weight"
    error = (found.tensor(name) - model.tensor(name)).norm() / model.tensor(name).norm()
    assert 0.01 < float(error) < 0.3
    (line,) = [w for w in report.warnings if "rounded again" in w]
    assert line.startswith("12 matrices are quantized already (int4-g32-asym) and rounded again to q4_0: both errors")


def test_numbers_decide_where_formats_alone_do_not(tiny_checkpoint, tmp_path):
    source("awq", ASYM4, tmp_path / "in", tiny_checkpoint)
    report, _ = requantize(tmp_path, "q4_1", "gguf")
    reason = "rounded a second time: some zero points times their scales are not exact in fp16"
    assert {e.fallback for e in report.layers if e.method == "rtn"} == {reason}
    assert any("taken over as q4_1 wherever that is exact" in w for w in report.warnings)


def test_a_gguf_goes_in_as_well(tiny_checkpoint, tmp_path):
    model = source("gguf", Q4_1(), tmp_path / "in", tiny_checkpoint, down=Int(bits=4, group=32, scale_dtype="fp16"))
    report, found = requantize(tmp_path, "q4_1", "gguf")
    assert {e.method for e in report.layers if e.format} == {"taken over"}
    for name in model.names():
        assert torch.equal(found.tensor(name).float(), model.tensor(name).float()), name
    shutil.rmtree(tmp_path / "out")
    report, _ = requantize(tmp_path, "q4_0", "gguf")
    assert {(e.role == "down", e.method) for e in report.layers if e.format} == {(True, "taken over"), (False, "rtn")}
    assert any(
        w.startswith("12 matrices are quantized already (q4_1) and rounded again to q4_0") for w in report.warnings
    )


def test_calibration_sees_the_codes_that_were_taken_over(tiny_checkpoint, tmp_path):
    source("gptq", INT4, tmp_path / "in", tiny_checkpoint, "qwen2", down=ASYM4)
    (tmp_path / "text.txt").write_text("one two three four five six seven. " * 400)
    calibration = {"data": str(tmp_path / "text.txt"), "samples": 4, "length": 32}
    report, _ = requantize(tmp_path, "int4-g32", "qtool", method="gptq", calibration=calibration)
    for e in report.layers:
        if e.format and e.role != "embedding":
            wanted = ("gptq", 1000) if e.role == "down" else ("taken over", float("inf"))
            assert e.method == wanted[0]
            assert e.output_error_db <= wanted[1]
            assert e.tokens == 128


def permute(folder):
    """Puts one matrix's groups in activation order."""
    tensors = load_file(folder / "model.safetensors")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    tensors[f"{UP}.g_idx"] = (torch.arange(64, dtype=torch.int32) // 32)[order].contiguous()
    save_file(tensors, folder / "model.safetensors")


def test_groups_in_activation_order_are_quantized_again(tiny_checkpoint, tmp_path):
    source("gptq", ASYM4, tmp_path / "in", tiny_checkpoint)
    permute(tmp_path / "in")
    with pytest.raises(
        PlanError, match=r"only `quantize` can take .* activation order \(g_idx\): model\.layers\.0\.mlp"
    ):
        export.run(export.ExportOptions(tmp_path / "in", "gguf", tmp_path / "never"))
    assert not (tmp_path / "never").exists()
    before = open_model(str(tmp_path / "in")).tensor(f"{UP}.weight")
    report, found = requantize(tmp_path, "q5_0", "gguf")
    (entry,) = [e for e in report.layers if e.name == UP]
    assert entry.fallback == "rounded a second time: its groups are in activation order (g_idx)"
    assert entry.method == "rtn"
    assert {e.method for e in report.layers if e.format and e.name != UP} == {"taken over"}
    error = (found.tensor(f"{UP}.weight") - before).norm() / before.norm()
    assert 0.005 < float(error) < 0.1
    assert sum("activation order" in w for w in report.warnings) == 1


def test_kept_matrices_are_said_to_grow(tiny_checkpoint, tmp_path):
    source("compressed-tensors", INT4, tmp_path / "in", tiny_checkpoint)
    rules = [{"match": "*.mlp.*", "weights": "int4-g64"}, {"match": "*", "keep": True}]
    plan = prepare(str(tmp_path / "in"), recipe(tmp_path, "int4-g64", "qtool", layers=rules)).plan
    assert "8 matrices are quantized already (int4-g64) and stored decoded" in plan.warnings


def test_a_plain_model_has_nothing_to_be_said(tiny_checkpoint, tmp_path):
    plan = prepare(str(tiny_checkpoint("llama")), recipe(tmp_path, "int4-g64", "qtool")).plan
    assert plan.warnings == ()


def test_scales_that_are_not_finite_are_refused(tiny_checkpoint, tmp_path):
    source("gptq", INT4, tmp_path / "in", tiny_checkpoint)
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    tensors[f"{UP}.scales"][0, 3] = torch.inf
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    with pytest.raises(NumericsError, match=f"tensor {UP}.weight is not finite"):
        requantize(tmp_path, "q4_0", "gguf")


EXPORTS = [(a, b) for a in LAYOUTS for b in TO if a != b]


@pytest.mark.parametrize(("first", "second"), EXPORTS, ids=lambda name: name)
def test_codes_move_from_layout_to_layout(first, second, tiny_checkpoint, tmp_path):
    model = source(first, Int(bits=4, group=32, scale_dtype="fp16"), tmp_path / "in", tiny_checkpoint)
    entry = export.run(export.ExportOptions(tmp_path / "in", second, tmp_path / "out"))
    assert entry.verified
    found = open_artifact(tmp_path / "out")
    assert {layer.format.label for layer in found.layers.values()} == {"q4_0" if second == "gguf" else "int4-g32"}
    for name in model.names():
        assert torch.equal(found.tensor(name).float(), model.tensor(name).float()), name


@pytest.mark.parametrize("second", ["gguf", "qtool"])
def test_offsets_of_mlx_go_to_blocks_with_minima(second, tiny_checkpoint, tmp_path):
    model = source("mlx", Biased(bits=4, group=64), tmp_path / "in", tiny_checkpoint)
    export.run(export.ExportOptions(tmp_path / "in", second, tmp_path / "out"))
    found = open_artifact(tmp_path / "out")
    assert {layer.format.label for layer in found.layers.values()} == {"q4_1" if second == "gguf" else "biased4-g64"}
    for name in model.names():
        assert torch.equal(found.tensor(name).float(), model.tensor(name).float()), name
