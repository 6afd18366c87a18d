"""What several runs for one model find out once: tokens, checksums, what the unquantized model says."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

from qtool.recipe.schema import Calibration
from qtool.report.model import StageEntry

T = TypeVar("T")
PER_RECIPE = {"experts", "min_tokens", "propagate", "token_weights"}
"""Fields of a calibration that do not choose tokens."""


class Shared:
    """What is known already.

    Args:
        keep: whether anything is; a run that is alone keeps nothing in memory.

    Attributes:
        stages: what was done of a run before it begins, by its output.
    """

    def __init__(self, keep: bool = False) -> None:
        self.keep, self.stages = keep, dict[Path, StageEntry]()
        self.known: dict[Hashable, Any] = {}

    def once(self, key: Hashable, find: Callable[[], T]) -> T:
        """What was found under a key, which names everything that it depends on beside the model."""
        if not self.keep:
            return find()
        if key not in self.known:
            self.known[key] = find()
        found: T = self.known[key]
        return found


def tokens_key(calibration: Calibration) -> str:
    """The same for calibrations with the same tokens."""
    return calibration.model_dump_json(exclude=PER_RECIPE)
