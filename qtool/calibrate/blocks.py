"""A model whose decoder blocks are loaded and run one at a time; hidden states come from outside.

The model class is transformers' own, built on the meta device, so nothing of it takes memory but the block in hand. The
arguments that a block wants beside its hidden states (attention mask, rotary tables) are recorded once, by running the
model's own forward with its blocks replaced by recorders, so no family needs code here.

Shape letters: S samples, T tokens per sample, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qtool.calibrate.ahead import Ahead
from qtool.calibrate.around import Around
from qtool.calibrate.branches import RoundedInputs, set_branches, stored_branches
from qtool.calibrate.copies import buffers_to, twin
from qtool.calibrate.experts import split_layers
from qtool.calibrate.foreign import Calls, KVStore, assign, misfit, run_block
from qtool.calibrate.hidden import Hidden
from qtool.calibrate.infinite import origin
from qtool.calibrate.meta import Recorder, build
from qtool.calibrate.operated import Following, innermost, put_behind
from qtool.checkpoint._base import Checkpoint, Layer, Module, QuantizedCheckpoint
from qtool.checkpoint.modules import modules
from qtool.errors import CheckpointError
from qtool.numerics.checks import finite
from qtool.numerics.metrics import all_finite
from qtool.numerics.threads.marks import marked
from qtool.numerics.threads.parallel import shares
from qtool.numerics.threads.ranks import ALONE, Ranks
from qtool.residuals._base import Correction

BATCH_TOKENS, DEVICE_TOKENS, EXPERT_TOKENS = 2048, 8192, 32768
"""Tokens per forward pass: enough to keep matrix products busy, few enough that a block's intermediates stay small.
Other devices get more, where launching work takes its time too, and still more with experts, who see few of them."""

ABREAST = 8
"""Most batches that are run side by side; each takes memory for a block's intermediates."""

TABLE_VALUES = 1 << 24
"""Values of the embedding, or of the output matrix in float32, that are in memory at a time: 64 MB."""


