"""What a format is: the representation of a weight matrix, known to methods only through this protocol.

Every scalar format decodes as `w_hat = scale * levels[code] + offset`: a shared ascending table of levels, and a
(scale, offset) pair per row and group of columns. Integers, minifloats, ternary grids and GGUF's K-quants all read
that way, so a method that walks columns, or refits scales in closed form, needs nothing else.

Formats with a codebook read the same way, but not every combination of neighbouring codes is allowed: `codebook` says
which, and `snap` and methods choose whole vectors.

Shape letters, here and in every format: N rows (output features), K columns (input features), C columns of a slice,
G groups of a slice (C / group_columns, or 1), L levels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor

from qtool.formats._roles import RunTime, Scheduled
from qtool.numerics.codebooks.codebook import Codebook
from qtool.numerics.grids.affine import decode_levels, round_to_levels
from qtool.numerics.solving.settle_multiples import Multiples

Params = dict[str, Tensor]
"""Fitted parameters by name, each [N, entries]; C / entries columns share one entry."""
CHUNK = 1 << 21
"""Weights that a search works on at once, so that its memory does not grow with the matrix."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """Codes of one matrix.

    Attributes:
        codes: uint8 [N, K], indices into `format.levels()`.
        params: what `format.fit` returned for all K columns.
        format: how the two are read.
    """

    codes: Tensor
    params: Params
    format: Format

    def decode(self) -> Tensor:
        """float32 [N, K], the weights that a runtime sees."""
        return self.format.decode(self.codes, self.params)

    def to(self, device: torch.device) -> Quantized:
        """The same on a device."""
        return Quantized(self.codes.to(device), {n: p.to(device) for n, p in self.params.items()}, self.format)

    def rows(self, start: int, stop: int) -> Quantized:
        """Rows `start` to `stop`, sharing memory."""
        return Quantized(self.codes[start:stop], {n: p[start:stop] for n, p in self.params.items()}, self.format)


class Format(Scheduled, RunTime):
    """A representation: grid, granularity, scale type. Instances are immutable, hashable and comparable.

    The fields of a subclass are its options in a recipe. A subclass sets `group_columns` (and `block_columns`), and
    implements the abstract methods; `snap` and `decode` follow from them unless the true arithmetic differs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    examples: ClassVar[tuple[str, ...]] = ()
    """Shorthands to suggest and to complete, where the family spells more than its own name."""
    fallback: ClassVar[str | None] = None
    """What takes rows that this format cannot divide, unless a recipe says otherwise: a format's name, or "f16"."""
    free_offset: ClassVar[bool] = False
    """True where the offset is free, so that a closed-form refit may move it beside the scale."""

    @property
    @abstractmethod
    def label(self) -> str:
        """The shorthand that recipes use; parsing it gives an equal format."""

    @classmethod
    def parse(cls, text: str) -> Format | None:
        """The format that a shorthand spells, or None if it is not one of this family's."""
        return cls() if text == cls.__name__.lower() else None

    @abstractmethod
    def levels(self) -> Tensor:
        """float32 [L], ascending; a code is an index into it."""

    @property
    def code_bits(self) -> int:
        """Bits that tell a code from all others; none where there is nothing to choose from."""
        return (len(self.levels()) - 1).bit_length()

    @abstractmethod
    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """Chooses parameters for a slice of whole blocks.

        Args:
            w: float32 [N, C].
            importance: float32 [C] >= 0, the weight of a column's squared error; None: all alike.
        """

    @abstractmethod
    def affine(self, params: Params) -> tuple[Tensor, Tensor]:
        """(scale, offset), float32 [N, G] each."""

    @abstractmethod
    def refit(self, params: Params, scale: Tensor, offset: Tensor) -> Params:
        """The storable parameters nearest to a wanted (scale, offset), float32 [N, G] each.

        What cannot be moved freely (an integer zero point, a shared super-block scale) stays as `params` has it.
        """

    def refit_weighted(self, params: Params, scale: Tensor, offset: Tensor, curvature: Tensor) -> Params:
        """As `refit`, nearest in the metric of an objective, for formats whose parameters are coarse.

        Args:
            params: present parameters.
            scale: wanted, float32 [N, G].
            offset: wanted, float32 [N, G].
            curvature: float32 [N, P, P], positive definite: how errors of a row's scales count, and behind them, where
                they are free, those of its offsets.
        """
        return self.refit(params, scale, offset)

    def multiples(self, params: Params) -> Multiples | None:
        """Parameters as integer multiples of steps that several groups of a row share; None where they are none."""
        return None

    def of_multiples(self, found: Multiples) -> Params:
        """The parameters that `multiples` tells."""
        raise NotImplementedError

    @abstractmethod
    def storage_bits(self, n: int, k: int) -> int:
        """Bits that a matrix of n rows and k columns takes, parameters included."""

    @property
    def tight(self) -> Mapping[str, tuple[int, int]]:
        """Parameters that files hold in less room than their tensors take: (bits of an entry, rows that share it).

        Fewer than 8 bits are those of uint8 codes; all others keep their type.
        """
        return {}

    def codebook(self) -> Codebook | None:
        """The allowed combinations of neighbouring codes; None if all are."""
        return None

    def snap(self, w: Tensor, params: Params, importance: Tensor | None = None) -> Tensor:
        """Rounds to the nearest level, or vector: w float32 [N, C] -> uint8 [N, C].

        Ties of uniform grids go to the even level. What is nearest depends on the importance of columns, float32 [C],
        only for vectors.
        """
        scale, offset = self.affine(params)
        levels = self.levels()
        lowest, highest = float(levels[0]), float(levels[-1])  # of numbers that are here: a device would be waited for
        uniform = highest - lowest == len(levels) - 1
        if uniform and w.device.type in ("cpu", "cuda"):
            return round_to_levels(w, scale, offset, lowest, highest)
        scale, offset = (expand(p, w.shape[1]) for p in (scale, offset))
        x = torch.where(scale == 0, 0.0, (w - offset) / torch.where(scale == 0, 1.0, scale))
        if uniform:
            return (x.round().clamp(lowest, highest) - lowest).to(torch.uint8)
        levels = levels_on(self, w.device)
        return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """uint8 [N, C] -> float32 [N, C]."""
        scale, offset = self.affine(params)
        if codes.device.type in ("cpu", "cuda"):
            return decode_levels(codes, levels_on(self, codes.device), scale, offset)
        level = levels_on(self, codes.device)[codes.long()]
        return level * expand(scale, codes.shape[1]) + expand(offset, codes.shape[1])

    def join(self, parts: list[Params]) -> Params:
        """The parameters of neighbouring blocks, put side by side."""
        return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}

    def may_hold(self, fmt: Format) -> str | None:
        """Why this format cannot hold matrices in another one, whatever their data; None if it can."""
        return None if alike(self, fmt) else f"{self.label} holds no {fmt.label}"

    def hold(self, quantized: Quantized) -> Quantized | str:
        """The same values in this format, exactly; or the reason why they cannot be."""
        return self.may_hold(quantized.format) or quantized

    def misfit(self, k: int) -> str | None:
        """Why rows of k columns cannot be held, with what would fit; None if they can."""
        block = self.block_columns or self.group_columns
        if block is None or k % block == 0:
            return None
        usual = (16, 32, 64, 96, 128, 192, 256) if "group" in type(self).model_fields else ()
        near = sorted((g for g in usual if k % g == 0), key=lambda g: abs(g - block))
        return f"rows of {k} columns are not divisible by {block}" + (
            f"; groups that divide: {', '.join(map(str, near[:3]))}" if near else ""
        )


