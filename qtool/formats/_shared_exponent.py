"""Groups of weights that share one power of two, stored as its exponent in 8 bits (E8M0): microscaling, block floats.

    w_hat = 2^(e - 127) * v         v a minifloat, or an integer with its point behind the first bit of its magnitude

The scale rule is the field `search`: `floor` is that of the OCP specification, floor(log2 largest) less the exponent
of the largest element, so that the largest weights may be clipped; `up` takes the next power of two where they would;
`even` does so only from mantissas on that round up to it, as compressed-tensors does for weights and inputs; the
others take the exponent with the least (importance-weighted) squared error.
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cache
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import Self

from qtool.formats._base import Params
from qtool.formats._scaled import Scaled
from qtool.numerics.grids import minifloat
from qtool.numerics.grids.minifloat import ceil_power, floor_power, nearest_power
from qtool.numerics.grids.scale_codes import CodedScales, best_code

BIAS = 127
LAST = 254
"""The largest exponent; 255 means NaN."""
TRIED = {"fast": (0, 1), "default": (-2, 1), "thorough": (-5, 2)}
"""Exponents that a search tries, relative to that of `floor`."""
Rule = Literal["floor", "up", "even", "fast", "default", "thorough"]


@cache
def powers(point: int) -> Tensor:
    """What stored exponents stand for, float32 [256], with infinity for NaN; see `SharedExponent.point`."""
    return torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - (BIAS + point)).float()


class SharedExponent(Scaled):
    """Base of the formats; a subclass says which elements, and how many share an exponent.

    Attributes:
        search: the rule for exponents, or how hard they are searched for.
    """

    search: Rule = "default"

    @property
    @abstractmethod
    def group_columns(self) -> int:
        """See `Format.group_columns`."""

    @property
    def point(self) -> int:
        """Bits of a level that lie behind its point; integers are counted in such steps."""
        return 0

    @property
    def smallest(self) -> int:
        """The exponent of a group of zeros, below which no other lies.

        That is 0, as other libraries write it; with a point, it is that of the smallest normal float32 number as scale,
        since compiled kernels multiply with inverses, which smaller ones do not have.
        """
        return self.point + 1 if self.point else 0

    def storage_bits(self, n: int, k: int) -> int:
        """See `Format.storage_bits`."""
        return n * k * self.code_bits + n * (k // self.group_columns) * 8

    def scale(self, params: Params) -> Tensor:
        """See `Scaled.scale`."""
        exponent = params["exponent"]
        return powers(self.point).to(exponent.device)[exponent.long()]

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """See `Format.fit`."""
        if self.search not in TRIED:
            return self._store(self.in_chunks(self._wanted, w))
        return {"exponent": self.in_chunks(lambda part: self._searched(part, importance), w)}

    def _searched(self, w: Tensor, importance: Tensor | None) -> Tensor:
        """Exponents of least error, float32 [N, C] -> uint8 [N, G]; `smallest` for a group of zeros."""
        groups = w.shape[1] // self.group_columns
        ends = self.extents(w, None if self.search == "fast" else importance, groups)
        scales = powers(self.point)[self.point : LAST + 1]
        around = ((ends.view(torch.int32) >> 23) - self.grid.exponent).clamp(0, len(scales) - 1).to(torch.uint8)
        found = best_code(w, importance, around, scales, TRIED[self.search], self.grid) + self.point
        return found.masked_fill_(ends[..., 0] == 0, self.smallest)

    def search_in_walk(self) -> CodedScales | None:
        """See `Format.search_in_walk`."""
        if self.search not in ("default", "thorough"):
            return None
        values = powers(self.point)[self.point : LAST + 1]
        empty = self.smallest - self.point
        return CodedScales(
            values, self.group_columns, TRIED[self.search], self.grid, unit=1.0, powers=True, empty=empty
        )

    def of_search(self, *found: Tensor) -> Params:
        """See `Format.of_search`."""
        (codes,) = found
        return {"exponent": codes + self.point}

    def _wanted(self, w: Tensor) -> Tensor:
        """Powers of two by a rule, float32 [N, C] -> [N, G]; zero for a group of zeros."""
        groups, unit = w.shape[1] // self.group_columns, 2.0**-self.grid.exponent
        if self.search == "up":
            return ceil_power(self.largest(w, groups).double() / self.grid.highest).float()
        largest = self.largest(w, groups)
        if self.search == "even":
            largest = largest + floor_power(largest) * self.carry
        return floor_power(largest) * unit

    @property
    def carry(self) -> float:
        """What `even` adds to the largest weight, relative to its power of two.

        compressed-tensors rounds to one bit of mantissa, to three for E2M3.
        """
        return 2.0**-4 if self.code_bits == 6 else 0.25

    def _store(self, scale: Tensor) -> Params:
        """Exponents of powers of two, those out of range moved to its end; `smallest` for zero."""
        exponent = scale.frexp().exponent - 1 + BIAS + self.point
        return {"exponent": torch.where(scale > 0, exponent, 0).clamp(self.smallest, LAST).to(torch.uint8)}

    def refit(self, params: Params, scale: Tensor, offset: Tensor) -> Params:
        """See `Format.refit`: the power of two with the least error; a scale that is not wanted positive stays."""
        return self._store(nearest_power(torch.where(scale > 0, scale, self.scale(params))))


class MX(SharedExponent):
    """Microscaling: 32 columns share an exponent.

    Attributes:
        element: how many exponent and mantissa bits: "e4m3".
    """

    usual: ClassVar[str]
    """The element that shorthands leave out."""

    element: str

    @property
    def label(self) -> str:
        """`mxfp8`, `mxfp8-e5m2`, `mxfp8-floor`."""
        parts = [type(self).__name__.lower()]
        parts += [self.element] * (self.element != self.usual) + [self.search] * (self.search != "default")
        return "-".join(parts)

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """See `Format.parse`."""
        elements, rules = (get_args(cls.model_fields[name].annotation) for name in ("element", "search"))
        for element in elements:
            for search in rules:
                fmt = cls.model_validate({"element": element, "search": search})
                if fmt.label == text:
                    return fmt
        return None

    @property
    def group_columns(self) -> int:
        """See `Format.group_columns`."""
        return 32

    @property
    def grid(self) -> minifloat.Grid:
        """See `Scaled.grid`."""
        return minifloat.minifloat(int(self.element[1]), int(self.element[3]))

    def at_run_time(self) -> Self:
        """See `Format.at_run_time`."""
        return self.model_copy(update={"search": "even"})
