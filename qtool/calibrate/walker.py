"""Runs a model one decoder block at a time: weights are streamed in, hidden states of all tokens are carried along.

The model class is transformers' own, built on the meta device, so nothing of it takes memory but the block in hand. The
arguments that a block wants beside its hidden states (attention mask, rotary tables) are recorded once, by running the
model's own forward with its blocks replaced by recorders, so no family needs code here.

Shape letters: S samples, T tokens per sample, H hidden size, V vocabulary, K input features of a linear layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qtool.calibrate.cache import MeteredCache, rounded_cache
from qtool.calibrate.experts import split_experts
from qtool.calibrate.foreign import Calls, KVStore, assign, check_tokens, run_block
from qtool.calibrate.hidden import MEMORY_LIMIT, Hidden
from qtool.calibrate.inputs import rounded
from qtool.calibrate.meta import ATTENTION, Recorder, build_on_meta
from qtool.calibrate.meter import Meter
from qtool.calibrate.operated import Following, Operated, put_behind
from qtool.calibrate.reference import Reference
from qtool.calibrate.steps import InStep
from qtool.checkpoint._base import Checkpoint, Layer, Module, QuantizedCheckpoint, finite, modules
from qtool.errors import CheckpointError
from qtool.numerics.product import float32_product
from qtool.numerics.threads.parallel import shares, side_by_side
from qtool.stats._base import InputStats, Statistic

BATCH_TOKENS = 2048
"""Tokens per forward pass: enough to keep matrix products busy, few enough that a block's intermediates stay small."""
ABREAST = 8
"""Most batches that are run side by side; each takes memory for a block's intermediates."""

TABLE_VALUES = 1 << 24
"""Values of the embedding, or of the output matrix in float32, that are in memory at a time: 64 MB."""


