"""What an artifact says about its size before anything is computed is what its files have, byte for byte."""

from __future__ import annotations

import pytest
import torch

from qtool import registry
from qtool.artifact import _packed_artifact, _shards
from qtool.checkpoint._base import Cache, Layer, Static
from qtool.checkpoint.hf import HFCheckpoint
from qtool.checkpoint.modules import modules
from qtool.formats._spelling import parse_format
from qtool.formats.int import Int
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.plan import Planned, make_plan
from qtool.recipe.cache import parse_cache
from qtool.recipe.load import load_recipe
from qtool.residuals.low_rank import LowRank
from qtool.residuals.sparse import Sparse
from tests.artifact.conftest import InMemory, save_llama

CASES = [
    *(("qtool", label, None) for label in ("int3-g32-asym", "q4_k", "iq2_xs", "tq1_0", "nvfp4", "mxfp4", "qoq")),
    *(("gguf", label, None) for label in ("q4_0", "q5_1", "q2_k", "q6_k", "iq3_s", "iq1_m", "tq2_0", "nvfp4", "mxfp4")),
    *(("mlx", label, None) for label in ("int4-g64", "int3-g32-asym", "mxfp4", "mxfp8")),
    ("awq", "int4-g128-asym", None),
    ("gptq", "int4-g32", None),
    ("gptq", "int3-g64-asym", None),
    ("fp8", "fp8-block", "fp8-g128"),
    ("modelopt", "nvfp4", "nvfp4"),
    ("modelopt", "int4-g128", None),
    ("modelopt", "int8-channel", None),
    ("modelopt", "fp8-tensor", "fp8-tensor"),
    ("compressed-tensors", "int4-g128-asym", None),
    ("compressed-tensors", "int3-g32", None),
    ("compressed-tensors", "int8-channel", "int8-token"),
    ("compressed-tensors", "int8-channel", "int8-tensor-asym"),
    ("compressed-tensors", "fp8-channel", "fp8-token"),
    ("compressed-tensors", "fp8-tensor", "fp8-tensor"),
    ("compressed-tensors", "nvfp4", "nvfp4"),
    ("compressed-tensors", "mxfp4", None),
]
CARD = {"base_model": "org/model", "recipe_name": "r"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("wide"), 256, torch.bfloat16)


def files_of(folder):
    """Bytes of all files with tensors."""
    kept = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".gguf") or "index" in path.name]
    return sum(path.stat().st_size for path in kept)


def model_of(folder, label, inputs, *kept):
    fmt, activations = parse_format(label), inputs and parse_format(inputs)

    def choose(module):
        if module.block is None or module.role in kept:
            return None
        return Layer(fmt, activations, Static(0.5, 0) if activations and activations.static else None)

    return InMemory(HFCheckpoint(folder), choose)


@pytest.mark.parametrize(("name", "label", "inputs"), CASES, ids=str)
def test_files_have_the_size_that_was_said(name, label, inputs, wide, tmp_path):
    artifact = registry.load("artifact", name)()
    model = model_of(wide, label, inputs)
    said = artifact.footprint(model, CARD)
    assert said.exact
    artifact.write(model, tmp_path, CARD)
    assert said.total == files_of(tmp_path)
    assert said.modules == {m.name: artifact.nbytes(model, m, model.layers.get(m.name)) for m in modules(model)}
    assert 0 < said.overhead < 60_000
    assert said.rest == 2 * 5 * 256 * (2 if name == "gguf" else 1) + sum(extra(name, label))


def extra(name, label):
    """Bytes of a GGUF's tensors of scales: one number for each matrix."""
    return [4 * 14] if (name, label) == ("gguf", "nvfp4") else []


def test_every_artifact_is_among_them():
    assert {name for name, _, _ in CASES} == set(registry.names("artifact"))