@cache
def levels_on(fmt: Format, device: torch.device) -> Tensor:
    """A format's levels on a device, which does not wait for them more than once; to be read only."""
    return fmt.levels().to(device)


def alike(a: Format, b: Format) -> bool:
    """True if two formats have the same values, however these are chosen and in whatever type scales are stored."""
    choice = {"search", "scales", "scale_dtype"}
    return type(a) is type(b) and a.model_dump(exclude=choice) == b.model_dump(exclude=choice)


def too_wide(fmt: Format, zeros: bool, holder: Format) -> str:
    """Why a format cannot hold another one: it has too few codes for that one's range, or for its zero points."""
    cause = f"the zero points of {fmt.label} do" if zeros else f"the range of {fmt.label} does"
    return f"{cause} not fit {holder.label}"


@cache
def entries(fmt: Format, k: int) -> Mapping[str, tuple[int, torch.dtype]]:
    """Entries of a row of k columns, and type, of each parameter; a row of zeros has them as well as any other."""
    informed = fmt.with_largest(1.0) if fmt.needs_largest else fmt
    return {name: (p.shape[1], p.dtype) for name, p in informed.fit(torch.zeros(1, k)).items()}


def row_chunks(w: Tensor) -> tuple[Tensor, ...]:
    """The rows of a matrix in parts of about `CHUNK` weights, sharing memory."""
    return torch.split(w, max(1, CHUNK // w.shape[1]))


def expand(p: Tensor, columns: int) -> Tensor:
    """One entry per column: [N, G] -> [N, columns]."""
    return p.expand(-1, columns) if p.shape[1] == 1 else p.repeat_interleave(columns // p.shape[1], dim=1)
