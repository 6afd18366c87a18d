"""Transforms that are trained: block by block, against what the original block makes of the same hidden states.

Shape letters: S samples, s of them, T tokens, H hidden size, K inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from qtool.calibrate.hidden import Hidden
from qtool.calibrate.operated import operated
from qtool.calibrate.replaced import run_replaced
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Checkpoint, TensorInfo
from qtool.checkpoint.edits import Edit
from qtool.checkpoint.rewritten import Rewritten
from qtool.errors import CheckpointError
from qtool.formats._base import Format
from qtool.methods._base import split
from qtool.methods._following import round_following
from qtool.methods._optimizers import optimizer
from qtool.methods.learned import relative_error
from qtool.numerics.checks import checked_later
from qtool.ops._base import InputOp
from qtool.pipeline.events import Event, Listener
from qtool.pipeline.prepare import Job
from qtool.pipeline.rewriting import Rewriting
from qtool.plan import LayerPlan
from qtool.transforms._base import Transform
from qtool.transforms._trained import TrainedTransform, Variables

CHECKS = 8
"""How often the state is compared with the best one so far."""


class Learning:
    """One trained transform of a model.

    Args:
        job: the run.
        transform: which one.
        before: what those before it did.
        listener: called with events of progress.

    Attributes:
        notes: what came of it, for the report.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, job: Job, transform: TrainedTransform, before: Sequence[Edit], listener: Listener) -> None:
        self.job, self.transform, self.listener = job, transform, listener
        self.rewriting = Rewriting(job, transform, before, listener)

    def edits(self, tokens: Tensor | None) -> Iterator[Edit]:
        """Everything that it does, in order. Each process trains some blocks.

        Raises:
            CheckpointError: there is one sample, and none to judge by.
        """
        if tokens is None or len(tokens) < 2:
            hint = "raise calibration.samples"
            raise CheckpointError("one calibration sample is none to learn from and one to judge by", hint=hint)
        job, ranks, found = self.job, self.job.ranks, list[Trained]()
        exact = self.rewriting.model
        walker = Walker(exact, job.device, job.dtype, job.plan.recipe.calibration.experts == "all")
        hidden, count = walker.embed(tokens), exact.family.blocks(exact.config)
        for i in range(count):
            block, inputs = walker.load_block(i), hidden.like()
            inputs.values.copy_(hidden.values)
            walker.advance(block, i, hidden)
            if i % ranks.size == ranks.rank:
                found.append(self.trained(BlockRun(walker, block, i, inputs, hidden, self.plans(i))))
            losses = {"before": found[-1].before, "after": found[-1].after} if found else {}
            self.listener(Event("transform", i + 1, count, self.transform.name(), losses))
        together = ranks.gather(found)
        ordered = [together[i % ranks.size][i // ranks.size] for i in range(count)]
        kept = sum(bool(t.edits) for t in ordered)
        left = sum(t.after for t in ordered) / max(sum(t.before for t in ordered), 1e-30)
        name, rest = self.transform.name(), "of the error of rounded blocks is left on samples held out of training"
        self.notes = (f"{name}: trained in {kept} of {count} blocks; {left:.2f} {rest}",)
        yield from (edit for t in ordered for edit in t.edits)

    def plans(self, i: int) -> dict[str, LayerPlan]:
        """Of the layers of a block that are quantized, by module."""
        return {p.module.name: p for p in self.job.plan.layers if p.module.block == i and p.format}

    def places(self, i: int) -> list[TrainedSite]:
        """What is trained in a block."""
        sites = [*self.rewriting.on_edges(i, {}), *self.rewriting.in_front(i, {})]
        device = self.job.device
        return [TrainedSite(edge, modules, self.transform.variables(site, device)) for edge, modules, site in sites]

    def trained(self, block: BlockRun) -> Trained:
        """The best of what training comes by, nothing and the start among it."""
        transform, places = self.transform, self.places(block.i)
        if not places:
            return Trained((), 0.0, 0.0)
        seed = self.job.plan.recipe.calibration.seed
        seen, unseen = split(block.inputs.samples, transform.holdout, seed)
        before = least = block.held_out((), unseen)
        best, generator = tuple[Edit, ...](), torch.Generator().manual_seed(seed + block.i)
        step = optimizer("adam", [(leaf, transform.rate) for place in places for leaf in place.variables.leaves])
        for i in range(transform.steps + 1):
            progress, last = i / transform.steps, i == transform.steps
            try:
                if last or i % max(1, transform.steps // CHECKS) == 0:
                    edits = [place.kept(progress) for place in places]
                    if (error := block.held_out(edits, unseen)) < least:
                        least, best = error, tuple(edits)
                if last:
                    break
                part = seen[torch.randperm(len(seen), generator=generator)[: transform.batch]]
                edits = [place.edit(progress) for place in places]
                with checked_later():  # states that may be kept are
                    loss = block.error(edits, part)
            except ValueError:  # steps were so long that an operation has no inverse any more
                break
            loss.backward()  # type: ignore[no-untyped-call]
            step(0.5 * (1 + math.cos(math.pi * progress)))
        return Trained(best, before, least)


@dataclass(frozen=True)
class Trained:
    """What came of a block: edits, and its error on held-out samples without and with them."""

    edits: tuple[Edit, ...]
    before: float
    after: float


@dataclass(frozen=True)
class TrainedSite:
    """What is trained somewhere; see `Edit`."""

    edge: str
    modules: tuple[str, ...]
    variables: Variables

    def edit(self, progress: float) -> Edit:
        """As it is now, with gradients."""
        return Edit(self.edge, self.variables.op(progress), self.modules)

    @torch.no_grad()
    def kept(self, progress: float) -> Edit:
        """As it is now, to be kept."""
        op = self.variables.op(progress)
        plain, tensors = op.data()
        own = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        return Edit(self.edge, type(op).load(plain, own), self.modules)


class BlockRun:
    """A block behind edits, rounded, beside the original one.

    Args:
        walker: runs the model as it is.
        block: loaded.
        i: its index.
        inputs: in front of it.
        targets: what it makes of these.
        plans: of the layers that are quantized, by module.
    """

    def __init__(
        self, walker: Walker, block: nn.Module, i: int, inputs: Hidden, targets: Hidden, plans: Mapping[str, LayerPlan]
    ) -> None:
        self.walker, self.block, self.i, self.inputs, self.targets, self.plans = (
            walker,
            block,
            i,
            inputs,
            targets,
            plans,
        )
        model = walker.checkpoint
        prefix = model.family.block_prefix.format(i=i)
        names = [prefix + name for name in model.family.block_shapes(model.config, i)]
        self.held = Held(model, {name: model.tensor(name).to(walker.device) for name in names})

    def changed(
        self, edits: Sequence[Edit], compared: bool
    ) -> tuple[dict[str, Tensor], dict[str, Callable[[Tensor], Tensor]]]:
        """(tensors that edits and rounding make others, by name; what linear layers read, by module).

        With `compared`, scales are those of an artifact; else what a search alone finds, as on the way of a walk.
        """
        model = Rewritten(self.held, edits, dtype=torch.float32)
        tensors, inputs = dict[str, Tensor](), dict[str, Callable[[Tensor], Tensor]]()
        for name, stored in self.held.tensors.items():
            plan = self.plans.get(name.removesuffix(".weight"))
            tensor = model.tensor(name)
            if plan and plan.format and name.endswith(".weight"):
                fmt = plan.format if compared else plan.format.on_the_way()
                tensor = round_following(tensor.float().contiguous(), fmt)
            if tensor is not stored:
                tensors[name] = tensor
        for name, plan in self.plans.items():
            ops = model.input_ops.get(name, ())[len(self.held.input_ops.get(name, ())) :]
            own = plan.activations if plan.activations and not plan.activations.static else None
            if ops or own:
                inputs[name] = partial(read, ops=ops, fmt=own)
        return tensors, inputs

    def error(self, edits: Sequence[Edit], part: Tensor) -> Tensor:
        """Error of the output for some samples, relative to tokens' energies, with gradients by what edits hold."""
        return self.apart(*self.changed(edits, compared=False), part)

    @torch.no_grad()
    def held_out(self, edits: Sequence[Edit], part: Tensor) -> float:
        """The same of samples one after the other."""
        changed = self.changed(edits, compared=True)
        return float(torch.stack([self.apart(*changed, s[None]) for s in part]).double().mean())

    def apart(
        self, tensors: Mapping[str, Tensor], inputs: Mapping[str, Callable[[Tensor], Tensor]], part: Tensor
    ) -> Tensor:
        """Mean error of the output of the block with these for some samples."""
        output = run_replaced(self.walker, self.block, self.i, self.inputs[part], tensors, inputs)
        return relative_error(output, self.targets[part].to(output.device))


def read(x: Tensor, ops: Sequence[InputOp], fmt: Format | None) -> Tensor:
    """What a layer multiplies with instead of its input, [..., K]: behind operations, rounded token by token."""
    x = operated(x, ops)
    if fmt is None:
        return x
    if fmt.augmented:
        raise CheckpointError("learned transforms", wanted="inputs that are rounded once", found=fmt.label)
    rows = x.flatten(0, -2).float()
    return round_following(rows, fmt.at_run_time()).to(x.dtype).view(x.shape)


class Held(Checkpoint):
    """A model of which the tensors of a block are in memory.

    Args:
        model: as it is.
        tensors: by name.
    """

    def __init__(self, model: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
        self.model, self.tensors = model, tensors
        self.source, self.config, self.family = model.source, model.config, model.family
        self.files, self.notes = model.files, model.notes
        self.listed = model.names()

    def names(self) -> list[str]:
        """See `Checkpoint.names`."""
        return self.listed

    def info(self, name: str) -> TensorInfo:
        """See `Checkpoint.info`."""
        return self.model.info(name)

    def tensor(self, name: str) -> Tensor:
        """See `Checkpoint.tensor`."""
        return self.tensors[name] if name in self.tensors else self.model.tensor(name)

    @property
    def input_ops(self) -> Mapping[str, tuple[InputOp, ...]]:
        """See `Checkpoint.input_ops`."""
        return self.model.input_ops

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`."""
        return self.model.fingerprint()


def carried_out(job: Job, transform: Transform, before: Sequence[Edit], listener: Listener) -> Learning | Rewriting:
    """A transform at the model of a run, to be asked for its edits; see `Rewriting` for the arguments."""
    if isinstance(transform, TrainedTransform):
        return Learning(job, transform, before, listener)
    return Rewriting(job, transform, before, listener)
