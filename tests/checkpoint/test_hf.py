from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qtool.checkpoint._base import Module
from qtool.checkpoint.hf import INDEX, HFCheckpoint
from qtool.checkpoint.modules import modules
from qtool.errors import CheckpointError, NumericsError
from qtool.numerics.checks import finite

Find = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def copy(tiny_checkpoint: Find, tmp_path: Path) -> Find:
    """A copy of a tiny checkpoint that a test may damage."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(tiny_checkpoint(name), tmp_path / name))

    return make


def edit(folder: Path, **fields: Any) -> None:
    """Sets fields of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | fields
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_equals_state_dict(tiny_folder: Path) -> None:
    checkpoint = HFCheckpoint(tiny_folder)
    state = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype="auto").state_dict()
    if checkpoint.tied:
        assert torch.equal(state.pop("lm_head.weight"), state["model.embed_tokens.weight"])
    assert set(checkpoint.names()) == set(state)
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        assert tensor.dtype == state[name].dtype == checkpoint.info(name).dtype
        assert checkpoint.info(name).shape == state[name].shape
        assert torch.equal(tensor, state[name])
        assert torch.equal(checkpoint.rows(name, 3, 9), state[name][3:9])
        assert name in checkpoint


def test_model_order(tiny_checkpoint: Find) -> None:
    checkpoint = HFCheckpoint(tiny_checkpoint("qwen3"))
    blocks = [name.split(".")[2] for name in checkpoint.names() if ".layers." in name]
    assert len(blocks) == 3 * 11
    assert blocks == sorted(blocks)
    assert checkpoint.names()[0] == "model.embed_tokens.weight"
    assert checkpoint.names()[-2:] == ["model.norm.weight", "lm_head.weight"]


def test_side_files(tiny_checkpoint: Find, copy: Find) -> None:
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert set(HFCheckpoint(tiny_checkpoint("llama")).files) == names
    folder = copy("llama")
    (folder / "LICENSE").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    assert set(HFCheckpoint(folder).files) == names | {"LICENSE"}


def test_modules_in_order(tiny_checkpoint: Find) -> None:
    found = list(modules(HFCheckpoint(tiny_checkpoint("llama"))))
    assert found[0] == Module("model.embed_tokens", (), "embedding", "embedding", None, "tokens", None, (512, 64))
    assert found[-1] == Module("lm_head", (), "linear", "head", None, "head_in", None, (512, 64))
    at = "model.layers.1."
    assert found[8:15] == [
        Module(at + "self_attn.q_proj", (), "linear", "q", 1, at + "attn_in", at + "qkv", (64, 64)),
        Module(at + "self_attn.k_proj", (), "linear", "k", 1, at + "attn_in", at + "qkv", (32, 64)),
        Module(at + "self_attn.v_proj", (), "linear", "v", 1, at + "attn_in", at + "qkv", (32, 64)),
        Module(at + "self_attn.o_proj", (), "linear", "o", 1, at + "attn_out", None, (64, 64)),
        Module(at + "mlp.gate_proj", (), "linear", "gate", 1, at + "mlp_in", at + "gate_up", (128, 64)),
        Module(at + "mlp.up_proj", (), "linear", "up", 1, at + "mlp_in", at + "gate_up", (128, 64)),
        Module(at + "mlp.down_proj", (), "linear", "down", 1, at + "mlp_mid", None, (64, 128)),
    ]
    assert len(found) == 16


def test_modules_follow_the_checkpoint(tiny_folder: Path) -> None:
    checkpoint = HFCheckpoint(tiny_folder)
    found = list(modules(checkpoint))
    weights = [f"{module.name}.weight" for module in found]
    assert weights == [name for name in checkpoint.names() if len(checkpoint.info(name).shape) == 2]
    assert [module.shape for module in found] == [checkpoint.info(name).shape for name in weights]


def test_tied_matrix_is_listed_once(tiny_checkpoint: Find) -> None:
    checkpoint = HFCheckpoint(tiny_checkpoint("llama-tied"))
    assert checkpoint.tied
    found = list(modules(checkpoint))
    assert found[0].aliases == ("lm_head",)
    assert [module for module in found if module.role in ("embedding", "head")] == found[:1]


