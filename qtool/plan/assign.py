"""Which rule decides each layer of a model: the first one that applies to the model and matches the layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qtool.checkpoint.modules import BESIDE
from qtool.errors import suggestion
from qtool.plan.findings import Findings
from qtool.recipe.match import EVERY_LINEAR, Named, matches
from qtool.recipe.scope import ModelFacts, chosen


def assign(found: Sequence[Named], facts: ModelFacts, findings: Findings) -> tuple[dict[str, int], list[str]]:
    """The rule that decides each module, by module name, and warnings about rules that decide none.

    Args:
        found: all modules of the model.
        facts: what the rules' conditions ask about.
        findings: holds the rules; gets rules that match nothing, and layers that no rule matches.
    """
    decisions: dict[str, int] = {}
    warnings = []
    for i, rule in enumerate(findings.rules):
        if rule.when and not rule.when.holds(facts):
            continue
        named = meant(rule.match, found)
        if not named:
            findings.add(i, f"matches nothing in this model; {suggestion(rule.match, _patterns(found))}")
        hits = [m.name for m in _in_blocks(named, i, facts, findings)]
        new = [name for name in hits if name not in decisions]
        rest = rule.match == EVERY_LINEAR  # there may be none
        if hits and not new and not rest and not any(_limited(findings, decisions[name]) for name in hits):
            warnings.append(
                f"{findings.position(i)} decides nothing: earlier rules match all of its {len(hits)} layers"
            )
        decisions |= dict.fromkeys(new, i)
    for m in found:
        if m.kind == "linear" and m.name not in decisions:
            advice = 'end layers: with a rule for the rest, such as {match: "*", keep: true}'
            findings.add(-1, f"no rule matches; {advice}", m.name)
    return decisions, warnings


def meant(pattern: str, found: Sequence[Named]) -> Sequence[Named]:
    """The modules that a pattern names: what is beside the model, only if it matches nothing of the model itself."""
    named = [m for m in found if matches(pattern, m)]
    return [m for m in named if m.kind != BESIDE] or named


def _in_blocks(named: Sequence[Named], index: int, facts: ModelFacts, findings: Findings) -> Sequence[Named]:
    """Those of the modules that lie in the blocks of a rule."""
    blocks = findings.rules[index].blocks
    if blocks is None:
        return named
    numbers = chosen(blocks, facts.blocks)
    if numbers and numbers[-1] >= facts.blocks:
        findings.add(index, f"no such block: wanted 0 to {facts.blocks - 1}, found {numbers[-1]}")
    return [m for m in named if m.block in numbers]


def _limited(findings: Findings, index: int) -> bool:
    """True if a rule is for some blocks or models, or a flag: what it leaves to later rules depends on these."""
    rule = findings.rules[index]
    return rule.blocks is not None or rule.when is not None or rule.where.startswith("--tensor-type")


def _patterns(found: Iterable[Named]) -> list[str]:
    """Patterns that match something: roles, and names with `*` for what comes before a block's or their last part."""
    patterns = {"*": None}
    for m in found:
        inner = m.name if m.block is None else "*" + m.name.partition(f".{m.block}")[2]
        patterns |= dict.fromkeys((inner, *m.aliases, f"role:{m.role}"))
        patterns |= {} if m.block is None else {"*." + m.name.rpartition(".")[2]: None}
    return list(patterns)
