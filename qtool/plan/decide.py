"""What every layer of a model gets, by the rules of a recipe; whether an artifact can carry that is asked elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qtool.checkpoint._base import Checkpoint, Layer, Module
from qtool.checkpoint.modules import BESIDE
from qtool.methods._base import Method
from qtool.plan.assign import assign
from qtool.plan.fallback import choose
from qtool.plan.findings import Findings
from qtool.plan.layers import LayerPlan
from qtool.recipe.schema import Recipe, Rule
from qtool.recipe.scope import ModelFacts

DTYPE_BITS = {"f32": 32, "f16": 16, "bf16": 16}


def decide(
    found: Sequence[Module], recipe: Recipe, checkpoint: Checkpoint, findings: Findings
) -> tuple[tuple[LayerPlan, ...], list[str]]:
    """Decides every layer.

    Args:
        found: all modules of the model.
        recipe: what to do.
        checkpoint: to what; only names and shapes are looked at.
        findings: gets what is wrong with the rules.

    Returns:
        One entry per module, but for those beside the model that no rule names; warnings about rules that decide
        nothing.
    """
    decisions, warnings = assign(found, facts(recipe, checkpoint), findings)
    found = [m for m in found if m.kind != BESIDE or m.name in decisions]
    layers = tuple(decide_module(m, decisions.get(m.name, -1), recipe, checkpoint, findings) for m in found)
    if recipe.method and any(p.format for p in layers) and all(p.method is not recipe.method for p in layers):
        findings.add(-1, "method: no layer uses it, because the rules name their own; remove it, or theirs")
    return layers, warnings


def facts(recipe: Recipe, checkpoint: Checkpoint) -> ModelFacts:
    """What the conditions of rules ask about."""
    family, config = checkpoint.family, checkpoint.config
    heads, kv_heads, _ = family.heads(config)
    methods = [recipe.method, *(rule.method for rule in recipe.layers)]
    return ModelFacts(
        blocks=family.blocks(config),
        gqa=heads // kv_heads,
        experts=family.experts(config),
        tied=checkpoint.tied,
        calibrated=any(method.needs for method in methods if method),
    )


def decide_module(module: Module, index: int, recipe: Recipe, checkpoint: Checkpoint, findings: Findings) -> LayerPlan:
    """Applies a rule (-1: none) to a module."""
    rule = recipe.layers[index] if index >= 0 else None
    if rule is None or rule.weights is None:
        keep = rule.keep if rule and isinstance(rule.keep, str) else "source"
        return LayerPlan(module, None, None, None, keep, None, index, kept_bits(module, keep, checkpoint))
    method = rule.method or (recipe.method if module.kind == "linear" else None) or Method.of("rtn")
    for text in blind(module, method, rule):
        findings.add(index, text, module.name)
    choice = choose(rule.weights, rule.fallback or recipe.fallback, module.shape[1])
    if choice.problem:
        findings.add(index, choice.problem, module.name)
    if choice.format is None:
        bits = kept_bits(module, choice.keep, checkpoint)
        return LayerPlan(module, None, None, None, choice.keep, choice.fallback, index, bits)
    residuals = []
    for residual in rule.residuals:
        if reason := residual.misfit(*module.shape):
            findings.add(index, f"{residual.name()}: {reason}", module.name)
        else:
            residuals.append(residual)
    bits = Layer(choice.format, residuals=tuple(residuals)).storage_bits(*module.shape)
    chosen = choice.format, method, rule.activations, choice.keep, choice.fallback
    return LayerPlan(module, *chosen, index, bits, tuple(residuals))


def blind(module: Module, method: Method, rule: Rule) -> Iterator[str]:
    """What a rule wants of an embedding, or of a matrix beside the model, that only inputs of linear layers tell."""
    why = {"embedding": "an embedding only looks rows up", BESIDE: "which nobody does beside the model"}
    if module.kind not in why:
        return
    as_head = module.kind == "embedding" and module.aliases  # whose inputs are those of the output layer
    if (method.needs and not as_head) or method.first != method:
        yield f"{method.name()} measures inputs, {why[module.kind]}; give it a rule with method: rtn"
    if any(residual.needs for residual in rule.residuals):
        yield f"these residuals measure inputs, {why[module.kind]}; give it a rule without them"
    if rule.activations and module.kind == "embedding":
        yield "an embedding has no inputs to round; give it a rule without activations:"
    elif rule.activations and rule.activations.static:
        yield f"a scale of inputs for all tokens is measured, {why[module.kind]}; scale them at run time"


def kept_bits(module: Module, keep: str, checkpoint: Checkpoint) -> int:
    """Bits of a matrix in its own type, or in the one that it is cast to."""
    n, k = module.shape
    return checkpoint.info(f"{module.name}.weight").nbytes * 8 if keep == "source" else n * k * DTYPE_BITS[keep]
