"""What is said about runtimes that cannot read a folder, beside what transformers makes of that folder."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from benchmarks import schemes
from qtool.artifact.compressed_tensors import CompressedTensors
from qtool.artifact.compressed_tensors._caveats import caveats
from qtool.checkpoint._base import Layer
from qtool.checkpoint.hf import HFCheckpoint
from qtool.formats._spelling import parse_format
from qtool.pipeline import export
from qtool.pipeline.export import ExportOptions
from qtool.pipeline.prepare import prepare
from qtool.report.model_card import card_text
from tests.artifact.conftest import quantize
from tests.artifact.test_gguf_moe import TOKENS, distance, reference_logits, state_dict

FP32 = {"scale_dtype": "fp32"}
INT4, INT4_ASYMMETRIC = ({"type": "int", "bits": 4, "group": 32, "symmetric": s} | FP32 for s in (True, False))
INT8 = {"type": "int", "bits": 8, "group": "channel"} | FP32
FP8 = {"type": "fp", "element": "e4m3", "group": "channel"} | FP32
KEPT = dict.fromkeys("qkvo")
UNROUNDED = "transformers leaves the inputs of experts in {} unrounded"
COMPRESSED = "with run_compressed=True transformers does not load {}: leave that out"
NOT_LOADED = {name: f"{name} does not load experts in {{}}" for name in ("transformers", "vLLM")}
OLD = "before compute capability 8.9 vLLM leaves inputs of {} unrounded"
TURING = "vLLM loads {} from compute capability 8.0 on"
HOPPER = "vLLM runs {} on Hopper GPUs only"
EXPERTS = {  # weights and inputs of experts, and the caveats; without any, transformers computes what we compute
    "int4": (INT4, None),
    "int3": (INT4 | {"bits": 3}, None, NOT_LOADED["vLLM"]),
    "int8": (INT8, None),
    "w8a8": (INT8, "int8-token", NOT_LOADED["transformers"]),
    "w8a8-asym": (INT8, "int8-token-asym", NOT_LOADED["transformers"], NOT_LOADED["vLLM"]),
    "w4a8": (INT4, "int8-token", UNROUNDED, NOT_LOADED["vLLM"]),
    "fp8": (FP8, None, NOT_LOADED["vLLM"]),
    "fp8-dynamic": (FP8, "fp8-token", UNROUNDED, OLD),
    "fp8-tensor": (FP8 | {"group": "tensor"}, "fp8-token", UNROUNDED, OLD, NOT_LOADED["vLLM"]),
    "mxfp4": ("mxfp4", None, TURING, "vLLM leaves it to the GPU whether inputs of {} are rounded as well"),
    "mxfp6": ("mxfp6", None, "vLLM does not know {}; transformers does, with compressed-tensors 0.20"),
    "nvfp4": (
        "nvfp4",
        None,
        "transformers loses the scales of whole matrices of experts in {}; vLLM reads them",
    ),
    "mxfp8": (
        "mxfp8",
        None,
        NOT_LOADED["transformers"],
        "vLLM leaves it to the GPU whether inputs of {} are rounded as well",
    ),
    "asymmetric": (INT4_ASYMMETRIC, None, NOT_LOADED["transformers"], COMPRESSED),
}


def layers_of(words):
    """Layers of "fp8-channel with fp8-token inputs and int4-g128", by some name."""
    for label in words.split(" and "):
        weights, _, inputs = label.partition(" behind ")[0].removesuffix(" inputs").partition(" with ")
        yield label, Layer(parse_format(weights), parse_format(inputs) if inputs else None)


def selections():
    """What is written as compressed-tensors, and what vLLM selects for it by compute capability."""
    for written, entry in schemes.stored()["written"].items():
        layout, _, words = written.partition(": ")
        if layout == "compressed-tensors":
            yield pytest.param(words, entry["schemes"], id=words)


@pytest.mark.parametrize(("words", "selected"), [*selections()])
def test_what_is_said_of_vllm_is_what_it_selects(words, selected, tiny_checkpoint):
    layers = dict(layers_of(words))
    found = caveats(HFCheckpoint(tiny_checkpoint("llama")), layers)
    loads = {capability for capability, said in selected.items() if not said.startswith("none")}

    def is_said(text):
        before, after = text.split("{}")
        return any(line.startswith(before) and line.endswith(after) for line in found)

    assert is_said(HOPPER) == (loads == {"90"})
    assert is_said(TURING) == ("75" not in loads and "80" in loads)
    assert is_said(OLD) == ("W8A8Fp8" in selected["90"])
    if "75" in loads and "W8A8Fp8" in selected["90"]:
        assert "W8A8Fp8" not in selected["80"] and "W8A16Fp8" in selected["80"] and "W8A8Fp8" in selected["89"]
    assert is_said("vLLM does not load {}; transformers does") == (not loads)


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
    weights, inputs, *caveats = EXPERTS[name]
    activations = parse_format(inputs) if inputs else None
    model = quantize(tiny_checkpoint("qwen3_moe"), parse_format(weights), activations, router=None, **KEPT)
    label = next(iter(model.layers.values())).label
    found = [text for text in written(model, tmp_path) if "to bfloat16" not in text]
    assert found == [text.format(label) for text in caveats]
    wrong = error(model, tmp_path)  # of transformers, where the reference leaves inputs alone
    reads = wrong is not None and wrong < 5e-3  # the library decodes mx floats to bfloat16
    assert reads == (NOT_LOADED["transformers"] not in caveats and name != "nvfp4")
    if activations and reads:
        assert caveats[0] == UNROUNDED


LINEAR = {  # weights, inputs, what vLLM does otherwise
    "int4-g128": ("int4-g128", "fp8-token", "vLLM runs int4-g128 with fp8-token inputs on Hopper GPUs only"),
    "int4-g32": ("int4-g32", "fp8-token", "vLLM does not load int4-g32 with fp8-token inputs; transformers does"),
    "int4-asym": ("int4-g32-asym", None, COMPRESSED.format("int4-g32-asym")),
    "int3-asym": ("int3-g32-asym", None, COMPRESSED.format("int3-g32-asym")),
    "int3": ("int3-g32", None, None),
    "w8a8": ("int8-channel", "int8-token", None),
    "mxfp8": ("mxfp8", "mxfp8", None),
    "mxfp8-alone": ("mxfp8", None, "vLLM leaves it to the GPU whether inputs of mxfp8 are rounded as well"),
}


@pytest.mark.parametrize("name", LINEAR)
def test_what_vllm_does_otherwise(name, tiny_checkpoint):
    weights, inputs, caveat = LINEAR[name]
    roles = {"down": parse_format(weights)} | dict.fromkeys(("q", "k", "v", "o", "gate", "up"))
    model = quantize(tiny_checkpoint("llama"), None, parse_format(inputs) if inputs else None, **roles)
    assert CompressedTensors().caveats(model, model.layers) == ([caveat] if caveat else [])


@pytest.mark.parametrize("other", [INT8, None], ids=["mixed", "alone"])
def test_zero_points_beside_another_format(other, tiny_checkpoint, tmp_path):
    others = {"down": parse_format(other)} if other else {}
    model = quantize(tiny_checkpoint("llama-biased"), parse_format(INT4_ASYMMETRIC), **others)
    found = written(model, tmp_path)
    beside = ["transformers does not load int4-g32-asym beside other formats; vLLM does"] if other else []
    assert found == [*beside, COMPRESSED.format("int4-g32-asym")]
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
    folder, said = tiny_checkpoint("qwen3_moe"), EXPERTS["nvfp4"][2].format("nvfp4")
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


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("label", ["int4-g32", "int4-g32-asym"])
def test_what_transformers_does_not_keep_compressed(label, tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), parse_format(label))
    said = COMPRESSED.format(label) in written(model, tmp_path)
    kept = {"quantization_config": CompressedTensorsConfig(run_compressed=True)}
    if said:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **kept)
    else:
        assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **kept)
    assert said == label.endswith("asym")
