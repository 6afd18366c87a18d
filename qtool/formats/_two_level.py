"""Groups of 16 weights with a scale in FP8, and one scale for the whole matrix: NVIDIA's two levels.

    w_hat = t * d * v       v a level, d >= 0 in E4M3 for 16 columns, t for the matrix

`search: minmax` is the usual rule: t puts the largest weight of the matrix on the largest level times the largest d,
448, and d puts each group's largest weight on the largest level. The other settings choose d by the
(importance-weighted) squared error, and make t a power of two, so that t * d is exact in the types that runtimes hold
it in.

t is chosen before any group is: for the matrix, or for all matrices that runtimes merge, whose largest weight
`with_largest` tells. It is kept in 64 bits, since layouts store it or its reciprocal in 32.
https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/BlockScaling.html
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Self

from qtool.formats._base import Params
from qtool.formats._scaled import Scaled
from qtool.numerics.grids.scale_codes import CodedScales, best_code
from qtool.numerics.threads.parallel import CPU

E4M3_MAX = 448.0
SMALLEST, LARGEST = 1, 0x7E
"""E4M3 bit patterns of 2^-9 and 448."""
EMPTY = 0x20
"""The scale of a group of zeros, 0.125, as compressed-tensors writes it."""
TRIED = {"fast": (-2, 2), "default": (-5, 6), "thorough": (-12, 10)}
"""Scales that a search tries, in E4M3 steps (eight to an octave) from the one that just covers the largest weight."""


class TwoLevel(Scaled):
    """Base of the formats; a subclass says which elements.

    Attributes:
        search: "minmax", or how hard the scales of groups are searched for.
    """

    search: Literal["minmax", "fast", "default", "thorough"] = "default"

    @property
    def label(self) -> str:
        """`nvfp4`, or `nvfp4-minmax`."""
        return type(self).__name__.lower() + ("" if self.search == "default" else f"-{self.search}")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """See `Format.parse`."""
        rules = ("minmax", *TRIED)
        return next((fmt for rule in rules if (fmt := cls.model_validate({"search": rule})).label == text), None)

    def at_run_time(self) -> Self:
        """See `Format.at_run_time`."""
        return self.model_copy(update={"search": "minmax"})

    @property
    def needs_largest(self) -> bool:
        """See `Format.needs_largest`."""
        return True

    @property
    def static(self) -> bool:
        """See `Format.static`: t is."""
        return True

    def covering(self, low: Tensor, high: Tensor) -> Params:
        """See `Format.covering`; groups choose their own d at run time."""
        t = self._tensor_scale(float(torch.maximum(-low, high).max()))
        return {"scale": torch.tensor([[t]], dtype=torch.float64)}

    def completed(self, x: Tensor, static: Params) -> Params:
        """See `Format.completed`."""
        t, fmt = float(static["scale"]), self.at_run_time()
        return {"scale": fmt.in_chunks(lambda part: fmt._bits(part, None, t), x), "tensor": fmt._matrix(x, t)}

    @property
    def group_columns(self) -> int:
        """See `Format.group_columns`."""
        return 16

    @property
    def block_columns(self) -> int | None:
        """See `Format.block_columns`; who does not know the matrix has to see all of it."""
        return None if self._largest is None else 16

    @property
    def by_rows(self) -> bool:
        """See `Format.by_rows`."""
        return self._largest is not None

    def storage_bits(self, n: int, k: int) -> int:
        """See `Format.storage_bits`."""
        return n * k * self.code_bits + n * (k // 16) * 8 + 32

    def scale(self, params: Params) -> Tensor:
        """See `Scaled.scale`."""
        return (local(params["scale"]).double() * params["tensor"]).float()

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """See `Format.fit`."""
        largest = float(self.largest(w, 1).max()) if self._largest is None else self._largest
        t = self._tensor_scale(largest)
        bits = self.in_chunks(lambda part: self._bits(part, importance, t), w)
        return {"scale": bits, "tensor": self._matrix(w, t)}

    def _matrix(self, w: Tensor, t: float) -> Tensor:
        """t for every row of a matrix."""
        return torch.full((len(w), 1), t, dtype=torch.float64, device=w.device)

    def _tensor_scale(self, largest: float) -> float:
        """t for matrices whose largest weight is known."""
        reach = E4M3_MAX * self.grid.highest
        if self.search == "minmax":
            inverse = float(torch.tensor(reach) / largest) if largest else 1.0  # in float32, as it is stored
            return 1.0 / inverse if math.isfinite(inverse) else 1.0
        mantissa, exponent = math.frexp(largest / reach)
        return 2.0 ** (exponent - (mantissa == 0.5)) if largest else 1.0

    def _bits(self, w: Tensor, importance: Tensor | None, t: float) -> Tensor:
        """E4M3 bit patterns of the groups' scales, float32 [N, C] -> uint8 [N, G]."""
        groups = w.shape[1] // 16
        if self.search == "minmax":
            covering = self.largest(w, groups) / self.grid.highest
            return nonzero(nearest_bits(covering * (1.0 / t)))
        ends = self.extents(w, importance, groups) / self.grid.highest
        values = scales(t, w.device)
        found = best_code(w, importance, nearest_bits(ends / t), values, TRIED[self.search], self.grid)
        return torch.where(ends[..., 0] > 0, found, EMPTY)

    def search_in_walk(self) -> CodedScales | None:
        """See `Format.search_in_walk`."""
        if self.search == "minmax" or self._largest is None:
            return None
        t = self._tensor_scale(self._largest)
        return CodedScales(
            scales(t, CPU), self.group_columns, TRIED[self.search], self.grid, unit=t, powers=False, empty=EMPTY
        )

    def of_search(self, *found: Tensor) -> Params:
        """See `Format.of_search`."""
        (codes,) = found
        assert self._largest is not None
        return {"scale": codes, "tensor": self._matrix(codes, self._tensor_scale(self._largest))}

    def join(self, parts: list[Params]) -> Params:
        """See `Format.join`; blocks of a matrix have its scale in common."""
        return super().join(parts) | {"tensor": parts[0]["tensor"]}

    def refit(self, params: Params, scale: Tensor, offset: Tensor) -> Params:
        """See `Format.refit`: t stays, and so does a scale that is not wanted positive."""
        wanted = nearest_bits(scale / params["tensor"]).clamp_min(SMALLEST)
        return params | {"scale": torch.where(scale > 0, wanted, params["scale"])}


@lru_cache(maxsize=16)
def scales(t: float, device: torch.device) -> Tensor:
    """Scales of groups by bit pattern, float32 [LARGEST + 1]."""
    return (local(torch.arange(LARGEST + 1, dtype=torch.uint8)).double() * t).float().to(device)


def local(bits: Tensor) -> Tensor:
    """Values of E4M3 bit patterns below 0x7f: uint8 -> float32."""
    return bits.view(torch.float8_e4m3fn).float()


def nearest_bits(x: Tensor) -> Tensor:
    """Bit patterns of the E4M3 numbers nearest to x >= 0, at most 448: float -> uint8."""
    return x.float().clamp(0, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def nonzero(bits: Tensor) -> Tensor:
    """Scales that runtimes may divide by."""
    return torch.where(bits == 0, EMPTY, bits)
