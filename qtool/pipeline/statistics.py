"""Where a layer's statistics come from: nowhere, a file, or the calibration tokens walked through the model."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from qtool.calibrate.attention import AttentionErrors, attention_errors, few
from qtool.calibrate.cache import MeteredCache, RoundedCache
from qtool.calibrate.hidden import Hidden
from qtool.calibrate.reference import Reference
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import CacheScales, Layer, QuantizedCheckpoint
from qtool.methods._base import BlockTask
from qtool.numerics.threads.marks import marked
from qtool.numerics.threads.ranks import ALONE, Ranks
from qtool.pipeline.events import Event, Listener, remarks
from qtool.pipeline.found import decoded
from qtool.pipeline.module_weights import ModulesAhead, modules_ahead
from qtool.pipeline.prepare import Job
from qtool.pipeline.solver import Solved, Solver
from qtool.pipeline.stored import Files, of_original, stored_for
from qtool.pipeline.tokens import tokens_of
from qtool.pipeline.units import Unit, comparable, needs_of, units
from qtool.pipeline.weigh import Weights, token_weights, weighing
from qtool.plan import LayerPlan
from qtool.recipe.schema import Calibration


class Statistics(ABC):
    """What the loop over units asks, one unit after the other.

    Args:
        digest: changes when the statistics would; None without data.
        about: what the report says about them.

    Attributes:
        cached: what was found for the KV cache of the block that was visited last; None if nobody asked for it.
        ranks: who solves a unit together.
        independent: whether units can be visited in any order, and each by another process.
    """

    cached: tuple[CacheScales, AttentionErrors] | None = None
    ranks: Ranks = ALONE
    independent = True

    def __init__(self, digest: str | None, about: dict[str, object]) -> None:
        self.digest, self.about = digest, about

    @abstractmethod
    def visit(self, unit: Unit, solver: Solver, propagate: bool) -> None:
        """Has all modules of a unit solved, input by input.

        Args:
            unit: the next one.
            solver: called for the modules of each input, with what was measured there.
            propagate: whether hidden states have to go on behind it, because a later unit is measured there.
        """

    def end(self) -> None:
        """Lets go of what it measured with, once all units are visited; what it says of itself stays."""
        for name in vars(self).keys() - {"digest", "about"}:
            delattr(self, name)


class FromFiles(Statistics):
    """Statistics from an earlier run of `calibrate`, or none at all.

    Args:
        files: holds them; None: nothing.
        weights: of modules, read ahead; None: whoever solves them reads them.
    """

    def __init__(self, files: Files | None = None, weights: ModulesAhead | None = None) -> None:
        super().__init__(files.digest if files else None, dict(files.about) if files else {})
        self.files, self.weights = files, weights

    def visit(self, unit: Unit, solver: Solver, propagate: bool) -> None:
        """See `Statistics.visit`."""
        for reads, plans in unit.inputs().items():
            needs = of_original(needs_of(plans))
            stats = self.files.read(reads, needs) if self.files and needs else None
            if stats is not None or self.weights is None or solver.resumed:
                solver.solve([(plans, stats)])
                continue
            for p in plans:
                solver.solve([((p,), None)], self.weights.of(p.module.name))


class Walked(Statistics):
    """Runs the calibration tokens through one block after the other.

    Each block is run once: before an input is read for the first time, all tokens wait until the layers that read it
    are quantized, so every layer is measured behind all quantized ones before it, those of its own block included.

    Methods that solve blocks get theirs then, before hidden states go on.

    Args:
        walker: over the unquantized model.
        tokens: int64 [S, T], those of all processes.
        calibration: whether a layer's successors see its quantized outputs; for the rest, see the report.
        compare: whether a method asks how inputs drift.
        blockwise: whether a method solves blocks, and so wants all samples as the unquantized model has them.
        original: whether one of these looks at that model's hidden states in front of blocks.
        weights: how much each token counts; None: all alike.
        reference: the unquantized model, where other runs have it beside them too.
    """

    independent = False

    def __init__(
        self,
        walker: Walker,
        tokens: Tensor,
        calibration: Calibration,
        compare: bool,
        blockwise: bool = False,
        original: bool = False,
        weights: Weights | None = None,
        reference: Reference | None = None,
    ) -> None:
        about = {**calibration.model_dump(mode="json"), "tokens": tokens.numel()}
        super().__init__(hashlib.sha256(tokens.numpy().tobytes()).hexdigest(), about)
        self.walker, self.ranks, self.seed = walker, walker.ranks, calibration.seed
        self.weights = weights
        self.hidden = walker.embed(tokens[self.ranks.share(len(tokens))])
        self.quantized = calibration.propagate == "quantized"
        beside = self.quantized and (compare or blockwise)
        own = reference or Reference(walker, tokens, every=blockwise, apart=original) if beside else None
        self.reference = own

    def visit(self, unit: Unit, solver: Solver, propagate: bool) -> None:
        """See `Statistics.visit`."""
        inputs, i = unit.inputs(), unit.block
        measured = {} if solver.resumed else {reads: need for reads in inputs if (need := comparable(inputs[reads]))}
        if i is None:
            for reads, plans in inputs.items():
                stats = self.walker.collect_head(self.hidden, measured[reads]) if reads in measured else None
                solver.solve([(plans, stats)])
            return
        block = self.walker.load_block(i)
        layers = {p.module.name: p.layer for p in unit.quantized if p.layer}
        rounding = layers if self.quantized else {}
        if unmeasured := [(plans, None) for reads, plans in inputs.items() if reads not in measured]:
            self.put(block, layers, unit, solver.solve(unmeasured))
        blockwise = bool(unit.blockwise) and not solver.resumed
        metered = MeteredCache(unit.cache) if unit.cache and not solver.resumed else None
        if not (measured or blockwise or metered or propagate):
            return
        first = few(self.hidden) if self.ranks.first else None
        with self.walker.quantized_inputs(block, i, rounding):
            weights = self.weights.modules if self.weights else None
            steps = self.walker.steps(block, i, self.hidden, measured, self.reference, metered, weights, blockwise)
            for several in steps:
                here = [(inputs[reads], stats) for reads, stats in several.items()]
                solved = solver.solve(here, self.at_hand(block, [p for plans, _ in here for p in plans]))
                self.put(block, layers, unit, solved)
        if blockwise:
            self.solve_block(block, layers, unit, solver)
        if metered and unit.cache:
            metered.combine(self.ranks)
            rounded = RoundedCache(unit.cache, metered.scales())
            found = None if first is None else self.compare_attention(block, rounding, i, first, rounded)
            self.cached = self.ranks.broadcast(found)

    def at_hand(self, block: nn.Module, plans: Iterable[LayerPlan]) -> dict[str, Tensor]:
        """Weights of modules that the loaded block has as they are stored, by name, so that nobody reads them again."""
        checkpoint, walker = self.walker.checkpoint, self.walker
        if isinstance(checkpoint, QuantizedCheckpoint):
            return {}
        exact = [p.module for p in plans if checkpoint.info(f"{p.module.name}.weight").dtype == walker.dtype]
        return {m.name: cast(Tensor, walker.linear(block, m).weight).data for m in exact}

    def put(self, block: nn.Module, layers: dict[str, Layer], unit: Unit, solved: Solved) -> None:
        """Puts what was solved into the block, if its successors are to see that."""
        layers |= {name: layer for name, (_, layer) in solved.items()}
        mine = [p.module for p in unit.quantized if self.quantized and p.module.name in solved]
        with marked("codes put into the block"):
            here = {module: solved[module.name][0].to(self.walker.device) for module in mine}
            for module, w in decoded(here):
                self.walker.set_weight(block, module, w, here[module].residuals)

    def solve_block(self, block: nn.Module, layers: dict[str, Layer], unit: Unit, solver: Solver) -> None:
        """Has the block solved as a whole, and lets hidden states go on behind what was found."""
        assert unit.block is not None
        walker, i = self.walker, unit.block
        if self.reference is None:
            targets = self.hidden.like()
            targets.values.copy_(self.hidden.values)
            walker.advance(block, i, targets, {})
        else:
            targets = self.reference.outputs
        task = BlockTask(
            block=i,
            plans={},
            formats={},
            weights={},
            found={},
            stats={},
            inputs=self.hidden,
            original=self.original(),
            targets=targets,
            forward=lambda x, weights, beside: walker.differentiable(block, i, x, weights, layers, beside),
            device=walker.device,
            dtype=walker.dtype,
            seed=self.seed,
            token_weights=self.weights.blocks[i] if self.weights else None,
        )
        for solved in solver.solve_block(task):
            self.put(block, layers, unit, solved)
        if self.reference is None:
            self.hidden = targets
        else:
            self.reference.proceed()
            walker.advance(block, i, self.hidden, layers)

    def original(self) -> Hidden | None:
        """What the block at hand reads in the unquantized model, where that is still there."""
        if self.reference is None:
            return self.hidden
        return self.reference.hidden if self.reference.apart else None

    def compare_attention(
        self, block: nn.Module, layers: Mapping[str, Layer], i: int, first: Hidden, cache: RoundedCache
    ) -> tuple[CacheScales, AttentionErrors]:
        """Scales of the KV cache, and what rounding with them does to the block's attention.

        Args:
            block: with the weights that it will have.
            layers: how its linear layers round their inputs.
            i: its index.
            first: the beginning of what it reads.
            cache: how keys and values are rounded.
        """
        reads = self.walker.modules[i][0].reads
        before = {m.name: layers[m.name] for m in self.walker.modules[i] if m.reads == reads and m.name in layers}
        with self.walker.quantized_inputs(block, i, before):
            return cache.scales, attention_errors(self.walker, block, i, first, cache)


class Alone:
    """Walks of a run without others beside it."""

    def walker(self, job: Job) -> Walker:
        """Over the model that is quantized."""
        everything = job.plan.recipe.calibration.experts == "all"
        return Walker(job.checkpoint, job.device, job.dtype, everything, job.ranks)

    def reference(self, job: Job, walker: Walker) -> Reference | None:
        """The unquantized model beside the quantized one; None: the run begins one of its own."""
        return None


def statistics_for(job: Job, stored: Path | None, listener: Listener, beside: Alone | None = None) -> Statistics:
    """Chooses where a run's statistics come from.

    Args:
        job: says whether any method needs some.
        stored: statistics of an earlier `calibrate`; None: run the calibration tokens.
        listener: called with events of progress.
        beside: what other runs need as well; None: there are none.

    Raises:
        CheckpointError, MissingExtra, HubError: see `load_tokens` and `stored_for`.
    """
    if not any(unit.walked for unit in units(job.plan)):
        if stored:
            text = f"{stored} is not used, because the recipe's methods measure no inputs"
            listener(Event("calibrate", 1, 1, text, warning=True))
        return FromFiles(weights=modules_ahead(job))
    if stored:
        return FromFiles(stored_for(job, stored, remarks(listener, "calibrate")))
    calibration = job.plan.recipe.calibration
    listener(Event("calibrate", 0, 1, str(calibration.data)))
    tokens = tokens_of(job, remarks(listener, "calibrate"))
    beside = beside or Alone()
    walker = beside.walker(job)
    compare = any(kind.compares for unit in units(job.plan) for kind in unit.needs)
    methods = [p.method for unit in units(job.plan) for p in unit.blockwise if p.method]
    original = any(method.reads_original for method in methods)
    groups = weighing(job.plan.layers, calibration.token_weights.groups if calibration.token_weights else 1)
    weights = token_weights(walker, tokens[job.ranks.share(len(tokens))], calibration, groups, listener)
    reference = beside.reference(job, walker) if compare and calibration.propagate == "quantized" else None
    source = Walked(walker, tokens, calibration, compare, bool(methods), original, weights, reference)
    listener(Event("calibrate", 1, 1, f"{tokens.numel()} tokens"))
    return source
