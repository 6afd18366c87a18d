"""Whatever a registry lists can be loaded, is spelled as the registry promises, and says where it comes from."""

from __future__ import annotations

import ast
import importlib
import inspect
import re

import pytest

from qtool import registry
from qtool.artifact._base import Artifact
from qtool.checkpoint.families._base import Family
from qtool.errors import QtoolError
from qtool.formats._base import Format
from qtool.methods._base import Method
from qtool.ops._base import InputOp
from qtool.residuals._base import Residual
from qtool.stages._base import Stage
from qtool.stats._base import Statistic
from qtool.transforms._base import Transform

BASES = {
    "artifact": Artifact,
    "checkpoint/families": Family,
    "formats": Format,
    "methods": Method,
    "ops": InputOp,
    "transforms": Transform,
    "residuals": Residual,
    "stages": Stage,
    "stats": Statistic,
}
ENTRIES = [(room, name) for room in BASES for name in registry.names(room)]


def each(test):
    """Runs a test once for every registered thing."""
    return pytest.mark.parametrize(("room", "name"), ENTRIES, ids=[f"{room}/{name}" for room, name in ENTRIES])(test)


@pytest.mark.parametrize("room", BASES)
def test_no_registry_is_empty(room):
    assert registry.names(room)


@each
def test_entry_loads_and_is_a_concrete_class_spelled_like_its_file(room, name):
    entry = registry.load(room, name)
    assert inspect.isclass(entry)
    assert issubclass(entry, BASES[room])
    assert not inspect.isabstract(entry)
    assert entry.__name__.lower() == re.sub("[-_]", "", name) or entry.__name__.lower() == name
    home = f"qtool.{room.replace('/', '.')}.{name.replace('-', '_')}"
    assert f"{entry.__module__}.".startswith(f"{home}.")


@each
def test_module_explains_itself_and_names_its_source(room, name):
    module = importlib.import_module(f"qtool.{room.replace('/', '.')}.{name.replace('-', '_')}")
    text = ast.get_docstring(ast.parse(inspect.getsource(module)))
    assert text is not None
    assert re.search(r"https://\S+\.\S+/\S+", text), "the module's docstring needs the URL of a paper or specification"
    assert inspect.getdoc(registry.load(room, name)) != inspect.getdoc(BASES[room])


@pytest.mark.parametrize("room", BASES)
def test_unknown_name_suggests_a_near_one(room):
    known = registry.names(room)[0]
    with pytest.raises(QtoolError, match=f"did you mean '{known}'"):
        registry.load(room, known + "x")


@pytest.mark.parametrize(("room", "name"), [e for e in ENTRIES if e[0] in ("methods", "residuals")])
def test_what_recipes_name_is_named_as_registered_and_runs_on_defaults(room, name):
    thing = registry.load(room, name)
    assert thing.name() == name
    assert thing() == thing()


@pytest.mark.parametrize("name", registry.names("artifact"))
def test_artifact_says_who_reads_it_and_how(name):
    artifact = registry.load("artifact", name)
    own = vars(artifact)
    assert own["fuses"] in (True, False)
    assert own["runtimes"] == tuple(dict.fromkeys(own["runtimes"])) != ()
    assert all(re.fullmatch(r"[A-Za-z][\w.-]+", runtime) for runtime in own["runtimes"])
    commands = {"vLLM": "vllm", "llama.cpp": "llama-cli", "mlx-lm": "mlx_lm", "qtool": "qtool"}
    commands |= {"TensorRT-LLM": "trtllm-serve", "GPTQModel": "GPTQModel"}
    called = {command for runtime in own["runtimes"] if (command := commands.get(runtime))}
    assert any(command in own["usage"] for command in called)
    assert not any(command in own["usage"] for command in set(commands.values()) - called)
