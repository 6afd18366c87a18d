"""The shape of the source, as rules that a machine checks: order of rooms, sizes, and what may be said where."""

from __future__ import annotations

import ast
import builtins
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qtool import registry

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qtool"

ORDER = (
    "__init__",
    "errors",
    "limits",
    "tested",
    "registry",
    "problems",
    "spec",
    "numerics",
    "ops",
    "formats",
    "stats",
    "residuals",
    "methods",
    "transforms",
    "recipe",
    "checkpoint",
    "store",
    "plan",
    "calibrate",
    "stages",
    "artifact",
    "models",
    "evaluate",
    "allocate",
    "report",
    "pipeline",
    "api",
    "cli",
    "__main__",
)
SOURCES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}

LONGEST_FILE = 300
LONGEST_FUNCTION = 60


def dotted(path: Path) -> str:
    """Module name of a source file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


KNOWN = {dotted(path) for path in SOURCES}


def room(module: str) -> str:
    """The part of a module's name that ORDER ranks."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of everything below qtool that a source imports, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "qtool")
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"line {node.lineno}: a relative import hides the room it reaches into")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qtool":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield node.lineno, inner if inner in KNOWN or node.module == "qtool" else str(node.module)


def every(paths: Sequence[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """Makes one test of a check of files, which takes less time than its report would; it names all that are wrong."""

    def once(check: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            wrong = {}
            for path in paths:
                try:
                    check(path)
                except AssertionError as error:
                    wrong[str(path.relative_to(PACKAGE))] = str(error)
            assert not wrong

        return test

    return once


def test_order_names_every_room():
    on_disk = {room(dotted(path)) for path in SOURCES}
    assert on_disk == set(ORDER)


@every(SOURCES)
def test_imports_come_from_rooms_above(path):
    own = ORDER.index(room(dotted(path)))
    upward = []
    for line, module in imports(TREES[path]):
        target = room(module) if room(module) in ORDER else "__init__"  # `from qtool import __version__`
        if ORDER.index(target) > own:
            upward.append(f"line {line}: {module}")
    assert not upward


def test_no_import_cycles():
    graph = {dotted(path): {module for _, module in imports(tree)} for path, tree in TREES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"cycle: {' -> '.join((*trail[trail.index(module) :], module))}"
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


@every(SOURCES)
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
    functions = (node for node in ast.walk(TREES[path]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    long = {node.name: size for node in functions if (size := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION}
    assert not long


@every([path for path in SOURCES if room(dotted(path)) != "cli"])
def test_only_the_command_line_prints_and_reads_the_environment(path):
    found = []
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "input"):
            found.append(f"line {node.lineno}: {node.func.id}()")
        elif isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv", "stdout", "stderr"):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    found = [line for line in found if "self.process.stdout" not in line]  # a child's, not ours
    assert not found


@every(sorted((PACKAGE / "methods").glob("*.py")))
def test_methods_name_no_format(path):
    imported = {module for _, module in imports(TREES[path]) if room(module) == "formats"}
    assert imported <= {"qtool.formats._base"}
    names = registry.names("formats")
    words = {name for name in names if not hasattr(builtins, name)}
    words |= {registry.load("formats", name).__name__ for name in names}
    shorthands = r"int[2-8]-\w+"
    assert not re.findall(rf"\b(?:{'|'.join(sorted(words))}|{shorthands})\b", path.read_text(encoding="utf-8"))


@every(SOURCES)
def test_systems_are_factored_by_cholesky(path):
    """What is solved here is positive definite, and LU of small batches did not return with two threads of MKL."""
    general = {"solve", "solve_ex", "inv", "inv_ex", "lstsq", "pinv", "lu", "lu_factor", "lu_solve"}
    names = (
        n for n in ast.walk(TREES[path]) if isinstance(n, ast.Attribute) and ast.unparse(n.value).endswith("linalg")
    )
    assert not {name.attr for name in names} & general


def test_one_name_for_one_class():
    """But for what recipes and commands name: GPTQ is a method and a layout, Hadamard a transform and its operation."""
    named = {registry.load(room, name).__name__ for room in registry.ROOMS for name in registry.names(room)}
    places: dict[str, list[str]] = {}
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name not in named:
                places.setdefault(node.name, []).append(dotted(path))
    assert not {name: modules for name, modules in places.items() if len(modules) > 1}


def test_help_is_quick_and_imports_nothing_heavy():
    """0.16 seconds of processor time on an idle machine, of which Typer and Rich take two thirds."""
    ours = (
        "import sys, time\nfrom qtool.cli.app import main\nsys.argv = ['qtool', '--help']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'numba', 'numpy', 'pydantic', 'importlib.metadata', 'rich.progress'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\nprint(time.process_time())"
    )
    theirs = "import time, typer, typer.rich_utils, rich.markdown\nprint(time.process_time())"

    def seconds(program):
        result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
        return float(result.stdout.splitlines()[-1])

    taken = [(seconds(ours), seconds(theirs)) for _ in range(3)]
    assert min(us for us, _ in taken) < 2.5 * min(them for _, them in taken)  # other work slows both down alike


def test_the_import_rule_sees_a_planted_upward_import():
    planted = ast.parse("def f():\n    from qtool.pipeline import events\n    import qtool.cli.app\n")
    assert list(imports(planted)) == [(2, "qtool.pipeline.events"), (3, "qtool.cli.app")]
    assert ORDER.index(room("qtool.pipeline.events")) > ORDER.index(room("qtool.methods.gptq"))
