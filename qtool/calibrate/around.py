"""What a model does around its blocks, by its own forward pass: embeds tokens, makes logits of hidden states.

The blocks are replaced by stations, so that whatever a class does before, between and behind them (scaled embeddings,
position embeddings, masks, inputs for each layer, scaled or capped logits) is done by that class.

Shape letters: S samples, T tokens per sample, H hidden size, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qtool.calibrate.foreign import misfit
from qtool.calibrate.hidden import Hidden
from qtool.calibrate.inputs import rounded
from qtool.calibrate.meta import Recorder
from qtool.calibrate.operated import operated
from qtool.checkpoint._base import Checkpoint, Layer
from qtool.checkpoint.derived.family import Derived
from qtool.checkpoint.derived.trace import Station
from qtool.errors import CheckpointError
from qtool.numerics.product import float32_product
from qtool.ops._base import InputOp

ROWS = 1 << 24
"""Values of the output matrix in float32 that are in memory at a time."""


class StopForward(Exception):
    """Ends a forward pass where nothing behind matters."""


class Post(Station):
    """In the place of a block: records what it is given, and may hand on other hidden states.

    Args:
        block: whose place it takes.
        outputs: how many things it returns; None: a tensor.
    """

    def __init__(self, block: nn.Module, outputs: int | None) -> None:
        super().__init__(block, outputs)
        self.recorder, self.received = Recorder(block), torch.empty(0)
        self.hidden: Tensor | None = None
        self.last = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes the place of a block's forward."""
        if not args:
            first = next(iter(kwargs))
            args, kwargs = (kwargs[first],), {name: x for name, x in kwargs.items() if name != first}
        if self.hidden is None:
            self.recorder(*args, **kwargs)
            self.received = args[0]
            if self.last:
                raise StopForward
            return self.hand_on(args[0])
        return self.hand_on(self.hidden)


