"""NVFP4: E2M1 elements, a scale in E4M3 for 16 columns, and one for the matrix; 4.5 bits. In GGUF it is block type 40.

    w_hat = t * d * v        v of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives

MXFP4 is the same elements with powers of two as scales of 32 columns. It is taken over with t = 2^-6, whatever matrix
it is of, so that matrices that runtimes merge have t in common: E4M3 then has the scales from 2^-15 to 2^2.

`augment` is for inputs: behind their first channels, which `permute` can make the largest, stand as many more, what
rounding left of them in the same format, and weights have their columns twice (ARCQuant,
https://arxiv.org/abs/2601.07475).

A GGUF block is 64 columns: four scales, then 8 bytes for each 16 columns; t is a tensor of its own.
https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/BlockScaling.html
https://github.com/ggml-org/llama.cpp, block_nvfp4 in ggml/src/ggml-common.h
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.formats._base import Format, Params, Quantized
from qtool.formats._fp4 import from_bit_patterns, pack_halves
from qtool.formats._ggml import BlockFormat
from qtool.formats._two_level import EMPTY, TwoLevel, local, nearest_bits
from qtool.formats.mxfp4 import MXFP4
from qtool.numerics.grids import minifloat
from qtool.numerics.grids.bits import from_planes

UNIT = 2.0**-6
"""t of what is taken over from MXFP4."""


class NVFP4(TwoLevel, BlockFormat):
    """4-bit floats with two levels of scales.

    Attributes:
        search: "minmax", or how hard the scales of groups are searched for.
        augment: first channels of an input whose rounding errors are rounded and multiplied as well; whole groups.
    """

    examples: ClassVar[tuple[str, ...]] = ("nvfp4-minmax",)
    ggml_type: ClassVar[int] = 40
    columns: ClassVar[int] = 64
    block_bytes: ClassVar[int] = 36
    matrix_scale: ClassVar[str | None] = "tensor"
    fallback: ClassVar[str | None] = None

    search: Literal["minmax", "fast", "default", "thorough"] = "default"  # type: ignore[assignment]
    augment: int = Field(default=0, ge=0, multiple_of=16)

    @property
    def augmented(self) -> int:
        """See `RunTime.augmented`."""
        return self.augment

    @property
    def label(self) -> str:
        """`nvfp4`, `nvfp4-minmax`, and `nvfp4+64` with that many augmented channels, which no shorthand spells."""
        return super().label + (f"+{self.augmented}" if self.augmented else "")

    def misfit(self, k: int) -> str | None:
        """See `Format.misfit`."""
        few = f"rows of {k} columns have no {self.augmented} first ones" if self.augmented > k else None
        return super().misfit(k) or few

    @property
    def grid(self) -> minifloat.Grid:
        """See `Scaled.grid`."""
        return minifloat.minifloat(2, 1)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """See `Format.fit`. ggml's choice is d for t = 1: what covers the largest weight of a group."""
        found = super().fit(w, importance)
        if self._alone or self.search in ("minmax", "fast"):
            return found
        wanted = local(nearest_bits(self.largest(w, w.shape[1] // self.group_columns) / self.grid.highest))
        theirs = nearest_bits(wanted / found["tensor"])
        same = (theirs > 0) & (local(theirs).double() * found["tensor"] == wanted)  # t may be too small or too large
        other = found | {"scale": torch.where(same, theirs, found["scale"])}
        return self.no_worse(found, other, w, importance, self.group_columns)

    def may_hold(self, fmt: Format) -> str | None:
        """See `Format.may_hold`."""
        return None if isinstance(fmt, MXFP4) and not self.augment else super().may_hold(fmt)

    def _of_powers(self, quantized: Quantized) -> Quantized | str:
        """MXFP4 in this format, or why its scales are not."""
        wanted = quantized.format.affine(quantized.params)[0].double()
        n, groups = wanted.shape
        empty = (quantized.codes.view(n, groups, -1) == self.grid.levels().tolist().index(0.0)).all(2)
        bits = nearest_bits(wanted / UNIT)
        if bool(((local(bits).double() * UNIT != wanted) & ~empty).any()):
            return "a power of two of mxfp4 is none of nvfp4's scales, which reach from 2^-15 to 2^2"
        scale = torch.where(empty, EMPTY, bits).repeat_interleave(2, dim=1)
        return Quantized(quantized.codes, {"scale": scale, "tensor": self._matrix(quantized.codes, UNIT)}, self)

    def hold(self, quantized: Quantized) -> Quantized | str:
        """See `Format.hold`. Layouts that store the reciprocal of t may have one that is not exact in 32 bits."""
        powers = isinstance(quantized.format, MXFP4) and not self.augment
        stored = self._of_powers(quantized) if powers else super().hold(quantized)
        if isinstance(stored, str):
            return stored
        if (k := stored.codes.shape[1]) % self.columns:
            return f"rows of {k} columns are not divisible by {self.columns}"
        t = stored.params["tensor"]
        if not torch.equal(t.float().double(), t) or bool((t != t[0]).any()):
            return "its matrix scale is no single number that is exact in 32 bits; other settings than minmax find one"
        return stored

    def pack(self, codes: Tensor, params: Params) -> Tensor:
        """See `BlockFormat.pack`."""
        q = codes.reshape(-1, 64)
        packed = torch.empty(len(q), self.block_bytes, dtype=torch.uint8)
        packed[:, :4] = params["scale"].reshape(-1, 4)
        for part in range(4):
            pack_halves(q[:, 16 * part : 16 * (part + 1)], packed[:, 4 + 8 * part : 12 + 8 * part])
        return packed.view(len(codes), -1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Params]:
        """See `BlockFormat.unpack`."""
        n = len(packed)
        blocks = packed.reshape(n, -1, self.block_bytes)
        q = from_bit_patterns(from_planes(blocks[..., 4:].reshape(n, -1, 4, 8), 4, 8))
        return q.reshape(n, -1), {"scale": blocks[..., :4].reshape(n, -1), "tensor": torch.ones(n, 1).double()}
