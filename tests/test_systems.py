"""docs/bench.md: what its files say, how a system is measured and written, and what the table makes of it."""

from __future__ import annotations

import json

import pytest
import yaml

from benchmarks import system as bench
from benchmarks.system import Measured, System, Way
from qtool.models import open_artifact
from qtool.recipe.load import find_recipe
from scripts.prose import prose

NAMES = sorted(path.stem for path in bench.FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_recipes_of_a_system_and_of_its_rival_load_and_differ(name):
    system = bench.read(bench.FOLDER / f"{name}.yaml")
    assert find_recipe(system.recipe).name == f"{system.recipe}.yaml"
    assert system.loaded() != system.against.loaded()
    assert system.loaded().calibration.samples == bench.SAMPLES
    assert 0 < system.ratio <= 1.5
    if system.measured:
        assert 0 <= system.measured.kld < 30
        assert system.measured.against.kld > 0


def made(text=""):
    """A system's file."""
    head = "title: Some\npaper: https://some\nwhat: That.\nclaim: So.\n"
    return f"{head}recipe: w4a16-awq\nagainst: {{recipe: w4a16-rtn}}\n{text}"


def test_measuring_writes_the_last_key_and_measures_a_rival_once(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text(made("# said by hand\n"))
    asked = []

    def run(way: Way, variant: str) -> Measured:
        asked.append((way.recipe, variant))
        kld = 0.123456 if way.recipe == "w4a16-awq" else 0.5
        return Measured(kld=kld, megabytes=113.12345, carrier="gguf")

    for _ in range(2):
        (found,) = bench.measure_all(run, tmp_path / "kept.json", ["a"])
    (other,) = bench.measure_all(run, tmp_path / "kept.json", ["b"])
    assert asked == [("w4a16-rtn", "off-grid"), *[("w4a16-awq", "off-grid")] * 3]
    text = (tmp_path / "a.yaml").read_text()
    assert text.count("measured:") == 1 and "# said by hand" in text
    assert yaml.safe_load(text)["measured"]["kld"] == 0.1235
    assert found[1] == other[1] == bench.read(tmp_path / "a.yaml")
    assert found[1].seen == "yes (0.25)"
    assert json.loads((tmp_path / "kept.json").read_text())["off-grid w4a16-rtn"]["kld"] == 0.5


@pytest.mark.parametrize(("ratio", "seen"), [(1.0, "yes (0.80)"), (0.8, "no (0.80)"), (0.9, "yes (0.80)")])
def test_seen_means_below_the_share_that_the_claim_stands_for(ratio, seen):
    system = System.model_validate(yaml.safe_load(made()) | {"ratio": ratio})
    assert system.seen == "not measured"
    against = Measured(kld=0.5, megabytes=2, carrier="gguf")
    result = bench.Result(kld=0.4, megabytes=1, carrier="gguf", against=against)
    assert system.model_copy(update={"measured": result}).seen == seen


def test_a_file_with_an_unknown_key_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text(made("quality: 1\n"))
    with pytest.raises(ValueError, match="quality"):
        bench.read(tmp_path / "a.yaml")


def test_a_system_is_run_evaluated_and_read_back(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SAMPLES", 2)
    monkeypatch.setattr(bench, "LENGTH", 32)
    monkeypatch.setattr(bench, "CHUNKS", 2)
    monkeypatch.setattr(bench, "CONTEXT", 32)
    (text := tmp_path / "prose.txt").write_text(prose()[:3000], encoding="utf-8")
    demo = bench.Demo(lambda _: tiny_checkpoint("llama"), text, tmp_path)
    coarse, fine = (demo(Way(recipe=recipe), "off-grid") for recipe in ("w4a16-awq", "w8a16"))
    assert 0 < fine.kld < 0.1 * coarse.kld
    assert coarse.carrier == "compressed-tensors"
    assert coarse.megabytes < fine.megabytes
    stored = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert fine.megabytes == stored / 1e6
    assert open_artifact(str(tmp_path / "out")).layers
