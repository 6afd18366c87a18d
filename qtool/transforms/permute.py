"""Channels in order of size, so that those of a group are alike.

A group has one scale for all its channels, which the largest of them sets. Down's columns, with the rows of up and gate
that write them, and a head's channels may stand in any order. RPTQ, https://arxiv.org/abs/2304.01089; COMET,
https://arxiv.org/abs/2410.12168

At "input" the order stays in front of layers, for runtimes that sort while they round (ARCQuant,
https://arxiv.org/abs/2601.07475): there all inputs can be sorted, those behind a norm as well.
"""

from __future__ import annotations

from typing import Literal

import torch

from qtool.ops.permutation import Permutation
from qtool.stats._base import Statistic
from qtool.stats.channels import Channels
from qtool.transforms._base import EdgeTransform, Site


class Permute(EdgeTransform):
    """Sorts channels, the largest first.

    Attributes:
        by: size of "inputs" (largest magnitude) or of "weights" (root mean square of the readers' columns).
        edges: "product" for the input of down, "heads" for that of o, head by head, "input" in front of all layers.
    """

    by: Literal["inputs", "weights"] = "weights"
    edges: tuple[Literal["product", "heads", "input"], ...] = ("product", "heads")

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Ranges of inputs, if it sorts by them."""
        return frozenset({Channels}) if self.by == "inputs" else frozenset()

    def stays(self, width: int) -> Permutation | None:
        """See `Transform.stays`."""
        return Permutation(torch.arange(width)) if "input" in self.edges else None

    def op(self, site: Site) -> Permutation | None:
        """See `Transform.op`."""
        if site.idle:
            return None
        if self.by == "inputs":
            size = site.input_range()
        else:
            size = site.mean(sum((r.weight().square().sum(0) for r in site.readers), torch.zeros(1)))
        runs = size.view(-1, site.dim if site.kind == "heads" else site.width)
        first = torch.arange(len(runs)).unsqueeze(1) * runs.shape[1]
        return Permutation((runs.argsort(dim=1, descending=True, stable=True) + first).reshape(-1))
