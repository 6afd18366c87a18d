"""How large an artifact's files of tensors are, known before any of them is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Footprint:
    """Bytes of the files that hold tensors: model card, config.json and the tokenizer's files are not among them.

    Attributes:
        modules: of the tensors of each matrix that a recipe can give a format to, by module name.
        rest: of all other tensors.
        overhead: of headers, metadata, tables, padding, and the index of shards.
        exact: whether files have exactly so many bytes. If not, it depends on the codes, and they have no more.
    """

    modules: Mapping[str, int]
    rest: int
    overhead: int
    exact: bool = True

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.modules.values()) + self.rest + self.overhead
