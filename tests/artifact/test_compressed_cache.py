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
from qtool.formats._spelling import parse_format
from qtool.recipe.cache import KVCache, parse_cache
from tests.artifact.conftest import quantize, save_llama, skip_if_cache_is_ignored
from tests.artifact.test_compressed_tensors import TOKENS, change_config, change_tensors, load, write

FP8, HEADS = parse_cache("fp8-tensor"), parse_cache("fp8-head")
STATICS = {0: ((Static(0.03125),), (Static(0.0078125),)), 1: ((Static(0.015625),), (Static(0.0107421875),))}
BY_HEAD = {i: tuple((*scales, Static(scales[0].scale / 8)) for scales in pair) for i, pair in STATICS.items()}
KEYS = "model.layers.1.self_attn.k_scale"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("cached"), 64, torch.float32)


CACHE = Cache(FP8, STATICS)
CACHES = {"tensor": CACHE, "attn_head": Cache(HEADS, BY_HEAD)}


def cached(folder, cache=CACHE):
    model = quantize(folder, parse_format("int8-channel"), parse_format("int8-token"))
    model.cache = cache
    return model


@pytest.mark.parametrize("strategy", CACHES)
def test_tensors_and_settings_are_those_of_the_specification(strategy, folder, tmp_path):
    write(cached(folder, CACHES[strategy]), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    shape = (1,) if strategy == "tensor" else (2, 1, 1)
    for block, sides in CACHES[strategy].statics.items():
        for name, statics in zip("kv", sides, strict=True):
            found = tensors[f"model.layers.{block}.self_attn.{name}_scale"]
            assert torch.equal(found, torch.tensor([s.scale for s in statics]).view(shape))
    scheme = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    wanted = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    assert {key: scheme[key] for key in wanted} == wanted
    write(cached(folder, None), tmp_path / "plain")
    plain = json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]
    assert plain["kv_cache_scheme"] is None


@pytest.mark.parametrize("artifact", [CompressedTensors, Qtool], ids=["compressed-tensors", "qtool"])
@pytest.mark.parametrize("strategy", CACHES)
def test_comes_back(strategy, artifact, folder, tmp_path):
    model = cached(folder, CACHES[strategy])
    artifact().write(model, tmp_path, {})
    found = artifact().open(tmp_path)
    assert found.cache == CACHES[strategy]
    assert found.names() == model.names()
    write(found, tmp_path / "again")
    write(model, tmp_path / "direct")
    again, direct = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "direct"))
    assert again.keys() == direct.keys()
    assert all(torch.equal(again[name], direct[name]) for name in direct)


@pytest.mark.parametrize("strategy", CACHES)
def test_transformers_computes_what_evaluation_simulates(strategy, folder, tmp_path):
    skip_if_cache_is_ignored()
    write(cached(folder, CACHES[strategy]), tmp_path)
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


@pytest.mark.parametrize(
    ("keys", "values", "label"),
    [
        ("int4-token", "int4-token", "int4-token"),
        ("int8-head", "int8-head", "int8-head"),
        ("fp8-head", "fp8-tensor", "fp8-head keys and fp8-tensor values"),
    ],
)
def test_other_caches_are_refused(keys, values, label, folder, tmp_path):
    cache = Cache(KVCache(keys=keys, values=values), {})
    with pytest.raises(PlanError, match=f"read KV caches in fp8-tensor or fp8-head, not {label}; `to: qtool`"):
        write(cached(folder, cache), tmp_path)


INT8 = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}
ATTN_HEAD = INT8 | {"type": "float", "strategy": "attn_head"}
DAMAGE = {
    "missing": (change_tensors(lambda t: t.pop(KEYS)), f"{KEYS}: wanted a positive float, found no such tensor"),
    "negative": (change_tensors(lambda t: t[KEYS].neg_()), f"{KEYS}: wanted a positive float, found tensor"),
    "several": (change_tensors(lambda t: t.update({KEYS: torch.ones(2)})), f"{KEYS}: wanted a positive float"),
    "heads": (change_config(kv_cache_scheme=ATTN_HEAD), r"k_scale: wanted positive floats \[2, 1, 1\], found tensor"),
    "scheme": (change_config(kv_cache_scheme=INT8), "kv_cache_scheme: wanted 8-bit float per tensor or attn_head"),
    "words": (change_config(kv_cache_scheme={"num_bits": "x"}), "wrong kv_cache_scheme"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage, folder, tmp_path):
    change, message = DAMAGE[damage]
    write(cached(folder), tmp_path)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        CompressedTensors().open(tmp_path)
