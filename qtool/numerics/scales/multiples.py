"""Steps, and their multiples that lie nearest to wanted values: scales are stored as integers beside a step in fp16.

All trials are made at once, as few operations as that takes, and nothing waits for a device.

Shape letters: N rows, S super-blocks, G groups of a super-block, P first steps that are tried.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qtool.numerics.scales.sweep import STRETCH

ROOM = {"cpu": 1 << 20}
"""Numbers of all trials that are in memory at a time, by kind of device."""
ELSEWHERE = 1 << 27


def nearest_multiples(wanted: Tensor, d: Tensor, limits: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The steps, in fp16, and their multiples that lie nearest to wanted values.

    Args:
        wanted: float32 [N, S G].
        d: float32 [N, S], the present steps, which are tried too.
        limits: of the multiples.

    Returns:
        (float32 [N, S], float32 [N, S G] with integer values).
    """
    trials = (len(STRETCH) + 1) * max(1, wanted.shape[1])
    rows = max(1, ROOM.get(wanted.device.type, ELSEWHERE) // trials)
    parts = zip(torch.split(wanted, rows), torch.split(d, rows), strict=True)
    steps, codes = zip(*(of_rows(x.view(*own.shape, -1), own, limits) for x, own in parts), strict=True)
    return torch.cat(steps), torch.cat(codes)


def of_rows(x: Tensor, d: Tensor, limits: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The same of some rows: x float32 [N, S, G]. Each step is tried as it is, and fitted to the multiples found so."""
    low, top = limits
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
    step = torch.cat([d[None], extreme / (low or top) / stretches(x.device)])
    steps, errors = [], []
    for _ in range(2):
        step = step.half().float()
        codes = nearest(x, step, limits)
        steps.append(step)
        errors.append((x - step[..., None] * codes).square().sum(-1))
        square = codes.square().sum(-1)
        step = torch.where(square > 0, (x * codes).sum(-1) / square.clamp_min(1), step)
    error = torch.stack(errors, 1).flatten(0, 1)
    error = torch.where(error.isnan(), torch.inf, error)
    best = error.argmin(0, keepdim=True)  # the first one of equals
    found = torch.stack(steps, 1).flatten(0, 1).gather(0, best)[0]
    finite = error.gather(0, best)[0].isfinite()
    multiples = torch.where(finite[..., None], nearest(x, found, limits), 0.0)
    return torch.where(finite, found, d), multiples.flatten(1)


def nearest(x: Tensor, step: Tensor, limits: tuple[int, int]) -> Tensor:
    """Integers: [N, S, G] for steps of any shape that ends in [N, S]."""
    return (x / torch.where(step == 0, torch.inf, step)[..., None]).round().clamp(*limits)


@cache
def stretches(device: torch.device) -> Tensor:
    """Where the largest value lands, relative to the last integer, [P - 1, 1, 1]; a device waits for them once."""
    return torch.from_numpy(STRETCH).to(device)[:, None, None]
