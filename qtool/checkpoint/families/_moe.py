"""Mixtures of experts: what their families have in common.

Every expert's projections are linear layers of their own here ("mlp.experts.3.gate_proj") that read what was routed to
that expert. Checkpoints store them like that, or else (state dicts of transformers 5) all experts of a block in one
three-dimensional tensor for gate and up, and one for down.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from qtool.checkpoint.families._base import Family, Value
from qtool.checkpoint.families._gguf import some_slide
from qtool.checkpoint.families._parts import ATTENTION, Linear, Slice
from qtool.errors import CheckpointError


class MixtureOfExperts(Family):
    """A family whose blocks send each token through some of their experts.

    Attributes:
        part: the mixture below the block, as checkpoints and as transformers' class call it.
        router: the layer below `part` that chooses experts.
        projections: names of an expert's layers by role.
        experts_field, wide_field: what config.json calls the number of experts and their intermediate size.
        interleaved: whether three-dimensional tensors are transposed, with the columns of gate and up in turns.
        gguf_normed: whether llama.cpp makes the weights of a token's experts sum up to 1; it cannot be told.
    """

    mixture = True
    part: ClassVar[tuple[str, str]] = ("mlp", "mlp")
    router: ClassVar[str] = "gate"
    projections: ClassVar[dict[str, str]] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    experts_field: ClassVar[str] = "num_experts"
    wide_field: ClassVar[str] = "moe_intermediate_size"
    interleaved: ClassVar[bool] = False
    gguf_normed: ClassVar[bool] = True

    def experts(self, config: dict[str, Any]) -> int:
        """Number of experts in a block."""
        return int(config[self.experts_field])

    def is_mixture(self, config: dict[str, Any], i: int) -> bool:
        """False for a block with a plain feed-forward network."""
        plain, step = config.get("mlp_only_layers") or [], int(config.get("decoder_sparse_step", 1))
        if not isinstance(plain, list):
            what = "config.json: wrong mlp_only_layers"
            raise CheckpointError(what, wanted="a list of block numbers", found=repr(plain)[:40])
        return i not in plain and (i + 1) % step == 0

    def shared(self, config: dict[str, Any]) -> tuple[Linear, ...]:
        """Layers of an expert that all tokens go through."""
        return ()

    def block_linears(self, config: dict[str, Any], i: int) -> tuple[Linear, ...]:
        """See `Family.block_linears`."""
        if not self.is_mixture(config, i):
            return self.linears
        part = self.part[0]
        router = Linear(f"{part}.{self.router}", "router", "mlp_in", kind="router")
        experts = []
        for e in range(self.experts(config)):
            expert = f"{part}.experts.{e}"
            for role, name in self.projections.items():
                reads, fused = ("mid", None) if role == "down" else ("in", f"{expert}.gate_up")
                experts.append(Linear(f"{expert}.{name}", role, f"{expert}.{reads}", fused, e))
        return (*ATTENTION, *self.shared(config), router, *experts)

    def linear_shape(self, config: dict[str, Any], linear: Linear) -> tuple[int, int]:
        """See `Family.linear_shape`."""
        hidden = int(config["hidden_size"])
        if linear.role == "router":
            return self.experts(config), hidden
        if linear.expert is None:
            return super().linear_shape(config, linear)
        wide = int(config[self.wide_field])
        return (hidden, wide) if linear.role == "down" else (wide, hidden)

    def submodule(self, path: str) -> str:
        """See `Family.submodule`."""
        here, there = self.part
        return there + path.removeprefix(here) if path.startswith(f"{here}.") else path

    def slices(self, config: dict[str, Any], stored: Collection[str]) -> dict[str, Slice]:
        """See `Family.slices`."""
        found: dict[str, Slice] = {}
        for i in range(self.blocks(config)):
            if self.is_mixture(config, i):
                found |= self._block_slices(config, self.block_prefix.format(i=i), stored)
        return found

    def _block_slices(self, config: dict[str, Any], prefix: str, stored: Collection[str]) -> dict[str, Slice]:
        """Of the block with that prefix."""
        count, hidden, wide = self.experts(config), int(config["hidden_size"]), int(config[self.wide_field])
        here, there = (prefix + part for part in self.part)
        found = {}
        if here != there and (router := f"{there}.{self.router}.weight") in stored:
            found[f"{here}.{self.router}.weight"] = Slice(router, (count, hidden))
        for role, own in self.projections.items():
            n, k, whole = (hidden, wide, "down_proj") if role == "down" else (2 * wide, hidden, "gate_up_proj")
            first, step = (1, 2) if self.interleaved else (wide, 1)
            first, step = (first * (role == "up"), step) if role != "down" else (0, 1)
            for suffix, ending in (("weight", ""), ("bias", "_bias")):
                name, turned = f"{there}.experts.{whole}{ending}", self.interleaved and suffix == "weight"
                shape = (count, n) if suffix == "bias" else (count, k, n) if turned else (count, n, k)
                if name in stored:
                    for e in range(count):
                        found[f"{here}.experts.{e}.{own}.{suffix}"] = Slice(name, shape, e, first, step, turned)
        return found

    def gguf_metadata(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Family.gguf_metadata`."""
        if plain := [i for i in range(self.blocks(config)) if not self.is_mixture(config, i)]:
            wanted, found = "experts in every block", f"none in block {plain[0]}"
            raise CheckpointError(f"GGUF cannot hold this {self.gguf_arch} model", wanted=wanted, found=found)
        if (normed := config.get("norm_topk_prob", self.gguf_normed)) != self.gguf_normed:
            wanted = f"norm_topk_prob: {self.gguf_normed}"
            raise CheckpointError(f"GGUF cannot say how {self.gguf_arch} weighs experts", wanted=wanted, found=normed)
        metadata = {"expert_count": self.experts(config), "expert_used_count": int(config["num_experts_per_tok"])}
        if self.wide_field != "intermediate_size":
            metadata["expert_feed_forward_length"] = int(config[self.wide_field])
        return super().gguf_metadata(config) | {f"{self.gguf_arch}.{key}": value for key, value in metadata.items()}

    def gguf_window(self, config: dict[str, Any]) -> int | None:
        """See `Family.gguf_window`: whatever `max_window_layers` says, the first block's attention slides."""
        slides = config.get("use_sliding_window") and some_slide({"layer_types": config.get("layer_types")}, 1, 0)
        return config.get("sliding_window") or None if slides else None

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Family.gguf_fields`."""
        keys = {self.experts_field: "expert_count", "num_experts_per_tok": "expert_used_count"}
        if self.wide_field != "intermediate_size":
            keys[self.wide_field] = "expert_feed_forward_length"
        return {field: metadata.get(f"{self.gguf_arch}.{key}") for field, key in keys.items()}
