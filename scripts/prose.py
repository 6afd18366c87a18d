"""Texts for evaluations: docstrings of Python's standard library, which are English prose, and its source code.

The calibration data `builtin` is other text (the topics of Python's help), so that nothing is evaluated on what it was
calibrated with, and nothing has to be shipped or fetched.
"""

from __future__ import annotations

import ast
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
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

OTHERS = [
    "_pydecimal",
    "asyncio/base_events",
    "bdb",
    "codecs",
    "collections/__init__",
    "configparser",
    "csv",
    "ctypes/util",
    "dataclasses",
    "enum",
    "fractions",
    "ftplib",
    "functools",
    "gettext",
    "heapq",
    "http/client",
    "inspect",
    "ipaddress",
    "locale",
    "mimetypes",
    "multiprocessing/managers",
    "os",
    "pathlib",
    "pdb",
    "random",
    "shutil",
    "smtplib",
    "socket",
    "ssl",
    "statistics",
    "string",
    "tempfile",
    "textwrap",
    "threading",
    "tkinter/__init__",
    "traceback",
    "unittest/mock",
    "uuid",
    "warnings",
    "zipfile",
]
"""Other modules, of which nothing is evaluated: texts to calibrate with."""

SHORTEST = 200
"""Characters; shorter docstrings are signatures rather than prose."""


def prose() -> str:
    """Long docstrings, to evaluate on."""
    return docstrings(MODULES)


def code() -> str:
    """Source code, to evaluate on."""
    return "\n\n".join(sources(MODULES[:4]))


def other_prose() -> str:
    """Long docstrings, to calibrate with."""
    return docstrings(OTHERS)


def other_code() -> str:
    """Source code, to calibrate with."""
    return "\n\n".join(sources(OTHERS[:12]))


def words() -> str:
    """Words of long docstrings without any order, to calibrate with."""
    found = other_prose().split()
    random.Random(0).shuffle(found)
    return "\n\n".join(" ".join(found[a : a + 200]) for a in range(0, len(found), 200)) + "\n"


def sources(modules: Sequence[str]) -> Iterator[str]:
    """Source code of modules of the standard library."""
    for name in modules:
        path = Path(sysconfig.get_path("stdlib")) / f"{name}.py"
        if path.exists():  # a later Python may have dropped it
            yield path.read_text(encoding="utf-8")


def docstrings(modules: Sequence[str]) -> str:
    """All long docstrings of modules, in the order of the source."""
    found = []
    for source in sources(modules):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                doc = ast.get_docstring(node)
                found += [doc] if doc and len(doc) >= SHORTEST else []
    return "\n\n".join(found) + "\n"


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(prose(), encoding="utf-8")