class HeadModule(nn.Module):
    """The output layer, whose product is a float32 one.

    Args:
        weight: [V, H].
        bias: [V], or none.
        layer: how its input is rounded.
        ops: what is done to its input before.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, layer: Layer | None, ops: Sequence[InputOp]) -> None:
        super().__init__()
        self.weight, self.bias, self.layer, self.ops = weight, bias, layer, ops
        self.start, self.input, self.stop = 0, torch.empty(0), False

    def forward(self, x: Tensor) -> Tensor:
        """[S, T, H] -> float32 [S, T, V], from token `start` on."""
        x = operated(x[:, self.start :], self.ops)
        self.input = x
        if self.stop:
            raise StopForward
        x = rounded(x, self.layer) if self.layer else x
        logits = torch.stack([float32_product(sample, self.weight, ROWS) for sample in x])
        return logits if self.bias is None else logits + self.bias.float()


class Around:
    """Embedding, arguments of blocks, and logits of one model; may be asked by several threads.

    Args:
        model: of transformers, on the meta device; its blocks are taken out.
        checkpoint: has its tensors.
        device, dtype: of what is computed.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        assert isinstance(checkpoint.family, Derived)
        self.model, self.checkpoint, self.family = model.eval(), checkpoint, checkpoint.family
        self.device, self.dtype = device, dtype
        facts = self.family.facts
        blocks = list(model.get_submodule(facts.blocks_path))
        self.posts = [Post(block, outputs) for block, outputs in zip(blocks, facts.outputs, strict=True)]
        put(model, facts.blocks_path, nn.ModuleList(self.posts))
        self.shared: dict[int, list[str]] = {}
        for key, parameter in model.named_parameters(remove_duplicate=False):
            self.shared.setdefault(id(parameter), []).append(key)
        self.recorded: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self.depends: bool | None = None
        self.left: dict[tuple[int, int, str], Any] = {}
        self.handed: dict[tuple[int, int, int], dict[str, Any]] = {}
        self.lock = threading.RLock()
        self.head: HeadModule | None = None

    def load(self) -> HeadModule:
        """Reads the tensors, once. Raises CheckpointError: one is missing or damaged."""
        if self.head is None:
            facts, own = self.family.facts, self.model.get_output_embeddings()
            for name, key in facts.around.items():
                if name not in (f"{facts.head}.weight", facts.head_bias):
                    tensor, keys = self._read(name), self._keys(key)
                    for other in keys:
                        set_tensor(self.model, other, tensor)
            for module in self.model.modules():
                for key, buffer in module._buffers.items():
                    if buffer is not None and not buffer.is_meta:
                        module._buffers[key] = buffer.to(self.device)
                # It is that of the first parameter, to which some classes send hidden states.
                if getattr(module, "device", None) == torch.device("meta"):
                    key, first = next(module.named_parameters())
                    set_tensor(module, key, torch.empty_like(first, device=self.device))
            tied = self.checkpoint.tied
            weight = self.model.get_input_embeddings().weight if tied else self._read(f"{facts.head}.weight")
            bias = self._read(facts.head_bias) if facts.head_bias else None
            layer = getattr(self.checkpoint, "layers", {}).get(facts.head)
            head = HeadModule(weight.detach(), bias, layer, self.checkpoint.input_ops.get(facts.head, ()))
            path = next(name for name, module in self.model.named_modules() if module is own)
            put(self.model, path, head)
            self.head = head
        return self.head

    def _keys(self, key: str) -> list[str]:
        """All names in the class of a tensor that several modules share."""
        owner, _, name = key.rpartition(".")
        return self.shared.get(id(getattr(self.model.get_submodule(owner), name)), [key])

    def _read(self, name: str) -> Tensor:
        found = self.checkpoint.tensor(name)
        return found.to(self.device, self.dtype if found.is_floating_point() else found.dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [S, T] -> hidden states in front of the first block, [S, T, H]."""
        with self.lock:
            self._record(tokens)
            return self.family.facts.streams.pack(self.posts[0].received)

    def arguments(self, tokens: Tensor) -> list[dict[str, Any]]:
        """What each block is given beside hidden states for samples [S, T]."""
        samples, length = tokens.shape
        with self.lock:
            if self.depends is None:
                one = self._record(tokens[:1])
                rows = self.checkpoint.info(f"{self.family.embedding}.weight").shape[0]
                other = self._record((tokens[:1] + 1) % rows)
                self.depends = not same(one, other)
            if self.depends:
                return self._record(tokens)
            if (samples, length) not in self.recorded:
                self.recorded[samples, length] = self._record(tokens)
            return self.recorded[samples, length]

    @property
    def exchanged(self) -> bool:
        """Whether blocks hand on more than hidden states."""
        return bool(self.family.facts.carried or self.family.facts.handed)

    def carrying(self, arguments: Mapping[str, Any], hidden: Hidden, part: slice, i: int) -> dict[str, Any]:
        """Arguments of block i with what earlier blocks left for it.

        Args:
            arguments: of the block.
            hidden: in front of it.
            part: which samples, the same in every block.
            i: its index.
        """
        extended, samples = dict(arguments), hidden.place(part)
        for name in self.family.facts.carried & extended.keys():
            if i == 0 or (*samples, name) not in self.left:
                self.left[(*samples, name)] = type(extended[name])()
            extended[name] = self.left[(*samples, name)]
        return extended | (self.handed.get((*samples, i), {}) if i else {})

    def handing(self, hidden: Hidden, part: slice, i: int) -> Callable[[Sequence[Any]], None] | None:
        """What keeps the things that block i returns and the next one is given; None: these are hidden states only.

        What the block was given itself is kept too, since it may run again.
        """
        wanted = self.family.facts.handed

        def keep(returned: Sequence[Any]) -> None:
            samples = hidden.place(part)
            self.handed[(*samples, i + 1)] = {name: returned[place] for name, place in wanted.items()}
            self.handed.pop((*samples, i - 1), None)

        return keep if wanted else None

    def anyhow(self, samples: int, length: int) -> list[dict[str, Any]]:
        """The same for samples whose tokens are forgotten. Raises QtoolError: they matter."""
        found = self.arguments(torch.zeros((samples, length), dtype=torch.long))
        if self.depends or self.exchanged:
            raise misfit(self.model, "gives blocks what depends on tokens, which methods that train blocks do not keep")
        return found

    def _record(self, tokens: Tensor) -> list[dict[str, Any]]:
        self.load()
        for post in self.posts:
            post.recorder.calls.clear()
            post.hidden, post.last = None, post is self.posts[-1]
        self._run(tokens)
        return [post.recorder.recorded() for post in self.posts]

    def logits(self, hidden: Tensor, start: int = 0) -> Tensor:
        """[1, T, H] behind the last block -> float32 [T - start, V]."""
        with self.lock:
            head = self.load()
            head.start, head.stop = start, False
            output = self._run(self._behind(hidden))
            head.start = 0
            if output is None or output.logits is None:
                raise misfit(self.model, "gave no logits")
            found: Tensor = output.logits[0].float()
            return found

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the output layer reads, [S, T, H], of hidden states behind the last block."""
        with self.lock:
            head = self.load()
            head.stop = True
            self._run(self._behind(hidden))
            head.stop = False
            return head.input

    def _behind(self, hidden: Tensor) -> Tensor:
        """Has hidden states handed on behind the last block; tokens to run the model with."""
        for post in self.posts:
            post.hidden = self.family.facts.streams.unpack(hidden.to(self.device, self.dtype))
        return torch.zeros(hidden.shape[:2], dtype=torch.long)

    def _run(self, tokens: Tensor) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            try:
                return self.model(input_ids=tokens.to(self.device), use_cache=False)
            except StopForward:
                return None


def same(one: Any, other: Any) -> bool:
    """Whether two sets of arguments are equal."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and all(same(value, other.get(name)) for name, value in one.items())
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    return True


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module in the place of another."""
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, module)


def set_tensor(model: nn.Module, key: str, tensor: Tensor) -> None:
    """Gives a parameter or buffer its values. Raises CheckpointError: it has another shape."""
    owner, _, name = key.rpartition(".")
    module = model.get_submodule(owner)
    places = module._parameters if name in module._parameters else module._buffers
    wanted = places[name]
    if wanted is None or wanted.shape != tensor.shape:
        what = f"tensor {key} does not fit config.json"
        raise CheckpointError(what, wanted=wanted and list(wanted.shape), found=list(tensor.shape))
    if places is module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor
