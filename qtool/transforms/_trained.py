"""Transforms that are trained: what moves, and what operation it stands for.

Shape letters: C channels, G heads, D channels of a head, M runs, A and B orders of two factors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from qtool.numerics.hadamard import known_order, matrix
from qtool.ops._base import InputOp
from qtool.ops.kronecker import Kronecker
from qtool.ops.scale import Scale
from qtool.transforms._base import Site, Transform

DOMINANT = 0.9
"""How large the numbers beside the diagonal of a row may be together, relative to the one on it."""


class Variables(ABC):
    """What is trained at a site."""

    @property
    @abstractmethod
    def leaves(self) -> Sequence[Tensor]:
        """All that is trained."""

    @abstractmethod
    def op(self, progress: float) -> InputOp:
        """The operation that it stands for, with gradients.

        Args:
            progress: share of the training that is done.
        """


class Factors(Variables):
    """Logarithms of factors of channels, which begin at one.

    Args:
        width: C.
        device: where they are trained.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.logarithms = torch.zeros(width, device=device, requires_grad=True)

    @property
    def leaves(self) -> Sequence[Tensor]:
        """See `Variables.leaves`."""
        return (self.logarithms,)

    def op(self, progress: float) -> Scale:
        """See `Variables.op`."""
        return Scale(self.logarithms.exp())


class Dominant(Variables):
    """A matrix for each head, whose diagonals outweigh the rest of their rows, so that it has an inverse.

    They begin as those of unit matrices, and numbers are let go band by band from the diagonal outwards (AffineQuant's
    gradual mask, https://arxiv.org/abs/2403.12544).

    Args:
        heads: G.
        dim: D.
        device: where they are trained.
    """

    def __init__(self, heads: int, dim: int, device: torch.device) -> None:
        self.logarithms = torch.zeros(heads, dim, device=device, requires_grad=True)
        self.beside = torch.zeros(heads, dim, dim, device=device, requires_grad=True)
        place = torch.arange(dim, device=device)
        self.bands = (place[:, None] - place).abs()

    @property
    def leaves(self) -> Sequence[Tensor]:
        """See `Variables.leaves`."""
        return (self.logarithms, self.beside)

    def op(self, progress: float) -> Kronecker:
        """See `Variables.op`: D = diag(exp(l)) (1 + N), N without a diagonal."""
        free = (self.bands > 0) & (self.bands <= progress * (len(self.bands) - 1))
        beside = torch.where(free, self.beside, 0.0)
        beside = beside * (DOMINANT / beside.abs().sum(2, keepdim=True).clamp_min(1e-30)).clamp_max(1)
        whole = torch.eye(len(self.bands), device=beside.device) + beside
        return Kronecker(self.logarithms.exp()[..., None] * whole, torch.ones(1, 1, device=beside.device))


class Products(Variables):
    """Two factors of a matrix, of which each run of channels has the first one for itself.

    They begin as Hadamard matrices divided by their lengths, and as random orthogonal ones where none is known.

    Args:
        site: "input".
        run: A times B.
        device: where they are trained.
    """

    def __init__(self, site: Site, run: int, device: torch.device) -> None:
        a, b = near_factors(run)
        generator = site.generator()
        first, second = (orthogonal(n, generator).to(device) for n in (a, b))
        self.left = first.repeat(site.width // run, 1, 1).requires_grad_()
        self.right = second.requires_grad_()

    @property
    def leaves(self) -> Sequence[Tensor]:
        """See `Variables.leaves`."""
        return (self.left, self.right)

    def op(self, progress: float) -> Kronecker:
        """See `Variables.op`."""
        return Kronecker(self.left, self.right)


def near_factors(n: int) -> tuple[int, int]:
    """The two factors of a number that are nearest to each other, the larger one first."""
    b = next(b for b in range(int(n**0.5), 0, -1) if n % b == 0)
    return n // b, b


def orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix of an order, float32 [n, n]."""
    known = known_order(n)
    found: Tensor = matrix(n) / n**0.5 if known else torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    return found.float()


class TrainedTransform(Transform):
    """A transform that is trained, block by block, on what the rounded block makes of calibration's hidden states.

    Attributes:
        steps: of training.
        batch: samples of a step.
        rate: of the first step; it falls to zero on a cosine.
        holdout: share of the samples that only decide which state is best.
    """

    steps: int = Field(100, ge=1, le=100_000)
    batch: int = Field(4, ge=1, le=4096)
    rate: float = Field(0.01, gt=0, le=1)
    holdout: float = Field(0.125, gt=0, lt=1)

    @abstractmethod
    def variables(self, site: Site, device: torch.device) -> Variables:
        """What is trained at a site."""

    def op(self, site: Site) -> InputOp | None:
        """Nothing, before it is trained."""
        return None