class Blocks:
    """One model.

    Args:
        checkpoint: where weights come from, one tensor at a time; a quantized one gives decoded weights.
        device: where blocks are run.
        dtype: of weights and hidden states.
        all_experts: show every token to every expert, and measure so; the model computes the same.
        ranks: who walks the same model with other samples.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        all_experts: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.checkpoint, self.device, self.dtype, self.ranks = checkpoint, device, dtype, ranks
        self.layers = checkpoint.layers if isinstance(checkpoint, QuantizedCheckpoint) else {}
        self.family, self.input_ops = checkpoint.family, checkpoint.input_ops
        self.model = build(self.family, checkpoint.config, dtype)
        self.blocks = list(self.model.get_submodule(self.family.blocks_path))
        self.modules: dict[int, list[Module]] = {i: [] for i in range(len(self.blocks))}
        for module in modules(checkpoint):
            if module.block is not None:
                self.modules[module.block].append(module)
        for block, found in zip(self.blocks, self.modules.values(), strict=True):
            split_layers(block, {self.path(module): module for module in found}, all_experts)
        self.around = Around(self.model, checkpoint, device, dtype) if self.family.derived else None
        self.norm = None if self.around else self.model.model.norm
        self.arguments: dict[int, list[dict[str, Any]]] = {}
        self.weights = Ahead(self.block_tensors, len(self.blocks), device)

    def embed(self, tokens: Tensor) -> Hidden:
        """Token ids, int64 [S, T] -> hidden states before the first block, [S, T, H].

        Raises:
            CheckpointError: a token has no row in the embedding.
        """
        name = f"{self.family.embedding}.weight"
        rows, width = self.checkpoint.info(name).shape
        if tokens.numel() and int(tokens.max()) >= rows:
            wanted = f"token ids below {rows}"
            raise CheckpointError("tokenizer and model do not belong together", wanted=wanted, found=int(tokens.max()))
        if self.around:
            return self.embed_by(self.around, tokens)
        samples, length = tokens.shape
        hidden = Hidden(samples, length, width, self.dtype, device=self.device)
        step = max(1, TABLE_VALUES // width)
        scale = torch.tensor(self.family.embedding_scale(self.checkpoint.config), dtype=self.dtype)
        flat, values, where = tokens.flatten(), hidden.values.view(-1, width), hidden.values.device
        for start in range(0, rows, step):
            here = ((flat >= start) & (flat < start + step)).nonzero().squeeze(1)
            if len(here):
                table = (self.checkpoint.rows(name, start, min(start + step, rows)).to(self.dtype) * scale).to(where)
                for places in torch.split(here, step):
                    values[places.to(where)] = table[(flat[places] - start).to(where)]
        return hidden

    def embed_by(self, around: Around, tokens: Tensor) -> Hidden:
        """The same by the model's own forward pass, some samples at a time."""
        samples, length = tokens.shape
        width = around.embed(torch.zeros((1, length), dtype=torch.long)).shape[-1]
        hidden = Hidden(samples, length, width, self.dtype, device=self.device)
        hidden.tokens = tokens.clone()  # whoever has the same tensor has the same hidden states
        for part in self.parts(hidden):
            hidden[part] = around.embed(tokens[part])
        return hidden

    def load_block(self, i: int) -> nn.Module:
        """Block i with its weights, on the device."""
        block: nn.Module = copy.deepcopy(self.blocks[i])
        assign(block, self.weights.take(i))
        if self.around:
            buffers_to(block, self.device)
        put_behind(block, {self.path(m): self.input_ops.get(m.name, ()) for m in self.modules[i]})
        for m in self.modules[i]:
            set_branches(self.linear(block, m), stored_branches(self.checkpoint, m.name, self.device))
        return block.eval().requires_grad_(False)

    def block_tensors(self, i: int) -> dict[str, Tensor]:
        """The weights of block i, by name in transformers' class, on the device."""
        prefix = self.family.block_prefix.format(i=i)
        found, parts = dict[str, Tensor](), self.around.family.facts.parts if self.around else {}
        for name in self.family.block_shapes(self.checkpoint.config, i):
            with marked("weights read"):
                tensor = self.tensor(prefix + name)
            if (part := parts.get(name)) is None:
                found[self.family.submodule(name)] = tensor
                continue
            whole = found.setdefault(part[0], torch.zeros(part[1], dtype=tensor.dtype, device=tensor.device))
            whole[part[2] : part[2] + len(tensor)] = tensor
        return found

    def tensor(self, name: str) -> Tensor:
        """A weight in the walker's dtype, on its device; a table of integers as it is."""
        found = self.checkpoint.tensor(name)
        return found.to(self.device, self.dtype if found.is_floating_point() else found.dtype)

    def set_weight(self, block: nn.Module, module: Module, w: Tensor, residuals: Sequence[Correction] = ()) -> None:
        """Replaces a linear layer's weight, [N, K], residuals included, by what a runtime would multiply with."""
        self.linear(block, module).weight.data = w.to(self.device, self.dtype)
        set_branches(self.linear(block, module), residuals)

    def linear(self, block: nn.Module, module: Module) -> nn.Module:
        """The submodule of a loaded block; behind the operations on its input, if it has some."""
        return innermost(block.get_submodule(self.path(module)))

    def path(self, module: Module) -> str:
        """Name of a module below its block, in transformers' class."""
        return self.family.submodule(module.name.removeprefix(self.family.block_prefix.format(i=module.block)))

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
                linear, inputs = self.linear(block, m), RoundedInputs(lambda name=m.name: layers[name])  # type: ignore[misc]
                hooks.enter_context(linear.register_forward_pre_hook(calls.counted(m.name, inputs.before)))
                hooks.enter_context(linear.register_forward_hook(inputs.behind))
            yield
        calls.check(block, [m.name for m in hooked if m.expert is None], times)

    def parts(self, hidden: Hidden) -> list[slice]:
        """Samples that are run together."""
        return self.pieces(hidden.samples, hidden.length)

    def pieces(self, samples: int, length: int) -> list[slice]:
        """The same, of some samples of so many tokens."""
        experts = any(m.expert is not None for several in self.modules.values() for m in several)
        elsewhere = EXPERT_TOKENS if experts else DEVICE_TOKENS
        tokens = BATCH_TOKENS if self.device.type == "cpu" else elsewhere
        step = max(1, tokens // length)
        return [slice(start, start + step) for start in range(0, samples, step)]

    def shares(self, parts: Sequence[slice]) -> tuple[int, int]:
        """Threads to run some batches on; see `numerics.parallel.shares`."""
        return shares(min(len(parts), ABREAST), self.device)

    def output(self, block: nn.Module, i: int, hidden: Hidden, part: slice, cache: KVStore | None = None) -> Tensor:
        """Block i's output for some samples, [s, T, H]; keys and values go through `cache`.

        Raises:
            NumericsError: it is not finite; says where that begins.
        """
        x, arguments = hidden.read(part).to(self.device), self.arguments_for(hidden, part, i)
        output = self.run(block, x, arguments, cache, self.around and self.around.handing(hidden, part, i))
        if not all_finite(output):
            finite(x, f"of hidden states before block {i} of {self.checkpoint.source}")
            again, names = twin(block), {self.path(m): m.name for m in self.modules[i]}
            first = origin(again, lambda: self.run(again, x, arguments, cache), names)
            where = f"of hidden states behind block {i} of {self.checkpoint.source}"
            finite(output, where, f"it begins in {first}, computed in {str(x.dtype)[6:]}" if first else None)
        return output

    def differentiable(
        self,
        block: nn.Module,
        i: int,
        x: Tensor,
        weights: Mapping[str, Tensor],
        layers: Mapping[str, Layer],
        beside: Mapping[str, Sequence[Correction]] | None = None,
    ) -> Tensor:
        """Block i's output with other weights, [s, T, H], differentiable in these.

        Args:
            block: from `load_block(i)`; stays as it is.
            i: its index.
            x: its inputs, [s, T, H].
            weights: by name of the module without ".weight"; of linear layers [N, K].
            layers: how linear layers round their inputs, by name; see `quantized_inputs`.
            beside: what `weights` contain that reads inputs before they are rounded, by the same names; None: nothing.
        """
        block, prefix = twin(block), self.family.block_prefix.format(i=i)
        for name, w in weights.items():
            module = innermost(block.get_submodule(self.family.submodule(name.removeprefix(prefix))))
            del module._parameters["weight"]
            module.weight = w.to(self.device, self.dtype)
            set_branches(module, (beside or {}).get(name, ()))
        arguments = self.around.anyhow(len(x), x.shape[1])[i] if self.around else self.block_arguments(x.shape[1])[i]
        with self.quantized_inputs(block, i, layers, times=1):
            return self.run(block, x.to(self.device, self.dtype), arguments)

    def run(
        self, block: nn.Module, x: Tensor, arguments: Mapping[str, Any], cache: KVStore | None = None, hand: Any = None
    ) -> Tensor:
        """What a loaded block makes of hidden states, [s, T, H]; see `run_block`."""
        if self.around is None:
            return run_block(block, x, arguments, cache)
        streams = self.around.family.facts.streams
        return streams.pack(run_block(block, streams.unpack(x), arguments, cache, hand))

    def record(self, hidden: Hidden) -> None:
        """Finds out what blocks are given, before threads ask for it."""
        if self.around is None:
            self.block_arguments(hidden.length)
        elif hidden.tokens is not None and hidden.samples:
            self.around.arguments(hidden.tokens[:1])

    def arguments_for(self, hidden: Hidden, part: slice, i: int) -> Mapping[str, Any]:
        """What block i is given beside hidden states of some samples."""
        if self.around is None:
            return self.block_arguments(hidden.length)[i]
        assert hidden.tokens is not None
        found = self.around.arguments(hidden.tokens[part])[i]
        return self.around.carrying(found, hidden, part, i) if self.around.exchanged else found

    def block_arguments(self, length: int) -> list[dict[str, Any]]:
        """What the model's own forward passes to each block beside hidden states, for samples of `length` tokens."""
        if self.around:
            return self.around.anyhow(1, length)
        if length not in self.arguments:
            body = self.model.model
            recorders = [Recorder(block) for block in self.blocks]
            body.layers = nn.ModuleList(recorders)
            body.norm = nn.Identity()
            with torch.inference_mode(False), torch.no_grad():  # gradients may flow past what is recorded here
                x = torch.zeros(1, length, body.config.hidden_size, dtype=self.dtype, device=self.device)
                body(inputs_embeds=x, use_cache=False)
            self.arguments[length] = [recorder.recorded() for recorder in recorders]
        return self.arguments[length]

    def load_norm(self) -> nn.Module:
        """The final norm with its weights, and what is done to its output before it is read.

        Raises:
            QtoolError: nobody knows what lies between the blocks and the output layer.
        """
        if self.norm is None:
            raise misfit(self.model, "has no family file, which gradients of its loss need")
        norm: Any = copy.deepcopy(self.norm)
        assign(norm, {"weight": self.tensor(f"{self.family.norm}.weight")})
        return Following(norm, self.input_ops.get(self.family.head, ()))
