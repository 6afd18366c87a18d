"""What a method is: it chooses the codes of one layer and knows the format only through its protocol."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from qtool import registry
from qtool.formats._base import Format, Quantized
from qtool.stats._base import InputStats, Statistic


@dataclass(frozen=True)
class Solution:
    """A solved layer.

    Attributes:
        quantized: codes and parameters.
        target: the matrix that the codes approximate, float32 [N, K], where that is not the layer's own.
        fallback: what had to be done instead of the method as asked, and why; None if nothing. Goes to the report.
    """

    quantized: Quantized
    fallback: str | None = None
    target: Tensor | None = None


class Method(BaseModel):
    """Chooses codes. The fields of a subclass are its options in a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    @abstractmethod
    def needs(self) -> frozenset[type[Statistic]]:
        """What calibration has to measure; empty: the method runs without data."""

    def prepare(self, stats: InputStats, fmt: Format) -> None:
        """Called before `solve`, which may then be called for some rows at a time, side by side.

        What all rows share can be computed here and left in `InputStats.cache`.
        """

    @abstractmethod
    def solve(self, w: Tensor, stats: InputStats | None, fmt: Format) -> Solution:
        """Quantizes one matrix.

        Args:
            w: float32 [N, K], finite.
            stats: measured on the K inputs; None if `needs` is empty.
            fmt: the representation to choose codes in.
        """

    @classmethod
    def name(cls) -> str:
        """The name that recipes use."""
        return registry.name_of("methods", cls)
