"""How inputs drift behind quantized layers: (X_0 - X)^T X, X_0 being those of the unquantized model.

Methods that know it can make up for what the inputs themselves tell about their drift (after GPTAQ,
https://arxiv.org/abs/2504.02692). It is measured on the tokens that the unquantized model was run on as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qtool.numerics.solving.gram import add_product, fuses
from qtool.numerics.threads.ranks import Ranks
from qtool.stats._base import Batch, Statistic, expect
from qtool.stats.gram import Gram


class Drift(Statistic):
    """(X_0 - X)^T X and X^T X over the compared tokens.

    They come before all others, and X^T X is that of `Gram`, but where batches pass by some experts and overtake.
    """

    uses = frozenset({Gram})
    compares = True
    weighs = "instead"

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        self._k = k
        self.cross: Tensor | None = None
        self._gram: Tensor | None = None

    @property
    def pair(self) -> tuple[Tensor, Tensor] | None:
        """((X_0 - X)^T X, X^T X) over the compared tokens, float32 [K, K] each; None if there were none."""
        if self.cross is None:
            return None
        return self.cross, self.others[Gram].matrix if self._gram is None else self._gram

    def add(self, batch: Batch) -> None:
        """See `Statistic.add`. Differences are small, so their products may be rounded to the type of the inputs."""
        if batch.reference is not None:
            x, difference = batch.weighted, batch.times_root(batch.reference - batch.x)
            if self._gram is not None:
                same = x if fuses(x) else x.float()
                add_product(self._gram, same, same)
            if fuses(x):
                if self.cross is None:
                    self.cross = x.new_zeros(self._k, self._k, dtype=torch.float32)
                add_product(self.cross, difference, x)
                return
            cross = (difference.T @ x).float()
            self.cross = cross if self.cross is None else self.cross + cross
        elif self._gram is None:  # up to here all tokens were compared
            self._gram = self.others[Gram].matrix.clone()

    def merge(self, other: Drift) -> None:
        """See `Statistic.merge`."""
        mine, more = self.pair, other.pair
        if mine is None or more is None:
            kept = mine or more
            self.cross, self._gram = kept if kept else (None, None)
        else:
            self.cross, self._gram = mine[0] + more[0], mine[1] + more[1]

    def combine(self, ranks: Ranks) -> None:
        """See `Statistic.combine`; comes before that of the Gram matrix, which may be that of the compared tokens."""
        mine = self.pair
        if not any(ranks.gather(mine is not None)):
            return
        gram = self.others[Gram].matrix
        cross, compared = (gram.new_zeros(gram.shape),) * 2 if mine is None else mine
        self.cross, self._gram = ranks.sum(cross.clone()), ranks.sum(compared.clone())

    def state(self) -> dict[str, Tensor]:
        """See `Statistic.state`. Nothing where no tokens were compared."""
        return {} if self.pair is None else dict(zip(("cross", "gram"), self.pair, strict=True))

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Statistic.load`."""
        like = (torch.float32, (self._k, self._k))
        expect(state, {"cross": like, "gram": like} if state else {})
        self.cross, self._gram = state.get("cross"), state.get("gram")
