"""Where commands keep what a later one would have to find out again."""

from __future__ import annotations

import os
from pathlib import Path


def scores_folder() -> Path | None:
    """The folder with what budgets are divided by; None where none can be made, so that nothing is kept.

    It is `scores` below $QTOOL_CACHE, or below `qtool` in $XDG_CACHE_HOME or ~/.cache. What lies there may be removed.
    """
    folder = os.environ.get("QTOOL_CACHE")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "qtool")
    place = Path(folder) / "scores"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return place if os.access(place, os.W_OK) else None
