"""Rounding that is decided in the end: until then each weight is a mixture of the two levels around it.

Shape letters: N rows, K columns, L levels.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from qtool.formats._base import Params, Quantized, expand
from qtool.methods._relaxed import Relaxed
from qtool.methods._soft import MARGIN, places, relative, stored

STRETCH = 1.2
"""Width of the sigmoid, which is cut off at 0 and 1, so that both are reached."""
WARM = 0.2
"""Share of the training before the regularizer sets in."""
SHARPNESS = (20.0, 2.0)
"""Exponent of the regularizer, from there to there."""
TEMPERATURE = (2.0, 0.2)
"""Of shares that are drawn, falling geometrically from there to there."""
CERTAINTY = (3.0, 10.0)
"""By how much a place counts beside the noise, growing from there to there on a line."""
LOGITS = 6.0
"""What a whole step counts at a certainty of 1, as a logit."""


class TwoLevels(Relaxed):
    """Weights are mixtures of two neighbouring levels: the first code's, and the one on the other side of the weight.

    Attributes:
        below: the lower one's code, int64 [N, K].
        inside: where the first mixture is between them, float32 [N, K]; more than 1/2: the upper one is the code.
    """

    def __init__(self, w: Tensor, start: Quantized, scales: bool, generator: torch.Generator) -> None:
        super().__init__(w, start, scales, generator)
        self.levels, code = self.fmt.levels().to(w.device), start.codes.long()
        y, _ = places(w, start)
        self.below = torch.where(y >= code, code, code - 1).clamp_(0, len(self.levels) - 2)
        inside = (y - self.below).clamp(MARGIN, 1 - MARGIN)
        up = code > self.below
        self.inside = torch.where(up, inside.clamp_min(0.5 + MARGIN), inside.clamp_max(0.5 - MARGIN))
        self.low, self.step = self.levels[self.below], self.levels.diff()[self.below]

    @abstractmethod
    def share(self, progress: float) -> Tensor:
        """How much there is of the upper level, from 0 to 1, float32 [N, K], with gradients."""

    @abstractmethod
    def upper(self) -> Tensor:
        """Whether the upper level is the code, bool [N, K]."""

    def weights(self, progress: float) -> Tensor:
        """See `Relaxed.weights`."""
        wanted = self.affine()
        params = stored(self.fmt, self.start.params, *wanted)
        k, values = self.w.shape[1], []
        for own, want in zip(self.fmt.affine(params), wanted, strict=True):
            values.append(expand(own if want is None else own.detach() + (want - want.detach()), k))
        scale, offset = values
        if wanted[0] is not None and not self.fmt.free_offset:  # a fixed multiple of the scale
            first, zero = self.wide()
            offset = scale * relative(zero, first, 0.0)
        return scale * (self.low + self.share(progress) * self.step) + offset

    @torch.no_grad()
    def solution(self) -> Quantized:
        """See `Relaxed.solution`."""
        params: Params = stored(self.fmt, self.start.params, *self.affine())
        return Quantized((self.below + self.upper()).to(torch.uint8), params, self.fmt)


class Sigmoid(TwoLevels):
    """The share is a stretched sigmoid that a regularizer drives to 0 or 1 (AdaRound, https://arxiv.org/abs/2004.10568)."""

    def __init__(self, w: Tensor, start: Quantized, scales: bool, generator: torch.Generator) -> None:
        super().__init__(w, start, scales, generator)
        margin = (STRETCH - 1) / 2
        self.v = torch.logit((self.inside + margin) / STRETCH).requires_grad_()

    def rounding(self) -> Iterator[Tensor]:
        """See `Relaxed.rounding`."""
        yield self.v

    def share(self, progress: float) -> Tensor:
        """See `TwoLevels.share`."""
        return (torch.sigmoid(self.v) * STRETCH - (STRETCH - 1) / 2).clamp(0, 1)

    def upper(self) -> Tensor:
        """See `TwoLevels.upper`."""
        return self.v > 0

    def penalty(self, progress: float) -> Tensor | None:
        """See `Relaxed.penalty`: the mean of 1 - |2 h - 1|^b."""
        if progress < WARM:
            return None
        done = (progress - WARM) / (1 - WARM)
        sharpness = SHARPNESS[1] + (SHARPNESS[0] - SHARPNESS[1]) * 0.5 * (1 + math.cos(math.pi * done))
        return 1 - (2 * self.share(progress) - 1).abs().pow(sharpness).mean()


class Gumbel(TwoLevels):
    """The share is drawn from a distribution that hardens on the way (GSQ, https://arxiv.org/abs/2604.18556)."""

    def __init__(self, w: Tensor, start: Quantized, scales: bool, generator: torch.Generator) -> None:
        super().__init__(w, start, scales, generator)
        self.v = self.inside.clone().requires_grad_()

    def rounding(self) -> Iterator[Tensor]:
        """See `Relaxed.rounding`."""
        yield self.v

    def share(self, progress: float) -> Tensor:
        """See `TwoLevels.share`: one draw, noise being the difference of two Gumbel variables."""
        certain = CERTAINTY[0] + (CERTAINTY[1] - CERTAINTY[0]) * progress
        temperature = TEMPERATURE[0] * (TEMPERATURE[1] / TEMPERATURE[0]) ** progress
        drawn = torch.rand(self.v.shape, generator=self.generator, device=self.v.device).clamp_(1e-6, 1 - 1e-6)
        return torch.sigmoid((LOGITS * certain * (self.v - 0.5) + torch.logit(drawn)) / temperature)

    def upper(self) -> Tensor:
        """See `TwoLevels.upper`."""
        return self.v > 0.5
