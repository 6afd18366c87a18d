"""A small model of a kind, with random weights in float64: what is claimed of a class is tried on it.

The same config.json but for its sizes: as many blocks as it takes to have one of every kind, fewer heads and experts,
narrower layers. Where these sizes do not go together in a class, all are kept but the number of blocks.

Shape letters: S samples, T tokens, V vocabulary, N rows and K columns of a matrix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qtool.checkpoint._base import Checkpoint, TensorInfo
from qtool.checkpoint.derived.derive import derive
from qtool.checkpoint.derived.experts import expert_layers, stacks_of
from qtool.checkpoint.derived.facts import Facts
from qtool.checkpoint.derived.heads import BLOCKS, HEADS, KV_HEADS, heads_of, text_fields
from qtool.checkpoint.derived.names import origins
from qtool.checkpoint.derived.skeleton import fill_buffers, quiet, skeleton
from qtool.checkpoint.families._base import Family
from qtool.checkpoint.families._edges import Edge
from qtool.checkpoint.families._parts import Slice

WEIGHTS = 30_000_000
"""At most."""
TOKENS = 24
VOCABULARY = 288
WIDTHS = ("hidden_size", "n_embd", "n_embed", "d_model", "dim")
SIZES = {
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"), 208),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size", "moe_intermediate_size"), 80),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
}
"""Fields of config.json, and the largest that they are."""


def smaller(config: Mapping[str, Any], facts: Facts, count: int) -> Iterator[dict[str, Any]]:
    """Configs of smaller models of the same kind, the smallest first.

    Args:
        config: config.json.
        facts: of its class.
        count: blocks that are kept.
    """
    heads, kv_heads, dim = heads_of(config, facts.shapes[f"{facts.embedding}.weight"][1])
    groups = 2 if kv_heads > 1 else 1
    few = groups * min(heads // kv_heads, 3)
    kept: dict[str, Any] = {}
    for name, value in text_fields(config).items():
        if isinstance(value, list) and len(value) == len(facts.linears):
            kept[name] = value[:count]
        elif not name.endswith("_token_id"):
            kept[name] = count if name in BLOCKS else value
    kept |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    sizes: dict[str, Any] = {}
    for name, value in kept.items():
        if name in WIDTHS and isinstance(value, int):
            sizes[name] = few * dim if heads * dim == value else 96
        elif name in HEADS + KV_HEADS and isinstance(value, int):
            sizes[name] = few if name in HEADS else groups
        elif name in SIZES and type(value) is int:
            sizes[name] = min(value, SIZES[name])
    if kept.get("head_dim") or heads * dim not in [kept.get(name) for name in WIDTHS]:
        sizes["head_dim"] = dim
    for fields in (kept | sizes, kept):
        yield {**config, **fields} if text_fields(config) is config else with_text(config, fields)


def with_text(config: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """A config of several parts, with these fields of the language model."""
    return {name: fields if value is text_fields(config) else value for name, value in config.items()}


class Proposed(Family):
    """A family whose edges are on trial.

    Args:
        facts: of the model.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts, self.on_trial = facts, dict[int | None, list[Edge]]()
        vars(self).update(embedding=facts.embedding, head=facts.head)

    def blocks(self, config: dict[str, Any]) -> int:
        """See `Family.blocks`."""
        return len(self.facts.linears)

    def edges(self, config: dict[str, Any], i: int | None) -> tuple[Edge, ...]:
        """See `Family.edges`."""
        return tuple(self.on_trial.get(i, ()))


