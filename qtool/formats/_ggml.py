"""Weights in the block types of GGUF files: bytes that llama.cpp reads as they are.

Layouts are those of ggml (https://github.com/ggml-org/llama.cpp, ggml/src/ggml-common.h): a row is a sequence of
blocks of consecutive columns, each with its parameters beside its codes.

`search` says how hard parameters are searched for: every setting minimizes the (importance-weighted) squared error of
each block. Where ggml's own choice is better it is kept (`BlockFormat.no_worse`; docs/formats.md says when). `search:
ggml`, where a type has it, gives the bytes of `ggml_quantize_chunk` without an importance matrix.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import Self

from qtool.errors import NumericsError
from qtool.formats._base import Format, Params
from qtool.formats._compare import better_of
from qtool.numerics.checks import importances, unwatched
from qtool.numerics.scales.kquant import FLOOR

FP16_MAX = 65504.0


def fp16(values: Tensor, label: str) -> Tensor:
    """Rounds scales. Raises NumericsError: too large for fp16."""
    rounded = values.half()
    if not unwatched(values) and not bool((rounded.float().abs() <= FP16_MAX).all()):
        found = f"{float(values.abs().max()):g}"
        raise NumericsError(f"{label} stores scales in fp16", wanted=f"at most {FP16_MAX:g}", found=found)
    return rounded


def as_bytes(d: Tensor) -> Tensor:
    """fp16 [N, S] -> uint8 [N, S, 2]."""
    return d.contiguous().view(torch.uint8).view(*d.shape, 2)


def as_fp16(packed: Tensor) -> Tensor:
    """The inverse of `as_bytes`."""
    return packed.contiguous().view(torch.float16).squeeze(-1)


class BlockFormat(Format):
    """A block type of GGUF. Subclasses say how the blocks of a row become bytes and back.

    Attributes:
        ggml_type: its number in tensor tables.
        columns: columns per block.
        block_bytes: bytes per block.
        matrix_scale: the parameter with one number for the matrix, which GGUF keeps in a tensor of its own, if any.
        fallback: the type that llama.cpp takes for rows which this one cannot divide.
        cheap: whether a search that is not exact takes hardly longer than reading the weights: `Format.memory_bound`.
        search: how hard parameters are searched for. "ggml" repeats ggml's encoder bit by bit and ignores importance;
            a subclass without such an encoder leaves it out of the choices.
    """

    ggml_type: ClassVar[int]
    columns: ClassVar[int]
    block_bytes: ClassVar[int]
    matrix_scale: ClassVar[str | None] = None
    fallback: ClassVar[str | None] = "f16"
    cheap: ClassVar[bool] = False

    search: Literal["ggml", "fast", "default", "thorough"] = "default"

    @property
    def label(self) -> str:
        """`q4_0`, or `q4_0-fast`."""
        return type(self).__name__.lower() + ("" if self.search == "default" else f"-{self.search}")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """See `Format.parse`."""
        name, _, search = text.partition("-")
        if name != cls.__name__.lower() or search not in ("", *get_args(cls.model_fields["search"].annotation)):
            return None
        found = cls.model_validate({"search": search or "default"})
        return found if found.label == text else None

    @property
    def block_columns(self) -> int | None:
        """See `Format.block_columns`."""
        return self.columns

    @property
    def memory_bound(self) -> bool:
        """See `Format.memory_bound`."""
        return self.cheap and self.search not in ("default", "thorough")

    def storage_bits(self, n: int, k: int) -> int:
        """See `Format.storage_bits`."""
        return n * (k // self.columns) * self.block_bytes * 8

    def no_worse(
        self, found: Params, other: Params, w: Tensor, importance: Tensor | None, columns: int | None = None
    ) -> Params:
        """Parameters of w [N, C] with those of `other` in every block where these have the smaller error.

        Channels without importance count a little (`FLOOR`), so that what is stored of them stays sane. `columns` are
        those of what is compared, if not of a block.
        """
        width = columns or self.columns
        weight = self.weights(w, importance, width)
        return better_of(self, w, found, other, weight, w.shape[1] // width, importance)

    def weights(self, w: Tensor, importance: Tensor | None, columns: int) -> Tensor:
        """Of squared errors of w [N, C], float32 [C]: channels without importance count a little (`FLOOR`)."""
        per_block = torch.ones(w.shape[1]) if importance is None else self.usable(importance, columns)
        per_block = per_block.view(-1, columns)
        return per_block.clamp_min(FLOOR * per_block.mean(1, keepdim=True)).flatten()

    def usable(self, importance: Tensor, columns: int | None = None) -> Tensor:
        """Importances of channels, float32 [C]; those of a block (or so many columns) without any are all alike."""
        per_block = importances(importance, importance.numel()).view(-1, columns or self.columns)
        return torch.where(per_block.sum(1, keepdim=True) > 0, per_block, 1.0).flatten()

    @abstractmethod
    def pack(self, codes: Tensor, params: Params) -> Tensor:
        """uint8 [N, K] and parameters -> uint8 [N, K / columns * block_bytes], the bytes of the file."""

    @abstractmethod
    def unpack(self, packed: Tensor) -> tuple[Tensor, Params]:
        """The exact inverse of `pack`."""
