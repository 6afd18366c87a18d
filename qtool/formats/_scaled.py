"""What formats with a symmetric grid share: levels, rounding, and a look for the largest weight of each group."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from pydantic import PrivateAttr
from torch import Tensor
from typing_extensions import Self

from qtool.errors import NumericsError
from qtool.formats._base import Format, Params, row_chunks
from qtool.numerics.checks import refuse_large
from qtool.numerics.grids import minifloat
from qtool.numerics.grids.minifloat import Grid
from qtool.numerics.grids.scale_codes import LARGEST
from qtool.numerics.scales.search import reach, relative


class Scaled(Format):
    """`w_hat = scale * level`, levels of a `Grid`, scales of a type that the subclass stores."""

    _largest: float | None = PrivateAttr(None)
    """The largest weight that the scale of a matrix has to cover, once it is known."""

    def with_largest(self, largest: float) -> Self:
        """See `Format.with_largest`."""
        fmt = self.model_copy()
        fmt._largest = largest
        return fmt

    @property
    @abstractmethod
    def grid(self) -> Grid:
        """The levels."""

    @abstractmethod
    def scale(self, params: Params) -> Tensor:
        """float32 [N, G], never negative."""

    def levels(self) -> Tensor:
        """See `Format.levels`."""
        return self.grid.levels()

    def affine(self, params: Params) -> tuple[Tensor, Tensor]:
        """See `Format.affine`."""
        scale = self.scale(params)
        return scale, torch.zeros_like(scale)

    def snap(self, w: Tensor, params: Params, importance: Tensor | None = None) -> Tensor:
        """See `Format.snap`. Rounds as a cast does: ties to the even bit pattern, saturating."""
        return minifloat.nearest_levels(w, self.scale(params), self.grid)

    def largest(self, w: Tensor, groups: int) -> Tensor:
        """Largest magnitude of every group, float32 [N, C] -> [N, G]. Raises NumericsError: not finite."""
        found = minifloat.largest(w, groups)
        if not bool((found < torch.inf).all()):
            raise NumericsError(f"{self.label} has no scale for weights that are NaN or infinite")
        return found

    def extents(self, w: Tensor, importance: Tensor | None, groups: int) -> Tensor:
        """Magnitudes that a search lets the grid end at, float32 [N, G, 1 or 2].

        With importance there is a second one, of what counts: a large weight on a dead input shall not set the step of
        its group. Raises NumericsError: not finite, or too large to be searched.
        """
        found = self.largest(w, groups).unsqueeze(-1)
        if len(found) and float(found.max()) > LARGEST:
            refuse_large(float(found.max()), LARGEST)
        if importance is None:
            return found
        factor = reach(relative(importance, w.shape[1], groups)).to(w.device)
        return torch.cat([found, minifloat.largest(w, groups, factor).unsqueeze(-1)], dim=-1)

    def in_chunks(self, fit: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
        """Applies `fit`, float32 [N, C] -> [N, G], to some rows at a time."""
        return torch.cat([fit(part) for part in row_chunks(w)])
