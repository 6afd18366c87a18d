"""Scores of positions: negative log likelihood, KL divergence, agreement; collected chunk by chunk.

Follows llama-perplexity (https://github.com/ggml-org/llama.cpp/tree/master/tools/perplexity) in what is scored and how
it is summed up, with one difference: llama.cpp keeps the baseline's log-probabilities as 16-bit integers, clipped 16
nats below the largest, and drops clipped tokens from the sum. Here both models' logits are at hand, and the sum runs
over the whole vocabulary.

Shape letters: P scored positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from array import array

import numpy as np
import torch
from torch import Tensor

from qtool.errors import NumericsError
from qtool.numerics.threads.ranks import Ranks

ROW_ELEMENTS = 1 << 19
"""Logits that are worked on at a time: the float64 temporaries (4 MiB each) stay in cache and memory stays flat."""


class Scores:
    """Grows by one chunk at a time and keeps a few float64 numbers per position, so that quantiles are exact."""

    def __init__(self) -> None:
        # No tensors: small ones between large temporaries keep the allocator from ever giving or using these again.
        self.columns: dict[str, array[float]] = {}

    def add(self, logits: Tensor, targets: Tensor, base: Tensor | None = None) -> None:
        """Scores the positions of a chunk.

        Args:
            logits: [P, V], of the model under test.
            targets: int64 [P], the tokens that really follow.
            base: [P, V], of the baseline; in every call or in none.

        Raises:
            NumericsError: a score is NaN or infinite.
        """
        rows = max(1, ROW_ELEMENTS // logits.shape[1])
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            found = score(logits[part], targets[part], None if base is None else base[part])
            for name, values in found.items():
                if not values.isfinite().all():
                    raise NumericsError(f"the logits of a position give a {name} that is NaN or infinite")
                self.columns.setdefault(name, array("d")).extend(values.tolist())

    def combine(self, ranks: Ranks, chunks: int, positions: int) -> None:
        """Takes in what other processes scored; positions are in the order of the text then.

        Args:
            ranks: who scored its share of the chunks each.
            chunks: how many all of them scored.
            positions: of a chunk.
        """
        gathered = ranks.gather(self.columns)
        if ranks.size == 1:
            return
        for name in {name: None for columns in gathered for name in columns}:
            whole = np.empty((chunks, positions))
            for rank, columns in enumerate(gathered):
                part = np.asarray(columns.get(name, ()), np.float64)
                whole[Ranks(rank, ranks.size).share(chunks)] = part.reshape(-1, positions)
            self.columns[name] = array("d", whole.tobytes())

    def column(self, name: str) -> Tensor:
        """One number per position so far, float64; names as in `score`."""
        return torch.tensor(self.columns[name], dtype=torch.float64)

    def summary(self) -> dict[str, float]:
        """The measured fields of an `Evaluation`, by name."""
        nll = self.column("nll")
        ppl = float(nll.mean().exp())
        result = {"ppl": ppl, "ppl_error": ppl * standard_error(nll)}
        if "kld" not in self.columns:
            return result
        kld, dp, base_nll = self.column("kld"), self.column("dp"), self.column("base_nll")
        base_ppl = float(base_nll.mean().exp())
        shares = torch.tensor([0.5, 0.9, 0.95, 0.99, 0.999, 1.0], dtype=torch.float64)
        names = ("kld_median", "kld_p90", "kld_p95", "kld_p99", "kld_p999", "kld_max")
        return result | {
            "base_ppl": base_ppl,
            "kld_mean": float(kld.mean()),
            "kld_error": standard_error(kld),
            **dict(zip(names, quantiles(kld, shares).tolist(), strict=True)),
            "ppl_ratio_error": ppl / base_ppl * standard_error(nll - base_nll),
            "top1": float(self.column("same").mean()),
            "top1_error": standard_error(self.column("same")),
            "dp_mean": float(dp.mean()),
            "rms_dp": float(dp.square().mean().sqrt()),
        }


def score(logits: Tensor, targets: Tensor, base: Tensor | None) -> dict[str, Tensor]:
    """Per position, float64 [P] each.

    nll: -log q(target). With a baseline p also base_nll, kld = sum_v p (log p - log q), dp = q(target) - p(target), and
    same: 1 where both have the same most likely token, else 0.
    """
    at = targets.to(logits.device).unsqueeze(1)
    log_q = torch.log_softmax(logits.double(), dim=1)
    nll = -log_q.gather(1, at).squeeze(1)
    if base is None:
        return {"nll": nll}
    log_p = torch.log_softmax(base.to(logits.device).double(), dim=1)
    base_nll = -log_p.gather(1, at).squeeze(1)
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)  # the limit of p log p at 0, which would compute as NaN
    return {
        "nll": nll,
        "base_nll": base_nll,
        "kld": terms.sum(1).clamp(min=0.0),  # not below 0 but by rounding
        "dp": (-nll).exp() - (-base_nll).exp(),
        "same": (log_q.argmax(1) == log_p.argmax(1)).double(),
    }


def standard_error(x: Tensor) -> float:
    """Of the mean of x, float64 [n]: sqrt((E[x^2] - E[x]^2) / (n - 1)); infinite for n = 1."""
    return math.inf if len(x) < 2 else math.sqrt(float(x.var(correction=0)) / (len(x) - 1))


def quantiles(x: Tensor, shares: Tensor) -> Tensor:
    """Exact quantiles with linear interpolation between neighbours, for any length (torch.quantile stops at 2^24)."""
    x = x.sort().values
    at = shares * (len(x) - 1)
    below = at.floor().long()
    above = (below + 1).clamp(max=len(x) - 1)
    return torch.lerp(x[below], x[above], at - below)