def test_equal_copy_of_a_tied_matrix_is_dropped(copy: Find) -> None:
    folder = copy("llama-tied")
    before = HFCheckpoint(folder).names()
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert HFCheckpoint(folder).names() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_copy_of_another_type_is_equal_if_its_numbers_are(dtype: torch.dtype, copy: Find) -> None:
    folder = copy("llama-tied")
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].to(dtype)}))
    assert "lm_head.weight" not in HFCheckpoint(folder).names()
    edit_tensors(folder, lambda t: t["lm_head.weight"].view(-1)[-1:].mul_(1.01))
    with pytest.raises(CheckpointError, match="stored matrices differ"):
        HFCheckpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_links_lead_nowhere_but_into_the_hub_cache(name: str, copy: Find, tmp_path: Path) -> None:
    folder = copy("llama")
    elsewhere = tmp_path / "elsewhere"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=f"{name} is a link out of its folder: found .*elsewhere; copy"):
        HFCheckpoint(folder)
    cache = tmp_path / "models--me--tiny"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    folder = folder.rename(cache / "snapshots" / "0123abc")
    elsewhere.rename(cache / "blobs" / "4567def")
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/4567def")
    assert HFCheckpoint(folder).names()
    inside = folder / "inside"
    (cache / "blobs" / "4567def").rename(inside)
    (folder / name).unlink()
    (folder / name).symlink_to("inside")
    assert HFCheckpoint(folder).names()


@pytest.mark.parametrize("shard", ["x" * 300 + ".safetensors", "a\0b.safetensors"])
def test_shards_that_nothing_can_be_called(shard: str, copy: Find) -> None:
    folder = copy("llama")
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    with pytest.raises(CheckpointError, match="that its index names"):
        HFCheckpoint(folder)


def test_differing_copy_of_a_tied_matrix(copy: Find) -> None:
    folder = copy("llama-tied")
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 1.01}))
    with pytest.raises(CheckpointError, match=r'stored matrices differ; set "tie_word_embeddings": false'):
        HFCheckpoint(folder)
    edit(folder, tie_word_embeddings=False)
    assert not HFCheckpoint(folder).tied


def test_constants_of_old_files_are_ignored(copy: Find) -> None:
    folder = copy("llama")
    before = HFCheckpoint(folder).names()
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert HFCheckpoint(folder).names() == before


Q = "model.layers.1.self_attn.q_proj.weight"
DAMAGED_TENSORS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing-matrix": (lambda t: t.pop(Q), rf"lacks 1 of the 21 tensors of a llama model: found no {Q}"),
    "missing-norm": (lambda t: t.pop("model.norm.weight"), "found no model.norm.weight"),
    "missing-head": (lambda t: t.pop("lm_head.weight"), "found no lm_head.weight"),
    "unknown-matrix": (
        lambda t: t.update({"model.layers.0.mlp.extra_proj.weight": torch.ones(4, 4)}),
        r"llama models do not have: found model.layers.0.mlp.extra_proj.weight",
    ),
    "unknown-bias": (lambda t: t.update({Q.replace("weight", "bias"): torch.ones(64)}), "llama models do not have"),
    "wrong-shape": (lambda t: t.update({Q: torch.ones(64, 32)}), r"wanted \[64, 64\], found \[64, 32\]"),
    "wrong-rank": (lambda t: t.update({Q: torch.ones(4096)}), r"wanted \[64, 64\], found \[4096\]"),
}


@pytest.mark.parametrize("case", DAMAGED_TENSORS)
def test_tensors_that_do_not_fit(case: str, copy: Find) -> None:
    change, message = DAMAGED_TENSORS[case]
    folder = copy("llama")
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        HFCheckpoint(folder)


