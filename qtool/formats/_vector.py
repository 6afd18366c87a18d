"""What the IQ types with codebooks share: super-blocks of 256 columns, in vectors of 4 or 8 that a table allows.

    w_hat = d * unit * (2 s + 1) * (level + shift)

d is an fp16 scale, s an integer of 3 or 4 bits per group of columns, the shift plus or minus 1/8 in the 1-bit types
and 0 in the others. Codes index the levels column by column, as in every format; `codebook` says which go together,
and the bytes hold an entry's number and signs. The tables are those of ggml-common.h
(https://github.com/ggml-org/llama.cpp), as the package gguf has them.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from qtool.errors import NumericsError
from qtool.formats._base import Params, expand, row_chunks
from qtool.formats._ggml import BlockFormat, fp16
from qtool.numerics.codebooks.codebook import Codebook
from qtool.numerics.codebooks.scale_rule import EFFORT, ScaleRule
from qtool.numerics.codebooks.vector_search import vector_scales
from qtool.numerics.codebooks.vector_snap import snap_vectors
from qtool.numerics.ggml.codebook import CodebookSearch, ggml_codebook_scales
from qtool.numerics.ggml.ternary import TernarySearch, ggml_ternary_scales

BITS = torch.arange(8, dtype=torch.uint8)

DOUBT = 1e-4
"""Errors in parts of a block's energy that are closer than this are compared exactly."""
FAST_CLOSE = 8
"""Entries near a vector that the fast search compares for its codes; the others find the nearest of all."""


@cache
def codebook(name: str, signs: Literal["none", "free", "even"], span: int) -> Codebook:
    """The codebook of a block type of that name in gguf."""
    from gguf import quants

    source = getattr(quants, name)
    source.init_grid()
    magnitudes = np.array(source.grid_map, np.float32)
    entries = np.searchsorted(magnitudes, source.grid.reshape(source.grid_shape)).astype(np.uint8)
    return Codebook(entries, magnitudes, signs, span)


