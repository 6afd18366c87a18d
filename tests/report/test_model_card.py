"""The model card: metadata that the hub accepts, and numbers as they were measured."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import ModelCardData

from qtool import registry
from qtool.artifact.compressed_tensors import CompressedTensors
from qtool.artifact.qtool import Qtool
from qtool.errors import CheckpointError
from qtool.evaluate.result import Evaluation, Gate
from qtool.formats.int import Int
from qtool.formats.q4_0 import Q4_0
from qtool.pipeline.events import silent
from qtool.pipeline.publish import publish
from qtool.pipeline.stopwatch import Stopwatch
from qtool.report.model_card import card_text
from qtool.store.files import sha256
from tests.artifact.conftest import quantize

FULL = {
    "base_model": "some-org/Tiny-Model",
    "recipe_name": "w4a16",
    "recipe": {"recipe": 1, "layers": [{"match": "*", "weights": "int4-g32"}]},
    "source_bytes": 269_060_552,
    "quantized_bytes": 100_000_000,
    "license": "apache-2.0",
    "repository": "someone/Tiny-Model-w4",
    "methods": dict.fromkeys([f"model.layers.{i}.mlp.down_proj" for i in range(2)], "rtn"),
    "bits_per_weight": 4.5678,
    "quality": [
        Evaluation(
            text="prose.txt",
            tokens=12345,
            context=512,
            chunks=48,
            runtime="qtool",
            ppl=17.98768,
            ppl_error=0.2,
            base_ppl=16.5,
            kld_mean=0.0512345,
            kld_error=0.00123,
            top1=0.8765,
            top1_error=0.003,
            gates=(Gate(name="kld", limit=0.05, at_least=False, value=0.0512345, low=None, high=None, passed=False),),
        ).model_dump(mode="json")
        | {"words": "the usual price"}
    ],
}


@pytest.fixture
def model(tiny_checkpoint):
    return quantize(tiny_checkpoint("llama"), Int(bits=4, group=32), down=Int(bits=8, group="channel"))


def test_metadata_is_what_the_hub_indexes(model):
    card = ModelCard(card_text(CompressedTensors(), model, FULL))
    assert isinstance(card.data, ModelCardData)
    assert card.data.to_dict() == {
        "base_model": "some-org/Tiny-Model",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["qtool", "compressed-tensors", "int4-g32", "int8-channel"],
    }


def test_text_has_formats_sizes_quality_and_recipe(model):
    text = card_text(CompressedTensors(), model, FULL)
    assert "# Tiny-Model, quantized\n" in text
    assert "| int4-g32 | as they are |  | 12 |\n| int8-channel | as they are | rtn | 2 |" in text
    assert "4.568 bits per weight" in text
    assert "100.0 MB instead of the original's 269.1 MB (37.2%)" in text
    assert "**FAIL**: kld 0.05123, at most 0.05." in text
    assert "prose.txt: the usual price." in text
    assert (
        "| text | runtime | tokens | perplexity | baseline | mean KL divergence, nats | same top token |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| prose.txt | qtool | 12,345 | 17.9877 ± 0.2000 | 16.5000 | 0.05123 ± 0.00123 | 87.65% ± 0.30% |"
    ) in text
    recipe = text.split("## Recipe w4a16\n\n```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe) == FULL["recipe"]
    assert 'AutoModelForCausalLM.from_pretrained("someone/Tiny-Model-w4")' in text
    assert "vllm serve someone/Tiny-Model-w4" in text
    assert "FOLDER" not in text
    assert "FOLDER" in card_text(CompressedTensors(), model, FULL | {"repository": ""})


def test_a_measurement_that_is_infinite(model):
    infinite = FULL["quality"][0] | {"ppl": "Infinity", "kld_mean": None}
    text = card_text(Qtool(), model, FULL | {"quality": [infinite]})
    assert "| prose.txt | qtool | 12,345 | Infinity | 16.5000 | 87.65% ± 0.30% |" in text
    assert "KL divergence" not in text


@pytest.mark.parametrize("base", ["/home/me/model", "./model", "model", "a/b/c"])
def test_a_folder_is_no_base_model(model, base):
    card = ModelCard(card_text(Qtool(), model, {"base_model": base}))
    assert "base_model" not in card.data.to_dict()
    assert "Quality" not in card.text
    assert "Recipe" not in card.text


def test_files_beside_the_weights(tiny_checkpoint, model, tmp_path):
    CompressedTensors().write(model, tmp_path, FULL)
    source = tiny_checkpoint("llama")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.items() >= json.loads((source / "config.json").read_text()).items()


@pytest.mark.parametrize("name", ["compressed-tensors", "gguf", "qtool"])
def test_every_artifact_gets_a_card(tiny_checkpoint, name, tmp_path):
    model, artifact = quantize(tiny_checkpoint("llama"), Q4_0()), registry.load("artifact", name)()
    if name == "compressed-tensors":
        model = quantize(tiny_checkpoint("llama"), Int(bits=4, group=32))
    (entry,) = publish({name: artifact}, model, tmp_path, FULL, False, Stopwatch(), silent)
    assert [file.sha256 for file in entry.files if file.name == "README.md"] == [sha256(tmp_path / "README.md")]
    text = (tmp_path / "README.md").read_text()
    assert text == card_text(artifact, artifact.open(tmp_path), FULL)
    assert "# Tiny-Model, quantized" in text and f"Read by: {artifact.runtimes[0]}" in text


def test_a_side_file_that_vanished(model, tmp_path):
    model.files = model.files | {"tokenizer.json": tmp_path / "gone.json"}
    with pytest.raises(CheckpointError, match=r"gone\.json cannot be read: No such file"):
        Qtool().write(model, tmp_path, {})


def test_names_are_shown_and_never_markup(model):
    """The folder, the recipe and the text may be called anything; nothing of it becomes HTML or ends a code block."""
    hostile = "/m/<img src=x onerror=alert(1)> `<b>` [a](http://e.example) | x"
    card = {
        "base_model": hostile,
        "recipe_name": hostile,
        "recipe": {"name": "```\n<script>"},
        "quality": [{"text": hostile, "ppl": 3.0}],
    }
    text = card_text(Qtool(), model, card).partition("---\n")[2].partition("---\n")[2]
    outside = re.sub(r"(?ms)^(`{3,})yaml\n.*?^\1$", "", text)
    assert outside != text and "<script>" not in outside
    spans = re.sub(r"(?<![`\\])(`+)(?!`)(.*?)(?<!`)\1(?!`)", "", outside)
    assert "onerror" in spans and "<" not in re.sub(r"\\<", "", spans)