DAMAGED_CONFIG: dict[str, tuple[dict[str, Any], str]] = {
    "no-family": ({"model_type": None}, r"wanted model_type one of .*llama, mistral, .*qwen3.*, found None"),
    "other-family": ({"model_type": "nobody"}, r"unknown model family: .*found 'nobody'; .*--model-free"),
    "path-as-family": ({"model_type": "../_base"}, "unknown model family"),
    "list-as-family": ({"model_type": ["llama"]}, "unknown model family"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized, in a way .*found gptq"),
    "quantized-strangely": ({"quantization_config": [1]}, r"already quantized"),
    "no-size": ({"hidden_size": None}, "impossible hidden_size: wanted a positive integer, found None"),
    "negative": ({"vocab_size": -1}, "impossible vocab_size"),
    "text": ({"num_attention_heads": "4"}, "impossible num_attention_heads"),
    "endless": ({"num_hidden_layers": 10**9}, "impossible num_hidden_layers"),
    "zero-heads": ({"num_key_value_heads": 0}, "impossible num_key_value_heads"),
    "unshareable": ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
    "indivisible": ({"head_dim": None, "hidden_size": 66}, "no multiple of 4"),
    "wrong-rope": ({"rope_scaling": "linear"}, "wrong rope_scaling"),
    "rope-without-factor": ({"rope_parameters": {"rope_type": "linear"}}, "impossible factor of the rotary embedding"),
    "rope-theta-nan": ({"rope_parameters": {"rope_theta": math.nan}}, "impossible rope_theta of the rotary embedding"),
    "rope-theta-text": ({"rope_parameters": {"rope_theta": "1e4"}}, "impossible rope_theta of the rotary embedding"),
    "rope-type-list": ({"rope_parameters": {"rope_type": []}}, "impossible rope_type .*: wanted text, found"),
    "rope-nested": ({"rope_parameters": {"full_attention": 5}}, "wrong rope_parameters: wanted an object"),
    "rope-nested-list": ({"rope_parameters": {"sliding_attention": []}}, "wrong rope_parameters: wanted an object"),
    "rope-beta-text": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}},
        "impossible beta_fast of the rotary embedding: wanted > 0, found 'x'",
    ),
    "window-text": ({"sliding_window": "all"}, "impossible sliding_window: wanted a positive integer, found 'all'"),
    "context-text": ({"max_position_embeddings": "long"}, "impossible max_position_embeddings"),
    "eps-text": ({"rms_norm_eps": "tiny"}, "wrong rms_norm_eps: wanted a number from 0, found 'tiny'"),
    "eps-infinite": ({"rms_norm_eps": math.inf}, "wrong rms_norm_eps: wanted a number from 0, found inf"),
    "other-blocks": ({"num_hidden_layers": 3}, "lacks 9 of the 30 tensors"),
}


@pytest.mark.parametrize("case", DAMAGED_CONFIG)
def test_config_that_does_not_fit(case: str, copy: Find) -> None:
    fields, message = DAMAGED_CONFIG[case]
    folder = copy("llama")
    edit(folder, **fields)
    with pytest.raises(CheckpointError, match=message):
        HFCheckpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no config.json"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "is damaged: wanted UTF-8 text, found byte 0 is none"),
        (b"[" * 10**5, "not valid JSON"),
        (b"[]", "wanted a JSON object, found list"),
    ],
    ids=["missing", "cut", "not-utf8", "deep", "list"],
)
def test_config_that_cannot_be_read(text: bytes | None, message: str, copy: Find) -> None:
    folder = copy("llama")
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        HFCheckpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int32], ids=str)
def test_numbers_without_a_scale(dtype: torch.dtype, copy: Find) -> None:
    """A quantized matrix whose scales are gone is no matrix of small numbers."""
    folder, name = copy("llama"), "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"{name} holds numbers without a scale: found {dtype}"):
        HFCheckpoint(folder)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def elsewhere(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda index: index["weight_map"].update({"model.norm.weight": name})


def swap(index: dict[str, Any]) -> None:
    first, *_, last = index["weight_map"]
    assert index["weight_map"][first] != index["weight_map"][last]
    index["weight_map"][first] = index["weight_map"][last]


DAMAGED_INDEX: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no-map": (lambda index: index.pop("weight_map"), "wrong weight_map"),
    "empty-map": (lambda index: index["weight_map"].clear(), "wrong weight_map"),
    "absolute-path": (elsewhere("/etc/x.safetensors"), r"names a file elsewhere: .*found /etc/x.safetensors"),
    "parent-folder": (elsewhere("../x.safetensors"), "names a file elsewhere"),
    "other-folder": (elsewhere("sub/x.safetensors"), "names a file elsewhere"),
    "backslash": (elsewhere("..\\x.safetensors"), "names a file elsewhere"),
    "other-kind": (elsewhere("config.json"), "names a file elsewhere"),
    "no-text": (elsewhere(["x.safetensors"]), "names a file elsewhere"),  # type: ignore[arg-type]
    "missing-shard": (elsewhere("gone.safetensors"), r"lacks the file gone.safetensors that its index names"),
    "other-shard": (swap, r"tensor '.*' is not in model-0"),
    "absent-tensor": (
        lambda index: index["weight_map"].update(ghost=index["weight_map"]["model.norm.weight"]),
        r"tensor 'ghost' is not in",
    ),
    "unlisted-tensor": (lambda index: index["weight_map"].pop("model.norm.weight"), r"not list tensor 'model.norm.w"),
}


