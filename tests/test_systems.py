"""docs/systems.md: what its files say, how a cell is measured and kept, and what the table makes of it."""

from __future__ import annotations

import json
import platform
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from benchmarks import cells, system
from benchmarks.__main__ import measured
from benchmarks.cells import Cell, Measured, Way
from benchmarks.system import System
from qtool.models import open_artifact
from qtool.recipe.load import find_recipe
from scripts import prose

KLD = {"kld": 0.5, "megabytes": 1, "carrier": "gguf"}
NAMES = sorted(path.stem for path in system.FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_recipes_of_a_system_and_of_its_rival_load_and_differ(name):
    found = system.read(system.FOLDER / f"{name}.yaml")
    assert find_recipe(found.recipe).name == f"{found.recipe}.yaml"
    own, rival = (one.way.loaded() for one in found.cells)
    assert own != rival
    assert own.calibration.samples == cells.SAMPLES
    assert 0 < found.ratio <= 1.5


def made(text=""):
    """A system's file."""
    head = "title: Some\npaper: https://some\nwhat: That.\nclaim: So.\n"
    return f"{head}recipe: w4a16-awq\nagainst: {{recipe: w4a16-rtn}}\n{text}"


def one(recipe: str, *settings: str) -> Cell:
    """A cell off any grid."""
    return Cell(Way(recipe=recipe, set=settings))


def test_cells_are_measured_once_kept_and_go_on_behind_one_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "KEPT", tmp_path / "kept.json")
    asked = []

    def run(cell: Cell) -> Measured:
        asked.append(cell.way.recipe)
        if cell.way.recipe == "w8a16" and asked.count("w8a16") < 2:
            raise ValueError("too wide")
        code = 0.2 if cell.code or cell.way.recipe == "w4a16-awq" else None
        return Measured(kld=0.123456, code=code, megabytes=113.12345, carrier="gguf")

    wanted = [one("w4a16-rtn"), one("w8a16"), one("w4a16-awq"), one("w4a16-best"), one("w4a16-rtn")]
    with ThreadPoolExecutor(1) as pool:
        first = dict(cells.measure(wanted, run, pool))
        second = dict(cells.measure(wanted, run, pool))
    assert asked == ["w4a16-rtn", "w8a16", "w4a16-awq", "w4a16-best", "w8a16"]
    assert first[one("w8a16")] == "ValueError: too wide"
    assert list(second) == [one("w8a16")]
    stored = json.loads((tmp_path / "kept.json").read_text())
    assert stored["cells"]["off-grid w4a16-awq"] == {"kld": 0.1235, "code": 0.2, "megabytes": 113.1, "carrier": "gguf"}
    with ThreadPoolExecutor(1) as pool:
        (again,) = cells.measure([one("w4a16-awq")._replace(code=True), wanted[1]._replace(code=True)], run, pool)
    assert again[1].code == 0.2
    monkeypatch.setattr(cells, "CONDITIONS", cells.CONDITIONS | {"samples": 1})
    assert cells.known() == {}


def test_a_cell_that_another_program_measured_meanwhile_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "KEPT", tmp_path / "kept.json")
    found = Measured(**KLD)
    cells.keep(one("w8a16").key, found)
    assert cells.outcome(one("w8a16"), tmp_path, "cpu") == found
    monkeypatch.setattr(cells, "demo", lambda *_: str)
    assert cells.outcome(one("w4a16-rtn"), tmp_path, "cpu") == str(one("w4a16-rtn"))


def test_texts_of_another_python_are_refused_beside_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "KEPT", tmp_path / "kept.json")
    cells.keep(one("w8a16").key, Measured(**KLD))
    cells.prepare(tmp_path, [])
    ((version, texts),) = cells.kept()["texts"].items()
    assert version == platform.python_version()
    assert set(texts) == {"prose.txt", "code.txt", "builtin"}
    cells.keep(one("w4a16-rtn").key, Measured(**KLD))
    cells.prepare(tmp_path, [])
    assert len(cells.known()) == 2
    (tmp_path / "prose.txt").write_text("Other docstrings.", encoding="utf-8")
    with pytest.raises(SystemExit, match=f"texts of Python {version}, and these are others"):
        cells.prepare(tmp_path, [])


def test_programs_that_keep_at_the_same_time_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "KEPT", tmp_path / "kept.json")
    found = Measured(**KLD)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: cells.keep(f"cell {i}", found), range(64)))
    assert len(cells.known()) == 64


