"""Models that are quantized already: their codes are taken over where the wanted format has the same values.

Whatever else is wanted of such a model is a second generation: what was rounded once is rounded again. That is no error
(llama-quantize wants --allow-requantize for it), but the plan and the report say so.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from qtool.artifact._base import Artifact
from qtool.checkpoint._base import Checkpoint, QuantizedCheckpoint
from qtool.checkpoint.parts import parts_of
from qtool.formats._base import Format, Quantized, alike
from qtool.pipeline.trained import PLAIN, described, held, trained_grid, trained_phases, units, units_off
from qtool.plan import LayerPlan, Plan
from qtool.residuals._base import Matrix, Residual

ADVICE = "both errors add up, so start from the original weights if there are any"


class StoredMatrix(NamedTuple):
    """How a source has a matrix.

    Attributes:
        stored: codes and what corrects them; None if it has plain numbers.
        same: the same values in the wanted format; None if they have to be rounded to it.
        remark: what the report says then; None where nothing is lost.
    """

    stored: Matrix | None
    same: Quantized | None
    remark: str | None

    @property
    def plain(self) -> bool:
        """Whether it is on no grid yet."""
        return self == (None, None, None)


def stored_matrix(checkpoint: Checkpoint, module: str) -> Matrix | None:
    """What a source has of a module that is quantized; None if it has plain numbers."""
    if isinstance(checkpoint, QuantizedCheckpoint) and module in checkpoint.layers:
        return checkpoint.matrix(module)
    return None


def origin(checkpoint: Checkpoint, module: str, wanted: Format, residuals: Sequence[Residual] = ()) -> StoredMatrix:
    """Looks whether a matrix is quantized already, and whether a format has the very same values.

    Args:
        checkpoint: has the matrix.
        module: its name.
        wanted: the format.
        residuals: what is kept beside it.
    """
    stored = stored_matrix(checkpoint, module)
    if stored is None:
        if why := checkpoint.decoded.get(module) if isinstance(checkpoint, QuantizedCheckpoint) else None:
            return StoredMatrix(None, None, f"rounded a second time: {why}")
        if module in PLAIN.get(checkpoint, ()):
            return StoredMatrix(None, None, None)
        if not (trained := trained_grid(checkpoint, module)):
            terms = trained_phases(checkpoint, module)
            lost = units_off(terms, residuals) if terms else None
            remark = lost and f"rounded off the grid that training left ({units(terms)}): {lost}"
            return StoredMatrix(None, None, remark)
        same = held(wanted, trained)
        if isinstance(same, str):
            return StoredMatrix(None, None, f"rounded off the grid that training left ({described(trained)}): {same}")
        return StoredMatrix(None, same, None)
    same = corrected(stored.residuals) or wanted.hold(stored.quantized)
    if isinstance(same, str):
        return StoredMatrix(stored, None, f"rounded a second time: {same}")
    return StoredMatrix(stored, same, None)


def kept_as_stored(checkpoint: Checkpoint, plan: LayerPlan) -> bool:
    """Whether a plan leaves a matrix as its file has it, so that nothing of it needs to be looked at."""
    name = plan.module.name
    if not isinstance(checkpoint, QuantizedCheckpoint) or plan.format is None or plan.residuals:
        return False
    if name not in checkpoint.layers or plan.layer is None or plan.layer.input_ops:
        return False
    stored = checkpoint.layers[name]
    exact = not stored.residuals and not stored.input_ops and alike(stored.format, plan.format)
    return exact and parts_of(checkpoint, name) is not None


def try_taken_over(plan: Plan, checkpoint: Checkpoint, artifacts: Iterable[Artifact]) -> None:
    """Has artifacts try the smallest matrix of each format whose codes the source has, before hours of work.

    Raises:
        PlanError: one cannot hold it as it is, such as scales in a wider type than its own.
    """
    if not isinstance(checkpoint, QuantizedCheckpoint) or not checkpoint.has_codes or plan.recipe.transforms:
        return
    tried: set[tuple[str, str]] = set()
    for p in sorted(plan.layers, key=lambda p: math.prod(p.module.shape)):
        name = p.module.name
        if p.format is None or p.layer is None or p.layer.unmeasured or name not in checkpoint.layers:
            continue
        if (kind := (checkpoint.layers[name].format.label, p.format.label)) in tried:
            continue
        tried.add(kind)
        if p.format.may_hold(checkpoint.layers[name].format) is None:
            same = origin(checkpoint, name, p.format, p.residuals).same
            for artifact in artifacts:
                if same is not None:
                    artifact.try_matrix(checkpoint, name, p.layer, same)


def corrected(residuals: Sequence[object]) -> str | None:
    """Why codes alone do not say what a matrix is, which has these residuals; None if they do."""
    return "its codes are not all of it, there are corrections" if residuals else None


def is_finite(matrix: Matrix) -> bool:
    """Whether every weight that a matrix can decode to is finite, as far as that is known without decoding it."""
    quantized = matrix.quantized
    scale, offset = quantized.format.affine(quantized.params)
    largest = quantized.format.levels().abs().max().to(scale.device)
    return not matrix.residuals and bool(torch.isfinite(scale.abs() * largest + offset.abs()).all())


def second_generation(plan: Plan, checkpoint: Checkpoint) -> list[str]:
    """What is to be said about a plan for a model that is quantized already; one line for each pair of formats."""
    if not isinstance(checkpoint, QuantizedCheckpoint):
        return []
    lines: dict[str, int] = defaultdict(int)
    for p in plan.layers:
        name = p.module.name
        if name in checkpoint.layers:
            source_format = checkpoint.layers[name].format
            before = source_format.label
            why = corrected(checkpoint.layers[name].residuals) or (
                p.format.may_hold(source_format) if p.format else None
            )
        elif name in checkpoint.decoded:
            before = why = checkpoint.decoded[name]
        else:
            continue
        if p.format is None:
            lines[f"quantized already ({before}) and stored decoded"] += 1
        elif why is None:
            lines[f"quantized already ({before}) and taken over as {p.format.label} wherever that is exact"] += 1
        else:
            lines[f"quantized already ({before}) and rounded again to {p.format.label}: {ADVICE}"] += 1
    found = [f"{count} {'matrix is' if count == 1 else 'matrices are'} {text}" for text, count in lines.items()]
    if checkpoint.cache and plan.recipe.kv_cache is None:
        found.append(f"the KV cache is quantized already ({checkpoint.cache.format.label}) and left alone from now on")
    return found
