"""Other libraries: newer ones are told of once, and what they say stays off a quiet terminal."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest

from qtool.cli import libraries
from qtool.cli.console import Console
from qtool.cli.libraries import untried
from qtool.errors import StrictError


def test_what_is_installed_was_tried():
    assert untried() == []


def test_newer_majors_are_told_of_once(monkeypatch, capsys):
    monkeypatch.setattr(libraries, "NEWEST", {"transformers": "5.24.0", "torch": "2.13.0", "not-installed-here": "1.0"})
    monkeypatch.setattr(libraries, "installed", {"transformers": "6.0.1", "torch": "2.99.0"}.get)
    console = Console()
    for _ in range(2):
        with console:
            pass
    line = "warning: qtool was not tested with transformers 6.0.1 (tested up to 5.24.0)\n"
    assert capsys.readouterr().err == line
    with pytest.raises(StrictError, match="not tested with transformers"), Console(strict=True):
        pass


def test_libraries_say_nothing_when_quiet(capsys):
    logger = logging.getLogger("transformers.somewhere")
    logger.addHandler(handler := logging.StreamHandler(sys.stderr))
    try:
        for console, said in ((Console(quiet=True), False), (Console(), True)):
            with warnings.catch_warnings(record=True) as cries:
                warnings.simplefilter("always")
                with console:
                    warnings.warn("a cry of a library", FutureWarning, stacklevel=1)
                    logger.warning("a groan of a library")
            assert len(cries) == said
            assert ("groan" in capsys.readouterr().err) is said
        with Console(quiet=True):
            logger.error("an error of a library")
        assert "an error of a library" in capsys.readouterr().err
    finally:
        logger.removeHandler(handler)


def test_strict_makes_errors_of_warnings():
    with pytest.raises(StrictError, match=r"^odd; without --strict this is a warning$"):
        Console(strict=True).warn("odd")


def test_the_profiler_says_nothing():
    program = (
        "from qtool.cli.libraries import quiet_profiler\nquiet_profiler()\nimport torch\n"
        "with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):\n    torch.ones(3) + 1\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (found.stdout, found.stderr) == ("", "")
