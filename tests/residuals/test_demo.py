"""On a real model: what whitening is worth."""

from __future__ import annotations

import pytest
import torch

from qtool.calibrate.tokens import load_tokens
from qtool.calibrate.walker import Walker
from qtool.checkpoint.hf import HFCheckpoint
from qtool.checkpoint.modules import modules
from qtool.formats.int import Int
from qtool.methods.rtn import RTN
from qtool.numerics.metrics import energy
from qtool.recipe.schema import Calibration
from qtool.residuals.low_rank import LowRank
from qtool.stats.gram import Gram


@pytest.mark.demo
def test_whitened_rank_32_leaves_at_most_half_of_what_a_plain_svd_leaves(demo_checkpoint):
    """Of the outputs' error of 3-bit weights, in the mean over the layers of two blocks."""
    source = HFCheckpoint(demo_checkpoint)
    walker = Walker(source, torch.device("cpu"), torch.float32)
    hidden = walker.embed(load_tokens(Calibration(samples=16, length=256), source))
    linears = [module for module in modules(source) if module.block is not None]
    ratios = []
    for i in range(2):
        stats = walker.collect(walker.load_block(i), i, hidden, frozenset({Gram}))
        for module in (m for m in linears if m.block == i):
            w, gram = source.tensor(f"{module.name}.weight").float(), stats[module.reads][Gram].matrix
            error = w - RTN().solve(w, None, Int(bits=3, group=64)).quantized.decode()
            left = {}
            for whiten in (True, False):
                residual = LowRank(rank=32, whiten=whiten)
                added = residual.apply(torch.zeros_like(w), residual.fit(error, gram if whiten else None))
                left[whiten] = energy(error - added, gram)
            ratios.append(left[True] / left[False])
    assert len(ratios) == 14
    assert max(ratios) < 1
    assert sum(ratios) / 14 < 0.5
