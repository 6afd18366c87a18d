"""Factors of channels, and matrices, trained until the rounded block gives what the original one gives.

    transforms: [smooth, learned]                                      OmniQuant's equivalent transform
    transforms: [smooth, {learned: {heads: matrices}}]                 AffineQuant's, between v and o
    transforms: [{learned: {heads: matrices, inputs: whole}}]          FlatQuant's
    transforms: [{learned: {edges: [], inputs: 32}}]                   BATQuant's

Each block is trained by itself on the hidden states that the original model has in front of it. A step rounds its
weights, and its inputs where the plan says so, as a runtime would behind the transform, and goes down the gradient of
the error of its output (Adam), through scales that follow what is rounded. Kept is the state whose error is least on
samples that nothing was learned from; doing nothing, and the first state, are among them. It is an ordinary transform
then: codes are chosen behind it by whatever method. Inputs that have one scale for all tokens are left as they are.

Factors begin where transforms before them ended. Shifts of channels need biases of the layers on both sides, and are
left out. https://arxiv.org/abs/2308.13137, https://arxiv.org/abs/2403.12544, https://arxiv.org/abs/2410.09426

Shape letters: C channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import field_validator, model_validator
from typing_extensions import Self

from qtool.ops.kronecker import Kronecker
from qtool.stats._base import Statistic
from qtool.stats.channels import Channels
from qtool.transforms._base import Kind, Scalable, Site
from qtool.transforms._trained import Dominant, Factors, Products, TrainedTransform, Variables, near_factors


class Learned(TrainedTransform):
    """Transforms that are trained.

    Attributes:
        edges: where factors of channels are folded away.
        heads: what goes through from v to o: factors, or a matrix for each head.
        inputs: what stays in front of layers, a matrix for all channels (`whole`), one for each run of so many, or
            nothing; each is the Kronecker product of two, of which runs share the second.
        steps, batch, rate, holdout: of the training.
    """

    edges: tuple[Scalable, ...] = ("norm", "heads", "product")
    heads: Literal["factors", "matrices"] = "factors"
    inputs: Literal["whole"] | int | None = None

    @field_validator("inputs")
    @classmethod
    def _divisible(cls, inputs: Literal["whole"] | int | None) -> Literal["whole"] | int | None:
        if isinstance(inputs, int) and inputs < 2:
            raise ValueError("runs have at least two channels")
        return inputs

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.edges and self.inputs is None:
            raise ValueError("nothing to train: name edges, or inputs")
        return self

    @property
    def kinds(self) -> frozenset[Kind]:
        """See `Transform.kinds`."""
        return frozenset((*self.edges, "input") if self.inputs else self.edges)

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Tokens; that nothing is measured of them but errors does not matter."""
        return frozenset({Channels})

    def run(self, width: int) -> int:
        """Channels of a run in front of layers of that width."""
        return self.inputs if isinstance(self.inputs, int) else width

    def variables(self, site: Site, device: torch.device) -> Variables:
        """See `TrainedTransform.variables`."""
        if site.kind == "input":
            return Products(site, self.run(site.width), device)
        if site.kind == "heads" and self.heads == "matrices":
            return Dominant(site.width // site.dim, site.dim, device)
        return Factors(site.width, device)

    def stays(self, width: int) -> Kronecker | None:
        """See `Transform.stays`."""
        if self.inputs is None:
            return None
        a, b = near_factors(self.run(width))
        return Kronecker(torch.eye(a).repeat(width // (a * b), 1, 1), torch.eye(b))

    def misfit(self, kind: Kind, width: int, dim: int) -> str | None:
        """See `Transform.misfit`."""
        if kind != "input" or self.inputs is None or width % self.run(width) == 0:
            return None
        return f"{width} inputs cannot be cut into runs of {self.inputs}"
