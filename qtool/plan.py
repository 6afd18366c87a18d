"""recipe x checkpoint -> what will be done to every layer, checked and counted before any weight is read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic import BaseModel

from qtool import __version__
from qtool.checkpoint._base import Checkpoint, Layer, Module, modules
from qtool.errors import PlanError, UsageError
from qtool.formats._base import Format
from qtool.methods._base import Method
from qtool.recipe.assign import assign
from qtool.recipe.cache import KVCache
from qtool.recipe.fallback import choose
from qtool.recipe.findings import Findings
from qtool.recipe.parse import parse_method
from qtool.recipe.schema import Recipe
from qtool.recipe.scope import Facts
from qtool.stats._base import Statistic
from qtool.stats.values import Values

DTYPE_BITS = {"f32": 32, "f16": 16, "bf16": 16}


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

    def knows(self, model: Checkpoint) -> Verdict:
        """Whether it can hold a model of this family and tokenizer, whatever the formats of its layers."""

    def one_format(self, module: Module) -> str | None:
        """Name of the set of modules that need one format, if the module belongs to such a set."""

    def can_carry(self, module: Module, layer: Layer | None, keep: str) -> Verdict:
        """Known from the format alone."""

    def caches(self, fmt: KVCache | None) -> Verdict:
        """Whether it can say how the KV cache is rounded."""

    def agree(self, layers: Collection[Layer]) -> Verdict:
        """Whether it can hold layers together that it can hold one by one."""


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one module.

    Attributes:
        module: which one.
        format: representation of its weight; None: kept.
        method: how codes are chosen; None: kept.
        activations: representation of its input at run time; None: left alone.
        keep: "source", or the dtype a kept tensor is cast to: "f32", "f16", "bf16".
        fallback: why `format` is not the one that the rule named; None if it is.
        rule: index into `recipe.layers` of the rule that decided, -1 for the default (embeddings nobody named).
        bits: size of the stored matrix, parameters included.
    """

    module: Module
    format: Format | None
    method: Method | None
    activations: Format | None
    keep: str
    fallback: str | None
    rule: int
    bits: int

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """What has to be measured on its input: for its method, and for a scale that holds for all tokens."""
        static = self.activations and self.activations.static
        return (self.method.needs if self.method else frozenset()) | ({Values} if static else set())

    @property
    def layer(self) -> Layer | None:
        """As checkpoints describe it; None if kept."""
        return Layer(self.format, self.activations) if self.format else None

    @property
    def label(self) -> str:
        """What becomes of it in a word or two: "int8-channel with int8-token inputs", "kept", "kept as f16"."""
        if self.layer is None:
            return "kept" if self.keep == "source" else f"kept as {self.keep}"
        return self.layer.label


@dataclass(frozen=True)
class Share:
    """All layers of one role that are treated alike.

    Attributes:
        role, label, fallback: as in the plan of each.
        method: its name; None: kept.
        layers: how many.
        weights, bits: of all of them together.
    """

    role: str
    label: str
    method: str | None
    fallback: str | None
    layers: int
    weights: int
    bits: int


