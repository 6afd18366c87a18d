"""Methods that solve a decoder block as a whole, from what another method found in it matrix by matrix."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer
from torch import Tensor

from qtool.formats._base import Format
from qtool.methods._base import BlockTask, Method, Solution
from qtool.spec import Spec
from qtool.stats._base import InputStats, Statistic

MatrixMethod = Annotated[
    Method,
    BeforeValidator(Method.of),
    PlainSerializer(Spec.spelled),
]


class BlockMethod(Method):
    """A method that solves blocks.

    Attributes:
        start: the method that finds first codes, matrix by matrix.
    """

    start: MatrixMethod = Field("gptq", validate_default=True)

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """What its start needs."""
        return self.start.needs

    @property
    def first(self) -> Method:
        """See `Method.first`."""
        return self.start

    def prepare(self, stats: InputStats, fmt: Format) -> None:
        """See `Method.prepare`."""
        self.start.prepare(stats, fmt)

    def solve(self, w: Tensor, stats: InputStats | None, fmt: Format) -> Solution:
        """See `Method.solve`; outside of blocks that is all."""
        return self.start.solve(w, stats, fmt)

    @abstractmethod
    def solve_block(self, task: BlockTask) -> dict[str, Solution]:
        """See `Method.solve_block`."""
