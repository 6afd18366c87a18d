"""What a stage tells while it works. Stages never print: they call a listener, and `cli/console.py` is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Event:
    """A step of a stage is finished (or, at done = 0, the stage begins).

    Attributes:
        stage: "calibrate", "quantize", "write gguf", "verify gguf", "evaluate", ...
        done, total: steps; total 0 if unknown.
        message: what was just finished, for the log line: "model.layers.3 18.2 dB".
        values: numbers worth showing beside the bar: {"error_db": 18.2, "tokens/s": 5400.0}.
        warning: True if `message` must be seen even with --quiet.
    """

    stage: str
    done: int
    total: int
    message: str = ""
    values: dict[str, float] = field(default_factory=dict)
    warning: bool = False


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """A listener that ignores everything."""


def remarks(listener: Listener, stage: str) -> Callable[[str], None]:
    """What takes warnings of a stage as text."""
    return lambda text: listener(Event(stage, 1, 1, text, warning=True))
