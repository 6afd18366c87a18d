"""What a run tells its model cards: origin and license from the source, files by name, where it will be."""

from __future__ import annotations

import os
import shutil

import pytest
import yaml
from gguf import GGUFReader
from huggingface_hub import ModelCard

from qtool.checkpoint.hf import HFCheckpoint
from qtool.pipeline.card import origin, without_paths
from qtool.pipeline.quantize import QuantizeOptions, run

README = "---\nlicense: other\nlicense_name: homemade\nbase_model: some-org/Original\ntags: [x]\n---\n# A model\n"


@pytest.fixture
def model(tiny_checkpoint, tmp_path):
    folder = tmp_path / "Tiny"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    return folder


def test_origin_is_what_the_source_s_card_says(model):
    checkpoint = HFCheckpoint(model)
    assert origin(checkpoint).base_model == "Tiny"
    assert origin(checkpoint).license == {}
    (model / "README.md").write_text(README)
    assert origin(checkpoint).base_model == "some-org/Original"
    assert origin(checkpoint).license == {"license": "other", "license_name": "homemade"}
    told = origin(checkpoint, "a/b", "mit")
    assert (told.base_model, told.license) == ("a/b", {"license": "mit"})
    checkpoint.source = "some-org/Tiny@main"
    assert origin(checkpoint).base_model == "some-org/Tiny"


NESTED = f"---\nlicense: {'[' * 5000}\n---\n"
NO_DATE = "---\nlicense: mit\ndate: 2020-13-45\n---\n"


@pytest.mark.parametrize(
    "text",
    ["# none", "---\n- a\n---\n", "---\n[\n---\n", "---\nlicense: 3\n", b"\xff\xfe", NESTED, NO_DATE],
    ids=["none", "list", "broken", "number", "bytes", "nested", "no date"],
)
def test_a_source_s_card_that_says_nothing(model, text):
    (model / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert origin(HFCheckpoint(model)).license == {}


def test_a_source_s_card_that_is_no_file(model):
    os.mkfifo(model / "README.md")
    assert origin(HFCheckpoint(model)).license == {}


def test_files_are_called_by_their_names():
    recipe = {
        "calibration": {"data": [{"data": "/home/me/a.jsonl", "share": 1}, "hf:some/repo"]},
        "eval": {"text": "/x/p.txt"},
    }
    assert without_paths(recipe) == {
        "calibration": {"data": [{"data": "a.jsonl", "share": 1}, "hf:some/repo"]},
        "eval": {"text": "p.txt"},
    }


def test_nothing_of_a_run_names_the_machine(model, tmp_path):
    (model / "README.md").write_text(README)
    for name in ("calibration.txt", "prose.txt"):
        (tmp_path / name).write_text("Nothing that is published says where it lay on the machine that made it. " * 60)
    recipe = {
        "recipe": 1,
        "name": "w4",
        "calibration": {"data": str(tmp_path / "calibration.txt"), "samples": 2, "length": 32},
        "layers": [
            {"match": "*_proj", "weights": "q4_0", "method": {"rtn": {"importance": True}}},
            {"match": "*", "keep": True},
        ],
        "export": [{"to": "gguf"}, {"to": "qtool"}],
        "eval": {"text": str(tmp_path / "prose.txt"), "context": 64, "chunks": 2, "gates": {"kld": 5}},
    }
    (tmp_path / "w4.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    report = run(QuantizeOptions(str(model), str(tmp_path / "w4.yaml"), out, push_to="me/Tiny-w4"))
    assert (report.base_model, report.repository) == ("some-org/Original", "me/Tiny-w4")
    for kind in ("gguf", "qtool"):
        text = (out / kind / "README.md").read_text()
        assert str(tmp_path) not in text
        card = ModelCard(text)
        assert (card.data.license, card.data.license_name, card.data.base_model) == (
            "other",
            "homemade",
            "some-org/Original",
        )
        assert "| q4_0 | as they are | rtn | 14 |" in text
        assert "**PASS**: kld " in text
    assert "`qtool export me/Tiny-w4 --to NAME" in text
    (file,) = (out / "gguf").glob("*.gguf")
    assert str(tmp_path).encode() not in file.read_bytes()
    assert GGUFReader(file).fields["general.name"].contents() == "Original"
