"""Several recipes for one model: results as each recipe alone would give, a page, going on, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from qtool.errors import GateError, HubError, StorageError, UsageError
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
    with pytest.raises(UsageError, match="wanted one recipe, or several that export GGUF alone, found compressed-tens"):
        family.run(replace(options, push_to="me/model"), both)
    assert not options.out.exists()
    options.out.mkdir()
    (options.out / "letter.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"holds something else: found .*letter\.txt"):
        family.run(options, both)


def test_gguf_files_become_one_repository(options, recipes, tmp_path, monkeypatch):
    """Under their usual names, with one card that says what the reports do."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    for name, kind in (("gguf-q4_k_m", "q4_0"), ("gguf-q8_0-fit", "q8_0")):
        rules = f"layers: [{{match: '*', weights: {kind}}}]\nmethod: rtn\nexport: [{{to: gguf}}]\n"
        judge = f"eval: {{text: {text}, context: 64, chunks: 2, gates: {{kld: 9}}}}\n"
        (tmp_path / f"{name}.yaml").write_text(f"recipe: 1\nname: {name}\n{rules}{judge}")
    asked = replace(options, push_to="me/tiny", license="mit", base_model="someone/Tiny-1B", private=True)
    reports = family.run(asked, [str(tmp_path / f"{name}.yaml") for name in ("gguf-q4_k_m", "gguf-q8_0-fit")])
    seen = {}

    def upload(folder, repo, listener, **how):
        seen.update({p.name: p.read_bytes() for p in folder.iterdir()}, repo=repo, **how)

    monkeypatch.setattr(family, "upload", upload)
    family.conclude(reports, asked)
    assert (seen.pop("repo"), seen.pop("private"), seen.pop("revision")) == ("me/tiny", True, None)
    names = ["README.md", "Tiny-1B-Q4_K_M.gguf", "Tiny-1B-Q8_0-fit.gguf", "index.html", "index.json"]
    assert sorted(seen) == names
    assert seen[names[1]] == next((options.out / "gguf-q4_k_m").glob("*.gguf")).read_bytes()
    card = ModelCard(seen["README.md"].decode())
    assert (card.data.base_model, card.data.license, card.data.library_name) == ("someone/Tiny-1B", "mit", "gguf")
    lines = [line for line in card.text.splitlines() if line.startswith("| [")]
    assert [name in line for name, line in zip(names[1:3], lines, strict=True)] == [True, True]  # smallest first
    assert f"{reports[0].evaluations[0].kld_mean:.2g}"[:5] in lines[0]
    assert "llama-cli -hf me/tiny:" in card.text
    assert str(tmp_path) not in card.text
    assert sorted(p.name for p in tmp_path.iterdir() if "upload" in p.name) == []
    monkeypatch.setattr(family, "refuse_missed", lambda gates: (_ for _ in ()).throw(GateError("missed")))
    monkeypatch.setattr(family, "upload", None)
    with pytest.raises(GateError):
        family.conclude(reports, asked)


@pytest.mark.parametrize("count", [1, 2])
def test_nothing_is_begun_where_the_hub_refuses(count, tiny_checkpoint, recipes, tmp_path, monkeypatch):
    def refuse(*_):
        raise HubError("cannot upload to me/tiny")

    monkeypatch.setattr("qtool.pipeline.upload.refuse_stranger", refuse)
    named = ["-r", recipes["gguf"]] if count == 1 else ["--family", "gguf"]
    done = qtool("quantize", tiny_checkpoint("qwen3"), *named, "-o", tmp_path / "out", "--push-to-hub", "me/tiny")
    assert done.exit_code == 11
    assert not list(tmp_path.glob("out*"))


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
