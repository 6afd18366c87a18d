"""Progress as plain lines and as bars, tables, and the way numbers are written."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from qtool.cli import console
from qtool.cli.console import Console, show, table
from qtool.pipeline.events import Event
from qtool.report.units import duration, size


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests move, and a process of 123.4 MB."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console, "resident_bytes", lambda: 123_400_000)
    return now


def blocks(clock, listener, count, seconds):
    """A stage of `count` steps."""
    listener(Event("quantize", 0, count))
    for done in range(1, count + 1):
        clock[0] += seconds
        listener(Event("quantize", done, count, f"block-{done - 1}", {"error_db": 18.23}))


def test_plain_lines_come_at_most_every_ten_seconds(clock, capsys):
    with Console() as listener:
        blocks(clock, listener, 10, 4.0)
    assert capsys.readouterr().err.splitlines() == [
        "quantize 0/10",
        "quantize 3/10 block-2  18.2 dB  4.0 s each  ETA 28 s  123.4 MB memory",
        "quantize 6/10 block-5  18.2 dB  4.0 s each  ETA 16 s  123.4 MB memory",
        "quantize 9/10 block-8  18.2 dB  4.0 s each  ETA 4.0 s  123.4 MB memory",
        "quantize 10/10 block-9  18.2 dB  40 s  123.4 MB memory",
    ]


def test_verbose_shows_every_step_and_quick_ones_by_their_rate(clock, capsys):
    with Console(verbose=True) as listener:
        blocks(clock, listener, 3, 0.25)
    assert capsys.readouterr().err.splitlines() == [
        "quantize 0/3",
        "quantize 1/3 block-0  18.2 dB  4.0/s  ETA 0.50 s  123.4 MB memory",
        "quantize 2/3 block-1  18.2 dB  4.0/s  ETA 0.25 s  123.4 MB memory",
        "quantize 3/3 block-2  18.2 dB  0.75 s  123.4 MB memory",
    ]


def test_quiet_shows_warnings_only(clock, capsys):
    with Console(quiet=True) as listener:
        blocks(clock, listener, 3, 20)
        listener(Event("plan", 1, 1, "a rule [layers.0] decides nothing", warning=True))
    assert capsys.readouterr().err == "warning: a rule [layers.0] decides nothing\n"


@pytest.mark.parametrize("columns", [80, 160])
def test_bars_on_a_terminal(columns, clock, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    with Console() as listener:
        blocks(clock, listener, 4, 5.0)
        listener(Event("verify compressed-tensors", 0, 272))
        clock[0] += 4
        listener(Event("verify compressed-tensors", 100, 272))
    quantize, verify = screen.getvalue().rsplit("quantize", 1)[1].splitlines()[:2]
    assert "4/4" in quantize
    assert "18.2 dB  20 s  123.4 MB memory" in quantize
    assert "100/272" in verify
    assert "25.0/s  ETA 6.9 s  123.4 MB memory" in verify


def test_nothing_breaks_without_stderr(clock, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    with Console() as listener:
        blocks(clock, listener, 3, 20)
        listener(Event("plan", 1, 1, "hear me", warning=True))


def test_values_have_units():
    assert show({"error_db": 18.26, "tokens/s": 5400.0}) == "18.3 dB  5400 tokens/s"


def test_table_aligns_numbers_right_and_cuts_nothing():
    text = table(["name", "size"], [["a", "1.0 kB"], ["x" * 100, "12 B"]], frozenset({1}))
    assert text == f"name{' ' * 96}    size\na{' ' * 99}  1.0 kB\n{'x' * 100}    12 B"


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (269_060_552, "269.1 MB"), (2.5e9, "2.5 GB")]
)
def test_sizes_are_decimal(nbytes, text):
    assert size(nbytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(8.44, "8.4 s"), (125, "2 min 05 s"), (3725, "1 h 02 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_compilation_is_told_of_once(capsys):
    from numba import njit

    with Console() as listener:
        listener(Event("quantize", 0, 2))
        for add in (1, 2):
            kernel = njit(lambda x, add=add: x + add)
            assert kernel(1) == 1 + add
            kernel(2)
        assert listener.compiling.seconds > 0.001
        assert listener.compiling.depth == 0
    njit(lambda x: x + 3)(1)
    assert capsys.readouterr().err.splitlines() == ["quantize 0/2", console.COMPILING]
    with Console(quiet=True) as listener:
        listener(Event("quantize", 0, 2))
        njit(lambda x: x + 4)(1)
    assert capsys.readouterr().err == ""


def test_what_is_compiled_once_does_not_count_for_the_rest(clock, capsys):
    with Console() as listener:
        listener.compiling = SimpleNamespace(seconds=7.0)
        listener(Event("quantize", 0, 10))
        clock[0] += 60.0
        listener.compiling.seconds += 56.0
        listener(Event("quantize", 1, 10))
    assert "4.0 s each  ETA 36 s" in capsys.readouterr().err
