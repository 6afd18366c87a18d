"""What is wrong with the rules of a recipe once they meet a model: one line per kind of mistake, not per layer."""

from __future__ import annotations

from collections.abc import Sequence

from qtool.recipe.schema import Rule


class Findings:
    """Mistakes gathered by rule and text, so that the same one in 30 blocks is one line."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = rules
        self.layers: dict[tuple[int, str], list[str]] = {}

    def add(self, rule: int, text: str, *layers: str) -> None:
        """Notes a mistake of a rule (-1: of none) about some layers."""
        self.layers.setdefault((rule, text), []).extend(layers)

    def lines(self) -> list[str]:
        """One line per mistake, in the order of the rules."""
        found = sorted(self.layers.items(), key=lambda item: item[0][0])
        return [self._line(rule, text, names) for (rule, text), names in found]

    def _line(self, rule: int, text: str, names: list[str]) -> str:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        parts = [self.position(rule)] if rule >= 0 else []
        return ": ".join([*parts, *(n + more for n in names[:1]), text])

    def position(self, rule: int) -> str:
        """Where a rule stands."""
        where = self.rules[rule].where
        return (f"{where}: " if where else "") + f'layers[{rule}] (match "{self.rules[rule].match}")'
