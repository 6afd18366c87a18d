"""Text models that come with other parts, such as the vision tower of the larger Gemma 3."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from benchmarks.tiny import tiny_config
from qtool.api import open_model, quantize
from qtool.calibrate.walker import Walker
from qtool.checkpoint.hf import HFCheckpoint
from qtool.checkpoint.language import language_model
from qtool.errors import CheckpointError
from qtool.pipeline.prepare import prepare
from qtool.recipe.load import load_recipe
from tests.conftest import make_tokenizer

TOKENS = torch.randint(512, (1, 24), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(folder, transformers' model) of a tiny Gemma 3 that sees; its config.json leaves out what is usual."""
    from transformers import AutoConfig, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7, "head_dim": 16, "vocab_size": 512}
    text |= {"num_key_value_heads": 4, "sliding_window": 8, "query_pre_attn_scalar": 16, "initializer_range": 0.2}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Gemma3ForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("several")
    model.save_pretrained(folder)
    told = json.loads((folder / "config.json").read_text())
    del told["text_config"]["num_attention_heads"]  # as in Google's files
    (folder / "config.json").write_text(json.dumps(told))
    return folder, model


def test_the_text_model_is_read_and_walked(several: tuple[Path, Any]) -> None:
    folder, model = several
    checkpoint = HFCheckpoint(folder)
    assert checkpoint.config["model_type"] == "gemma3_text"
    assert checkpoint.config["architectures"] == ["Gemma3ForCausalLM"]
    assert checkpoint.config["num_attention_heads"] == 8
    state = model.model.language_model.state_dict()
    assert set(checkpoint.names()) == {f"model.{name}" for name in state}
    assert all(torch.equal(checkpoint.tensor(f"model.{name}"), tensor) for name, tensor in state.items())
    assert torch.equal(checkpoint.rows("model.embed_tokens.weight", 3, 9), state["embed_tokens.weight"][3:9])
    walker = Walker(checkpoint, torch.device("cpu"), torch.float32)
    hidden = walker.embed(TOKENS)
    for i in range(7):
        walker.advance(walker.load_block(i), i, hidden)
    with torch.no_grad():
        wanted = model(TOKENS).logits[0]
    torch.testing.assert_close(walker.logits(hidden, 0), wanted, rtol=1e-4, atol=1e-4 * float(wanted.std()))


