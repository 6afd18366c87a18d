"""Block Hadamard transforms of inputs at run time, made up for by the weights.

Runs as long as the groups of a format spread outliers within a group: that helps grids that are even, such as MXFP4's
with its power-of-two scales and INT4's, and hurts NVFP4. https://arxiv.org/abs/2509.23202, https://arxiv.org/abs/2511.04214
"""

from __future__ import annotations

import torch
from pydantic import field_validator

from qtool.numerics.hadamard import known_order
from qtool.ops.hadamard import Hadamard as Operation
from qtool.transforms._base import Kind, Site, Transform


class Hadamard(Transform):
    """Hadamard matrices in front of layers.

    Attributes:
        block: channels of a run.
    """

    block: int = 32

    @field_validator("block")
    @classmethod
    def _known(cls, block: int) -> int:
        if not known_order(block) or block < 2:
            raise ValueError("no Hadamard matrix of this order is known here; take 16, 32, 64 or 128")
        return block

    @property
    def kinds(self) -> frozenset[Kind]:
        """See `Transform.kinds`."""
        return frozenset({"input"})

    def misfit(self, kind: Kind, width: int, dim: int) -> str | None:
        """See `Transform.misfit`."""
        return f"{width} inputs cannot be cut into runs of {self.block}" if width % self.block else None

    def stays(self, width: int) -> Operation:
        """See `Transform.stays`."""
        return Operation(self.block, torch.ones(width, dtype=torch.int8))

    def op(self, site: Site) -> Operation:
        """See `Transform.op`."""
        return self.stays(site.width)
