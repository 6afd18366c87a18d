"""Several recipes for one model: results as each recipe alone would give, a page, going on, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qtool.errors import StorageError, UsageError
from qtool.pipeline import family, quantize
from qtool.pipeline.quantize import QuantizeOptions
from tests.cli.test_commands import qtool


def weights_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.suffix in (".gguf", ".safetensors")}


@pytest.fixture
def options(tiny_checkpoint, tmp_path):
    return QuantizeOptions(str(tiny_checkpoint("qwen3")), "", tmp_path / "out", device="cpu")


def test_each_result_is_that_of_its_recipe_alone(options, recipes, tmp_path):
    reports = family.run(options, [recipes["gguf"], recipes["compressed"]])
    assert [report.recipe_name for report in reports] == ["tiny-gguf", "tiny-ct"]
    assert sorted(p.name for p in options.out.iterdir()) == ["index.html", "index.json", "tiny-ct", "tiny-gguf"]
    for name, recipe in (("tiny-gguf", recipes["gguf"]), ("tiny-ct", recipes["compressed"])):
        quantize.run(replace(options, recipe=recipe, out=tmp_path / name))
        assert weights_of(options.out / name) == weights_of(tmp_path / name) != {}
    found = json.loads((options.out / "index.json").read_text())
    assert {entry["kind"] for entry in found["entries"]} == {"tiny-gguf", "tiny-ct"}
    assert "tiny-ct" in (options.out / "index.html").read_text()


def test_what_is_there_is_not_made_again(options, recipes, monkeypatch):
    both, real, made = [recipes["gguf"], recipes["compressed"]], quantize.produce, []

    def produce(job, *rest):
        made.append(job.plan.recipe.name)
        if made == ["tiny-gguf", "tiny-ct"]:
            raise KeyboardInterrupt
        return real(job, *rest)

    monkeypatch.setattr(quantize, "produce", produce)
    with pytest.raises(KeyboardInterrupt):
        family.run(options, both)
    family.run(options, both)
    assert made == ["tiny-gguf", "tiny-ct", "tiny-ct"]
    family.run(options, both)
    assert len(made) == 3
    family.run(replace(options, overwrite=True), both)
    assert made[3:] == ["tiny-gguf", "tiny-ct"]
    with pytest.raises(StorageError, match="holds an earlier output"):
        family.run(replace(options, overrides=("calibration.seed=5",)), both)


def test_what_is_refused(options, recipes, tmp_path):
    both = [recipes["gguf"], recipes["compressed"]]
    with pytest.raises(UsageError, match="wanted recipes with different names, found tiny-gguf twice"):
        family.run(options, [recipes["gguf"], recipes["gguf"]])
    with pytest.raises(UsageError, match="wanted a folder for several recipes, found one file"):
        family.run(replace(options, out=tmp_path / "m.gguf"), both)
    with pytest.raises(UsageError, match="wanted one recipe, found 2"):
        family.run(replace(options, push_to="me/model"), both)
    assert not options.out.exists()
    options.out.mkdir()
    (options.out / "letter.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"holds something else: found .*letter\.txt"):
        family.run(options, both)


def test_on_the_command_line(tiny_checkpoint, recipes, tmp_path):
    model, out = tiny_checkpoint("qwen3"), tmp_path / "out"
    done = qtool("quantize", model, "-r", recipes["gguf"], "-r", recipes["compressed"], "-o", out, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("matrices quantized") == 2
    assert done.stdout.rstrip().endswith(f"compared: {out / 'index.html'}")
    again = qtool("quantize", model, "-r", recipes["gguf"], "-r", recipes["compressed"], "-o", out, "--json")
    assert [report["recipe_name"] for report in json.loads(again.stdout)] == ["tiny-gguf", "tiny-ct"]
    for given in ([], ["-r", "gguf-q8_0", "--family", "gguf"]):
        refused = qtool("quantize", model, *given, "-o", tmp_path / "other")
        assert refused.stderr == "error: wanted --recipe, once or several times, or --family\n"
    refused = qtool("quantize", model, "--family", "ggul", "-o", tmp_path / "other")
    assert refused.stderr == "error: --family: wanted gguf or gguf-fit, found ggul\n"


def test_families_are_recipes_that_ship():
    from qtool.recipe.load import list_recipes

    shipped = {entry.name for entry in list_recipes()}
    assert all(set(members) <= shipped and len(members) > 1 for members in family.FAMILIES.values())