@dataclass(frozen=True)
class Plan:
    """The whole run, decided.

    Attributes:
        recipe: as validated.
        layers: one entry per module, in the model's order, so block by block.
        artifacts: names of the artifacts to write, in recipe order.
        other_bytes: tensors that are no module (norms, biases), copied bit for bit.
        warnings: what the user should know and nobody has to fix.
        source_fingerprint: of the checkpoint.
        limited_blocks: blocks that a smoke run quantizes; None for a whole run.
    """

    recipe: Recipe
    layers: tuple[LayerPlan, ...]
    artifacts: tuple[str, ...]
    other_bytes: int
    warnings: tuple[str, ...]
    source_fingerprint: str = ""
    limited_blocks: int | None = None

    @property
    def predicted_bytes(self) -> int:
        """Bytes of all tensors when stored."""
        return sum(-(-p.bits // 8) for p in self.layers) + self.other_bytes

    @property
    def bits_per_weight(self) -> float:
        """Mean over all matrices, kept ones and parameters included."""
        return sum(p.bits for p in self.layers) / sum(math.prod(p.module.shape) for p in self.layers)

    def summary(self) -> tuple[Share, ...]:
        """The layers by role and treatment, in the model's order."""
        alike: dict[tuple[str, str, str | None, str | None], list[LayerPlan]] = {}
        for p in self.layers:
            method = p.method.name() if p.method else None
            alike.setdefault((p.module.role, p.label, method, p.fallback), []).append(p)
        return tuple(
            Share(*key, len(layers), sum(math.prod(p.module.shape) for p in layers), sum(p.bits for p in layers))
            for key, layers in alike.items()
        )

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides the codes: program version, model, calibration settings, layers.

        Names, artifacts and evaluation are left out: they only use the result. So is the content of a calibration
        file, which the recipe merely names.
        """
        layers = [[p.module.name, *map(_exact, (p.format, p.method, p.activations)), p.keep] for p in self.layers]
        calibration = self.recipe.calibration.model_dump(mode="json")
        content = [__version__, self.source_fingerprint, calibration, layers, _exact(self.recipe.kv_cache)]
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _exact(thing: BaseModel | None) -> Any:
    return thing and [type(thing).__name__, thing.model_dump(mode="json")]


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
    found = tuple(modules(checkpoint))
    findings = Findings(recipe.layers)
    decisions, warnings = assign(found, facts(recipe, checkpoint), findings)
    layers = tuple(_decide(m, decisions.get(m.name, -1), recipe, checkpoint, findings) for m in found)
    if recipe.method and any(p.format for p in layers) and all(p.method is not recipe.method for p in layers):
        findings.add(-1, "method: no layer uses it, because the rules name their own; remove it, or theirs")
    artifacts = tuple(export.to for export in recipe.export)
    for name in artifacts:
        for verdict in (carriers[name].knows(checkpoint), carriers[name].caches(recipe.kv_cache)):
            if not verdict.possible:
                findings.add(-1, f"{name} cannot hold this model: {verdict.reason}")
        _check_carrier(name, carriers[name], layers, findings)
    if lines := findings.lines():
        raise PlanError(lines, f"recipe {recipe.name} does not fit {checkpoint.source}")
    if limit_layers is not None:
        layers, warning = _limit(layers, limit_layers, checkpoint)
        warnings.append(warning)
    matrices = {f"{m.name}.weight" for m in found}
    other = sum(checkpoint.info(name).nbytes for name in checkpoint.names() if name not in matrices)
    return Plan(recipe, layers, artifacts, other, tuple(warnings), checkpoint.fingerprint(), limit_layers)


def facts(recipe: Recipe, checkpoint: Checkpoint) -> Facts:
    """What the conditions of rules are held against."""
    family, config = checkpoint.family, checkpoint.config
    heads, kv_heads, _ = family.heads(config)
    methods = [recipe.method, *(rule.method for rule in recipe.layers)]
    return Facts(
        blocks=family.blocks(config),
        gqa=heads // kv_heads,
        experts=family.experts(config),
        tied=checkpoint.tied,
        calibrated=any(method.needs for method in methods if method),
    )


def _decide(module: Module, index: int, recipe: Recipe, checkpoint: Checkpoint, findings: Findings) -> LayerPlan:
    """Applies a rule (-1: none) to a module."""
    rule = recipe.layers[index] if index >= 0 else None
    if rule is None or rule.weights is None:
        keep = rule.keep if rule and isinstance(rule.keep, str) else "source"
        return LayerPlan(module, None, None, None, keep, None, index, _kept_bits(module, keep, checkpoint))
    method = rule.method or (recipe.method if module.kind == "linear" else None) or parse_method("rtn")
    if module.kind == "embedding":
        if method.needs:
            text = f"{method.name()} measures inputs, an embedding only looks rows up; give it a rule with method: rtn"
            findings.add(index, text, module.name)
        if rule.activations:
            text = "an embedding has no inputs to round; give it a rule without activations:"
            findings.add(index, text, module.name)
    choice = choose(rule.weights, rule.fallback or recipe.fallback, module.shape[1])
    if choice.problem:
        findings.add(index, choice.problem, module.name)
    if choice.format is None:
        bits = _kept_bits(module, choice.keep, checkpoint)
        return LayerPlan(module, None, None, None, choice.keep, choice.fallback, index, bits)
    bits = choice.format.storage_bits(*module.shape)
    return LayerPlan(module, choice.format, method, rule.activations, "source", choice.fallback, index, bits)


def _kept_bits(module: Module, keep: str, checkpoint: Checkpoint) -> int:
    """Bits of a matrix in its own type, or in the one that it is cast to."""
    n, k = module.shape
    return checkpoint.info(f"{module.name}.weight").nbytes * 8 if keep == "source" else n * k * DTYPE_BITS[keep]


def _check_carrier(name: str, carrier: Carrier, layers: Sequence[LayerPlan], findings: Findings) -> None:
    """Notes every layer that the artifact cannot hold, and every set that its runtimes could not merge."""
    sets: dict[str, list[LayerPlan]] = {}
    for p in layers:
        verdict, noted = carrier.can_carry(p.module, p.layer, p.keep), p.format and p.format.misfit(p.module.shape[1])
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


def _limit(layers: Sequence[LayerPlan], limit: int, checkpoint: Checkpoint) -> tuple[tuple[LayerPlan, ...], str]:
    """The layers of a smoke run, and what is to be said about it."""
    blocks = checkpoint.family.blocks(checkpoint.config)
    if not 1 <= limit <= blocks:
        raise UsageError("--limit-layers", wanted=f"1 to {blocks} decoder blocks", found=limit)

    def untouched(p: LayerPlan) -> LayerPlan:
        bits = checkpoint.info(f"{p.module.name}.weight").nbytes * 8
        return replace(p, format=None, method=None, activations=None, keep="source", fallback=None, bits=bits)

    limited = tuple(p if p.module.block in range(limit) else untouched(p) for p in layers)
    return limited, f"smoke run: only the first {limit} of {blocks} decoder blocks are quantized, the rest is untouched"
