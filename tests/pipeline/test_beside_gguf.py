"""Draft layers of models that are written as GGUF: left out of the file, of the plan's sizes and of the proof."""

from __future__ import annotations

import warnings

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny import save_tiny
from qtool.api import quantize
from qtool.checkpoint.language import LanguageModel, language_model
from qtool.models import open_model
from qtool.pipeline.prepare import prepare
from qtool.recipe.load import load_recipe
from tests.conftest import make_tokenizer

KINDS = {"glm4_moe": "model.layers.4.", "deepseek_v3": "model.layers.4.", "qwen3_next": "mtp.layers.0."}
BLOCK = {"weights": "q8_0", "method": "rtn"}


def recipe(*exports):
    layers = [{"match": "lm_head", "keep": True}, {"match": "*", **BLOCK}]
    return {"recipe": 1, "name": "drafts", "layers": layers, "export": [{"to": name} for name in exports]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a tiny model with a draft layer, as published ones have it: the last block's again, and two more."""
    made = {}

    def make(kind):
        if kind not in made:
            folder, draft = tmp_path_factory.mktemp(kind), KINDS[kind]
            save_tiny(kind, folder)
            make_tokenizer().save_pretrained(folder)
            tensors = load_file(folder / "model.safetensors")
            again = {draft + n.split("layers.3.")[1]: t.clone() for n, t in tensors.items() if "layers.3." in n}
            more = {f"{draft}eh_proj.weight": torch.randn(64, 128), f"{draft}enorm.weight": torch.ones(64)}
            save_file(tensors | again | more, folder / "model.safetensors")
            made[kind] = folder, {**again, **more}
        return made[kind]

    return make


@pytest.mark.proven
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_left_out_and_the_rest_runs(kind, saved, tmp_path):
    folder, drafts = saved(kind)
    plan = prepare(str(folder), load_recipe(recipe("gguf"))).plan
    report = quantize(str(folder), recipe("gguf"), tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = gguf.GGUFReader(file).tensors
    written = sum(int(tensor.n_bytes) for tensor in tensors)
    assert not any("blk.4." in tensor.name or "nextn" in tensor.name for tensor in tensors)
    assert abs(plan.predicted_bytes - written) < 0.05 * written  # norms and routers become float32
    assert plan.other_bytes == report.other_bytes < sum(tensor.nbytes for tensor in drafts.values())
    stored = load_file(folder / "model.safetensors")
    assert report.parameters == sum(tensor.numel() for name, tensor in stored.items() if name not in drafts)
    assert any("draft layers and the like are left out" in text for text in report.warnings)
    assert report.artifacts[0].proof.words.startswith("runs in llama.cpp")


def test_those_that_a_file_has_quantized_are_not_planned(saved, tmp_path):
    folder, drafts = saved("deepseek_v3")
    layers = [{"match": "model.layers.4.*", "weights": "int8-channel", "method": "rtn"}, {"match": "*", "keep": True}]
    content = recipe("compressed-tensors") | {"layers": layers}
    quantize(str(folder), content, tmp_path / "packed", verify=False)
    assert open_model(tmp_path / "packed").layers.keys() == {
        name.removesuffix(".weight") for name, tensor in drafts.items() if tensor.ndim == 2 and "gate.w" not in name
    }
    report = quantize(str(tmp_path / "packed"), recipe("gguf"), tmp_path / "out")
    assert "beside" not in {entry.role for entry in report.layers}
    both = quantize(str(tmp_path / "packed"), recipe("gguf", "qtool"), tmp_path / "both", verify=False)
    assert "beside" in {entry.role for entry in both.layers}


def test_the_language_model_is_what_the_class_knows(saved):
    folder, drafts = saved("glm4_moe")
    model = open_model(folder)
    part = language_model(model)
    assert isinstance(part, LanguageModel) and part.kind is None
    assert set(part.names()) == set(model.names()) - drafts.keys()
    assert language_model(part) is part
    assert part.family is model.family
    assert torch.equal(part.tensor("model.norm.weight"), model.tensor("model.norm.weight"))