@pytest.mark.parametrize("name", ["mlx", "gptq", "qtool"])
def test_models_of_experts(name, tiny_checkpoint, tmp_path):
    artifact = registry.load("artifact", name)()
    model = model_of(tiny_checkpoint("qwen3_moe"), "int4-g32", None, "router")
    artifact.write(model, tmp_path, CARD)
    assert artifact.footprint(model, CARD).total == files_of(tmp_path)


@pytest.mark.parametrize("family", ["llama-rope3", "gemma2", "qwen2", "phi3", "qwen3_moe"])
def test_gguf_of_other_families(family, tiny_checkpoint, tmp_path):
    artifact = registry.load("artifact", "gguf")(split_max_size=100_000)
    model = model_of(tiny_checkpoint(family), "q8_0", None, "router")
    artifact.write(model, tmp_path, CARD)
    said = artifact.footprint(model, CARD)
    assert len(list(tmp_path.glob("*.gguf"))) > 1
    assert said.total == files_of(tmp_path)
    for module in modules(model):
        assert said.modules[module.name] == artifact.nbytes(model, module, model.layers.get(module.name))


def test_integers_in_gguf_take_no_more_than_was_said(wide, tmp_path):
    artifact = registry.load("artifact", "gguf")()
    model = model_of(wide, "int4-g32-asym", None)
    said = artifact.footprint(model, CARD)
    artifact.write(model, tmp_path, CARD)
    assert not said.exact
    assert 0.7 * said.total < files_of(tmp_path) <= said.total


def test_shards(wide, tmp_path, monkeypatch):
    monkeypatch.setattr(
        _packed_artifact, "write_shards", lambda *a, **named: _shards.write_shards(*a, limit=300_000, **named)
    )
    monkeypatch.setattr(_packed_artifact, "overhead", lambda pieces: _shards.overhead(pieces, 300_000))
    artifact, model = registry.load("artifact", "compressed-tensors")(), model_of(wide, "int8-channel", None)
    artifact.write(model, tmp_path, CARD)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert artifact.footprint(model, CARD).total == files_of(tmp_path)


def test_corrections_and_caches_count(wide, tmp_path):
    model = model_of(wide, "int3-g32", None)
    scales = (Static(0.5),) * 128, (Static(0.25),) * 128
    model.cache = Cache(parse_cache("int8-channel"), {0: scales, 1: scales})
    artifact = registry.load("artifact", "qtool")()
    plain = artifact.footprint(model).total
    module = next(m for m in modules(model) if m.role == "down")
    layer = Layer(Int(bits=3, group=32), residuals=(LowRank(rank=8), Sparse(share=0.01)))
    more = artifact.nbytes(model, module, layer) - artifact.nbytes(model, module, Layer(Int(bits=3, group=32)))
    n, k = module.shape
    assert more == 2 * 8 * (n + k) + 4 * (n + 1) + 6 * round(0.01 * n * k)
    artifact.write(model, tmp_path, {})
    assert plain == files_of(tmp_path)


RECIPE = """
recipe: 1
name: planned
calibration: {data: builtin, samples: 4, length: 64}
layers:
  - {match: "*.down_proj", weights: WEIGHTS, activations: INPUTS}
  - {match: lm_head, keep: f32}
  - {match: "*", weights: WEIGHTS}
kv_cache: fp8-tensor
export: [{to: compressed-tensors}]
"""


def test_a_plan_knows_the_size_of_its_files(wide, tmp_path):
    text = RECIPE.replace("WEIGHTS", "fp8-channel").replace("INPUTS", "fp8-tensor")
    text = text.replace('"*", weights: fp8-channel', '"*", weights: int4-g64')
    (tmp_path / "planned.yaml").write_text(text)
    recipe, source = load_recipe(str(tmp_path / "planned.yaml")), HFCheckpoint(wide)
    artifact = registry.load("artifact", "compressed-tensors")()
    plan = make_plan(recipe, source, {"compressed-tensors": artifact})
    said = artifact.footprint(Planned(source, plan), {})
    run(QuantizeOptions(str(wide), str(tmp_path / "planned.yaml"), tmp_path / "out"))
    assert said.total == files_of(tmp_path / "out")
