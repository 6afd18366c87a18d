"""What runs, and what runtimes, ask of a format beside its grid: how work on it is shared out, and how inputs use it.

Shape letters: N rows, C columns.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from pydantic import BaseModel, PrivateAttr
from torch import Tensor
from typing_extensions import Self

from qtool.numerics.grids.scale_codes import CodedScales
from qtool.numerics.scales.search import IntegerScales


class Granular(BaseModel):
    """What shares parameters."""

    @property
    @abstractmethod
    def group_columns(self) -> int | None:
        """Columns that share one (scale, offset); None: the whole row."""

    @property
    def block_columns(self) -> int | None:
        """Columns whose parameters are fitted together (a multiple of `group_columns`); None: the whole row."""
        return self.group_columns

    @property
    def group_rows(self) -> int | None:
        """Rows that share one (scale, offset); None: all of them."""
        return 1


class Scheduled(Granular):
    """What a run asks: how a matrix may be divided, and what has to be known of it first."""

    _alone: bool = PrivateAttr(False)
    """Whether parameters are searched for without comparing them with other choices."""

    @property
    def by_rows(self) -> bool:
        """True if a row's parameters depend on that row alone, so that a large matrix can be fitted in parts."""
        return self.group_rows == 1

    @property
    def memory_bound(self) -> bool:
        """True if codes take hardly longer to find than weights to read, so that few are not worth a second thread."""
        return False

    @property
    def needs_largest(self) -> bool:
        """True if parameters depend on the largest weight of the matrix, and of those that runtimes merge with it."""
        return False

    def with_largest(self, largest: float) -> Self:
        """This format, for matrices whose largest magnitude is known."""
        return self

    def on_the_way(self) -> Self:
        """This format as a walk fits its blocks: by its search alone.

        Comparing with what other encoders or simpler rules choose takes long, and where later columns make up for
        errors, it gains nothing.
        """
        fmt = self.model_copy()
        fmt._alone = True
        return fmt

    def search_in_walk(self) -> CodedScales | IntegerScales | None:
        """How `fit` searches, where the walk of columns can do that when it comes to a group; see `walk_searching`."""
        return None

    def of_search(self, *found: Tensor) -> dict[str, Tensor]:
        """Parameters from what `walk_searching` found, [N, G] each; for formats with `search_in_walk`."""
        raise NotImplementedError


class RunTime(Granular):
    """What inputs and KV caches ask, whose scales calibration chooses, or a runtime on the fly."""

    @abstractmethod
    def fit(self, w: Tensor, importance: Tensor | None = None) -> dict[str, Tensor]:
        """See `Format.fit`."""

    @property
    def granularity(self) -> str | None:
        """What shares a scale, where it has a name: "tensor", "head", "channel" or "token"; None: columns of a row."""
        return None

    @property
    def static(self) -> bool:
        """True if inputs in this format all share a scale, which no token can choose: calibration has to."""
        return self.group_rows is None and self.group_columns is None

    @property
    def ranges(self) -> str | float:
        """How the range of a scale that holds for all tokens is chosen.

        "minmax" covers what calibration saw, "search" leaves the least squared error, and a number covers that
        percentage, leaving out as many numbers below as above.
        """
        return "minmax"

    @property
    def augmented(self) -> int:
        """How many first channels of inputs have what rounding left of them rounded and multiplied as well."""
        return 0

    def covering(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """What calibration chooses for all tokens, if numbers from low to high are not to be clipped.

        Args:
            low: float32 [N], for each row of parameters.
            high: float32 [N].

        Returns:
            "scale" [N, 1], and "zero" int8 [N, 1] in asymmetric formats.
        """
        return self.model_copy(update={"scales": "minmax"}).fit(torch.stack([low, high], dim=1))

    def completed(self, x: Tensor, static: dict[str, Tensor]) -> dict[str, Tensor]:
        """All parameters of inputs, float32 [N, C], of which some hold for all tokens; see `covering`."""
        return static

    def at_run_time(self) -> Self:
        """This format as runtimes fit it to inputs on the fly, without a search."""
        return self
