"""GGUF's K-quants: super-blocks of 256 columns, whose groups have integer multiples of shared fp16 steps.

    Q2_K, Q4_K, Q5_K:  w_hat = (d * sc) * q - (dmin * m)     sc, m >= 0
    Q3_K, Q6_K:        w_hat = (d * sc) * q                  q and sc signed

Layouts are those of ggml (https://github.com/ggml-org/llama.cpp, ggml/src/ggml-common.h). The search is described in
`qtool.numerics.scales.kquant`: it refines scales, minima and steps together.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from qtool.formats._base import Format, Params, Quantized, alike, expand, too_wide
from qtool.formats._ggml import BlockFormat, fp16
from qtool.formats.biased import Biased
from qtool.formats.int import Int
from qtool.numerics.ggml import search as ggml_search
from qtool.numerics.ggml.groups import Sweep
from qtool.numerics.ggml.search import ScaleSearch
from qtool.numerics.scales.kquant import EFFORT, SuperBlock, search_super_blocks
from qtool.numerics.scales.multiples import nearest_multiples
from qtool.numerics.solving.kquant_refit import refit_multiples
from qtool.numerics.solving.settle_multiples import Multiples


class KQuant(BlockFormat):
    """A K-quant. Parameters: d and, with minima, dmin fp16 [N, S]; sc and m, 8 bits [N, G].

    S super-blocks and G groups of a slice.

    Attributes:
        group: columns of a group.
        bits: of a code.
        minima: True if groups have minima; without, codes and scales are signed.
        scale_bits: of sc and m.
        ggml_spread, ggml_sweep, ggml_flat: see `qtool.numerics.ggml.search.ScaleSearch`.
    """

    columns: ClassVar[int] = 256
    group: ClassVar[int] = 16
    bits: ClassVar[int]
    minima: ClassVar[bool] = False
    scale_bits: ClassVar[int]
    ggml_spread: ClassVar[float]
    ggml_sweep: ClassVar[Sweep]
    ggml_flat: ClassVar[float] = 0

    search: Literal["fast", "default", "thorough"] = "default"

    @property
    def group_columns(self) -> int | None:
        """See `Format.group_columns`."""
        return self.group

    @property
    def lowest(self) -> int:
        """The level of code 0."""
        return 0 if self.minima else -(1 << (self.bits - 1))

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest sc (and m)."""
        low = 0 if self.minima else -(1 << (self.scale_bits - 1))
        return low, low + (1 << self.scale_bits) - 1

    def levels(self) -> Tensor:
        """See `Format.levels`."""
        return torch.arange(self.lowest, self.lowest + (1 << self.bits), dtype=torch.float32)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """See `Format.fit`."""
        lowest, low, top = (np.float32(end) for end in (self.lowest, *self.limits))
        highest = lowest + np.float32((1 << self.bits) - 1)
        kind, effort = SuperBlock(self.group, lowest, highest, low, top, self.minima), EFFORT[self.search][self.minima]
        if self._alone or (self.search == "fast" and not self.minima):  # ggml's takes half of the time of `fast`
            return self.stored(*search_super_blocks(w, importance, kind, effort))
        d, dmin, a, b = self.ggml_choice(w, importance)
        theirs = d.half().float(), dmin.half().float(), a, b
        found = self.stored(*search_super_blocks(w, importance, kind, effort, theirs))
        return self.no_worse(found, self.stored(*theirs), w, importance)

    def ggml_choice(self, w: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(d, dmin, a, b) of ggml's encoder, before steps are rounded to fp16; see `ggml_scales`."""
        levels, top = ((1 << self.bits) - 1, self.limits[1]) if self.minima else (-self.lowest, -self.limits[0])
        spread, flat = np.float32(self.ggml_spread), np.float32(self.ggml_flat)
        kind = ScaleSearch(self.group, np.float32(levels), np.float32(top), self.minima, spread, self.ggml_sweep, flat)
        return ggml_search.ggml_scales(w, None if importance is None else self.usable(importance), kind, self.columns)

    def stored(self, d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor) -> Params:
        """Parameters in the types they are stored in. Raises NumericsError: a step is too large for fp16."""
        if not self.minima:
            return {"d": fp16(d, self.label), "sc": sc.to(torch.int8)}
        steps = {"d": fp16(d, self.label), "dmin": fp16(dmin, self.label)}
        return steps | {"sc": sc.to(torch.uint8), "m": m.to(torch.uint8)}

    def affine(self, params: Params) -> tuple[Tensor, Tensor]:
        """See `Format.affine`."""
        groups = params["sc"].shape[1]
        scale = expand(params["d"].float(), groups) * params["sc"].float()
        if not self.minima:
            return scale, torch.zeros_like(scale)
        return scale, -(expand(params["dmin"].float(), groups) * params["m"].float())

    def refit(self, params: Params, scale: Tensor, offset: Tensor) -> Params:
        """See `Format.refit`. Steps move where that brings the multiples nearer."""
        d, sc = nearest_multiples(scale, params["d"].float(), self.limits)
        if not self.minima:
            return self.stored(d, d, sc, sc)
        dmin, m = nearest_multiples(-offset, params["dmin"].float(), self.limits)
        return self.stored(d, dmin, sc, m)

    def refit_weighted(self, params: Params, scale: Tensor, offset: Tensor, curvature: Tensor) -> Params:
        """See `Format.refit_weighted`: goes on from the present parameters or from the nearest, row by row."""
        wanted = (scale, offset)[: 1 + self.minima]

        def missing(p: Params) -> Tensor:
            return torch.cat([want - got for want, got in zip(wanted, self.affine(p), strict=False)], 1)

        near = self.refit(params, scale, offset)
        pulls = [torch.einsum("npq,nq->np", curvature, missing(p)) for p in (params, near)]
        distances = [(pull * missing(p)).sum(1, keepdim=True) for pull, p in zip(pulls, (params, near), strict=True)]
        nearer = distances[1] < distances[0]
        start = {name: torch.where(nearer, near[name], old).float() for name, old in params.items()}
        d, sc = start["d"], start["sc"]
        dmin, m = start.get("dmin", d), start.get("m", sc)
        pull = torch.where(nearer, pulls[1], pulls[0])
        return self.stored(*refit_multiples(curvature, pull, (d, dmin, sc, m), self.limits))

    def multiples(self, params: Params) -> Multiples:
        """See `Format.multiples`."""
        d, sc = (params[name].float() for name in ("d", "sc"))
        dmin, m = (params[name].float() if self.minima else same for name, same in (("dmin", d), ("m", sc)))
        return Multiples(d, dmin, sc, m, self.minima, self.limits)

    def of_multiples(self, found: Multiples) -> Params:
        """See `Format.of_multiples`."""
        return self.stored(*found[:4])

    def pack(self, codes: Tensor, params: Params) -> Tensor:
        """See `BlockFormat.pack`."""
        n = len(codes)
        blocks = codes.reshape(n, -1, self.columns)
        shaped = {name: p.reshape(*blocks.shape[:2], -1).contiguous() for name, p in params.items()}
        parts = self.pack_block(blocks, {name: shaped[name].view(torch.uint8) for name in shaped})
        return torch.cat(parts, dim=-1).reshape(n, -1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Params]:
        """See `BlockFormat.unpack`."""
        n = len(packed)
        codes, fields = self.unpack_block(packed.reshape(n, -1, self.block_bytes))
        steps = {name: p.contiguous().view(torch.float16) for name, p in fields.items() if name in ("d", "dmin")}
        dtype = torch.uint8 if self.minima else torch.int8
        integers = {name: p.contiguous().view(dtype) for name, p in fields.items() if name not in steps}
        return codes.reshape(n, -1), {name: p.reshape(n, -1) for name, p in (steps | integers).items()}

    @abstractmethod
    def pack_block(self, q: Tensor, fields: Params) -> list[Tensor]:
        """The fields of the blocks in their order, uint8 [N, S, bytes] each.

        Args:
            q: uint8 [N, S, 256].
            fields: the parameters as bytes: uint8 [N, S, 2] of d and dmin, [N, S, groups] of sc and m.
        """

    @abstractmethod
    def unpack_block(self, blocks: Tensor) -> tuple[Tensor, Params]:
        """The inverse of `pack_block`: uint8 [N, S, block_bytes] -> (q, fields)."""

    def may_hold(self, fmt: Format) -> str | None:
        """See `Format.may_hold`."""
        if alike(self, fmt):
            return None
        if not isinstance(fmt, Int) and not (isinstance(fmt, Biased) and self.minima):
            return f"{self.label} holds no {fmt.label}"
        if fmt.group_columns is not None and fmt.group_columns % self.group:
            return f"{self.label} needs groups that are a multiple of {self.group} columns, not {fmt.group_columns}"
        zeros = isinstance(fmt, Int) and not fmt.symmetric
        if fmt.bits + (zeros and not self.minima) > self.bits:
            return too_wide(fmt, zeros, self)
        return None

    def hold(self, quantized: Quantized) -> Quantized | str:
        """See `Format.hold`. It takes scales that are small multiples of a step, as those of whole super-blocks are."""
        codes, params, fmt = quantized.codes, quantized.params, quantized.format
        reason = self.may_hold(fmt) or self.misfit(codes.shape[1])
        if reason or alike(self, fmt):
            return reason or quantized
        scale, offset = (expand(p, codes.shape[1] // self.group) for p in fmt.affine(params))
        lowest_value = offset + float(fmt.levels()[0]) * scale
        supers = codes.shape[1] // self.columns
        steps = common_step(scale, supers, self.limits)
        minima = common_step(-lowest_value, supers, self.limits) if self.minima else steps
        if steps is None or minima is None:
            which = "scales" if steps is None else "zero points times their scales"
            return f"some {which} of a super-block are no multiples of one step"
        if not self.minima:
            shift = torch.where(scale == 0, self.lowest, (lowest_value / scale).round())
            codes = (codes.reshape(*scale.shape, -1) + (shift - self.lowest).to(torch.uint8)[..., None]).flatten(1)
        return Quantized(codes, self.stored(steps[0], minima[0], steps[1], minima[1]), self)


def common_step(values: Tensor, supers: int, limits: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """Steps in fp16 whose multiples are exactly some values; None: one of the super-blocks has none.

    Args:
        values: float32 [N, G].
        supers: S.
        limits: of the multiples.

    Returns:
        (float32 [N, S], float32 [N, G] with integer values).
    """
    low, top = limits
    x = values.reshape(len(values), supers, -1)
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    d, multiples = torch.zeros_like(extreme), torch.zeros_like(x)
    missing = torch.ones_like(extreme, dtype=torch.bool)
    for k in (*range(1, top + 1), *range(-1, low - 1, -1)):
        step = (extreme / k).half().float()
        near = (x / torch.where(step == 0, torch.inf, step)).round().clamp(low, top)
        found = missing & (near * step == x).all(-1, keepdim=True)
        d, multiples = torch.where(found, step, d), torch.where(found, near, multiples)
        missing &= ~found
    return None if missing.any() else (d.squeeze(-1), multiples.flatten(1))


def sixes(sc: Tensor, m: Tensor) -> Tensor:
    """6-bit scales and minima of Q4_K and Q5_K: uint8 [..., 8] each -> [..., 12].

    The last four of each lend their high 2 bits to the first four of the same kind; their low 4 bits stand together.
    """
    first = torch.cat([p[..., :4] | (p[..., 4:] >> 4) << 6 for p in (sc, m)], dim=-1)
    return torch.cat([first, sc[..., 4:] & 15 | m[..., 4:] << 4], dim=-1)


def from_sixes(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `sixes`."""
    sc, m, low = packed.tensor_split((4, 8), dim=-1)
    last = (low & 15 | (sc >> 6) << 4, low >> 4 | (m >> 6) << 4)
    return torch.cat([sc & 63, last[0]], dim=-1), torch.cat([m & 63, last[1]], dim=-1)
