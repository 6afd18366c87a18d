"""What the user sees: progress and warnings on stderr, results on stdout."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.markup import escape

from qtool.cli.libraries import silenced, untried
from qtool.errors import StrictError, UsageError
from qtool.pipeline.events import Event
from qtool.pipeline.memory import resident_bytes
from qtool.report.units import duration, size

if TYPE_CHECKING:
    from qtool.numerics.threads.compiling import Compiling

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

COMPILING = "compiling kernels, once for this processor"
LINE_INTERVAL = 10.0
"""Seconds between two progress lines of a stage when stderr is no terminal."""


class Console:
    """Progress of stages, as a listener: `run(options, console)` within `with Console(...) as console`.

    Args:
        quiet: show only warnings.
        verbose: show every event.
        strict: warnings are errors.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False, strict: bool = False) -> None:
        if quiet and verbose:
            raise UsageError("--quiet and --verbose exclude each other")
        self.quiet, self.verbose, self.strict = quiet, verbose, strict
        self.stderr = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self.announced, self.libraries = False, ExitStack()
        self.bars: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.started: dict[str, tuple[float, float]] = {}
        self.compiling: Compiling | None = None
        self.last_line: dict[str, float] = {}

    def __enter__(self) -> Console:
        if not self.announced and (newer := untried()):
            self.warn(f"qtool was not tested with {', '.join(newer)}")
        self.announced = True
        if sys.stderr is None:
            self.quiet = True
        if self.quiet:
            self.libraries.enter_context(silenced())
        elif self.stderr.is_terminal:
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

            self.bars = Progress(
                SpinnerColumn(finished_text="[green]✓"),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.fields[of]}"),
                TextColumn("{task.fields[values]}"),
                console=self.stderr,
            )
            self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.bars:
            self.bars.stop()
        self.libraries.close()

    def __call__(self, event: Event) -> None:
        """Shows an event; this makes a console a `qtool.pipeline.events.Listener`."""
        if event.warning:
            self.warn(event.message)
            return
        if self.quiet:
            return
        if self.compiling is None and "numba" in sys.modules:  # a command that needs kernels has imported it by now
            from qtool.numerics.threads.compiling import Compiling

            self.compiling = Compiling(self._tell_of_compiling)
            self.libraries.callback(self.compiling.close)
        if self.bars:
            self._advance_bar(self.bars, event)
        else:
            self._print_line(event)

    def note(self, message: str) -> None:
        """Shows a remark, not with --quiet."""
        if sys.stderr is not None and not self.quiet:
            self.stderr.print(escape(message))

    def warn(self, message: str) -> None:
        """Shows a warning, also with --quiet. Raises StrictError: there are to be none."""
        if self.strict:
            raise StrictError(message, hint="without --strict this is a warning")
        if sys.stderr is not None:
            self.stderr.print(f"[yellow]warning:[/] {escape(message)}")

    def _tell_of_compiling(self) -> None:
        """Shows why nothing moves; a line where there are no bars, once."""
        if self.bars and self.tasks:
            self.bars.update(list(self.tasks.values())[-1], values=COMPILING)
        elif self.compiling and not self.compiling.before:
            self.stderr.print(COMPILING, markup=False)

    def _advance_bar(self, bars: Progress, event: Event) -> None:
        if event.stage not in self.tasks:
            self.tasks[event.stage] = bars.add_task(event.stage, of="?", values="", total=None)
        bars.update(
            self.tasks[event.stage],
            completed=event.done,
            total=event.total or None,
            of=event.total or "?",
            values=self._values(event),
        )
        if self.verbose and event.message:
            self.stderr.print(escape(event.message))

    def _print_line(self, event: Event) -> None:
        now = time.monotonic()
        edge = event.done == 0 or event.done == event.total
        if not (edge or self.verbose) and now - self.last_line.get(event.stage, 0) < LINE_INTERVAL:
            return
        self.last_line[event.stage] = now
        count = f"{event.done}/{event.total}" if event.total else str(event.done or "")
        what = f"{event.stage} {count}".strip() + (f" {event.message}" if event.message else "")
        self.stderr.print("  ".join(filter(None, (what, self._values(event)))), markup=False)

    def _values(self, event: Event) -> str:
        """What was measured, how fast it goes, how long it will take, and memory."""
        rate = self._rate(event)
        memory = f"{size(resident_bytes())} memory" if event.done else ""
        return "  ".join(filter(None, (show(event.values), rate, memory)))

    def _rate(self, event: Event) -> str:
        """Time that the stage took; before its end steps per second or seconds per step, and the time that is left."""
        compiled = self.compiling.seconds if self.compiling else 0.0
        began, already = self.started.setdefault(event.stage, (time.monotonic(), compiled))
        seconds = time.monotonic() - began
        if not event.done or seconds <= 0:
            return ""
        if event.done == event.total:
            return duration(seconds)
        rate = event.done / max(seconds - (compiled - already), 1e-3)  # kernels are compiled once
        speed = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
        return f"{speed}  ETA {duration((event.total - event.done) / rate)}" if event.total else speed


def show(values: dict[str, float]) -> str:
    """`{"error_db": 18.23, "tokens/s": 5400.0}` -> `18.2 dB  5400 tokens/s`."""
    units = {"error_db": "dB"}
    return "  ".join(
        f"{v:.4g} {units.get(k, k)}" if k not in units else f"{v:.1f} {units[k]}" for k, v in values.items()
    )


def result(text: str) -> None:
    """Prints a result on stdout."""
    print(text)


def document(value: Any) -> None:
    """Prints one JSON document on stdout; infinity and NaN are words, as in the files that qtool writes."""
    print(json.dumps(in_words(value), indent=2, ensure_ascii=False, allow_nan=False))


def in_words(value: Any) -> Any:
    """JSON values with words for numbers that JSON does not have: exact layers have infinitely many decibels."""
    if isinstance(value, dict):
        return {key: in_words(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [in_words(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: frozenset[int] = frozenset()) -> str:
    """Columns separated by two spaces; those in `numbers` are flush right. Nothing is cut to the screen's width."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = (c.rjust(w) if i in numbers else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
