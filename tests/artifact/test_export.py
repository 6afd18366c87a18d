"""Codes go from one layout to another exactly, or not at all."""

import json
import shutil

import pytest
import torch

from qtool import registry
from qtool.artifact.compressed_tensors import CompressedTensors
from qtool.artifact.gguf import GGUF
from qtool.artifact.qtool import Qtool
from qtool.checkpoint._base import QuantizedCheckpoint
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import CheckpointError, PlanError
from qtool.formats._spelling import parse_format
from qtool.formats.int import Int
from qtool.formats.q4_1 import Q4_1
from qtool.models import find_artifact, open_artifact, open_model
from qtool.pipeline.calibrate import CalibrateOptions
from qtool.pipeline.calibrate import run as calibrate
from qtool.pipeline.evaluate import EvaluateOptions
from qtool.pipeline.evaluate import run as run_evaluation
from qtool.pipeline.events import silent
from qtool.pipeline.export import ExportOptions
from qtool.pipeline.export import run as export
from qtool.pipeline.publish import publish
from qtool.pipeline.quantize import QuantizeOptions
from qtool.pipeline.quantize import run as quantize_model
from qtool.pipeline.stopwatch import Stopwatch
from qtool.store.files import new_folder
from tests.artifact.conftest import assert_same_model, quantize

EXACT = [
    pytest.param(Int(bits=4, group=32), "q4_0", id="sym-q4_0"),
    pytest.param(Int(bits=4, group=64, scale_dtype="fp16"), "q4_0", id="sym-g64-q4_0"),
    pytest.param(Int(bits=5, group=32), "q5_0", id="sym-q5_0"),
    pytest.param(Int(bits=8, group=32), "q8_0", id="sym-q8_0"),
    pytest.param(Int(bits=4, group=32, symmetric=False), "q4_1", id="asym-q4_1"),
]


def written(artifact, model, folder):
    folder.mkdir()
    publish({"artifact": artifact}, model, folder, {"base_model": "tiny"}, False, Stopwatch(), silent)
    return folder


def assert_same_values(found, wanted):
    assert set(found.names()) == set(wanted.names())
    assert found.layers.keys() == wanted.layers.keys()
    for name in wanted.names():
        assert torch.equal(found.tensor(name).float(), wanted.tensor(name).float()), name


@pytest.mark.parametrize("source", ["qtool", "compressed-tensors"])
@pytest.mark.parametrize(("fmt", "block"), EXACT)
def test_integers_become_gguf_blocks(source, fmt, block, tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), fmt)
    if source == "compressed-tensors":
        model.config["dtype"] = {"bf16": "bfloat16", "fp16": "float16"}[fmt.scale_dtype]
    first = open_artifact(written(registry.load("artifact", source)(), model, tmp_path / "first"))
    second = open_artifact(written(GGUF(), first, tmp_path / "second"))
    labels = {layer.format.label for layer in second.layers.values()}
    assert labels == {block} or (block == "q4_1" and labels <= {"q4_1", "q5_0"})  # minima that fp16 cannot hold
    assert_same_values(second, model)
    card = (tmp_path / "second" / "README.md").read_text()
    assert "# tiny, quantized" in card
    assert all(f"| {label} | as they are |" in card for label in labels)
    assert fmt.label not in card


@pytest.mark.parametrize(
    "fmt", [Int(bits=4, group=32), Int(bits=3, group="channel", symmetric=False)], ids=lambda f: f.label
)
def test_neutral_and_back(fmt, tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), fmt)
    neutral = open_artifact(written(Qtool(), model, tmp_path / "neutral"))
    packed = open_artifact(written(CompressedTensors(), neutral, tmp_path / "packed"))
    again = open_artifact(written(Qtool(), packed, tmp_path / "again"))
    assert_same_model(again, model)


def test_what_gguf_cannot_hold_is_said_once_with_its_layers(tiny_checkpoint, tmp_path):
    model = quantize(
        tiny_checkpoint("llama"), Int(bits=8, group="channel"), Int(bits=8, group="token"), down=Int(bits=4, group=32)
    )
    with pytest.raises(PlanError) as caught:
        GGUF().check(model)
    assert caught.value.problems == (
        "GGUF cannot say how activations are quantized; llama.cpp decides that itself: "
        "model.layers.0.self_attn.q_proj and 13 more",
    )
    with pytest.raises(PlanError, match=r"such as int4-g128 .*, not q4_1: model\.layers\.0\.self_attn\.q_proj and 13"):
        CompressedTensors().check(quantize(tiny_checkpoint("llama"), Q4_1()))


@pytest.mark.parametrize("name", registry.names("artifact"))
def test_each_layout_is_recognized_as_itself_and_nothing_else(name, tiny_checkpoint, tmp_path):
    artifact = registry.load("artifact", name)()
    blocks = {"activations": parse_format("fp8-g128"), "down": parse_format("fp8-block")}  # where rows are long enough
    what = {"fmt": None, **blocks} if name == "fp8" else {"fmt": Int(bits=4, group=32)}
    folder = written(artifact, quantize(tiny_checkpoint("llama"), **what), tmp_path / "out")
    recognized = [n for n in registry.names("artifact") if registry.load("artifact", n).recognizes(folder)]
    assert recognized == [name]
    assert find_artifact(folder)[0] == name
    assert isinstance(open_model(str(folder)), QuantizedCheckpoint)


