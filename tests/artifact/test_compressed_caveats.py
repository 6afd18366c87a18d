"""What is said about runtimes that cannot read a folder, beside what transformers makes of that folder."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from qtool.artifact._card import card_text
from qtool.artifact.compressed_tensors import CompressedTensors
from qtool.pipeline import export
from qtool.pipeline.export import ExportOptions
from qtool.pipeline.prepare import prepare
from qtool.recipe.schema import parse_format
from tests.artifact.conftest import quantize
from tests.artifact.test_gguf_moe import TOKENS, distance, reference_logits, state_dict

FP32 = {"scale_dtype": "fp32"}
INT4, INT4_ASYMMETRIC = ({"type": "int", "bits": 4, "group": 32, "symmetric": s} | FP32 for s in (True, False))
INT8 = {"type": "int", "bits": 8, "group": "channel"} | FP32
FP8 = {"type": "fp", "element": "e4m3", "group": "channel"} | FP32
KEPT = dict.fromkeys("qkvo")
EXPERTS = {  # weights and inputs of experts, and the caveat; None: transformers computes what we compute
    "int4": (INT4, None, None),
    "int8": (INT8, None, None),
    "w8a8": (INT8, "int8-token", "transformers does not load experts in int8-channel"),
    "fp8": (FP8, None, None),
    "mxfp4": ("mxfp4", None, None),
    "mxfp6": ("mxfp6", None, "vLLM does not know mxfp6"),
    "nvfp4": ("nvfp4", None, "transformers loses the scales of whole matrices of experts in nvfp4; vLLM reads them"),
    "mxfp8": ("mxfp8", None, "transformers does not load experts in mxfp8"),
    "asymmetric": (INT4_ASYMMETRIC, None, "transformers does not load experts in int4-g32-asym"),
}


def written(model, folder):
    CompressedTensors().write(model, folder, {})
    return CompressedTensors().caveats(model, model.layers)


def error(model, folder):
    """Of the logits that transformers computes from a folder; None if it does not load it."""
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except RuntimeError:
        return None
    with torch.no_grad():
        logits = loaded(torch.tensor([TOKENS])).logits[0]
    return distance(logits, reference_logits(model.source, state_dict(model)))


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name, tiny_checkpoint, tmp_path):
    weights, inputs, caveat = EXPERTS[name]
    activations = parse_format(inputs) if inputs else None
    model = quantize(tiny_checkpoint("qwen3_moe"), parse_format(weights), activations, router=None, **KEPT)
    found = [text for text in written(model, tmp_path) if "to bfloat16" not in text]
    assert [text.startswith(caveat) for text in found] == [True] if caveat else found == []
    wrong = error(model, tmp_path)
    reads = wrong is not None and wrong < 5e-3  # the library decodes mx floats to bfloat16
    assert reads == ("transformers" not in (caveat or ""))


@pytest.mark.parametrize("other", [INT8, None], ids=["mixed", "alone"])
def test_zero_points_beside_another_format(other, tiny_checkpoint, tmp_path):
    others = {"down": parse_format(other)} if other else {}
    model = quantize(tiny_checkpoint("llama-biased"), parse_format(INT4_ASYMMETRIC), **others)
    found = written(model, tmp_path)
    assert found == (["transformers does not load int4-g32-asym beside other formats; vLLM does"] if other else [])
    wrong = error(model, tmp_path)
    assert wrong is None if other else wrong < 1e-5


@pytest.mark.parametrize(("name", "told"), [("llama-biased", True), ("llama", False)])
def test_floats_that_are_decoded_to_bfloat16(name, told, tiny_checkpoint, tmp_path):
    found = written(quantize(tiny_checkpoint(name), parse_format("nvfp4")), tmp_path)
    text = "transformers decodes nvfp4 to bfloat16: load the model with dtype=torch.bfloat16"
    assert found == ([text] if told else [])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    if told:
        with pytest.raises(RuntimeError, match="dtype"):
            loaded(torch.tensor([TOKENS]))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded(torch.tensor([TOKENS])).logits.isfinite().all()


def test_plan_export_and_model_card_say_it(tiny_checkpoint, tmp_path):
    folder, said = tiny_checkpoint("qwen3_moe"), EXPERTS["nvfp4"][2]
    recipe = tmp_path / "recipe.yaml"
    rules = "[{match: lm_head, keep: true}, {match: '*', weights: nvfp4, method: rtn}]"
    recipe.write_text(f"{{recipe: 1, name: test, layers: {rules}, export: [{{to: compressed-tensors}}]}}")
    assert f"compressed-tensors: {said}" in prepare(str(folder), str(recipe)).plan.warnings
    model = quantize(folder, parse_format("nvfp4"), router=None)
    assert f"- Note: {said}.\n" in card_text(CompressedTensors(), model, {})
    (tmp_path / "first").mkdir()
    CompressedTensors().write(model, tmp_path / "first", {})
    events = []
    export.run(ExportOptions(tmp_path / "first", "compressed-tensors", tmp_path / "second"), events.append)
    assert next(event.message for event in events if event.warning) == f"compressed-tensors: {said}"
