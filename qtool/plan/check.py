"""Whether artifacts can carry what was decided; asked before any weight is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Protocol, cast

from qtool.checkpoint._base import Checkpoint, Layer, Module
from qtool.plan.findings import Findings
from qtool.plan.layers import LayerPlan, Plan
from qtool.recipe.cache import KVCache


class Finisher(Protocol):
    """What the plan asks a stage behind the last block; `qtool.stages._base.Stage` is one."""

    def name(self) -> str:
        """The name that recipes use."""

    def misfit(self, plan: Plan) -> str | None:
        """Why it has nothing to work on in a model that is quantized by this plan; None if it has."""


class Verdict(Protocol):
    """Whether an artifact can hold a layer, and why not; `qtool.artifact._base.Carry` is one."""

    @property
    def possible(self) -> bool:
        """True if it can."""

    @property
    def reason(self) -> str:
        """Why not."""


class Carrier(Protocol):
    """What the plan asks an artifact; `qtool.artifact._base.Artifact` is one."""

    language: ClassVar[bool]

    def supports(self, model: Checkpoint) -> Verdict:
        """Whether it can hold a model of this family and tokenizer, whatever the formats of its layers."""

    def one_format(self, module: Module) -> str | None:
        """Name of the set of modules that need one format, if the module belongs to such a set."""

    def carries(self, model: Checkpoint, module: Module, layer: Layer | None, keep: str) -> Verdict:
        """Whether it can hold a layer, and its runtimes compute what this model has in it."""

    def caches(self, fmt: KVCache | None) -> Verdict:
        """Whether it can say how the KV cache is rounded."""

    def agree(self, layers: Collection[Layer]) -> Verdict:
        """Whether it can hold layers together that it can hold one by one."""


def check(
    layers: Sequence[LayerPlan],
    cache: KVCache | None,
    checkpoint: Checkpoint,
    carriers: Mapping[str, Carrier],
    findings: Findings,
) -> None:
    """Notes what the artifacts cannot hold.

    Args:
        layers: what was decided.
        cache: format of the KV cache; None: left alone.
        checkpoint: the model.
        carriers: the artifacts by name.
        findings: gets a line for every kind of mistake.
    """
    if cache and (reason := cache.misfit(checkpoint.family.heads(checkpoint.config)[2])):
        findings.add(-1, f"the KV cache does not fit this model: {reason}")
    for name, carrier in carriers.items():
        for verdict in (carrier.supports(checkpoint), carrier.caches(cache)):
            if not verdict.possible:
                findings.add(-1, f"{name} cannot hold this model: {verdict.reason}")
        _check_carrier(name, carrier, layers, checkpoint, findings)


def check_stages(plan: Plan, findings: Findings) -> None:
    """Notes the stages that have nothing to work on.

    Args:
        plan: what was decided.
        findings: gets a line for each.
    """
    for stage in cast(tuple[Finisher, ...], plan.recipe.finish):
        if reason := stage.misfit(plan):
            findings.add(-1, f"finish: {stage.name()}: {reason}")


def _check_carrier(
    name: str, carrier: Carrier, layers: Sequence[LayerPlan], checkpoint: Checkpoint, findings: Findings
) -> None:
    """Notes every layer that the artifact cannot hold, and every set that its runtimes could not merge."""
    sets: dict[str, list[LayerPlan]] = {}
    for p in layers:
        verdict = carrier.carries(checkpoint, p.module, p.layer, p.keep)
        noted = p.format and p.format.misfit(p.module.shape[1])
        if not verdict.possible and not noted:
            findings.add(p.rule, f"{name} cannot hold this ({p.label}): {verdict.reason}", p.module.name)
        if one := carrier.one_format(p.module):
            sets.setdefault(one, []).append(p)
    together = carrier.agree([p.layer for p in layers if p.layer])
    if not together.possible:
        findings.add(-1, f"{name} cannot hold these formats together: {together.reason}")
    for one, members in sets.items():
        if len({(p.layer, p.keep) for p in members}) > 1:
            choices = ", ".join(dict.fromkeys(f"{p.module.role} {p.label}" for p in members))
            ends = "|".join(dict.fromkeys(p.module.name.rpartition(".")[2] for p in members))
            experts = "" if members[0].module.expert is None else r"experts\.\d+\."
            advice = rf'let one rule decide them all, such as match: "re:.*\.{experts}({ends})"'
            odd = next(p for p in members if (p.layer, p.keep) != (members[0].layer, members[0].keep))
            text = f"these become one tensor in {name} or its runtimes, wanted one format, found {choices}; {advice}"
            findings.add(odd.rule, text, one)
