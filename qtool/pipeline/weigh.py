"""How much each calibration token counts: the model's own squared gradients, as a recipe wants them tempered.

Shape letters: S samples, T tokens per sample, B groups of a module's outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.calibrate.gradients import squared_gradients
from qtool.calibrate.walker import TokenWeights, Walker
from qtool.checkpoint._base import Module
from qtool.numerics.threads.ranks import ALONE, Ranks
from qtool.pipeline.events import Event, Listener
from qtool.plan import LayerPlan
from qtool.recipe import schema
from qtool.recipe.schema import Calibration


@dataclass(frozen=True)
class Weights:
    """How much each token counts, 1 on average.

    Attributes:
        modules: see `TokenWeights`.
        blocks: for the output of each block, float32 [S, T].
    """

    modules: TokenWeights
    blocks: list[Tensor]


def token_weights(
    walker: Walker, tokens: Tensor, calibration: Calibration, groups: Mapping[Module, int], listener: Listener
) -> Weights | None:
    """The weights that a recipe asks for; None if it weighs all tokens alike.

    Args:
        walker: over the original model.
        tokens: int64 [S, T].
        calibration: of the recipe.
        groups: B of the modules that weigh tokens.
        listener: called with events of progress.
    """
    wanted = calibration.token_weights
    if wanted is None:
        return None

    def tell(done: int, of: int) -> None:
        listener(Event("calibrate", done, of, "gradients"))

    by_name = {module.name: count for module, count in groups.items()}
    squares = squared_gradients(walker, tokens, by_name, wanted.labels, calibration.seed, tell)
    walker.head = None
    modules: dict[str, dict[str, Tensor]] = {}
    for module in groups:
        found = tempered(squares.modules[module.name], wanted, walker.ranks)
        modules.setdefault(module.reads, {})[module.name] = found
    return Weights(modules, [tempered(b[..., None], wanted, walker.ranks)[..., 0] for b in squares.blocks])


def weighing(plans: Iterable[LayerPlan], wanted: int) -> dict[Module, int]:
    """B of the modules that weigh tokens: those of which something is measured in which tokens can count differently.

    Experts, and what is no part of a block, weigh all tokens alike.

    Args:
        plans: of modules.
        wanted: groups of each.
    """
    inside = (p for p in plans if p.module.block is not None and p.module.expert is None)
    found = (p for p in inside if any(kind.weighs != "never" for kind in p.weight_needs))
    return {p.module: groups_of(p, wanted) for p in found}


def groups_of(plan: LayerPlan, wanted: int) -> int:
    """Groups of a module's outputs: one where rows cannot be solved apart, and no more than rows."""
    apart = plan.format is not None and (plan.format.by_rows or plan.format.needs_largest) and not plan.residuals
    return min(wanted, plan.module.shape[0]) if apart else 1


def tempered(squares: Tensor, wanted: schema.TokenWeights, ranks: Ranks = ALONE) -> Tensor:
    """Weights, 1 on average in each group, of squared gradients: float32 [S, T, B] each.

    Args:
        squares: of this process's samples.
        wanted: how they become weights.
        ranks: who has the other samples.
    """

    def mean(x: Tensor) -> Tensor:
        parts = ranks.gather((x.double().sum((0, 1)), x[..., 0].numel()))
        total: Tensor = torch.stack([part for part, _ in parts]).sum(0) / sum(count for _, count in parts)
        return total.to(x.dtype)

    average = mean(squares)
    nonzero = average > 0
    weights = (squares / average.where(nonzero, 1.0)).pow(wanted.power)
    weights = weights.minimum(wanted.cap * mean(weights))
    return torch.where(nonzero, weights / mean(weights).where(nonzero, 1.0), 1.0)
