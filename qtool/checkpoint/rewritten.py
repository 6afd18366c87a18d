"""A model that computes the same with other tensors, rewritten one at a time while they are read.

Edits compose in order; operations that stay on inputs come behind all that are folded away, whenever they were named.
Factors of norms are kept exact on the way and rounded once, at the end, when what the rounding took away is given to
the readers' columns, so that a norm in bfloat16 costs nothing.

Shape letters: N rows, K columns, C channels of an edge.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from qtool.checkpoint._base import Checkpoint, TensorInfo
from qtool.checkpoint.edits import STREAM, Edit, digest, model_edges
from qtool.checkpoint.families._edges import Edge
from qtool.errors import CheckpointError
from qtool.ops._base import InputOp
from qtool.ops.permutation import Permutation
from qtool.ops.scale import Scale


@dataclass(frozen=True)
class Step:
    """Part of the rewriting of a tensor.

    Attributes:
        run: [rows, ...] -> same shape.
        whole: whether that wants all rows at once.
    """

    run: Callable[[Tensor], Tensor]
    whole: bool = False


class Rewritten(Checkpoint):
    """See the module; for the methods see `Checkpoint`.

    Args:
        checkpoint: the model as it is.
        edits: what is done to it, in this order.
        wide: modules whose rewritten weights come out in float32, because they are rounded anyway.
        dtype: the type of all tensors that are rewritten; None: their own, but for those of `wide`. Computed in float64
            if it is that, in float32 otherwise.

    Raises:
        CheckpointError: the model has no such edge, or it does not allow such a rewrite.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        edits: Sequence[Edit],
        wide: Collection[str] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        self.origin, self.edits, self._wide, self._dtype = checkpoint, tuple(edits), frozenset(wide), dtype
        self.source, self.config, self.family = checkpoint.source, checkpoint.config, checkpoint.family
        self.files, self.notes = checkpoint.files, checkpoint.notes
        self._online: dict[str, list[InputOp]] = defaultdict(list)
        self._names = list(checkpoint.names())
        self._steps: dict[str, list[Step]] = defaultdict(list)
        self._edges = model_edges(checkpoint)
        self._gains: dict[str, Tensor] = {}
        self._last: tuple[str, Tensor] | None = None
        for edit in self.edits:
            self._add(edit)
        for edge in self._edges.values():
            if edge.kind == "norm" and edge.name in self._gains:
                self._settle(edge)
        for module, ops in self._online.items():
            for op in ops:
                self._columns(module, op)

    def names(self) -> list[str]:
        """See `Checkpoint.names`. A tied output layer that is rewritten otherwise than the embedding has a name."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """See `Checkpoint.info`."""
        info = self.origin.info(self._stored(name))
        if name not in self._steps:
            return info
        own = torch.float32 if name.removesuffix(".weight") in self._wide else info.dtype
        return TensorInfo(info.shape, self._dtype or own)

    def tensor(self, name: str) -> Tensor:
        """See `Checkpoint.tensor`."""
        if name not in self._steps:
            return self.origin.tensor(self._stored(name))
        return self._rewrite(name, self.origin.tensor(self._stored(name)))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Checkpoint.rows`. A matrix whose rows are mixed is read whole, and kept until another one is."""
        if not any(step.whole for step in self._steps.get(name, ())):
            rows = self.origin.rows(self._stored(name), start, stop)
            return self._rewrite(name, rows) if name in self._steps else rows
        last = self._last
        if last is None or last[0] != name:
            self._last = last = name, self.tensor(name)
        return last[1][start:stop].clone()

    @property
    def input_ops(self) -> Mapping[str, tuple[InputOp, ...]]:
        """See `Checkpoint.input_ops`."""
        own = {module: (*self.origin.input_ops.get(module, ()), *ops) for module, ops in self._online.items()}
        return {**self.origin.input_ops, **own}

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`: of the model as it is, and of all edits."""
        return hashlib.sha256(f"{self.origin.fingerprint()} {digest(self.edits)}".encode()).hexdigest()

    def _stored(self, name: str) -> str:
        """The tensor of the original that one is made from."""
        untied = name == f"{self.family.head}.weight" and self.origin.tied
        return f"{self.family.embedding}.weight" if untied and name in self._names else name

    def _rewrite(self, name: str, stored: Tensor) -> Tensor:
        dtype = self.info(name).dtype
        x = stored.to(torch.float64 if dtype == torch.float64 else torch.float32)
        for step in self._steps[name]:
            x = step.run(x)
        return x.to(dtype)

    def _add(self, edit: Edit) -> None:
        edge, op = self._edges.get(edit.edge), edit.op
        if edit.edge and self.origin.input_ops:
            raise CheckpointError(f"{self.source} has operations on inputs: nothing can be folded into its layers")
        if edit.edge == STREAM and op:
            self._turn_stream(op)
        elif not edit.edge and op:
            for module in edit.modules:
                self._online[module].append(op)
        elif edge and edge.kind == "norm":
            self._rescale(edge, op)
        elif edge and edge.kind == "scores" and op:
            self._balance(edge, op)
        elif edge and edge.kind != STREAM and op:
            self._along(edge, op)
        else:
            raise CheckpointError(f"{self.source} has no edge to fold this along", found=edit.edge or "no operation")

    def _gain(self, edge: Edge) -> Tensor:
        """What a norm multiplies with, after the edits so far: float64 [C]."""
        if edge.name not in self._gains:
            self._gains[edge.name] = self.origin.tensor(f"{edge.source[0]}.weight").double() + edge.offset
        return self._gains[edge.name]

    def _rescale(self, edge: Edge, op: InputOp | None) -> None:
        """Takes factors, or all that there is, from a norm to its readers."""
        gain = self._gain(edge)
        if op is None:
            self._gains[edge.name] = torch.ones_like(gain)
            if not bool(gain.all()) and f"{edge.source[0]}.bias" in self._names:
                raise CheckpointError(f"{edge.source[0]} multiplies with zero: its factors cannot be folded away")
            self._scale_readers(edge, gain)
        elif isinstance(op, Scale) and op.width == edge.width:
            self._gains[edge.name] = op.apply(gain)
            self._scale_readers(edge, op.factors)
        elif op.adds and op.width == edge.width and (bias := f"{edge.source[0]}.bias") in self._names:
            self._steps[bias].append(Step(op.apply, whole=True))
            for module in edge.readers:
                self._columns(module, op)
        else:
            self._refuse(edge, op)

    def _scale_readers(self, edge: Edge, factors: Tensor) -> None:
        """Has readers multiply with factors that the norm is relieved of; so is what it adds."""
        if (bias := f"{edge.source[0]}.bias") in self._names:
            self._steps[bias].append(Step(lambda b: b / factors.to(b)))
        for module in edge.readers:
            self._untie(module)
            self._steps[f"{module}.weight"].append(Step(lambda w: w * factors.to(w)))

    def _settle(self, edge: Edge) -> None:
        """Makes a norm's weight of what it multiplies with, and readers make up for its rounding."""
        gain, weight = self._gains[edge.name], f"{edge.source[0]}.weight"
        self._steps[weight] = [Step(lambda _: gain - edge.offset, whole=True)]
        rounded = (gain - edge.offset).to(self.info(weight).dtype).double() + edge.offset
        lost = torch.where(rounded == 0, 1.0, gain / rounded)
        if not bool(lost.eq(1).all()):
            self._scale_readers(edge, lost)

    def _along(self, edge: Edge, op: InputOp) -> None:
        """Does to what the source of an edge writes, and makes up for in the readers, what may be done there."""
        sorts = isinstance(op, Permutation) and edge.kind == "product"
        if op.width != edge.width or not (sorts or edge.dim % op.run == 0) or (op.adds and not edge.shifts):
            self._refuse(edge, op)
        self._rows(edge.source[0], op, edge.first)
        if isinstance(op, Permutation):
            for module in edge.beside:
                self._rows(module, op)
        for module in edge.readers:
            self._columns(module, op.spread(edge.repeat, edge.dim))

    def _balance(self, edge: Edge, op: InputOp) -> None:
        """Does to keys what queries make up for, if it may as well be done behind the rotary embedding."""
        fits = op.width == edge.width and edge.dim % op.run == 0 and not op.adds
        if not fits or not (isinstance(op, Scale) or op.orthogonal) or not turns_alike(op, edge):
            self._refuse(edge, op)
        answer = Scale(1 / op.factors) if isinstance(op, Scale) else op
        self._rows(edge.source[0], op, edge.first)
        for module in edge.beside:
            self._rows(module, answer.spread(edge.repeat, edge.dim))

    def _turn_stream(self, op: InputOp) -> None:
        """Multiplies all hidden states of the model with an orthogonal matrix."""
        stream = [edge for edge in self._edges.values() if edge.kind == STREAM]
        if not stream or not op.orthogonal or op.width != stream[0].width:
            self._refuse(STREAM, op)
        for edge in self._edges.values():
            if edge.kind == "norm" and not bool(self._gain(edge).eq(1).all()):
                raise CheckpointError(f"{edge.source[0]} has factors: fold them away before hidden states are turned")
        for edge in stream:
            for module in edge.source:
                if module == self.family.embedding:
                    self._columns(module, op)
                else:
                    self._rows(module, op)
            for module in edge.readers:
                if f"{module}.weight" in self._names:  # else it is the embedding itself
                    self._columns(module, op)

    def _rows(self, module: str, op: InputOp, first: int = 0) -> None:
        """Has a module write `op` of what it wrote, in rows `first` and following."""
        part = slice(first, first + op.width)

        def weight(w: Tensor) -> Tensor:
            written = w.clone()
            written[part] = op.mix(w[part].T).T
            return written

        def bias(b: Tensor) -> Tensor:
            written = b.clone()
            written[part] = op.apply(b[part])
            return written

        self._steps[f"{module}.weight"].append(Step(weight, whole=True))
        if f"{module}.bias" in self._names:
            self._steps[f"{module}.bias"].append(Step(bias, whole=True))
        elif op.adds:
            self._refuse(module, op)

    def _columns(self, module: str, op: InputOp) -> None:
        """Has a module make up for reading `op` of what it read."""
        weight, bias = f"{module}.weight", f"{module}.bias"
        if op.adds and bias not in self._names:
            self._refuse(module, op)
        if op.adds:
            before = tuple(self._steps[weight])

            def add(b: Tensor) -> Tensor:
                w = self.origin.tensor(weight).to(b)
                for step in before:
                    w = step.run(w)
                return b + op.bias(w)

            self._steps[bias].append(Step(add, whole=True))
        self._steps[weight].append(Step(op.fold))

    def _untie(self, module: str) -> None:
        """Gives the output layer a matrix of its own, before it becomes another one than the embedding."""
        if module == self.family.head and f"{module}.weight" not in self._names:
            self._names.append(f"{module}.weight")
            self._steps[f"{module}.weight"] = list(self._steps[f"{self.family.embedding}.weight"])
            self.config = self.config | {"tie_word_embeddings": False}

    def _refuse(self, where: Edge | str, op: InputOp) -> NoReturn:
        place = where.name if isinstance(where, Edge) else where
        raise CheckpointError(f"{self.source} does not compute the same with a {op.name()} there", found=place)


def turns_alike(op: InputOp, edge: Edge) -> bool:
    """Whether it makes no difference to keys if positions turn them before an operation, or behind it."""
    half, generator = edge.rotary // 2, torch.Generator().manual_seed(0)
    keys = torch.randn(2, edge.width, dtype=torch.float64, generator=generator)

    def turned(x: Tensor) -> Tensor:
        """As a small step ahead does: every pair by an angle of its own."""
        heads, angles = x.view(len(x), -1, edge.dim), torch.arange(1, half + 1, dtype=x.dtype)
        first, second = heads[..., :half], heads[..., half : edge.rotary]
        rest = torch.zeros_like(heads[..., edge.rotary :])
        return torch.cat([-second * angles, first * angles, rest], -1).flatten(1)

    before, behind = op.apply(turned(keys)), turned(op.apply(keys))
    return torch.allclose(before, behind, rtol=0, atol=1e-6 * float(before.abs().max()))
