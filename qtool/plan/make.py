"""recipe x checkpoint -> what will be done to every layer, checked and counted before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qtool.checkpoint._base import Checkpoint
from qtool.checkpoint.language import beside_language
from qtool.checkpoint.modules import beside, own_modules
from qtool.errors import PlanError, UsageError
from qtool.plan.beside import with_stored
from qtool.plan.check import Carrier, check, check_stages
from qtool.plan.decide import decide
from qtool.plan.findings import Findings
from qtool.plan.layers import LayerPlan, Plan
from qtool.plan.transforms import operate
from qtool.recipe.schema import Recipe


def make_plan(
    recipe: Recipe, checkpoint: Checkpoint, carriers: Mapping[str, Carrier], limit_layers: int | None = None
) -> Plan:
    """Decides every layer.

    Args:
        recipe: what to do.
        checkpoint: to what; only names and shapes are looked at.
        carriers: the artifact behind each name of `recipe.export`.
        limit_layers: quantize only that many decoder blocks and keep all the rest as it is.

    Raises:
        PlanError: every mismatch of recipe, model and artifacts, all at once.
        UsageError: the model does not have so many blocks.
    """
    found, findings = (*own_modules(checkpoint), *beside(checkpoint)), Findings(recipe.layers)
    layers, warnings = decide(found, recipe, checkpoint, findings)
    artifacts = tuple(export.to for export in recipe.export)
    alone = bool(artifacts) and all(carriers[name].language for name in artifacts)
    outside = frozenset(beside_language(checkpoint) if alone else ())
    layers = with_stored(operate(layers, recipe, checkpoint, findings), found, checkpoint, artifacts, outside)
    check_stages(Plan(recipe, layers, artifacts, 0, ()), findings)
    check(layers, recipe.kv_cache, checkpoint, {name: carriers[name] for name in artifacts}, findings)
    if lines := findings.lines():
        raise PlanError(lines, f"recipe {recipe.name} does not fit {checkpoint.source}")
    if limit_layers is not None:
        layers, warning = _limit(layers, limit_layers, checkpoint)
        left = ", and the KV cache is not quantized" if recipe.kv_cache else ""
        warnings.append(warning + left)
    if not any(p.format for p in layers):
        warnings.append(f"none of {len(layers)} matrices is quantized: the rules of {recipe.name} keep all of them")
    counted = outside | {f"{p.module.name}.weight" for p in layers}
    other = sum(checkpoint.info(name).nbytes for name in checkpoint.names() if name not in counted)
    return Plan(recipe, layers, artifacts, other, tuple(warnings), checkpoint.fingerprint(), limit_layers, outside)


def _limit(layers: Sequence[LayerPlan], limit: int, checkpoint: Checkpoint) -> tuple[tuple[LayerPlan, ...], str]:
    """The layers of a smoke run, and what is to be said about it."""
    blocks = checkpoint.family.blocks(checkpoint.config)
    if not 1 <= limit <= blocks:
        raise UsageError("--limit-layers", wanted=f"1 to {blocks} decoder blocks", found=limit)

    def untouched(p: LayerPlan) -> LayerPlan:
        bits = checkpoint.info(f"{p.module.name}.weight").nbytes * 8
        return LayerPlan(p.module, None, None, None, "source", None, p.rule, bits)

    limited = tuple(p if p.module.block in range(limit) else untouched(p) for p in layers)
    return limited, f"smoke run: only the first {limit} of {blocks} decoder blocks are quantized, the rest is untouched"
