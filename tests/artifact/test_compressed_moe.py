"""Mixtures of experts in compressed-tensors: names, decompression by the library, logits in transformers."""

from __future__ import annotations

import json
import re

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file

from benchmarks.architectures import logits_of
from benchmarks.tiny import save_tiny
from qtool.artifact.compressed_tensors import CompressedTensors
from qtool.artifact.compressed_tensors._caveats import caveats
from qtool.artifact.qtool import Qtool
from qtool.checkpoint._base import Layer
from qtool.checkpoint.hf import HFCheckpoint
from qtool.checkpoint.modules import modules
from qtool.errors import PlanError
from qtool.formats.int import Int
from tests.artifact.conftest import InMemory, assert_same_model, quantize
from tests.artifact.test_gguf_moe import TOKENS, distance, reference_logits, state_dict

INT4, INT8 = Int(bits=4, group=32, scale_dtype="fp32"), Int(bits=8, group="channel", scale_dtype="fp32")
TOKEN = Int(bits=8, group="token")
LOADABLE = ["mixtral", "qwen2_moe", "qwen3_moe"]


def write(model, folder):
    CompressedTensors().write(model, folder, {})
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("attention", [INT4, INT8, None], ids=["alike", "mixed", "kept"])
@pytest.mark.parametrize("name", LOADABLE)
def test_transformers_computes_with_decoded_weights(name, attention, tiny_checkpoint, tmp_path):
    """Whose experts it holds as one tensor, put together from the packed ones of the file."""
    from transformers import AutoModelForCausalLM

    model = quantize(tiny_checkpoint(name), INT4, router=None, **dict.fromkeys("qkvo", attention))
    config = write(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        found = loaded(torch.tensor([TOKENS])).logits[0]
    assert distance(found, reference_logits(tiny_checkpoint(name), state_dict(model))) < 1e-5
    assert distance(found, reference_logits(tiny_checkpoint(name))) > 0.02
    assert_same_model(CompressedTensors().open(tmp_path), model)
    routers = [module.name for module in modules(model) if module.kind == "router"]
    assert set(routers) <= set(config["ignore"])


def test_shared_experts_may_have_another_format(tmp_path):
    """transformers decodes experts by the first group whose targets name any, and these are in blocks behind others."""
    from transformers import AutoModelForCausalLM

    save_tiny("deepseek_v3", tmp_path)
    source = HFCheckpoint(tmp_path)

    def choose(module):
        if module.block is None or module.kind == "router":
            return None
        return Layer(INT4 if module.expert is not None and module.shape[1] % 32 == 0 else INT8)

    quantized = InMemory(source, choose)
    (out := tmp_path / "out").mkdir()
    groups = write(quantized, out)["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [4, 8]
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        found = loaded(torch.tensor([TOKENS])).logits[0]
    walked = logits_of(CompressedTensors().open(out), torch.tensor([TOKENS]))[0]
    assert distance(found, walked) < 1e-5


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Layer(INT8), "transformers decodes experts in one format only, not in int4-g32, int8-channel"),
        (None, "transformers does not load experts that are kept where others are in int4-g32"),
    ],
)
def test_experts_of_blocks_that_differ_are_told(other, said, tiny_checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    source = HFCheckpoint(tiny_checkpoint("qwen3_moe"))

    def choose(module):
        alike = module.expert is not None and module.block == 0
        return Layer(INT4) if alike else other if module.expert is not None else None

    mixed = InMemory(source, choose)
    assert caveats(source, mixed.layers)[0] == said
    everywhere = InMemory(source, lambda module: Layer(INT4) if module.expert is not None else None)
    assert not any(line.endswith("in int4-g32") for line in caveats(source, everywhere.layers))
    write(mixed, tmp_path)
    if other is None:
        with pytest.raises(RuntimeError, match="conversion of the weights"):
            AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        return
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        found = loaded(torch.tensor([TOKENS])).logits[0]
    assert distance(found, reference_logits(tiny_checkpoint("qwen3_moe"), state_dict(mixed))) > 0.02


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", LOADABLE)
def test_the_library_decompresses_every_expert(name, symmetric, tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint(name), Int(bits=4, group=32, symmetric=symmetric, scale_dtype="fp32"), router=None)
    config = write(model, tmp_path)
    arguments = QuantizationArgs(**config["config_groups"]["group_0"]["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    stored, count = load_file(tmp_path / "model.safetensors"), 0
    for module in modules(model):
        if module.expert is not None:
            own = f"{module.name}.weight_"
            parts = {key.removeprefix(f"{module.name}."): t for key, t in stored.items() if key.startswith(own)}
            found = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
            assert torch.equal(found, model.tensor(f"{module.name}.weight"))
            count += 1
    assert count == 2 * 3 * model.family.experts(model.config)


def test_names_are_those_that_vllm_expects(tiny_checkpoint, tmp_path):
    write(quantize(tiny_checkpoint("qwen3_moe"), INT4, router=None), tmp_path)
    stored = set(load_file(tmp_path / "model.safetensors"))
    own = {name for name in stored if ".1.mlp." in name}
    parts = ("weight_packed", "weight_scale", "weight_shape")
    experts = {f"{e}.{x}_proj.{part}" for e in range(6) for x in ("gate", "up", "down") for part in parts}
    assert own == {"model.layers.1.mlp.gate.weight"} | {f"model.layers.1.mlp.experts.{x}" for x in experts}


@pytest.mark.parametrize("name", LOADABLE)
def test_eight_bit_experts_come_back(name, tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint(name), INT8, TOKEN, router=None)
    write(model, tmp_path)
    assert_same_model(CompressedTensors().open(tmp_path), model)


def test_one_pattern_for_all_experts_of_many_blocks(tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("qwen2_moe"), INT4, router=None, **dict.fromkeys("qkvo", INT8))
    groups = write(model, tmp_path)["config_groups"]
    assert sum(len(group["targets"]) for group in groups.values()) == 4 + 3 + 3  # attention, shared expert, experts
    for module in modules(model):
        matching = [g for g in groups.values() for t in g["targets"] if re.match(t.removeprefix("re:"), module.name)]
        bits = [model.layers[module.name].format.bits] if module.name in model.layers else []
        assert [g["weights"]["num_bits"] for g in matching] == bits


def test_the_experts_of_a_block_have_one_format(tiny_checkpoint, tmp_path):
    """Gate, up and down alike; another block may have another one."""
    source = HFCheckpoint(tiny_checkpoint("qwen3_moe"))

    def choose(module, odd):
        if module.block is None or module.kind == "router":
            return None
        return Layer(INT8 if odd(module) else INT4)

    one = InMemory(source, lambda m: choose(m, lambda m: m.expert is not None and m.role == "down"))
    with pytest.raises(PlanError, match=r"different formats: model\.layers\.0\.mlp\.experts and 1 more"):
        CompressedTensors().write(one, tmp_path, {})
    other = InMemory(source, lambda m: choose(m, lambda m: m.expert is not None and m.block == 1))
    write(other, tmp_path)
    assert_same_model(CompressedTensors().open(tmp_path), other)


def test_routers_stay_as_they_are(tiny_checkpoint, tmp_path):
    with pytest.raises(PlanError, match="routers stay unquantized in compressed-tensors: keep it"):
        CompressedTensors().write(quantize(tiny_checkpoint("qwen3_moe"), INT4), tmp_path, {})


def test_experts_that_runtimes_know_as_one_tensor_only(tiny_checkpoint, tmp_path):
    """transformers 5.23 would take a folder with separate experts, and begin with random ones."""
    model = quantize(tiny_checkpoint("gpt_oss"), INT4, router=None)
    with pytest.raises(PlanError, match="its runtimes know the experts of gpt_oss models as one tensor only"):
        CompressedTensors().write(model, tmp_path, {})
    Qtool().check(model)
    Qtool().write(model, tmp_path, {})
    assert_same_model(Qtool().open(tmp_path), model)