def test_plain_checkpoints_open_as_such(tiny_checkpoint):
    assert isinstance(open_model(str(tiny_checkpoint("llama"))), HFCheckpoint)
    with pytest.raises(CheckpointError, match=r"holds no quantized artifact: wanted one of awq, .*gguf"):
        open_artifact(tiny_checkpoint("llama"))


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"is no checkpoint: wanted a folder .*, found no such file or folder"):
        open_artifact(tmp_path / "nothing")


def test_a_quantized_model_from_the_hub_is_one(tiny_checkpoint, tmp_path, monkeypatch):
    model = quantize(tiny_checkpoint("llama"), Int(bits=4, group=32))
    folder = written(registry.load("artifact", "gptq")(), model, tmp_path / "cache")
    monkeypatch.setattr("qtool.models.find_model", {"org/tiny": folder}.get)
    found = open_model("org/tiny")
    assert isinstance(found, QuantizedCheckpoint)
    assert found.source == "org/tiny"
    assert_same_values(found, model)


def test_quantized_in_a_way_that_nobody_here_reads(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"already quantized, in a way that qtool does not read: .*bitsandbytes"):
        open_model(str(folder))


@pytest.mark.parametrize("name", ["awq", "compressed-tensors", "fp8", "gptq", "mlx", "modelopt"])
def test_a_model_without_codes_is_refused(name, tiny_checkpoint):
    with pytest.raises(PlanError, match="nothing of the model is quantized: the model as a whole"):
        registry.load("artifact", name)().check(quantize(tiny_checkpoint("llama"), None))


@pytest.fixture
def sealed(tiny_checkpoint, tmp_path):
    """An artifact with SHA256SUMS, some of whose model card was written by hand."""
    folder = tmp_path / "first"
    with new_folder(folder) as partial:
        Qtool().write(quantize(tiny_checkpoint("llama"), Int(bits=4, group=32)), partial, {})
        (partial / "report.json").write_text("{}")
    with (folder / "README.md").open("a") as card:
        card.write("Thanks.")
    (folder / "report.json").unlink()
    return folder


def flip(path):
    """Changes the last bit of a file."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


RECIPE = """
recipe: 1
name: again
layers: [{match: "*", weights: q8_0}]
export: [{to: gguf}]
"""


def uses(source, place):
    """What reads all of a model, by name."""
    text, recipe = place / "text", place / "recipe.yaml"
    text.write_text("Some words of it. " * 200)
    recipe.write_text(RECIPE)
    plain = {"context": 32, "chunks": 1, "device": "cpu"}
    return {
        "export": lambda: export(ExportOptions(source, "qtool", place / "out")),
        "quantize": lambda: quantize_model(QuantizeOptions(source, str(recipe), place / "out", device="cpu")),
        "calibrate": lambda: calibrate(CalibrateOptions(source, str(recipe), place / "out", device="cpu")),
        "eval": lambda: evaluate(source, baseline=None, text=text, **plain),
        "baseline": lambda: evaluate(place / "plain", baseline=source, text=text, **plain),
    }


def evaluate(model, **options):
    return run_evaluation(EvaluateOptions(str(model), out=None, **options))


@pytest.mark.parametrize("use", ["export", "quantize", "calibrate", "eval", "baseline"])
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_source_that_differs_from_its_sums_is_refused_before_any_work(use, kind, sealed, tiny_checkpoint, tmp_path):
    source = sealed
    if kind == "gguf":
        export(ExportOptions(str(sealed), "gguf", tmp_path / "second"))
        (source,) = (tmp_path / "second").glob("*.gguf")
        flip(tmp_path / "second" / "README.md")
    shutil.copytree(tiny_checkpoint("llama"), tmp_path / "plain")
    before = sorted(tmp_path.iterdir())
    flip(source / "block-1.safetensors" if kind == "folder" else source)
    message = (
        r"(block-1\.safetensors|\.gguf) is not as it was written: SHA256SUMS has another hash; make or copy it anew"
    )
    with pytest.raises(CheckpointError, match=message):
        uses(str(source), tmp_path)[use]()
    assert {p for p in tmp_path.iterdir() if p.name not in ("text", "recipe.yaml")} == set(before)


def test_a_source_that_is_whole_is_used_by_all(sealed, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint("llama"), tmp_path / "plain")
    for use in uses(str(sealed), tmp_path).values():
        use()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out").unlink(missing_ok=True)


def test_what_sums_name_is_there_and_in_the_folder(sealed, tmp_path):
    def refused(match):
        with pytest.raises(CheckpointError, match=match):
            export(ExportOptions(str(sealed), "gguf", tmp_path / "out"))

    sums = sealed / "SHA256SUMS"
    written = sums.read_text()
    for name in ("../elsewhere", "/dev/zero", "a/../../b"):
        sums.write_text(f"{written}{'0' * 64}  {name}\n")
        refused("SHA256SUMS names a file elsewhere")
    sums.write_text(written)
    (sealed / "chat_template.jinja").unlink()
    refused(r"chat_template\.jinja is not as it was written: it is missing")
    sums.unlink()
    export(ExportOptions(str(sealed), "gguf", tmp_path / "out"))
