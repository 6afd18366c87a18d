"""Rounding that is decided in the end: until then each weight is a mixture of the two levels around it.

Shape letters: N rows, K columns, L levels.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qtool.formats._base import Params, Quantized
from qtool.methods._relaxed import Relaxed
from qtool.methods._soft import MARGIN, places, relative, steps_of, stored

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
        below: the lower one's code, uint8 [N, K].
        inside: where the first mixture is between them, float32 [N, K]; more than 1/2: the upper one is the code.
            What is trained may take its memory.
    """

    repeats = False

    def __init__(self, w: Tensor, start: Quantized, scales: bool, generator: torch.Generator) -> None:
        super().__init__(w, start, scales, generator)
        self.levels, code = self.fmt.levels().to(w.device), start.codes.long()
        y, _ = places(w, start)
        below = torch.where(y >= code, code, code - 1).clamp_(0, len(self.levels) - 2)
        inside, up = (y - below).clamp(MARGIN, 1 - MARGIN), code > below
        self.inside = torch.where(up, inside.clamp_min(0.5 + MARGIN), inside.clamp_max(0.5 - MARGIN))
        self.below, (_, uniform, _, step) = below.to(torch.uint8), steps_of(self.fmt, w.device)
        self.step: Tensor | float = 1.0 if uniform and step == 1 else self.levels.diff()[below]
        self.kept = None if w.is_cuda else self.levels[below]
        self.zero = relative(self.first[1], self.first[0], 0.0)
        self.centered = self.shift is None and not bool(self.zero.any())

    @property
    def low(self) -> Tensor:
        """The lower level, float32 [N, K]; a device looks it up each time, which takes less than its room is worth."""
        return self.levels[self.below.int()] if self.kept is None else self.kept

    @abstractmethod
    def share(self, progress: float) -> Tensor:
        """How much there is of the upper level, from 0 to 1, float32 [N, K], with gradients."""

    @abstractmethod
    def upper(self) -> Tensor:
        """Whether the upper level is the code, bool [N, K]."""

    def weights(self, progress: float) -> Tensor:
        """See `Relaxed.weights`."""
        params = stored(self.fmt, self.start.params, *self.affine())
        scale, offset = self.fmt.affine(params)
        if self.factor is not None:
            scale = straight(scale, self.first[0] * self.factor)
        if self.shift is not None:
            offset = straight(offset, self.first[1] + self.first[0] * self.shift)
        elif self.factor is not None:  # a fixed multiple of the scale
            offset = scale * self.zero
        low, share = self.low, self.share(progress)
        mixed = low + share if isinstance(self.step, float) else torch.addcmul(low, share, self.step)
        value = mixed.view(len(self.w), scale.shape[1], -1) * scale[..., None]
        if self.centered:
            return value.view(self.w.shape)
        return (value + offset[..., None]).view(self.w.shape)

    @torch.no_grad()
    def solution(self) -> Quantized:
        """See `Relaxed.solution`."""
        params: Params = stored(self.fmt, self.start.params, *self.affine())
        return Quantized((self.below + self.upper()).to(torch.uint8), params, self.fmt)


class Sigmoid(TwoLevels):
    """The share is a stretched sigmoid that a regularizer drives to 0 or 1 (AdaRound, https://arxiv.org/abs/2004.10568).

    Matrices are not joined, since the regularizer counts each alike.
    """

    by_row = False

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
        self.v = self.inside.requires_grad_()

    def rounding(self) -> Iterator[Tensor]:
        """See `Relaxed.rounding`."""
        yield self.v

    def share(self, progress: float) -> Tensor:
        """See `TwoLevels.share`: one draw, noise being the difference of two Gumbel variables."""
        certain = CERTAINTY[0] + (CERTAINTY[1] - CERTAINTY[0]) * progress
        temperature = TEMPERATURE[0] * (TEMPERATURE[1] / TEMPERATURE[0]) ** progress
        drawn = torch.rand(self.v.shape, generator=self.generator, device=self.v.device)
        noise, slope = drawn.logit_(1e-6).div_(temperature), LOGITS * certain / temperature
        found: Tensor = _Drawn.apply(self.v, noise, slope)  # type: ignore[no-untyped-call]
        return found

    def upper(self) -> Tensor:
        """See `TwoLevels.upper`."""
        return self.v > 0.5


class _Drawn(torch.autograd.Function):
    """sigmoid((v - 1/2) slope + noise), in the noise's memory: [N, K] each."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, noise: Tensor, slope: float) -> Tensor:
        share = noise.add_(v, alpha=slope).sub_(0.5 * slope).sigmoid_()
        ctx.save_for_backward(share)
        ctx.slope = slope
        return share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (share,) = ctx.saved_tensors
        return gradient.mul(share).mul_(ctx.slope).mul_(1 - share), None, None


def straight(value: Tensor, wanted: Tensor) -> Tensor:
    """A value with the gradient of what was wanted."""
    return value.detach() + (wanted - wanted.detach())
