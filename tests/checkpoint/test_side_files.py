"""What lies beside the weights goes along: several chat templates, and code that is never run."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch

import pytest

from qtool.artifact.gguf._tokenizer import tokenizer_metadata
from qtool.checkpoint.hf import HFCheckpoint
from qtool.checkpoint.open import UNWANTED, WANTED
from qtool.errors import CheckpointError
from qtool.models import open_model
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.store.files import read_sums

RECIPE = """
recipe: 1
name: t
layers: [{match: "*", weights: int8-channel}]
export: [{to: TO}]
"""
TEMPLATES = {"rag": "{{ documents }}", "tool_use": "{{ tools }}"}


@pytest.fixture
def model(tiny_checkpoint, tmp_path):
    """With two named chat templates beside the usual one, and code of its own."""
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    (folder / "additional_chat_templates").mkdir()
    for name, text in TEMPLATES.items():
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "configuration_mine.MyConfig", "AutoModelForCausalLM": "modeling_mine.MyModel"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    for name in ("configuration_mine", "modeling_mine", "helpers"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} was run')\n")
    return folder


def quantized(model, tmp_path, to):
    (tmp_path / "r.yaml").write_text(RECIPE.replace("TO", to))
    events = []
    run(QuantizeOptions(str(model), str(tmp_path / "r.yaml"), tmp_path / "out", dtype="fp32"), events.append)
    return tmp_path / "out", [e.message for e in events if e.warning]


@pytest.mark.parametrize("to", ["compressed-tensors", "qtool"])
def test_all_of_it_goes_along(to, model, tmp_path):
    out, warnings = quantized(model, tmp_path, to)
    found = open_model(str(out)).files
    for name in ("additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja", "modeling_mine.py"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
        assert found[name] == out / name
        assert name in read_sums(out)
    assert json.loads((out / "config.json").read_text())["auto_map"]["AutoConfig"] == "configuration_mine.MyConfig"
    listed = "along goes, unread, configuration_mine.py, helpers.py, modeling_mine.py"
    assert f"auto_map names code, which qtool never runs: {listed}" in warnings


def test_transformers_finds_the_templates(model, tmp_path):
    from transformers import AutoTokenizer

    out, _ = quantized(model, tmp_path, "compressed-tensors")
    templates = AutoTokenizer.from_pretrained(out).chat_template
    assert {name: templates[name] for name in TEMPLATES} == TEMPLATES
    assert templates["default"] == (model / "chat_template.jinja").read_text()


def test_templates_by_name_in_gguf(model):
    checkpoint = HFCheckpoint(model)
    found = tokenizer_metadata(checkpoint.files, checkpoint.config, "gpt-2")
    assert found["tokenizer.chat_template"] == (model / "chat_template.jinja").read_text()
    assert {name: found[f"tokenizer.chat_template.{name}"] for name in TEMPLATES} == TEMPLATES
    assert sorted(found["tokenizer.chat_templates"]) == sorted(TEMPLATES)


def test_code_that_is_missing_is_told_of(model, tmp_path):
    (model / "modeling_mine.py").unlink()
    out, warnings = quantized(model, tmp_path, "qtool")
    along = "along goes, unread, configuration_mine.py, helpers.py"
    said = f"which qtool never runs: {along}; missing is modeling_mine.py; auto_map of config.json is left out"
    assert f"auto_map names code, {said}" in warnings
    assert "auto_map" not in json.loads((out / "config.json").read_text())


def test_code_that_nobody_names_stays(model):
    config = json.loads((model / "config.json").read_text())
    del config["auto_map"]
    (model / "config.json").write_text(json.dumps(config))
    checkpoint = HFCheckpoint(model)
    assert not [name for name in checkpoint.files if name.endswith(".py")]
    assert checkpoint.notes == ()


def test_the_tokenizer_may_name_it(model):
    config = json.loads((model / "config.json").read_text())
    del config["auto_map"]
    (model / "config.json").write_text(json.dumps(config))
    settings = {"auto_map": {"AutoTokenizer": ["helpers.Slow", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (note,) = HFCheckpoint(model).notes
    assert "helpers.py" in note
    assert "helpers.py" in HFCheckpoint(model).files


def test_a_template_that_is_a_link_out_of_the_folder(model, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (model / "additional_chat_templates" / "a.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"a\.jinja is a link out of its folder"):
        HFCheckpoint(model)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("additional_chat_templates/rag.jinja", True),
        ("modeling_mine.py", True),
        ("model.safetensors", True),
        ("original/model.safetensors", False),
        ("original/code.py", False),
        ("onnx/model.onnx", False),
        ("original/tokenizer.model", False),
    ],
)
def test_what_is_downloaded(name, wanted):
    """As the hub library decides: https://huggingface.co/docs/huggingface_hub/guides/download#filter-files-to-download"""
    assert (any(fnmatch(name, p) for p in WANTED) and not any(fnmatch(name, p) for p in UNWANTED)) is wanted
