"""Writes held-out English prose for evaluations: the docstrings of Python's standard library.

The calibration data `builtin` is other text (the topics of Python's help), so that nothing is evaluated on what it was
calibrated with, and nothing has to be shipped or fetched.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from pathlib import Path

MODULES = [
    "argparse",
    "datetime",
    "difflib",
    "doctest",
    "email/message",
    "imaplib",
    "logging/__init__",
    "mailbox",
    "optparse",
    "pickletools",
    "subprocess",
    "tarfile",
    "turtle",
    "typing",
    "unittest/case",
    "urllib/request",
]
"""A fixed list, because the library's content differs from machine to machine."""

SHORTEST = 200
"""Characters; shorter docstrings are signatures rather than prose."""


def prose() -> str:
    """All long docstrings of the modules, in the order of the source."""
    found = []
    for name in MODULES:
        path = Path(sysconfig.get_path("stdlib")) / f"{name}.py"
        if not path.exists():  # a later Python may have dropped it
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                doc = ast.get_docstring(node)
                found += [doc] if doc and len(doc) >= SHORTEST else []
    return "\n\n".join(found) + "\n"


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(prose(), encoding="utf-8")