class Wide(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps numbers in float64 where a class rounds them, so that two ways to compute the same agree to its end."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is torch.ops.aten._to_copy.default and (dtype := given.get("dtype")) and dtype.is_floating_point:
            given["dtype"] = torch.float64
        return func(*args, **given)


class Miniature(Checkpoint):
    """See the module.

    Args:
        config: its config.json.

    Raises:
        CheckpointError: there is no such model, or it does not go through.
        ValueError: it is large.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.source, self.config, self.files = "a small random model of this kind", config, {}
        self.facts = derive(config)
        self.proposed = self.family = Proposed(self.facts)
        model = skeleton(config, torch.float64)
        if sum(p.numel() for p in self._used(model)) > WEIGHTS:
            raise ValueError(f"more than {WEIGHTS} weights")
        found, _ = origins(model)
        stacks = stacks_of(model, self.facts.blocks_path, found)
        fill_buffers(model)
        self.model = filled(model, {id(p) for p in self._used(model)})
        state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        self.views: dict[str, Tensor] = {}
        for name, origin in found.items():
            if not state[origin.key].is_meta and name in self.facts.shapes:
                self.views[name] = cut(state[origin.key], origin.part, origin.shape)
        for stack in stacks.values():
            for layer in expert_layers([stack]):
                self.views[layer.name] = cut(state[stack.key], layer.part, layer.shape)
        for name, part in self.facts.slices.items():
            if name not in self.views and part.tensor in found:
                self.views[name] = cut(state[found[part.tensor].key], part, self.facts.shapes[name])
        self.views[f"{self.facts.head}.weight"] = model.get_output_embeddings().weight
        self.tokens = torch.randint(3, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
        self.tokens %= len(self.views[f"{self.facts.embedding}.weight"])
        self.logits = self.run()

    def _used(self, model: Any) -> list[nn.Parameter]:
        """Parameters of what runs on text."""
        around, place = set(self.facts.around.values()), f"{self.facts.blocks_path}."
        ends = [id(model.get_output_embeddings().weight), id(model.get_input_embeddings().weight)]
        named = model.named_parameters()
        return [p for name, p in named if name in around or name.startswith(place) or id(p) in ends]

    def run(self) -> Tensor:
        """Logits, float64 [S, T, V]."""
        with quiet(), torch.no_grad(), Wide():  # type: ignore[no-untyped-call]
            logits: Tensor = self.model(input_ids=self.tokens, use_cache=False).logits
            return logits.double()

    def names(self) -> list[str]:
        """See `Checkpoint.names`: the output layer has a matrix of its own."""
        return list(self.views)

    def info(self, name: str) -> TensorInfo:
        """See `Checkpoint.info`."""
        return TensorInfo(tuple(self.views[name].shape), self.views[name].dtype)

    def tensor(self, name: str) -> Tensor:
        """See `Checkpoint.tensor`."""
        return self.views[name].detach().clone()

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`."""
        return repr(sorted(self.views))

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Logits with other tensors, float64 [S, T, V]; the model is what it was, behind it."""
        before = {name: self.tensor(name) for name in tensors}
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.views[name].copy_(tensor)
            try:
                return self.run()
            finally:
                for name, tensor in before.items():
                    self.views[name].copy_(tensor)


def filled(model: Any, used: set[int]) -> Any:
    """Gives a model on the meta device random parameters, the output layer some of its own, and wide buffers."""
    fresh: dict[int, nn.Parameter] = {}
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"  # others know no float64
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in used:
                values = random(f"{path}.{name}", tuple(parameter.shape), isinstance(module, nn.Embedding))
                fresh.setdefault(id(parameter), nn.Parameter(values, requires_grad=False))
                module._parameters[name] = fresh[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = random(f"{path}.{name}", tuple(buffer.shape), False).to(buffer.dtype)
            elif buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.double()
    head.weight = nn.Parameter(random("output", tuple(head.weight.shape), False), requires_grad=False)
    return model.eval()


def random(name: str, shape: tuple[int, ...], embedding: bool) -> Tensor:
    """Weights of the size of trained ones; of norms such that they matter, whether one is added to them or not."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if len(shape) < 2:
        return 0.6 + 0.3 * values
    return values if embedding else values * shape[-1] ** -0.5


def cut(tensor: Tensor, part: Slice | None, shape: tuple[int, ...]) -> Tensor:
    """The part of a parameter that a checkpoint's tensor of that shape is, as a view."""
    if part is None:
        return tensor
    whole = tensor if part.index is None else tensor[part.index]
    rows = whole.T if part.transposed else whole
    return rows[part.first :: part.step][: shape[0]]
