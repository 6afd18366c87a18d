"""The unquantized model, run beside the quantized one: what the inputs of layers drift away from.

Behind quantized layers a layer reads other inputs than those it was trained on. Methods that know both can make up for
part of the difference (https://arxiv.org/abs/2504.02692).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor, nn

from qtool.calibrate.blocks import Blocks
from qtool.calibrate.copies import twin
from qtool.calibrate.foreign import misfit
from qtool.checkpoint._base import Module
from qtool.numerics.threads.marks import marked

SHARE = 0.25
"""Part of the samples that the unquantized model is run on. With half or all of them, KL divergence at 4 bits was 7
percent lower on SmolLM2-135M (0.084 instead of 0.090), for up to half the time of all forward passes."""


class Enough(Exception):
    """Leaves a block behind the last input that is looked at."""


class Reference:
    """Hidden states of samples in the unquantized model; advanced block by block beside the quantized ones.

    They are this process's share.

    Args:
        blocks: of the unquantized model.
        tokens: int64 [S, T], those of all processes.
        every: whether all samples are run; else the first ones, as many as are compared.
        apart: whether outputs have memory of their own, where hidden states are to stay until `proceed`.

    Attributes:
        hidden: in front of the next block.
        outputs: where outputs go; `hidden` itself, unless they are apart.
    """

    def __init__(self, blocks: Blocks, tokens: Tensor, every: bool = False, apart: bool = False) -> None:
        self.blocks, self.apart = blocks, apart
        compared = range(-int(-len(tokens) * SHARE // 1))
        self.compared = len(compared[blocks.ranks.share(len(tokens))])
        mine = tokens[blocks.ranks.share(len(tokens))]
        self.hidden = self.outputs = blocks.embed(mine if every else mine[: self.compared])
        self.block: nn.Module | None = None
        self.readers: tuple[Module, ...] = ()
        self.found: dict[int, tuple[dict[str, Tensor], Tensor | None]] = {}
        """What batches that start anew need not compute again, on devices, where no block is trained."""

    def begin(self, i: int, readers: Iterable[Module], keep: bool = False) -> None:
        """Loads block i.

        Args:
            i: its index.
            readers: linear layers whose inputs are looked at, in the samples that are compared.
            keep: leave `hidden` as it is until `proceed`, if outputs are apart.
        """
        self.block, self.index, self.readers = self.blocks.load_block(i), i, tuple(readers)
        self.keeps = self.hidden.values.device.type != "cpu" and not keep
        self.found.clear()
        if keep and self.apart:
            self.outputs = self.hidden.like()

    def compares(self, part: slice) -> bool:
        """Whether anything is looked at in some samples; else no more than the block's output is wanted of them."""
        return bool(self.readers) and part.start < self.compared

    def run(self, part: slice, wanted: Collection[str] | None = None) -> tuple[dict[str, Tensor], Tensor | None]:
        """What `compute` finds; where hidden states stay on a device, all of it, once per block."""
        if part.start in self.found:
            return self.found[part.start]
        with marked("unquantized forward passes"):
            found = self.compute(part, None if self.keeps else wanted)
        if self.keeps:
            self.found[part.start] = found
        return found

    def compute(self, part: slice, wanted: Collection[str] | None = None) -> tuple[dict[str, Tensor], Tensor | None]:
        """Runs the block on those of some samples that it has; several parts may run side by side.

        Args:
            part: the samples.
            wanted: inputs, by `Module.reads`, behind which the block is not run on; None: all, and its output.

        Returns:
            (the inputs it was begun to look at, by `Module.reads`, [tokens, K], of the samples that are compared; the
            block's output, to be given to `advance`).
        """
        part = slice(part.start, min(part.stop, self.hidden.samples))
        seen: dict[str, Tensor] = {}
        if part.start >= part.stop:
            return seen, None
        assert self.block is not None
        block, first = twin(self.block), self.compared - part.start  # hooks of a twin see this part only
        readers = [m for m in self.readers if wanted is None or m.reads in wanted] if first > 0 else []
        if wanted is not None and not readers:
            return seen, None

        def look(reads: str, x: Tensor) -> None:
            seen[reads] = x[:first].flatten(0, -2)
            if wanted is not None and len(seen) == len(readers):
                raise Enough

        for m in readers:
            self.blocks.linear(block, m).register_forward_pre_hook(
                lambda _, inputs, reads=m.reads: look(reads, inputs[0])
            )
        try:
            output = self.blocks.output(block, self.index, self.hidden, part)
        except Enough:
            return seen, None
        if missing := {m.reads for m in readers} - seen.keys():
            raise misfit(block, f"did not run what reads {', '.join(sorted(missing))}")
        return seen, output

    def complete(self, part: slice, output: Tensor | None) -> None:
        """Takes the block's output for samples that are through, once: where nobody compares, only then is it computed.

        Args:
            part: the samples.
            output: what `run` gave; None: it was not asked.
        """
        _, output = self.run(part) if output is None else ({}, output)
        if output is not None:
            self.advance(part, output)

    def advance(self, part: slice, output: Tensor) -> None:
        """Takes the block's output for some samples; what was kept of them is gone."""
        self.found.pop(part.start, None)
        self.outputs[slice(part.start, part.start + len(output))] = output

    def proceed(self) -> None:
        """Goes on behind the block."""
        self.hidden = self.outputs


class SharedReference(Reference):
    """The same for several runs that go from block to block side by side: each is run once for all of them.

    Args:
        blocks, tokens: see `Reference`.
        compared: inputs that one of the runs looks at, by `Module.reads`.
    """

    def __init__(self, blocks: Blocks, tokens: Tensor, compared: Collection[str]) -> None:
        super().__init__(blocks, tokens, apart=True)
        self.looked_at, self.seen = compared, dict[tuple[int, int], tuple[dict[str, Tensor], Tensor | None]]()

    def begin(self, i: int, readers: Iterable[Module], keep: bool = False) -> None:
        """See `Reference.begin`; the first run that comes to the block does, and goes on behind the one before."""
        if self.block is None or self.index != i:
            self.seen.clear()
            self.proceed()
            every = {m.reads: m for m in reversed(self.blocks.modules[i]) if m.reads in self.looked_at}
            super().begin(i, reversed(every.values()), keep=True)

    def run(self, part: slice, wanted: Collection[str] | None = None) -> tuple[dict[str, Tensor], Tensor | None]:
        """See `Reference.run`; everything, which another run may want."""
        key = part.start, part.stop
        if key not in self.seen:
            with marked("unquantized forward passes"):
                self.seen[key] = self.compute(part)
        inputs, output = self.seen[key]
        return dict(inputs), output
