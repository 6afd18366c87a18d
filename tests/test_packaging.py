"""The wheel: built from this tree, unpacked elsewhere, it works without the tree."""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager

from qtool.errors import DISTRIBUTION
from scripts.package import LINK

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds what the wheel would install."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(out), str(ROOT)], check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


def python(installed, *arguments):
    """Runs Python with the unpacked wheel, from a folder where the source tree is not in sight."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=installed.parent, env=environment)


def test_wheel_holds_the_package_whole(installed):
    kinds = {".py", ".html", ".md", ".css", ".js", ".j2", ".jinja"}
    sources = {p.relative_to(ROOT) for p in (ROOT / "qtool").rglob("*") if p.suffix in kinds}
    missing = {str(path) for path in sources if not (installed / path).is_file()}
    assert not missing
    assert any(path.suffix in {".html", ".j2", ".jinja"} for path in sources), "the report's templates"


def test_wheel_holds_every_recipe_byte_for_byte(installed):
    recipes = {p.relative_to(ROOT / "recipes"): p.read_bytes() for p in (ROOT / "recipes").rglob("*.yaml")}
    shipped = installed / "qtool" / "_recipes"
    assert recipes
    assert {p.relative_to(shipped): p.read_bytes() for p in shipped.rglob("*.yaml")} == recipes


def test_wheel_holds_nothing_else(installed):
    tops = {p.name for p in installed.iterdir()}
    assert tops == {"qtool", next(top for top in tops if top.endswith(".dist-info"))}


def test_shipped_recipes_are_found_by_name(installed):
    listed = python(installed, "-m", "qtool", "recipes", "list").stdout
    for path in (ROOT / "recipes").rglob("*.yaml"):
        assert path.stem in listed


def test_console_script_resolves(installed):
    (info,) = installed.glob("*.dist-info")
    scripts = configparser.ConfigParser()
    scripts.read(info / "entry_points.txt")
    assert dict(scripts["console_scripts"]) == {"qtool": "qtool.cli.app:main"}
    program = "import qtool.cli.app as app; print(app.__file__, callable(app.main))"
    assert python(installed, "-c", program).stdout.split() == [str(installed / "qtool" / "cli" / "app.py"), "True"]


def test_version_is_the_same_everywhere(installed):
    version = re.search(r'__version__ = "(.+)"', (ROOT / "qtool" / "__init__.py").read_text())[1]
    (info,) = installed.glob("*.dist-info")
    assert info.name == f"{DISTRIBUTION.replace('-', '_')}-{version}.dist-info"
    assert version in python(installed, "-m", "qtool", "--version").stdout
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_requirements_are_what_is_imported(installed):
    (info,) = installed.glob("*.dist-info")
    needs = re.findall(r"^Requires-Dist: ([\w.-]+)(.*)$", (info / "METADATA").read_text(encoding="utf-8"), re.MULTILINE)
    always = {name for name, rest in needs if "extra ==" not in rest}
    optional = {name for name, rest in needs if re.search("extra == '(data|llamacpp|tasks)'", rest)}
    assert imported() >= {module(name) for name in always}, "a requirement that nothing imports"
    brought = {"qtool", "triton", "compressed_tensors"}  # torch's builds for CUDA require triton; a reader may be there
    assert imported() <= {module(name) for name in always | optional} | brought, "an import that nothing requires"


def module(requirement):
    """What a package of that name is imported as."""
    return {"pyyaml": "yaml"}.get(requirement, requirement.replace("-", "_"))


def imported():
    """Everything outside the standard library that the package imports, anywhere."""
    found = set()
    for path in (ROOT / "qtool").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names


def metadata(monkeypatch, repository):
    """What a build says of the project."""
    monkeypatch.setenv("QTOOL_REPOSITORY", repository)
    return ProjectMetadata(str(ROOT), PluginManager()).core


def test_the_readme_is_as_it_stands_where_nothing_is_published(monkeypatch):
    found = metadata(monkeypatch, "")
    assert found.readme == (ROOT / "README.md").read_text(encoding="utf-8")
    assert not found.urls


def test_links_lead_from_the_package_index_to_the_files_of_the_version(monkeypatch):
    found, base = metadata(monkeypatch, "https://example.org/owner/name/"), "https://example.org/owner/name"
    plain = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    links = re.findall(r"!?\[[^\]]*\]\(([^)]+)\)", found.readme)
    assert links == [f"{base}/{'raw' if mark else 'blob'}/v{found.version}/{path}" for mark, path in plain]
    assert any(mark for mark, _ in plain)
    assert found.urls["Homepage"] == base
    assert {url.removeprefix(base).split("/")[1] for url in list(found.urls.values())[1:]} == {"blob", "issues"}
    for url in found.urls.values():
        assert "/blob/" not in url or (ROOT / url.split(f"/v{found.version}/")[1]).exists()
    assert len(LINK.findall(found.readme)) == 0