class Vector(BlockFormat):
    """Super-blocks of table entries. Parameters: d fp16, s uint8, and where there are shifts `minus`, uint8 0 or 1.

    Attributes:
        rule: how scales are stored.
        signs, span: see `Codebook`.
        ggml: its own search, to compare with.
    """

    search: Literal["fast", "default", "thorough"] = "default"
    columns: ClassVar[int] = 256
    fallback: ClassVar[str | None] = "iq4_nl"
    rule: ClassVar[ScaleRule]
    signs: ClassVar[Literal["none", "free", "even"]]
    span: ClassVar[int] = 8
    ggml: ClassVar[CodebookSearch | TernarySearch]

    @property
    def group_columns(self) -> int | None:
        """See `Format.group_columns`."""
        return self.rule.segment

    def codebook(self) -> Codebook:
        """See `Format.codebook`."""
        return codebook(type(self).__name__, self.signs, self.span)

    def levels(self) -> Tensor:
        """See `Format.levels`."""
        magnitudes = torch.from_numpy(self.codebook().magnitudes)
        return magnitudes.clone() if self.signs == "none" else torch.cat([-magnitudes.flip(0), magnitudes])

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """See `Format.fit`."""
        parts = [self._fit(part, importance) for part in row_chunks(w)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _fit(self, w: Tensor, importance: Tensor | None) -> Params:
        weight, effort, book = self.normalized(w, importance), EFFORT[self.search][self.rule.delta > 0], self.codebook()
        d, s, signs, ours = vector_scales(w, weight, book, self.columns, self.rule, effort)
        found = self.stored(d, s, signs < 0)
        if self._alone or self.search == "fast" or (importance is None and self.ggml.required):
            return found
        scaled = None if importance is None else self.usable(importance)
        if isinstance(self.ggml, TernarySearch):
            *choice, theirs = ggml_ternary_scales(w, scaled, weight, book, self.rule, self.ggml)
        else:
            *choice, theirs = ggml_codebook_scales(w, scaled, weight, book, self.rule, self.ggml)
        close = (ours + DOUBT > theirs).any(1)
        if bool(close.any()):
            ours_there = {name: p[close] for name, p in found.items()}
            other = self.stored(*(part[close] for part in choice))
            for name, p in self.no_worse(ours_there, other, w[close], importance).items():
                found[name][close] = p
        return found

    def stored(self, d: Tensor, s: Tensor, minus: Tensor) -> Params:
        """Rounds d to fp16. Raises NumericsError: too large for it."""
        shifts = {"minus": minus.to(torch.uint8)} if self.rule.delta else {}
        return {"d": fp16(d, self.label), "s": s.to(torch.uint8)} | shifts

    def snap(self, w: Tensor, params: Params, importance: Tensor | None = None) -> Tensor:
        """See `Format.snap`."""
        close = FAST_CLOSE if self.search == "fast" else 0
        return snap_vectors(w, self.normalized(w, importance), self.affine(params), self.codebook(), close)

    def normalized(self, w: Tensor, importance: Tensor | None) -> Tensor:
        """Of squared errors of w [N, C], float32 [C]: `weights`, 1 on average in every block (or in what there is)."""
        columns = self.columns if w.shape[1] % self.columns == 0 else w.shape[1]
        weight = self.weights(w, importance, columns).view(-1, columns)
        return (weight / weight.mean(1, keepdim=True)).flatten()

    def affine(self, params: Params) -> tuple[Tensor, Tensor]:
        """See `Format.affine`."""
        steps = 2 * params["s"].float() + 1
        scale = expand(params["d"].float(), steps.shape[1]) * (steps * self.rule.unit)
        if not self.rule.delta:
            return scale, torch.zeros_like(scale)
        scale = expand(scale, params["minus"].shape[1])
        return scale, scale * self.rule.delta * (1 - 2 * params["minus"].float())

    def refit(self, params: Params, scale: Tensor, offset: Tensor) -> Params:
        """See `Format.refit`: d moves to the least-squares fit for all s, then they are rounded again; shifts stay."""
        blocks = params["d"].shape[1]
        wanted = scale.view(len(scale), blocks, -1, self.rule.group // self.rule.segment).mean(-1) / self.rule.unit
        steps = 2 * params["s"].view(wanted.shape).float() + 1
        d = fp16((wanted * steps).sum(-1) / steps.square().sum(-1), self.label)
        divisor = torch.where(d == 0, 1.0, d.float())[..., None]
        s = ((wanted / divisor - 1) / 2).round().clamp(0, self.rule.top)
        return self.stored(d, s.flatten(1), params.get("minus", s))

    def entries(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """(entry of every vector, int32 [N, K / V]; signs, uint8 [N, K / 8], first column lowest, set where negative).

        Raises:
            NumericsError: codes that no entry has together, or signs that are not stored.
        """
        book = self.codebook()
        count = len(book.magnitudes)
        fields, negative = codes, torch.zeros((len(codes), codes.shape[1] // 8), dtype=torch.uint8)
        if self.signs != "none":
            minus = codes < count
            fields = torch.where(minus, count - 1 - codes, codes - count)
            negative = (minus.view(len(codes), -1, 8) << BITS).sum(-1, dtype=torch.uint8)
        places = torch.tensor([count**i for i in reversed(range(book.width))], dtype=torch.int32)
        keys = (fields.view(len(codes), -1, book.width) * places).sum(-1, dtype=torch.int32)
        entries = torch.from_numpy(book.index)[keys]
        if bool((entries < 0).any()) or (self.signs == "even" and bool((parity(negative) == 1).any())):
            raise NumericsError(f"some codes do not go together in {self.label}", hint="choose them with its `snap`")
        return entries, negative

    def codes(self, entries: Tensor, negative: Tensor) -> Tensor:
        """The inverse of `entries`."""
        book = self.codebook()
        count = len(book.magnitudes)
        fields = torch.from_numpy(book.entries)[entries.long()].view(len(entries), -1)
        if self.signs == "none":
            return fields
        minus = (negative[..., None] >> BITS & 1).bool().view(fields.shape)
        return torch.where(minus, count - 1 - fields, count + fields)


def parity(signs: Tensor) -> Tensor:
    """1 where the number of set bits is odd: uint8 -> uint8."""
    signs = signs ^ signs >> 4
    signs = signs ^ signs >> 2
    return (signs ^ signs >> 1) & 1


def eighth_sign(seven: Tensor) -> Tensor:
    """uint8 of seven signs -> of eight, whose number is even."""
    return seven | parity(seven) << 7


def fields_to_bytes(fields: Tensor, bits: int, places: int) -> Tensor:
    """[..., F] fields at multiples of `bits` from the lowest on -> words of `places` bytes, uint8 [..., places]."""
    shifts = torch.arange(fields.shape[-1]) * bits
    words = (fields.long() << shifts).sum(-1, keepdim=True)
    return (words >> 8 * torch.arange(places) & 255).to(torch.uint8)


def bytes_to_fields(packed: Tensor, bits: int, count: int) -> Tensor:
    """uint8 [..., places] -> the first `count` fields, uint8 or int16 [..., count] as `bits` needs."""
    words = (packed.long() << 8 * torch.arange(packed.shape[-1])).sum(-1, keepdim=True)
    fields = words >> bits * torch.arange(count) & (1 << bits) - 1
    return fields.to(torch.uint8 if bits <= 8 else torch.int16)
