"""Names that nothing can be called, signals, a stderr that nobody reads: a sentence, a code, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from qtool.cli.app import app
from qtool.errors import RecipeError
from qtool.recipe.load import load_recipe

RECIPE = """\
recipe: 1
name: tiny
calibration: {samples: 8, length: 64}
layers:
  - {match: "*", weights: int4-g32, method: gptq}
export: [{to: qtool}]
"""
LONG = "x" * 300
LATIN = os.fsdecode(b"caf\xe9")


@pytest.fixture
def place(tiny_checkpoint, tmp_path, monkeypatch):
    """The working folder, with a model, a recipe and a text."""
    shutil.copytree(tiny_checkpoint("llama"), tmp_path / "m")
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "t.txt").write_text("Nothing to see here. " * 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("quantize m -r r.yaml -o /", 2, "the output: wanted a folder or file with a name, found /"),
        ("quantize m -r r.yaml -o ..", 7, "holds what the result is made from"),
        ("quantize m -r r.yaml -o m --overwrite", 7, "holds what the result is made from"),
        ("quantize m -r r.yaml -o LONG", 7, "the output's name is too long: wanted at most 235 bytes, found 300"),
        ("quantize m -r r.yaml -o LONG/x", 7, "File name too long; choose another output"),
        ("quantize m -r r.yaml -o LATIN", 2, r"out: wanted UTF-8, found 'caf\udce9'"),
        ("quantize LATIN -r r.yaml -o o", 2, r"model: wanted UTF-8, found 'caf\udce9'"),
        ("quantize m -r r.yaml -o ~nosuchuser/x", 7, "cannot write ~nosuchuser/x: Could not determine home"),
        ("quantize LONG -r r.yaml -o o", 5, "is neither a file or folder nor a valid hub id"),
        ("quantize ~nosuchuser/x -r r.yaml -o o", 5, "~nosuchuser/x is no checkpoint"),
        ("quantize m -r r.yaml -o o --stats LONG", 2, "--stats: wanted a file"),
        ("quantize m -r r.yaml -o o --imatrix LONG", 2, "--imatrix: wanted a file"),
        ("quantize m -r r.yaml -o o --scores LONG", 7, "the output's name is too long"),
        ("compare LONG m -o page.html --text t.txt --baseline m", 5, "is neither a file or folder nor a valid hub id"),
        ("quantize m -r r.yaml -o o -q --set calibration.data=LONG.txt", 5, "there is no calibration file x"),
        ("export m --to qtool -o m --overwrite", 7, "holds what the result is made from"),
        ("export m --to qtool -o LONG", 7, "the output's name is too long"),
        ("export ~nosuchuser/x --to qtool -o o", 5, "~nosuchuser/x is no checkpoint"),
        ("calibrate m -r r.yaml -o /", 2, "the output: wanted a folder or file with a name"),
        ("calibrate m -r r.yaml -o LONG/x", 7, "File name too long"),
        ("eval m --text LONG", 2, "the evaluation text: wanted a UTF-8 file"),
        ("eval m --text t.txt -o t.txt", 7, "holds what the result is made from"),
        ("eval m --text t.txt -o m/config.json", 7, "holds what the result is made from"),
        ("inspect ~nosuchuser/x", 5, "~nosuchuser/x is no checkpoint"),
    ],
)
def test_impossible_names_are_told_before_any_work(command, code, message, place, tree):
    before = tree(place)
    words = [word.replace("LONG", LONG).replace("LATIN", LATIN) for word in command.split()]
    result = CliRunner().invoke(app, words, prog_name="qtool")
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert tree(place) == before


def test_a_long_chain_of_recipes(tmp_path):
    for i in range(1200):
        (tmp_path / f"{i}.yaml").write_text(f"recipe: 1\nname: r\nextends: ./{i + 1}.yaml\n")
    with pytest.raises(RecipeError, match=r"31\.yaml:3: extends: wanted at most 32 recipes"):
        load_recipe(str(tmp_path / "0.yaml"))


def started(place, wrap="", **more):
    """A run in a process of its own, at the moment when its first block is finished."""
    command = [sys.executable, "-m", "qtool", "quantize", "m", "-r", "r.yaml", "-o", "o", "-v"]
    shell = ["sh", "-c", f'{wrap}exec "$@"', "sh", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(shell, cwd=place, stderr=subprocess.PIPE, text=True, env=environment, **more)
    while "quantize 1/" not in (line := process.stderr.readline()):
        assert line, "the run ended before its first block"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_in_order(number, code, place):
    process = started(place)
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == code, told
    assert "run the same command again to continue" in told.splitlines()[-1]
    assert "Traceback" not in told
    assert (place / "o.work" / "manifest.json").exists()
    assert not list(place.glob(".*partial"))


def test_what_ignores_hangups_goes_on_ignoring_them(place):
    process = started(place, "trap '' HUP; ")
    process.send_signal(signal.SIGHUP)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told


def test_a_run_needs_no_reader_of_what_it_says(place):
    process = started(place, stdout=subprocess.DEVNULL)
    process.stderr.close()
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.returncode == 0
    assert (place / "o" / "report.json").exists()