class Walker:
    """One model, walked block by block.

    Args:
        checkpoint: where weights come from, one tensor at a time; a quantized one gives decoded weights.
        device: where blocks are run.
        dtype: of weights and hidden states.
        all_experts: show every token to every expert, and measure so; the model computes the same.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, all_experts: bool = False
    ) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.layers = checkpoint.layers if isinstance(checkpoint, QuantizedCheckpoint) else {}
        self.family, self.input_ops = checkpoint.family, checkpoint.input_ops
        self.model = build_on_meta(checkpoint.config, dtype, self.family.attention)
        self.attends = self.model.config._attn_implementation == ATTENTION
        self.blocks = list(self.model.model.layers)
        self.norm = self.model.model.norm
        self.modules: dict[int, list[Module]] = {i: [] for i in range(len(self.blocks))}
        for module in modules(checkpoint):
            if module.block is not None:
                self.modules[module.block].append(module)
        for block, found in zip(self.blocks, self.modules.values(), strict=True):
            split_experts(block, {self.path(module): module for module in found}, all_experts)
        self.arguments: dict[int, list[dict[str, Any]]] = {}
        self.head: tuple[nn.Module, Tensor] | None = None

    def embed(self, tokens: Tensor) -> Hidden:
        """Token ids, int64 [S, T] -> hidden states before the first block, [S, T, H].

        Raises:
            CheckpointError: a token has no row in the embedding.
        """
        name = f"{self.family.embedding}.weight"
        rows, width = self.checkpoint.info(name).shape
        if int(tokens.max()) >= rows:
            wanted = f"token ids below {rows}"
            raise CheckpointError("tokenizer and model do not belong together", wanted=wanted, found=int(tokens.max()))
        samples, length = tokens.shape
        hidden = Hidden(samples, length, width, self.dtype)
        step = max(1, TABLE_VALUES // width)
        scale = torch.tensor(self.family.embedding_scale(self.checkpoint.config), dtype=self.dtype)
        for start in range(0, rows, step):
            here = (tokens >= start) & (tokens < start + step)
            if here.any():
                table = self.checkpoint.rows(name, start, min(start + step, rows)).to(self.dtype) * scale
                for s in range(samples):
                    hidden.values[s, here[s]] = table[tokens[s, here[s]] - start]
        return hidden

    def load_block(self, i: int) -> nn.Module:
        """Block i with its weights, on the device."""
        block: nn.Module = copy.deepcopy(self.blocks[i])
        prefix = self.family.block_prefix.format(i=i)
        names = self.family.block_shapes(self.checkpoint.config, i)
        state = {self.family.submodule(name): self.tensor(prefix + name) for name in names}
        assign(block, state)
        put_behind(block, {self.path(m): self.input_ops.get(m.name, ()) for m in self.modules[i]})
        return block.eval().requires_grad_(False)

    def tensor(self, name: str) -> Tensor:
        """A weight in the walker's dtype, on its device."""
        return self.checkpoint.tensor(name).to(self.device, self.dtype)

    def set_weight(self, block: nn.Module, module: Module, w: Tensor) -> None:
        """Replaces a linear layer's weight, [N, K], by what a runtime would multiply with."""
        self.linear(block, module).weight.data = w.to(self.device, self.dtype)

    def linear(self, block: nn.Module, module: Module) -> nn.Module:
        """The submodule of a loaded block; behind the operations on its input, if it has some."""
        found = block.get_submodule(self.path(module))
        return found.linear if isinstance(found, Operated) else found

    def path(self, module: Module) -> str:
        """Name of a module below its block, in transformers' class."""
        return self.family.submodule(module.name.removeprefix(self.family.block_prefix.format(i=module.block)))

    @torch.inference_mode()
    def collect(
        self, block: nn.Module, i: int, hidden: Hidden, needs: frozenset[type[Statistic]]
    ) -> dict[str, InputStats]:
        """Runs block i once over all tokens, measures the inputs of its linear layers, and replaces `hidden`.

        Args:
            block: from `load_block(i)`.
            i: its index.
            hidden: inputs of the block, replaced by its outputs.
            needs: what to measure.

        Returns:
            Statistics by `Module.reads`.
        """
        wanted = dict.fromkeys((m.reads for m in self.modules[i]), needs)
        return dict(self.steps(block, i, hidden, wanted))

    @torch.inference_mode()
    def steps(
        self,
        block: nn.Module,
        i: int,
        hidden: Hidden,
        needs: Mapping[str, frozenset[type[Statistic]]],
        reference: Reference | None = None,
        cache: MeteredCache | None = None,
        token_weights: Mapping[str, Tensor] | None = None,
    ) -> Iterator[tuple[str, InputStats]]:
        """Runs block i once over all tokens, and stops before each wanted input is read.

        Whoever iterates may replace the weights of the layers that read the input before asking for the next one, which
        then is what the model computes with these. At the end `hidden` is replaced by the block's outputs.

        Args:
            block: from `load_block(i)`.
            i: its index.
            hidden: inputs of the block, replaced by its outputs.
            needs: what to measure, by `Module.reads`, for inputs to stop at.
            reference: the unquantized model in front of block i, to compare with where drift is needed; is advanced.
            cache: measures keys and values.
            token_weights: of modules that read all tokens, by name, float32 [S, T, B]; see `Batch.weights`.

        Yields:
            (`Module.reads`, statistics), in the order of the forward pass; of an input that no token reaches, last.
        """
        readers = dict(reversed({m.reads: m for m in reversed(self.modules[i]) if m.reads in needs}.items()))
        meter = Meter({reads: m.shape[1] for reads, m in readers.items()}, needs, self.device)

        def run(part: slice) -> None:
            expected, ahead = reference.run(part) if reference else ({}, None)
            meter.expect(part, expected, {name: w[part].flatten(0, 1) for name, w in (token_weights or {}).items()})
            hidden[part] = self.output(block, i, hidden, part, cache)
            if reference and ahead is not None:
                reference.advance(part, ahead)

        if reference:
            reference.begin(i, [m for reads, m in readers.items() if any(s.compares for s in needs[reads])])
        width = 3 * hidden.width + max((m.shape[1] for m in readers.values()), default=0)
        suspend = hidden.samples * hidden.length * width * self.dtype.itemsize <= MEMORY_LIMIT
        self.block_arguments(hidden.length)  # recorded before threads ask for them
        parts = self.parts(hidden)
        threads = (1, 1) if cache else self.shares(parts)  # a cache is no place for two batches
        flow = InStep(run, parts, list(readers), meter.count, threads, suspend)
        with ExitStack() as hooks:
            for r, m in readers.items():
                first, hook = any(s.unrounded for s in needs[r]), meter.hook(r, flow)
                hooks.enter_context(self.linear(block, m).register_forward_pre_hook(hook, prepend=first))
            for reads in flow:
                yield reads, self.complete(meter.take(reads), block, readers[reads], hidden)
        for reads in (reads for reads in readers if reads not in flow.passed):
            yield reads, self.complete(meter.take(reads), block, readers[reads], hidden)

    @staticmethod
    def complete(stats: InputStats, block: nn.Module, module: Module, hidden: Hidden) -> InputStats:
        """The same statistics. Raises QtoolError: the block left tokens out, though only experts may be passed by."""
        if module.expert is None:
            check_tokens(block, module.name, stats.tokens, hidden.samples * hidden.length)
        return stats

    @torch.inference_mode()
    def advance(self, block: nn.Module, i: int, hidden: Hidden) -> None:
        """Runs block i and replaces its inputs by its outputs; linear layers see inputs as the checkpoint declares."""
        self.block_arguments(hidden.length)  # recorded before threads ask for them
        parts = self.parts(hidden)
        with self.quantized_inputs(block, i, times=len(parts)):
            cache = rounded_cache(self.checkpoint, i)

            @torch.inference_mode()
            def run(part: slice) -> None:
                hidden[part] = self.output(block, i, hidden, part, cache)

            side_by_side(run, parts, self.shares(parts))

    @contextmanager
    def quantized_inputs(
        self, block: nn.Module, i: int, layers: Mapping[str, Layer] | None = None, times: int | None = None
    ) -> Iterator[None]:
        """Within the context, linear layers of the block see inputs rounded as a runtime rounds them.

        Args:
            block: from `load_block(i)`.
            i: its index.
            layers: by module name; may change on the way. None: what the checkpoint declares.
            times: how often the block is run; None: at least once.

        Raises:
            QtoolError: on leaving, if a layer that reads every token did not come by.
        """
        layers = self.layers if layers is None else layers
        hooked, calls = [m for m in self.modules[i] if m.name in layers and layers[m.name].activations], Calls()
        with ExitStack() as hooks:
            for m in hooked:
                rounds = calls.counted(m.name, lambda _, x, name=m.name: rounded(x[0], layers[name]))
                hooks.enter_context(self.linear(block, m).register_forward_pre_hook(rounds))
            yield
        calls.check(block, [m.name for m in hooked if m.expert is None], times)

    def parts(self, hidden: Hidden) -> list[slice]:
        """Samples that are run together."""
        step = max(1, BATCH_TOKENS // hidden.length)
        return [slice(start, start + step) for start in range(0, hidden.samples, step)]

    def shares(self, parts: Sequence[slice]) -> tuple[int, int]:
        """Threads to run some batches on; see `numerics.parallel.shares`."""
        return shares(min(len(parts), ABREAST), self.device)

    def output(self, block: nn.Module, i: int, hidden: Hidden, part: slice, cache: KVStore | None = None) -> Tensor:
        """Block i's output for some samples, [s, T, H]; keys and values go through `cache`. Raises NumericsError."""
        x, arguments = hidden[part].to(self.device), self.block_arguments(hidden.length)[i]
        where = f"of hidden states behind block {i} of {self.checkpoint.source}"
        return finite(run_block(block, x, arguments, cache, self.attends), where)

    def block_arguments(self, length: int) -> list[dict[str, Any]]:
        """What the model's own forward passes to each block beside hidden states, for samples of `length` tokens."""
        if length not in self.arguments:
            body = self.model.model
            recorders = [Recorder(block) for block in self.blocks]
            body.layers = nn.ModuleList(recorders)
            body.norm = nn.Identity()
            x = torch.zeros(1, length, body.config.hidden_size, dtype=self.dtype, device=self.device)
            with torch.inference_mode():
                body(inputs_embeds=x, use_cache=False)
            self.arguments[length] = [recorder.recorded() for recorder in recorders]
        return self.arguments[length]

    @torch.inference_mode()
    def collect_head(self, hidden: Hidden, needs: frozenset[type[Statistic]]) -> InputStats:
        """Measures what the output layer reads: the normed hidden states behind the last block."""
        norm = self.load_norm()
        stats = InputStats(hidden.values.shape[-1], needs, self.device)
        for s in range(hidden.samples):
            stats.add(norm(hidden[s : s + 1].to(self.device)).flatten(0, -2))
        return stats

    def load_norm(self) -> nn.Module:
        """The final norm with its weights, and what is done to its output before it is read."""
        norm: nn.Module = copy.deepcopy(self.norm)
        assign(norm, {"weight": self.tensor(f"{self.family.norm}.weight")})
        return Following(norm, self.input_ops.get(self.family.head, ()))

    @torch.inference_mode()
    def logits(self, hidden: Hidden, sample: int, start: int = 0) -> Tensor:
        """Final norm and output layer for positions `start` and later of one sample: float32 [T - start, V].

        The product is a float32 one, since bfloat16 would round logits to 3 digits.
        """
        if self.head is None:
            name = self.family.embedding if self.checkpoint.tied else self.family.head
            self.head = self.load_norm(), self.tensor(f"{name}.weight")
        norm, weight = self.head
        x: Tensor = norm(hidden[sample : sample + 1][0, start:].to(self.device))
        if layer := self.layers.get(self.family.head):
            x = rounded(x, layer)
        logits = float32_product(x, weight, TABLE_VALUES)
        cap = self.family.logit_softcap(self.checkpoint.config)
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