@pytest.mark.parametrize("case", DAMAGED_INDEX)
def test_index_that_lies(case: str, copy: Find) -> None:
    change, message = DAMAGED_INDEX[case]
    folder = copy("qwen3")
    edit_index(folder, change)
    with pytest.raises(CheckpointError, match=message):
        HFCheckpoint(folder)


def test_tensor_in_two_shards(copy: Find) -> None:
    folder = copy("qwen3")
    (folder / "again.safetensors").write_bytes(next(iter(sorted(folder.glob("model-*")))).read_bytes())
    edit_index(folder, lambda index: index["weight_map"].update(ghost="again.safetensors"))
    with pytest.raises(CheckpointError, match="two files hold tensor"):
        HFCheckpoint(folder)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ("weights.safetensors", "but no model.safetensors or .*; rename a single one"),
        ("model.gguf", "name that file itself"),
        ("pytorch_model.bin", r"pickled weights.*save_pretrained"),
        ("readme.txt", "holds no weights"),
    ],
)
def test_folder_without_usable_weights(rename: str, message: str, copy: Find) -> None:
    folder = copy("llama")
    (folder / "model.safetensors").rename(folder / rename)
    with pytest.raises(CheckpointError, match=message):
        HFCheckpoint(folder)


def test_no_such_tensor(tiny_checkpoint: Find) -> None:
    checkpoint = HFCheckpoint(tiny_checkpoint("llama"), "org/name")
    for read in (checkpoint.info, checkpoint.tensor, lambda name: checkpoint.rows(name, 0, 1)):
        with pytest.raises(CheckpointError, match=r"org/name holds no tensor 'model.x'"):
            read("model.x")
    assert "model.x" not in checkpoint


def test_fingerprint_follows_content(tiny_checkpoint: Find, copy: Find) -> None:
    before = HFCheckpoint(tiny_checkpoint("llama")).fingerprint()
    folder = copy("llama")
    assert HFCheckpoint(folder).fingerprint() == before
    AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    assert HFCheckpoint(folder).fingerprint() == before


@pytest.mark.parametrize("what", ["weight", "config", "tokenizer"])
def test_fingerprint_notices(what: str, copy: Find) -> None:
    folder = copy("llama")
    before = HFCheckpoint(folder).fingerprint()
    if what == "weight":
        edit_tensors(folder, lambda t: t["model.norm.weight"][3].mul_(1.01))
    elif what == "config":
        edit(folder, rms_norm_eps=1.01e-6)
    else:
        with (folder / "tokenizer.json").open("a") as file:
            file.write(" ")
    assert HFCheckpoint(folder).fingerprint() != before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_finite(value: float) -> None:
    good = torch.randn(3, 4).bfloat16()
    assert finite(good, "w") is good
    bad = good.clone()
    bad[1, 2] = bad[2, 0] = value
    with pytest.raises(NumericsError, match=rf"tensor w is not finite: found {value} at \[1, 2\], 2 of 12 values"):
        finite(bad, "w")


@pytest.mark.demo
def test_demo_checkpoint(demo_checkpoint: Path) -> None:
    checkpoint = HFCheckpoint(demo_checkpoint)
    state = load_file(demo_checkpoint / "model.safetensors")
    assert checkpoint.tied
    assert set(checkpoint.names()) == set(state)
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in state.items())
    assert len(list(modules(checkpoint))) == 1 + 30 * 7
