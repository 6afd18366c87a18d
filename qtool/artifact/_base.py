"""What an artifact is: a byte layout on disk that can carry some formats, with a writer and a reader.

A writer takes any `QuantizedCheckpoint` (the neutral one that a run leaves, or another artifact's reader), so `export`
and `quantize` share it. It streams: one tensor in memory at a time, everything under a temporary name until whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool.artifact._footprint import Footprint
from qtool.checkpoint._base import Checkpoint, Layer, Module, QuantizedCheckpoint
from qtool.checkpoint.derived.skeleton import IN_TURN
from qtool.checkpoint.modules import BESIDE, modules
from qtool.errors import PlanError
from qtool.formats._base import Quantized
from qtool.numerics.threads.ranks import Ranks
from qtool.ops._base import InputOp
from qtool.recipe.cache import KVCache
from qtool.recipe.strict import Strict
from qtool.residuals._base import Residual
from qtool.store.neutral import KEEP


@dataclass(frozen=True)
class Carry:
    """Whether an artifact can hold a layer. `reason` is empty if it can, exactly."""

    possible: bool
    reason: str = ""


@dataclass(frozen=True)
class Reading:
    """How a program that is not ours computes from an artifact.

    Attributes:
        reader: what it is called.
        dtype: that it is to compute in.
        rounds: whether it rounds inputs of quantized matrices to 8 bits on the way.
        most: tokens up to which it computes the same; None: it does so of any text.
        other: another one that computes so, where that one is not installed; empty: none.
        differs: why it is known to compute something else, or does not read it; empty: it should not.
        decodes: type that some of its releases round decoded matrices to on the way; None: none does.
        tables: whether it looks GELU up in a table of 16-bit floats.
    """

    reader: str
    dtype: torch.dtype = torch.float32
    rounds: bool = False
    most: int | None = None
    differs: str = ""
    other: str = ""
    decodes: torch.dtype | None = None
    tables: bool = False


class NoOptions(Strict):
    """Options of an artifact that has none."""


class Artifact(ABC):
    """One layout. The registry name is the file's: `compressed-tensors`, `gguf`, `qtool`.

    Attributes:
        besides: True if matrices beside the model may be quantized in it.
        language: True if it holds the language model alone.
        fuses: True if runtimes merge q/k/v and gate/up, so that each such set needs one format.
        runtimes: who reads it, for the support table.
        library: `library_name` of the hub's metadata; None: the hub has no name for it.
        usage: how to load it, Markdown for the model card.
        options: what a recipe or a flag says about it.
    """

    Options: ClassVar[type[Strict]] = NoOptions
    """What can be said about it in a recipe, beside its name; with a docstring for each."""

    besides: ClassVar[bool] = False
    language: ClassVar[bool] = False
    fuses: ClassVar[bool]
    runtimes: ClassVar[tuple[str, ...]]
    library: ClassVar[str | None] = None
    usage: ClassVar[str] = ""

    def __init__(self, **options: Any) -> None:
        self.options = self.Options.model_validate(options)

    def can_carry(self, module: Module, layer: Layer | None, keep: str) -> Carry:
        """Known before anything is computed, from the layer's description alone.

        Args:
            module: which one.
            layer: how it is quantized; None: kept.
            keep: type that it is cast to then; "source": none.
        """
        if layer and module.kind == BESIDE and not self.besides:
            return Carry(False, "what is beside the language model stays unquantized in this layout: remove the rule")
        for residual in layer.residuals if layer else ():
            if not self.corrects(module, residual):
                return Carry(False, f"it has no place for {residual.label} beside the codes; qtool has")
        for op in layer.input_ops if layer else ():
            if not self.operates(module, op):
                return Carry(False, f"its runtimes cannot be told to do {op.label} to inputs; qtool can")
        return self.holds(module, layer, keep)

    def corrects(self, module: Module, residual: Residual) -> bool:
        """Whether it can hold a correction beside a module's codes. Few can: nothing is carried unless said here."""
        return False

    def operates(self, module: Module, op: InputOp) -> bool:
        """Whether its runtimes can be told to do an operation on a module's input. Few can: none unless said here."""
        return False

    @abstractmethod
    def holds(self, module: Module, layer: Layer | None, keep: str) -> Carry:
        """See `can_carry`: whether it can hold the formats of weight and input."""

    def computed(self, model: Checkpoint, module: Module, layer: Layer | None) -> Carry:
        """Whether its runtimes compute what a model of this family has in a format that it can carry."""
        return Carry(True)

    def carries(self, model: Checkpoint, module: Module, layer: Layer | None, keep: str) -> Carry:
        """See `can_carry`, and `computed`: whether it is the layout for a layer of this very model."""
        carry = self.can_carry(module, layer, keep)
        return self.computed(model, module, layer) if carry.possible else carry

    def supports(self, model: Checkpoint) -> Carry:
        """Whether it can hold a model of this family, with this tokenizer, whatever the formats of its layers.

        Unless an artifact says more, its runtimes find tensors under transformers' names, one matrix each.
        """
        kind = model.config["model_type"]
        if model.config.get(IN_TURN):
            return Carry(False, f"its runtimes know another order of heads in {kind} models than GGUF's")
        if model.family.separate_experts:
            return Carry(True)
        return Carry(False, f"its runtimes know the experts of {kind} models as one tensor only; gguf holds them")

    def caches(self, fmt: KVCache | None) -> Carry:
        """Whether it can say how the KV cache is rounded; `fmt` None: not at all."""
        return Carry(fmt is None, "" if fmt is None else "it cannot say how a KV cache is quantized; remove kv_cache:")

    def part(self, model: QuantizedCheckpoint) -> QuantizedCheckpoint:
        """What of a model it holds, as a model by itself: all, unless it is for language models only."""
        return model

    def caveats(self, model: Checkpoint, layers: Mapping[str, Layer]) -> list[str]:
        """What to know of a model that it can hold: which of its runtimes cannot read it, or compute it differently.

        Args:
            model: the source.
            layers: what is quantized, by module.
        """
        return []

    def reading(self, model: QuantizedCheckpoint) -> Reading | None:
        """Who else computes from a model in this layout, to prove it; None: nobody that runs everywhere.

        Args:
            model: as `open` gives it.
        """
        return None

    def agree(self, layers: Collection[Layer]) -> Carry:
        """Whether it can hold layers together that it can hold one by one."""
        return Carry(True)

    def one_format(self, module: Module) -> str | None:
        """Name of the set of modules that need one format, if the module belongs to such a set."""
        return module.fused if self.fuses else None

    def check(self, model: QuantizedCheckpoint) -> None:
        """Makes sure that a model can be written, as far as its formats tell.

        Raises:
            PlanError: every reason why not, with the layers that it holds for.
        """
        reasons: dict[str, list[str]] = defaultdict(list)
        sets: dict[str, set[tuple[str, ...]]] = defaultdict(set)
        for module in modules(model):
            layer = model.layers.get(module.name)
            if layer and layer.unmeasured:
                reasons["inputs with one scale for all tokens need one, and nobody measured it"].append(module.name)
            if not (carry := self.carries(model, module, layer, "source")).possible:
                reasons[carry.reason].append(module.name)
            if name := self.one_format(module):
                sets[name].add(_labels(layer))
        for name, why in model.decoded.items():
            reasons[f"only `quantize` can take these matrices over, which rounds them again: {why}"].append(name)
        for reason in self._refusals(model):
            reasons[reason].append("the model as a whole")
        for name, labels in sets.items():
            if len(labels) > 1:
                reasons["layers that become one tensor, here or in a runtime, have different formats"].append(name)
        if reasons:
            lines = [f"{reason}: {names[0]}{_more(names)}" for reason, names in reasons.items()]
            raise PlanError(lines, f"{model.source} does not fit into this artifact")

    def _refusals(self, model: QuantizedCheckpoint) -> list[str]:
        """Why it cannot hold a model, whatever single layers are like."""
        cache = model.cache.format if model.cache else None
        verdicts = (self.supports(model), self.caches(cache), self.agree(model.layers.values()))
        return [verdict.reason for verdict in verdicts if not verdict.possible]

    def nbytes(self, model: Checkpoint, module: Module, layer: Layer | None, keep: str = "source") -> int:
        """Bytes of the tensors that a module's weight becomes, known before anything is computed.

        Args:
            model: that it belongs to.
            module: which one; it can be carried so.
            layer: how it is quantized; None: kept.
            keep: type that it is cast to then.
        """
        n, k = module.shape
        if layer is not None:
            return -(-layer.storage_bits(n, k) // 8)
        return model.info(f"{module.name}.weight").nbytes if keep == "source" else n * k * KEEP[keep].itemsize

    def footprint(self, model: QuantizedCheckpoint, card: Mapping[str, Any] | None = None) -> Footprint:
        """Bytes of the files with tensors that `write` makes of a model, headers included.

        Args:
            model: of which layers, names and shapes are looked at; it need not be solved yet (`qtool.plan.Planned`).
            card: what `write` will be given.
        """
        return replace(self._footprint(model, 0), exact=False)

    def _footprint(
        self, model: QuantizedCheckpoint, overhead: int, more: Mapping[str, Tensor] | None = None
    ) -> Footprint:
        """That of a model whose other tensors are stored as they are, and `more` behind them."""
        matrices = {m.name: self.nbytes(model, m, model.layers.get(m.name)) for m in modules(model)}
        others = (name for name in model.names() if name.removesuffix(".weight") not in matrices)
        rest = sum(model.info(name).nbytes for name in others)
        return Footprint(matrices, rest + sum(tensor.nbytes for tensor in (more or {}).values()), overhead)

    def try_matrix(self, model: Checkpoint, module: str, layer: Layer, quantized: Quantized) -> None:
        """Raises PlanError: what a matrix holds has no exact place here, which its layer alone does not tell."""
        return

    @abstractmethod
    def write(self, model: QuantizedCheckpoint, out: Path, card: dict[str, Any]) -> list[Path]:
        """Writes the artifact into the existing, empty folder `out` and returns its files.

        Args:
            model: what to write.
            out: a temporary folder; the caller gives it its final name.
            card: what the model card is going to say: base_model, recipe name and text, sizes, measured quality; and
                what is known of the importance matrix, if there was one. The card itself is not the layout's to write.

        Raises:
            StorageError: the disk is full or not writable.
            PlanError: the codes or scales of a layer do not fit exactly, with the reason.
        """

    def write_together(
        self, model: QuantizedCheckpoint, out: Path, card: dict[str, Any], ranks: Ranks
    ) -> Sequence[Path]:
        """`write` in every process of several: the first one returns all files, and writes alone what no layout shares.

        Raises:
            ProcessError: another process ended. For the rest, see `write`.
        """
        return self.write(model, out, card) if ranks.first else ()

    @abstractmethod
    def open(self, path: Path) -> QuantizedCheckpoint:
        """Reads an artifact of this layout. Raises CheckpointError: damaged, or another layout."""

    @classmethod
    @abstractmethod
    def recognizes(cls, path: Path) -> bool:
        """True if `path` looks like this layout; reads headers only."""


def naming(caveats: Mapping[str, Collection[Layer]]) -> list[str]:
    """Caveats, each a text with {} for the formats of the layers that it holds for; those that hold for none go."""
    labels = {text: ", ".join(sorted({layer.label for layer in layers})) for text, layers in caveats.items()}
    return [text.format(named) for text, named in labels.items() if named]


def _labels(layer: Layer | None) -> tuple[str, ...]:
    """What is stored of a layer; options that only matter for choosing codes are left out."""
    if layer is None:
        return ()
    inputs = layer.activations.label if layer.activations else ""
    beside = (*(residual.label for residual in layer.residuals), *(op.label for op in layer.input_ops))
    return (layer.format.label, inputs, *beside)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
