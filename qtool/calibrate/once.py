"""The unquantized model, walked and measured once for several runs that go from block to block side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from qtool.calibrate.hidden import Hidden
from qtool.calibrate.walker import Walker
from qtool.stats._base import InputStats, Statistic


class OnceWalker(Walker):
    """A walker for all of them; whoever comes first to a block runs and measures it.

    Args:
        wanted: what is measured in each block, by `Module.reads`; the same for all.
    """

    hidden: Hidden | None = None

    def __init__(self, *args: Any, wanted: Mapping[int, Mapping[str, frozenset[type[Statistic]]]]) -> None:
        super().__init__(*args)
        self.wanted, self.measured = wanted, -1
        self.found: tuple[dict[str, InputStats], ...] = ()

    def embed(self, tokens: Tensor) -> Hidden:
        """See `Blocks.embed`; the hidden states of all."""
        if self.hidden is None:
            self.hidden = super().embed(tokens)
        return self.hidden

    def steps(self, block: nn.Module, i: int, hidden: Hidden, *rest: Any) -> Iterator[dict[str, InputStats]]:
        """See `Walker.steps`; nothing that is done to the block in between changes what is found."""
        if self.measured != i:
            self.found = tuple(super().steps(block, i, hidden, self.wanted[i]))
            self.measured = i
        return iter(self.found)