@pytest.mark.parametrize("last_first", [False, True])
def test_what_trains_is_run_last_or_begun_with(tmp_path, monkeypatch, last_first):
    asked = []
    monkeypatch.setattr(cells, "KEPT", tmp_path / "kept.json")
    monkeypatch.setattr(cells, "prepare", lambda *_: None)
    monkeypatch.setattr(cells, "outcome", lambda cell, **_: asked.append(cell.way.recipe) or Measured(**KLD))
    monkeypatch.setattr(cells, "processes", ThreadPoolExecutor)
    options = Namespace(work=tmp_path, device="cpu", processes=1, last_first=last_first)
    assert len(measured([one("w4a16-best"), one("w8a16"), one("w4a16-rtn"), one("w8a16")], options)) == 3
    order = ["w8a16", "w4a16-rtn", "w4a16-best"]
    assert asked == (order[::-1] if last_first else order)


@pytest.mark.parametrize(("ratio", "seen"), [(1.0, "yes (0.80)"), (0.8, "no (0.80)"), (0.9, "yes (0.80)")])
def test_seen_means_below_the_share_that_the_claim_stands_for(ratio, seen):
    found = System.model_validate(yaml.safe_load(made()) | {"ratio": ratio})
    assert system.row(found, {})[-1] == "not measured"
    alone = system.row(found, {found.cells[0].key: Measured(**KLD)})
    assert alone[2:5] == ("gguf", "1.0", "0.5")
    assert alone[-1] == "not compared"
    values = [Measured(kld=kld, code=1, megabytes=2, carrier="gguf") for kld in (0.4, 0.5)]
    row = system.row(found, {cell.key: value for cell, value in zip(found.cells, values, strict=True)})
    assert row[2:5] == ("gguf", "2.0", "0.4")
    assert row[-1] == seen


@pytest.mark.parametrize(
    ("recipe", "plain", "share"),
    [
        ("off-grid mxfp4-hadamard", "off-grid mxfp4-hadamard transforms=[]", 0.7),
        ("off-grid w2a16-decoupleq", "off-grid w2a16-decoupleq method.gptq.rounds=0", 1),
        ("off-grid spqr", "off-grid w3a16-gptq", 1),
        ("outliers w8a8-int8-smooth", "outliers w8a16", 1.2),
        ("off-grid w4a16-awq", "off-grid w4a16-rtn-g64", 0.6),
        ("off-grid w4a16-awq transforms=[{smooth: {alpha: 0.5}}]", "off-grid w4a16-awq transforms=[]", 0.6),
    ],
    ids=["Hadamard matrices before MXFP4", "decoupleQ", "SpQR", "8-bit inputs that are smoothed", "AWQ", "smoothing"],
)
def test_what_is_kept_of_the_demo_model_is_as_good_as_it_has_to_be(recipe, plain, share):
    found = cells.known()
    assert 0 < found[recipe].kld < share * found[plain].kld


def test_a_file_with_an_unknown_key_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text(made("quality: 1\n"))
    with pytest.raises(ValueError, match="quality"):
        system.read(tmp_path / "a.yaml")


def test_a_cell_is_run_evaluated_on_both_texts_and_read_back(tiny_checkpoint, tmp_path, monkeypatch):
    for name, value in {"SAMPLES": 2, "LENGTH": 32, "CHUNKS": 2, "CONTEXT": 32}.items():
        monkeypatch.setattr(cells, name, value)
    (tmp_path / "prose.txt").write_text(prose.prose()[:3000], encoding="utf-8")
    (tmp_path / "code.txt").write_text(prose.code()[:3000], encoding="utf-8")
    (tmp_path / "words.txt").write_text(prose.words()[:3000], encoding="utf-8")
    monkeypatch.setattr(cells.models, "variant", lambda *_: tiny_checkpoint("llama"))
    demo = cells.Demo(tmp_path)
    coarse = demo(one("w4a16-awq", "calibration.data=TEXTS/words.txt"))
    fine, both = demo(one("w8a16")), demo(one("w8a16")._replace(code=True))
    assert 0 < fine.kld < 0.1 * coarse.kld
    assert fine.code is None
    assert 0 < both.code < 0.2 * coarse.kld
    assert both.code != both.kld == fine.kld
    assert coarse.carrier == "compressed-tensors"
    assert coarse.megabytes < fine.megabytes
    stored = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert fine.megabytes == stored / 1e6
    assert open_artifact(str(tmp_path / "out")).layers


def test_calibration_text_is_not_what_is_evaluated():
    assert not set(prose.MODULES) & set(prose.OTHERS)
