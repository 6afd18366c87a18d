"""What a run that continues believes: its own results, its own blocks, the same source. It says so."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from qtool.errors import StorageError
from qtool.pipeline import work
from qtool.pipeline.quantize import QuantizeOptions, run

DATA_FREE = """
recipe: 1
name: data-free
layers:
  - {match: "*.mlp.*", weights: q4_0}
  - {match: "*", weights: q8_0}
export: [{to: qtool}]
"""
FAR = """
recipe: 1
name: far
calibration: {data: DATA, samples: 4, length: 32}
layers:
  - {match: "re:model.layers.[12].*", weights: int4-g32, method: rtn}
  - {match: "*.down_proj", weights: int4-g32, method: gptq, activations: {type: int, bits: 8, group: tensor}}
  - {match: "*", weights: int4-g32, method: gptq}
export: [{to: qtool}]
"""


class Killed(BaseException):
    """What no handler of the program takes for an error."""


def kill_after(units):
    """A listener that ends the run when so many units are finished."""

    def listener(event):
        if event.stage == "quantize" and event.done == units and not event.warning:
            raise Killed

    return listener


def killed(options, units):
    with pytest.raises(Killed):
        run(options, kill_after(units))


@pytest.fixture
def make(tiny_checkpoint, tmp_path):
    """Options of a run: `make(recipe's text, **options)`."""

    def options(text=DATA_FREE, out="out", model="qwen3", **more):
        path = tmp_path / f"{text.split('name: ')[1].split()[0]}.yaml"
        path.write_text(text)
        return QuantizeOptions(str(tiny_checkpoint(model)), str(path), tmp_path / out, device="cpu", **more)

    return options


@pytest.fixture
def weights(tree):
    """Every file of a result but those that hold times."""
    timed = {"report.json", "report.html", "report.md", "SHA256SUMS"}
    return lambda folder: {name: data for name, data in tree(folder).items() if name not in timed}


def test_another_runs_result_is_not_taken_for_its_own(make):
    first = run(make())
    other = DATA_FREE.replace("q4_0", "q5_0")
    killed(make(other, overwrite=True), 1)
    work = make().out.with_name("out.work")
    left = sorted(p.name for p in work.iterdir())
    with pytest.raises(StorageError, match=r"holds an earlier output.*--overwrite"):
        run(make(other))
    assert sorted(p.name for p in work.iterdir()) == left == ["block-0.safetensors", "manifest.json"]
    second = run(make(other, overwrite=True))
    assert {e.format for e in second.layers if e.role == "up"} == {"q5_0"}
    assert (first.run == second.run, len(first.run), len(second.run)) == (False, 64, 64)


@pytest.mark.parametrize("change", ["export: [{to: gguf}]", "export: [{to: qtool}]\neval: {text: TEXT, chunks: 1}"])
def test_a_result_with_other_artifacts_or_evaluation_is_another(change, make, tmp_path):
    (tmp_path / "text.txt").write_text("Nothing is so firmly believed as what is least known. " * 400)
    run(make(keep=True))
    other = DATA_FREE.replace("export: [{to: qtool}]", change.replace("TEXT", str(tmp_path / "text.txt")))
    with pytest.raises(StorageError, match="holds an earlier output"):
        run(make(other))
    report = run(make(other, overwrite=True))
    assert ([a.kind for a in report.artifacts], len(report.evaluations)) in [(["gguf"], 0), (["qtool"], 1)]


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_damaged_result_is_not_called_verified(damage, make):
    run(make(keep=True))
    path = make().out / "block-1.safetensors"
    content = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StorageError, match=r"block-1\.safetensors is missing or was changed; pass --overwrite"):
        run(make())
    run(make(overwrite=True))
    assert path.read_bytes() == content


def edit(options, change):
    path = options.out.with_name("out.work") / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def first_static(manifest):
    layers = manifest["blocks"]["block-0"]["layers"]
    return next(layer for layer in layers.values() if layer["static"])


DAMAGES = {
    "static scale": lambda m: first_static(m)["static"].__setitem__(0, first_static(m)["static"][0] * 1.01),
    "record": lambda m: m["blocks"]["block-0"]["record"]["layers"][0].pop("name"),
    "error": lambda m: m["blocks"]["block-0"]["record"]["layers"][0].update(weight_error_db=99.0),
    "missing module": lambda m: m["blocks"]["block-0"]["record"]["layers"].pop(),
    "no record": lambda m: m["blocks"]["block-0"].update(record=None),
    "unknown key": lambda m: m["blocks"]["block-0"].update(more=1),
    "format": lambda m: next(iter(m["blocks"]["block-0"]["layers"].values())).update(format="int4-g64"),
    "no seal": lambda m: m["blocks"]["block-0"].pop("seal"),
    "another block's": lambda m: m["blocks"].update({"block-0": m["blocks"]["block-1"]}),
    "no object": lambda m: m["blocks"].update({"block-0": []}),
}


@pytest.mark.parametrize("change", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_done_again(change, make, weights):
    text = FAR.replace("DATA", "builtin")
    run(make(text, out="whole"))
    killed(make(text), 2)
    edit(make(text), change)
    events = []
    run(make(text), events.append)
    work = make().out.with_name("out.work")
    said = [e.message for e in events if e.warning and "done again" in e.message]
    assert said == [f"block-0 in {work} is done again: its entry in manifest.json is damaged"]
    assert weights(make().out) == weights(make(out="whole").out)


def test_a_damaged_file_is_done_again(make, weights):
    run(make(out="whole"))
    killed(make(), 2)
    work = make().out.with_name("out.work")
    (work / "block-1.safetensors").unlink()
    events = []
    run(make(), events.append)
    said = f"block-1 in {work} is done again: block-1.safetensors is missing or damaged"
    assert said in [e.message for e in events if e.warning]
    assert weights(make().out) == weights(make(out="whole").out)


@pytest.mark.parametrize("units", range(1, 5))
def test_a_run_that_continues_measures_what_it_would_have(units, make, weights):
    """The last layer is measured behind blocks that need no measuring themselves."""
    text = FAR.replace("DATA", "builtin")
    run(make(text, out="whole"))
    killed(make(text), units)
    run(make(text))
    assert weights(make().out) == weights(make(out="whole").out)


def test_a_source_that_changed_where_nobody_samples_is_noticed(make, tmp_path):
    options = make()
    source = tmp_path / "model"
    shutil.copytree(options.model, source)
    options = QuantizeOptions(str(source), options.recipe, options.out, device="cpu")
    killed(options, 1)
    (path,) = (p for p in source.glob("*.safetensors") if "model.layers.2.mlp.up_proj.weight" in load_file(p))
    tensors = load_file(path)
    changed = tensors["model.layers.2.mlp.up_proj.weight"]
    assert changed.nbytes > 3 * 4096
    changed.view(-1)[2600] += 1  # between the samples of 4,096 bytes
    save_file(tensors, path, {"format": "pt"})
    events = []
    run(options, events.append)
    said = [e.message for e in events if e.warning and "begun" in e.message]
    assert said == [f"{options.out}.work was begun with another content: starting anew"]


def test_another_calibration_text_is_another_run(make, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("Whoever is careless with the truth in small matters. " * 200)
    options = make(FAR.replace("DATA", str(data)))
    killed(options, 1)
    data.write_text("Cannot be trusted with important matters. " * 200)
    events = []
    run(options, events.append)
    said = [e.message for e in events if e.warning and "begun" in e.message]
    assert said == [f"{options.out}.work was begun with another calibration: starting anew"]


@pytest.mark.parametrize("what", ["processor", "threads"])
def test_another_processor_or_number_of_threads_is_another_run(what, make, tmp_path, monkeypatch, use_threads):
    data = tmp_path / "data.txt"
    data.write_text("Whoever is careless with the truth in small matters. " * 200)
    options = make(FAR.replace("DATA", str(data)))
    use_threads(1)
    killed(options, 1)
    if what == "threads":
        use_threads(2)
        wanted = "threads (1, now 2)"
    else:
        here = work.processor()
        monkeypatch.setattr(work, "processor", lambda: "znver3, torch AVX2, 1f0c27a9")
        wanted = f"processor ({here}, now znver3, torch AVX2, 1f0c27a9)"
    events = []
    run(options, events.append)
    said = [e.message for e in events if e.warning and "begun" in e.message]
    assert said == [f"{options.out}.work was begun with another {wanted}: starting anew"]


def test_without_data_any_number_of_threads_goes_on(make, use_threads):
    options = make()
    use_threads(1)
    killed(options, 1)
    use_threads(2)
    events = []
    run(options, events.append)
    assert not [e.message for e in events if e.warning and "begun" in e.message]
