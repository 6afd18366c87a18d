"""FP8 KV caches in compressed-tensors: literal tensors and settings, its own code, damage."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from qtool.artifact.compressed_tensors import CompressedTensors
from qtool.artifact.qtool import Qtool
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Cache, Static
from qtool.errors import CheckpointError, PlanError
from qtool.recipe.schema import parse_format
from tests.artifact.conftest import quantize, save_llama
from tests.artifact.test_compressed_tensors import TOKENS, change_config, change_tensors, load, write

FP8 = parse_format("fp8-tensor")
STATICS = {0: (Static(0.03125), Static(0.0078125)), 1: (Static(0.015625), Static(0.0107421875))}
KEYS = "model.layers.1.self_attn.k_scale"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("cached"), 64, torch.float32)


CACHE = Cache(FP8, STATICS)


def cached(folder, cache=CACHE):
    model = quantize(folder, parse_format("int8-channel"), parse_format("int8-token"))
    model.cache = cache
    return model


def test_tensors_and_settings_are_those_of_the_specification(folder, tmp_path):
    write(cached(folder), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for block, (keys, values) in STATICS.items():
        prefix = f"model.layers.{block}.self_attn"
        assert torch.equal(tensors[f"{prefix}.k_scale"], torch.tensor([keys.scale]))
        assert torch.equal(tensors[f"{prefix}.v_scale"], torch.tensor([values.scale]))
    scheme = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    wanted = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    assert {key: scheme[key] for key in wanted} == wanted
    write(cached(folder, None), tmp_path / "plain")
    plain = json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]
    assert plain["kv_cache_scheme"] is None


@pytest.mark.parametrize("artifact", [CompressedTensors, Qtool], ids=["compressed-tensors", "qtool"])
def test_comes_back(artifact, folder, tmp_path):
    model = cached(folder)
    artifact().write(model, tmp_path, {})
    found = artifact().open(tmp_path)
    assert (found.cache.format, found.cache.statics) == (FP8, STATICS)
    assert found.names() == model.names()
    write(found, tmp_path / "again")
    write(model, tmp_path / "direct")
    again, direct = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "direct"))
    assert again.keys() == direct.keys()
    assert all(torch.equal(again[name], direct[name]) for name in direct)


def test_transformers_computes_what_evaluation_simulates(folder, tmp_path):
    write(cached(folder), tmp_path)
    with torch.no_grad():
        theirs = load(tmp_path)(TOKENS).logits[0]

    def walked(model):
        walker = Walker(model, torch.device("cpu"), torch.float32)
        hidden = walker.embed(TOKENS)
        for i in range(2):
            walker.advance(walker.load_block(i), i, hidden)
        return walker.logits(hidden, 0)

    ours, uncached = walked(CompressedTensors().open(tmp_path)), walked(cached(folder, None))
    assert float((theirs - ours).norm() / (ours - uncached).norm()) < 0.02


def test_other_caches_are_refused(folder, tmp_path):
    with pytest.raises(PlanError, match="its KV caches are fp8-tensor, not int4-token"):
        write(cached(folder, Cache(parse_format("int4-token"), {})), tmp_path)


INT8 = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}
DAMAGE = {
    "missing": (change_tensors(lambda t: t.pop(KEYS)), f"{KEYS}: wanted a positive float, found no such tensor"),
    "negative": (change_tensors(lambda t: t[KEYS].neg_()), f"{KEYS}: wanted a positive float, found -0.015625"),
    "several": (change_tensors(lambda t: t.update({KEYS: torch.ones(2)})), f"{KEYS}: wanted a positive float"),
    "scheme": (change_config(kv_cache_scheme=INT8), "kv_cache_scheme: wanted 8-bit float per tensor"),
    "words": (change_config(kv_cache_scheme={"num_bits": "x"}), "wrong kv_cache_scheme"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage, folder, tmp_path):
    change, message = DAMAGE[damage]
    write(cached(folder), tmp_path)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        CompressedTensors().open(tmp_path)
