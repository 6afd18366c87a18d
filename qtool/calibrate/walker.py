"""Walks a model one decoder block at a time: hidden states of all tokens are carried along, and measured on the way.

Shape letters: S samples, T tokens per sample, V vocabulary, K input features, B groups of a module's outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from qtool.calibrate.blocks import TABLE_VALUES, Blocks
from qtool.calibrate.cache import MeteredCache, rounded_cache
from qtool.calibrate.experts import Experts
from qtool.calibrate.foreign import check_tokens
from qtool.calibrate.hidden import Hidden, waiting_limit
from qtool.calibrate.infinite import finite_statistics
from qtool.calibrate.inputs import rounded
from qtool.calibrate.meter import Meter
from qtool.calibrate.places import WaitingExperts, at_a_time, experts_in, meeting, places_of, stopping, upcoming
from qtool.calibrate.reference import Reference
from qtool.calibrate.steps import InStep
from qtool.checkpoint._base import Layer, Module, QuantizedCheckpoint
from qtool.numerics.heap import give_back
from qtool.numerics.product import float32_product
from qtool.numerics.threads.marks import marked
from qtool.numerics.threads.parallel import side_by_side
from qtool.stats._base import InputStats, Statistic, combine

TokenWeights = Mapping[str, Mapping[str, Tensor]]
"""How much each token counts, float32 [S, T, B], by `Module.reads` and the module that reads it."""


class Walker(Blocks):
    """One model, walked block by block; see `Blocks` for the arguments."""

    head: tuple[nn.Module, Tensor] | None = None

    def tensor(self, name: str) -> Tensor:
        """See `Blocks.tensor`; codes are decoded on the device."""
        module, model = name.removesuffix(".weight"), self.checkpoint
        coded = isinstance(model, QuantizedCheckpoint) and model.has_codes and module in self.layers
        if coded and self.device.type != "cpu":
            assert isinstance(model, QuantizedCheckpoint)
            return model.matrix(module).to(self.device).decode().to(self.dtype)
        return super().tensor(name)

    @torch.inference_mode()
    def collect(
        self,
        block: nn.Module,
        i: int,
        hidden: Hidden,
        needs: frozenset[type[Statistic]],
        token_weights: TokenWeights | None = None,
    ) -> dict[str, InputStats]:
        """Runs block i once over all tokens, measures the inputs of its linear layers, and replaces `hidden`.

        Args:
            block: from `load_block(i)`.
            i: its index.
            hidden: inputs of the block, replaced by its outputs.
            needs: what to measure.
            token_weights: see `steps`.

        Returns:
            Statistics by `Module.reads`.
        """
        wanted = dict.fromkeys((m.reads for m in self.modules[i]), needs)
        found: dict[str, InputStats] = {}
        for several in self.steps(block, i, hidden, wanted, token_weights=token_weights):
            found |= several
        return found

    @torch.inference_mode()
    def steps(
        self,
        block: nn.Module,
        i: int,
        hidden: Hidden,
        needs: Mapping[str, frozenset[type[Statistic]]],
        reference: Reference | None = None,
        cache: MeteredCache | None = None,
        token_weights: TokenWeights | None = None,
        keep: bool = False,
    ) -> Iterator[dict[str, InputStats]]:
        """Runs block i once over all tokens, and stops before each wanted input is read.

        Whoever iterates may replace the weights of the layers that read the input before asking for the next one, which
        then is what the model computes with these. Inputs of several experts come together. At the end `hidden` is
        replaced by the block's outputs.

        Args:
            block: from `load_block(i)`.
            i: its index.
            hidden: inputs of the block, replaced by its outputs.
            needs: what to measure, by `Module.reads`, for inputs to stop at.
            reference: the unquantized model in front of block i, to compare with where drift is needed; is advanced.
            cache: measures keys and values, which is no place for two batches side by side.
            keep: leave `hidden` as it is, and that of a reference whose outputs are apart.
            token_weights: how much each token counts, see `Meter`.

        Yields:
            Statistics by `Module.reads`, in the order of the forward pass; of an input that no token reaches, last.
        """
        readers = dict(reversed({m.reads: m for m in reversed(self.modules[i]) if m.reads in needs}.items()))
        meter = Meter({reads: m.shape[1] for reads, m in readers.items()}, needs, self.device, token_weights)

        def run(part: slice) -> None:
            comparing = reference if reference and reference.compares(part) else None
            wanted = None if suspend or experts else upcoming(places, passed)
            expected, ahead = comparing.run(part, wanted) if comparing else ({}, None)
            meter.expect(part, expected)
            output = self.output(block, i, hidden, part, cache)
            if not keep:
                hidden[part] = output
            if reference:
                reference.complete(part, ahead)

        if reference:
            reference.begin(i, [m for reads, m in readers.items() if any(s.compares for s in needs[reads])], keep)
        abreast, suspend = self.abreast(experts := experts_in(block), list(readers.values()), hidden, keep)
        self.record(hidden)
        parts, places = self.parts(hidden), places_of(readers, abreast)
        threads = (1, 1) if cache else self.shares(parts)
        flow = InStep(run, parts, list(places), meter.count, threads, suspend, self.ranks)
        passed = flow.passed  # or batches would keep the flow, and that the block

        def complete(place: str) -> dict[str, InputStats]:
            return self.complete({readers[r]: meter.take(r) for r in places[place].values()}, block, hidden)

        layers = {r: (self.linear(block, m), any(s.unrounded for s in needs[r])) for r, m in readers.items()}
        with stopping(flow, places, layers), meeting(experts, abreast, WaitingExperts(flow, places)):
            yield from self.tidied(map(complete, flow))
        yield from map(complete, (place for place in places if place not in flow.passed))

    def tidied(self, places: Iterable[dict[str, InputStats]]) -> Iterator[dict[str, InputStats]]:
        """The same; solving and forward passes do not grow on what the other left on the heap, a fifth of memory."""
        for found in places:
            if self.device.type == "cpu":
                give_back()
            yield found
            if self.device.type == "cpu":
                give_back()

    def abreast(
        self, experts: Experts | None, readers: Sequence[Module], hidden: Hidden, trains: bool = False
    ) -> tuple[int | None, bool]:
        """How many experts are measured together, and whether there is room for batches to wait.

        Args:
            experts: of the block.
            readers: a linear layer of it for each input that is measured.
            hidden: inputs of the block.
            trains: see `waiting_limit`.
        """
        inside, several = max((m.shape[1] for m in readers), default=0), None
        theirs = [m for m in readers if m.expert is not None]
        if experts and theirs:
            found = self.checkpoint.config.get("num_experts_per_tok")
            visits = found if isinstance(found, int) and found > 0 and not experts.show_all else len(experts)
            several = self.ranks.minimum(at_a_time(experts, theirs, hidden, visits))
            inner = max((m.shape[1] for m in theirs if m.role == "down"), default=0)
            inside = max(inside, inner * min(several, visits))
        waiting = hidden.samples * hidden.length * (3 * hidden.width + inside) * self.dtype.itemsize
        return several, waiting <= waiting_limit(self.device, trains)

    def complete(self, several: Mapping[Module, InputStats], block: nn.Module, hidden: Hidden) -> dict[str, InputStats]:
        """Statistics of all processes, by `Module.reads`.

        Args:
            several: those of this one, by a linear layer that reads the input.
            block: that was run.
            hidden: on what.

        Raises:
            QtoolError: the block left tokens out, though only experts may be passed by.
            NumericsError: what was measured is not finite.
        """
        for module, stats in several.items():
            if module.expert is None:
                check_tokens(block, module.name, stats.tokens, hidden.samples * hidden.length)
        with marked("exchange"):
            combine([*several.values()], self.ranks)
        finite_statistics({f"{module.name} of {self.checkpoint.source}": s for module, s in several.items()})
        return {module.reads: stats for module, stats in several.items()}

    @torch.inference_mode()
    def advance(self, block: nn.Module, i: int, hidden: Hidden, layers: Mapping[str, Layer] | None = None) -> None:
        """Runs block i and replaces its inputs by its outputs.

        Args:
            block: from `load_block(i)`.
            i: its index.
            hidden: inputs of the block, replaced by its outputs.
            layers: how linear layers round their inputs, by name. None: as the checkpoint declares, which then rounds
                the KV cache as well, if it does.
        """
        self.record(hidden)
        parts = self.parts(hidden)
        with self.quantized_inputs(block, i, layers, times=len(parts)):
            cache = rounded_cache(self.checkpoint, i) if layers is None else None

            @torch.inference_mode()
            def run(part: slice) -> None:
                hidden[part] = self.output(block, i, hidden, part, cache)

            side_by_side(run, parts, self.shares(parts))

    @torch.inference_mode()
    def collect_head(self, hidden: Hidden, needs: frozenset[type[Statistic]]) -> InputStats:
        """Measures what the output layer reads: the normed hidden states behind the last block."""
        around = self.around
        norm = around.head_input if around else self.load_norm()
        stats = InputStats(hidden.values.shape[-1], needs, self.device)
        for s in range(hidden.samples):
            stats.add(norm(hidden[s : s + 1].to(self.device)).flatten(0, -2))
        stats.combine(self.ranks)
        finite_statistics({f"{self.family.head} of {self.checkpoint.source}": stats})
        return stats

    @torch.inference_mode()
    def logits(self, hidden: Hidden, sample: int, start: int = 0) -> Tensor:
        """Final norm and output layer for positions `start` and later of one sample: float32 [T - start, V].

        The product is a float32 one, since bfloat16 would round logits to 3 digits.
        """
        if self.around:
            return self.around.logits(hidden[sample : sample + 1], start)
        once = hidden.samples == 1 and self.head is None and self.device.type == "cpu"
        norm, weight = (self.load_norm(), None) if once else self.output_layer()
        x: Tensor = norm(hidden[sample : sample + 1][0, start:].to(self.device))
        if layer := self.layers.get(self.family.head):
            x = rounded(x, layer)
        logits = self.product_once(x) if weight is None else float32_product(x, weight, TABLE_VALUES)
        cap = self.family.logit_softcap(self.checkpoint.config)
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def output_layer(self) -> tuple[nn.Module, Tensor]:
        """The final norm, and the matrix of the output layer, [V, H]; loaded once."""
        if self.head is None:
            self.head = self.load_norm(), self.table(self.output_name)
        return self.head

    @property
    def output_name(self) -> str:
        """Of the matrix of the output layer."""
        return f"{self.family.embedding if self.checkpoint.tied else self.family.head}.weight"

    def product_once(self, x: Tensor) -> Tensor:
        """[T, H] times the output layer, float32 [T, V]; for one sample the matrix is never in memory as a whole."""
        name, x = self.output_name, x.float()
        result = x.new_empty(len(x), self.checkpoint.info(name).shape[0])
        for start, stop in self.stretches(name):
            torch.mm(x, self.part(name, start, stop).float().T, out=result[:, start:stop])
        return result

    def table(self, name: str) -> Tensor:
        """See `tensor`; on the CPU a matrix as large as this is not there in two types at a time."""
        if self.device.type != "cpu":
            return self.tensor(name)
        found = torch.empty(self.checkpoint.info(name).shape, dtype=self.dtype)
        for start, stop in self.stretches(name):
            found[start:stop] = self.part(name, start, stop)
        return found

    def stretches(self, name: str) -> list[tuple[int, int]]:
        """Rows of a large matrix that are read together."""
        rows, width = self.checkpoint.info(name).shape
        step = max(1, TABLE_VALUES // (8 * width))
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor, decoded, in the type that is computed in."""
        return self.checkpoint.rows(name, start, stop).to(self.dtype)