def test_what_is_left_out_is_said(several: tuple[Path, Any]) -> None:
    (note,) = HFCheckpoint(several[0]).notes
    assert note.startswith("only the text model of ") and note.endswith(": multi_modal_projector, vision_tower")


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_both_ways_to_name_it(prefix: str, several: tuple[Path, Any], tmp_path: Path) -> None:
    tensors = load_file(several[0] / "model.safetensors")
    stem = next(name for name in tensors if name.endswith("embed_tokens.weight")).removesuffix("embed_tokens.weight")
    save_file({name.replace(stem, prefix): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((several[0] / "config.json").read_bytes())
    found, original = HFCheckpoint(tmp_path), HFCheckpoint(several[0])
    assert found.names() == original.names()
    assert all(torch.equal(found.tensor(name), original.tensor(name)) for name in found.names())


@pytest.mark.proven
@pytest.mark.parametrize("to", ["compressed-tensors", "gguf"])
@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
def test_an_output_layer_outside_of_the_text_model(kind: str, to: str, tmp_path: Path) -> None:
    """`model.text_model.` and `lm_head`; Idefics 3 sends hidden states to where its tower's first parameter is."""
    model = AutoModelForImageTextToText.from_config(tiny_config(kind), dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    own = {name for name in model.state_dict() if name.startswith(("model.text_model.", "lm_head"))}
    assert set(HFCheckpoint(tmp_path / "model").names()) == {name.replace(".text_model", "") for name in own}
    weights = "q8_0" if to == "gguf" else "int8-channel"
    recipe = asked(to, layers=[{"match": "*_proj", "weights": weights, "method": "rtn"}, {"match": "*", "keep": True}])
    proof = quantize(str(tmp_path / "model"), recipe, tmp_path / "out").artifacts[0].proof
    assert proof is not None and proof.words.startswith("runs in ")


def test_a_missing_tensor_is_noticed(several: tuple[Path, Any], tmp_path: Path) -> None:
    tensors = load_file(several[0] / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("layers.3.mlp.up_proj.weight") and "language" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((several[0] / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"lacks 1 of the .* found no model\.layers\.3\.mlp\.up_proj\.weight"):
        HFCheckpoint(tmp_path)


def test_an_output_layer_may_be_tied_by_the_whole(several: tuple[Path, Any], tmp_path: Path) -> None:
    """As in GOT-OCR 2, whose text model says that it has one of its own; so it has where a file stores one."""
    tensors = load_file(several[0] / "model.safetensors")
    told = json.loads((several[0] / "config.json").read_text())
    told["text_config"]["tie_word_embeddings"], told["tie_word_embeddings"] = False, True
    (tmp_path / "config.json").write_text(json.dumps(told))
    save_file(tensors, tmp_path / "model.safetensors")
    assert HFCheckpoint(tmp_path).tied
    own = {"language_model.lm_head.weight": torch.randn(512, 64)}
    save_file(tensors | own, tmp_path / "model.safetensors")
    assert torch.equal(HFCheckpoint(tmp_path).tensor("lm_head.weight"), *own.values())
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(told | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"found no lm_head\.weight"):
        HFCheckpoint(tmp_path)


def asked(to: str, **more: Any) -> dict[str, Any]:
    layers = [{"match": "*_proj", "weights": "int4-g32", "method": "rtn"}, {"match": "*", "keep": True}]
    return {"recipe": 1, "name": "parts", "layers": layers, "export": [{"to": to}], **more}


@pytest.mark.parametrize("to", ["compressed-tensors", "qtool"])
def test_layouts_that_can_hold_all_parts_get_all(to: str, several: tuple[Path, Any], tmp_path: Path) -> None:
    source = load_file(several[0] / "model.safetensors")
    report = quantize(str(several[0]), asked(to), tmp_path / "out", verify=False)
    assert any("tensors beside Gemma3ForConditionalGeneration, copied" in text for text in report.warnings)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gemma3"
    model = open_model(tmp_path / "out")
    assert set(model.names()) == set(source) and len(model.layers) == 7 * 7
    for name, tensor in source.items():
        if name.removesuffix(".weight") not in model.layers:
            assert torch.equal(model.tensor(name), tensor)
    text = language_model(model)
    assert text.config["model_type"] == "gemma3_text" and len(text.layers) == 7 * 7
    assert set(text.names()) == set(HFCheckpoint(several[0]).names())


def of_towers(weights: str, match: str) -> dict[str, Any]:
    layers = [{"match": match, "weights": weights, "method": "rtn"}, {"match": "*", "keep": True}]
    return {"recipe": 1, "name": "towers", "layers": layers, "export": [{"to": "compressed-tensors"}]}


@pytest.mark.parametrize(
    ("weights", "match", "place"),
    [
        ("int4-g32", "vision_tower.*", "vision_tower.*"),
        ("mxfp4", "*.out_proj", "vision_tower.*"),
        ("int4-g32", "*.layers.0.self_attn.out_proj", "vision_tower.encoder.layers.0.self_attn.out_proj"),
        ("int4-g32", "*.mlp.down_proj", ""),
        ("fp8-channel", "vision_tower.*", ""),
    ],
)
def test_packed_layers_whose_weight_a_class_looks_for_are_told_before(
    weights: str, match: str, place: str, several: tuple[Path, Any], tmp_path: Path
) -> None:
    job = prepare(str(several[0]), load_recipe(of_towers(weights, match)))
    told = [text for text in job.plan.warnings if "from_pretrained of transformers fails" in text]
    assert [text.partition(" fails at ")[2].partition(": ")[0] for text in told] == ([place] if place else [])
    quantize(str(several[0]), of_towers(weights, match), tmp_path / "out", verify=False)
    load = partial(type(several[1]).from_pretrained, tmp_path / "out")
    if place:
        with pytest.raises(AttributeError, match="no attribute 'weight'"):
            load()
    else:
        assert load()


def test_what_is_for_text_models_only_gets_the_text_model(several: tuple[Path, Any], tmp_path: Path) -> None:
    smoothed = load_recipe(asked("compressed-tensors", transforms=[{"smooth": {}}]))
    assert prepare(str(several[0]), smoothed).checkpoint.config["model_type"] == "gemma3_text"
    assert prepare(str(several[0]), load_recipe(asked("gptq"))).checkpoint.config["model_type"] == "gemma3_text"
