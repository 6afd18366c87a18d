"""What the user types and sees: exact output, exit codes, streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import typer.main
from typer.testing import CliRunner

from qtool import errors, registry
from qtool.cli.app import app

RECIPE = """\
recipe: 1
name: tiny
layers:
  - {match: lm_head, keep: true}
  - {match: "*", weights: q8_0}
export: [{to: gguf}]
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def qtool(*arguments):
    """Runs a command in this process."""
    return CliRunner().invoke(app, list(map(str, arguments)), prog_name="qtool")


def process(*arguments, **options):
    """Runs a command in a fresh process."""
    command = [sys.executable, "-m", "qtool", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


# Every kind of failure, and its code


def every_error():
    """One instance of each class of the tree."""
    problems = ["a.yaml:3: first", "a.yaml:7: second"]
    return [
        (errors.QtoolError("it broke"), 1, "error: it broke\n"),
        (errors.UsageError("--x", wanted=1, found=2), 2, "error: --x: wanted 1, found 2\n"),
        (
            errors.RecipeError(problems, "recipe a"),
            3,
            "error: recipe a: 2 problems\n  a.yaml:3: first\n  a.yaml:7: second\n",
        ),
        (errors.PlanError(["x"], "plan"), 4, "error: plan: x\n"),
        (errors.CheckpointError("bad [file]"), 5, "error: bad [file]\n"),
        (errors.NumericsError("NaN in w"), 6, "error: NaN in w\n"),
        (errors.StorageError("full", hint="make room"), 7, "error: full; make room\n"),
        (errors.VerifyError("differs"), 8, "error: differs\n"),
        (errors.GateError("missed"), 9, "error: missed\n"),
        (
            errors.MissingExtra("pyarrow", "data", "reading x.parquet"),
            10,
            "error: reading x.parquet needs the package pyarrow; "
            "install it with: pip install 'datasets>=3.0' 'pyarrow>=15.0'\n",
        ),
        (errors.HubError("refused"), 11, "error: refused\n"),
        (errors.StrictError("a warning"), 12, "error: a warning\n"),
        (errors.ProcessError("process 0 of 2"), 13, "error: process 0 of 2\n"),
        (
            KeyboardInterrupt(),
            130,
            "error: interrupted; run the same command again to continue\n",
        ),
        (
            MemoryError(),
            1,
            "error: out of memory; lower calibration.samples or calibration.length, or use --device cpu\n",
        ),
        (
            OSError(28, "No space left on device", "/out/x"),
            7,
            "error: cannot write /out/x: No space left on device; free some space and run the same command again\n",
        ),
        (
            ZeroDivisionError("division by zero\nmore"),
            1,
            "error: unexpected ZeroDivisionError: division by zero; run again with --debug for the traceback\n",
        ),
    ]


@pytest.mark.parametrize(("error", "code", "line"), every_error(), ids=lambda v: type(v).__name__)
def test_each_failure_is_one_message_and_its_exit_code(monkeypatch, error, code, line):
    def fail():
        raise error

    monkeypatch.setattr("qtool.recipe.load.list_recipes", fail)
    result = qtool("recipes", "list")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", line)


def test_every_error_class_is_tested():
    tree = [errors.QtoolError]
    for kind in tree:
        tree.extend(kind.__subclasses__())
    own = {kind for kind in tree if "exit_code" in vars(kind) and kind.__module__ == "qtool.errors"}
    assert own == {type(error) for error, _, _ in every_error() if isinstance(error, errors.QtoolError)}


def test_help_lists_the_exit_codes_of_the_error_tree():
    text = qtool("--help").stdout
    for kind in (errors.RecipeError, errors.GateError, errors.HubError):
        assert f"{kind.exit_code} " in text
    assert "9 the measured quality misses a gate" in text


def test_debug_adds_the_traceback(monkeypatch):
    def fail():
        raise errors.HubError("refused")

    monkeypatch.setattr("qtool.recipe.load.list_recipes", fail)
    result = qtool("recipes", "list", "--debug")
    assert result.exit_code == 11
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert result.stderr.endswith("qtool.errors.HubError: refused\nerror: refused\n")


def test_bad_flags_exit_with_2_and_say_so():
    result = qtool("quantize", "model", "--recipe", "r", "-o", "out", "--device", "tpu")
    assert result.exit_code == 2
    assert "'tpu' is not one of 'auto', 'cpu', 'cuda'" in " ".join(result.stderr.replace("│", " ").split())


def test_quiet_and_verbose_exclude_each_other():
    result = qtool("export", "a", "--to", "gguf", "-o", "b", "-q", "-v")
    assert (result.exit_code, result.stderr) == (2, "error: --quiet and --verbose exclude each other\n")


def test_every_command_can_be_quiet_and_print_json():
    """Only `recipes schema` has no --json, because JSON is all that it prints."""

    def leaves(command, path):
        inner = getattr(command, "commands", None)
        return [x for name, c in inner.items() for x in leaves(c, (*path, name))] if inner else [(path, command)]

    found = leaves(typer.main.get_command(app), ())
    flags = {" ".join(path): {flag for p in command.params for flag in p.opts} for path, command in found}
    assert {"quantize", "recipes list", "recipes schema"} <= flags.keys()
    assert [name for name, own in flags.items() if not {"-q", "--quiet"} <= own] == []
    assert [name for name, own in flags.items() if "--json" not in own] == ["recipes schema"]
    assert qtool("recipes", "list", "-q").stdout == qtool("recipes", "list").stdout


# Help


@pytest.mark.parametrize("command", ["quantize", "calibrate", "export", "eval", "plan", "inspect"])
def test_every_command_has_an_example(command):
    text = qtool(command, "--help").stdout
    assert f"Example: qtool {command} ./SmolLM2-135M" in " ".join(text.replace("│", " ").split())


def test_help_lists_what_the_registries_hold():
    text = " ".join(qtool("quantize", "--help").stdout.replace("│", " ").split())
    assert f"Formats: {', '.join(registry.names('formats'))}." in text
    assert f"Methods: {', '.join(registry.names('methods'))}." in text


@pytest.mark.parametrize(
    "arguments", [[], *([c, "--help"] for c in ("quantize", "calibrate", "export", "eval", "plan"))]
)
def test_help_imports_nothing_heavy(arguments):
    program = (
        "import sys\nfrom qtool.cli.app import main\n"
        f"sys.argv = ['qtool', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'numba', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_completion_script_knows_the_program():
    result = process(
        "--show-completion", "bash", env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    )
    assert result.returncode == 0
    assert "_QTOOL_COMPLETE=complete_bash" in result.stdout


def test_completion_completes_commands():
    words = {"COMP_WORDS": "qtool quan", "COMP_CWORD": "1", "_QTOOL_COMPLETE": "complete_bash"}
    result = process(env={**os.environ, **words})
    assert result.stdout.split() == ["quantize"]


# Streams


def test_a_closed_stdout_is_fine():
    result = subprocess.run(
        f"{sys.executable} -m qtool recipes list >&-", shell=True, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_a_reader_that_goes_away_is_fine():
    result = subprocess.run(
        f"{sys.executable} -u -m qtool recipes schema | true", shell=True, capture_output=True, text=True, check=False
    )
    assert result.stderr == ""


def test_colours_only_on_a_terminal_and_not_with_no_color(recipe):
    command = f"{sys.executable} -m qtool recipes show {recipe}x"
    outputs = {}
    for name, value in (("plain", {}), ("none", {"NO_COLOR": "1"})):
        env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm", **value}
        shown = subprocess.run(["script", "-qec", command, "/dev/null"], capture_output=True, env=env, check=False)
        outputs[name] = shown.stdout
    assert b"\x1b[1;31merror:" in outputs["plain"]
    assert b"\x1b[" not in outputs["none"].replace(b"\x1b[1m", b"").replace(b"\x1b[0m", b"")
    assert b"\x1b[" not in process("recipes", "show", f"{recipe}x").stderr.encode()


# Recipes


def test_version():
    from qtool import __version__

    assert qtool("--version").stdout == f"qtool {__version__}\n"


def test_recipes_list_is_a_table_of_all_that_ship(tmp_path, monkeypatch):
    for name, description in (("w8", "Eight bits"), ("a-longer-name", "Four bits")):
        (tmp_path / f"{name}.yaml").write_text(f"recipe: 1\nname: {name}\ndescription: {description}\n")
    monkeypatch.setattr("qtool.recipe.load.shelf", lambda: tmp_path)
    assert qtool("recipes", "list").stdout == (
        "recipe         description\na-longer-name  Four bits\nw8             Eight bits\n"
    )
    assert json.loads(qtool("recipes", "list", "--json").stdout) == [
        {"name": "a-longer-name", "description": "Four bits", "path": str(tmp_path / "a-longer-name.yaml")},
        {"name": "w8", "description": "Eight bits", "path": str(tmp_path / "w8.yaml")},
    ]


def test_recipes_show_prints_the_file(recipe):
    assert qtool("recipes", "show", recipe).stdout == RECIPE
    recipe.write_bytes(b"\xff\xfe")
    refused = qtool("recipes", "show", recipe)
    assert refused.exit_code == 3
    assert refused.stderr == f"error: recipe {recipe}: wanted YAML in UTF-8, found other bytes\n"


def test_recipes_validate_prints_every_mistake_of_every_file(tmp_path, recipe):
    broken = tmp_path / "broken.yaml"
    broken.write_text(RECIPE.replace("q8_0", "q9_0").replace("name: tiny", "name: tiny\ncolour: red"))
    result = qtool("recipes", "validate", broken, recipe)
    assert result.exit_code == 3
    assert result.stdout == f"{recipe}: valid\n"
    lines = result.stderr.splitlines()
    assert lines[0] == "error: not valid: 2 problems"
    assert lines[1].startswith(f"  {broken}:3: colour: ")
    assert lines[2].startswith(f"  {broken}:6: layers[1].weights: ")
    assert "did you mean 'q8_0'?" in lines[2]


def test_recipes_as_json(tmp_path, recipe):
    broken = tmp_path / "broken.yaml"
    broken.write_text(RECIPE.replace("q8_0", "q9_0"))
    result = qtool("recipes", "validate", broken, recipe, "--json")
    first, second = json.loads(result.stdout)
    assert (result.exit_code, first["recipe"], second) == (3, str(broken), {"recipe": str(recipe), "problems": []})
    assert result.stderr == f"error: not valid: {first['problems'][0]}\n"
    shown = json.loads(qtool("recipes", "show", recipe, "--json").stdout)
    assert (shown["name"], shown["layers"][1]["weights"], shown["calibration"]["samples"]) == ("tiny", "q8_0", 128)


def test_recipes_validate_takes_overrides(recipe):
    result = qtool("recipes", "validate", recipe, "--set", "calibration.samples=0")
    assert result.exit_code == 3
    assert "--set calibration.samples=0" in result.stderr


def test_recipes_schema_is_a_json_schema():
    schema = json.loads(qtool("recipes", "schema").stdout)
    assert schema["properties"]["calibration"]
    assert schema["$schema"].startswith("https://json-schema.org/")
