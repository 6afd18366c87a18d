"""What GGUF calls models whose families are derived. One file per architecture; its name is a `model_type`.

transformers' class says what tensors there are; here is said only what llama.cpp expects of a file. A conversion is
proven by llama.cpp computing transformers' logits from a small random model.

Shape letters: H attention heads, G key/value heads, D head dimension, R elements of a head that are rotated.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool import registry
from qtool.checkpoint.conversions._equal import Equal
from qtool.checkpoint.families._base import GGUF_FIELDS, Value
from qtool.checkpoint.families._gguf import Form, check_biases, check_fixed, name_map, positive
from qtool.checkpoint.families._parts import stacked
from qtool.checkpoint.families._rope import LLAMA3_TENSOR, check_llama3, llama3_factors, rope_metadata
from qtool.errors import CheckpointError

ROOM = "checkpoint/conversions"
SWITCHES = {
    **dict.fromkeys(("attention_bias", "use_qkv_bias"), "attn_q.bias"),
    "mlp_bias": "ffn_up.bias",
    "use_qk_norm": "attn_q_norm.weight",
}
"""Fields of config.json that say whether blocks have some tensors -> what GGUF calls one of them."""
LAYER_NORM = {key: field for key, field in GGUF_FIELDS.items() if "rms" not in key}
"""`GGUF_FIELDS` without the epsilon of RMS norms."""


class Conversion:
    """One architecture.

    Attributes:
        architecture: the model class in transformers.
        gguf_arch: `general.architecture`.
        numbers: metadata key below the architecture's name -> field of config.json.
        optional: fields that are only written where config.json has more than 0 or False of them.
        fixed: fields of config.json that llama.cpp takes for granted.
        activation: as in `Family`.
        names: what names of tensors are replaced by before GGUF's own table is asked: part -> part.
        norm_offset: what norms add to their weight before they multiply.
        gguf_permute: roles whose rows llama.cpp wants in interleaved rotary order.
        rope_kinds: kinds of rotary scaling that llama.cpp knows for it.
        partial: share of a head that is rotated where config.json does not say; None: transformers rotates all of it,
            and never looks there.
        mixture: whether blocks hold experts; None: of some models.
        gguf_marker: as in `Family`; or a key and its value.
        gguf_untied: as in `Family`.
        latent: whether keys are longer than values.
        window: whether llama.cpp lets attention see more than `sliding_window`.
        attends: whether some block has attention.
        own_factors: whether factors of frequencies in a file are not those of Llama 3's scaling.
        apart: whether GGUF has a tensor for each of several layers that transformers' class keeps in one parameter.
    """

    architecture: ClassVar[str]
    gguf_arch: ClassVar[str]
    numbers: ClassVar[dict[str, str]] = GGUF_FIELDS
    optional: ClassVar[dict[str, str]] = {}
    fixed: ClassVar[dict[str, Any]] = {}
    activation: ClassVar[tuple[str, str]] = ("hidden_act", "silu")
    names: ClassVar[dict[str, str]] = {}
    norm_offset: ClassVar[float] = 0.0
    gguf_permute: ClassVar[frozenset[str]] = frozenset()
    rope_kinds: ClassVar[tuple[str, ...]] = ("default", "linear", "yarn")
    partial: ClassVar[float | None] = None
    mixture: ClassVar[bool | None] = False
    gguf_marker: ClassVar[str | tuple[str, int] | None] = None
    window: ClassVar[bool] = False
    latent: ClassVar[bool] = False
    attends: ClassVar[bool] = True
    own_factors: ClassVar[bool] = False
    gguf_untied: ClassVar[bool] = False
    apart: ClassVar[bool] = False

    @property
    def kind(self) -> str:
        """Its `model_type`."""
        return type(self).__module__.rpartition(".")[2]

    def heads(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """(H, G, D)."""
        heads = int(config["num_attention_heads"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        return heads, kv_heads, int(config.get("head_dim") or config["hidden_size"] // heads)

    def rotary_dim(self, config: Mapping[str, Any]) -> int:
        """R. Raises CheckpointError: config.json speaks of a share that transformers does not look at."""
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        rope = rope.get("full_attention", rope)
        share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", self.partial))
        if self.partial is None:
            check_fixed(self.gguf_arch, {"partial_rotary_factor": share}, {"partial_rotary_factor": 1.0})
        return int(self.heads(config)[2] * (self.partial or 1.0 if share is None else share))

    def rope(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json with the rotary embedding in the usual fields; the share that is rotated is not part of it."""
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        rope = rope.get("full_attention", rope)
        rope = {field: value for field, value in rope.items() if field != "partial_rotary_factor"}
        return dict(config) | {"rope_scaling": None, "rope_parameters": rope}

    def metadata(self, config: dict[str, Any]) -> dict[str, Value]:
        """Key-values below the architecture's name. Raises CheckpointError: the format has no word for something."""
        full = filled(config)
        field, wanted = self.activation
        if field and (found := full.get(field, wanted)) != wanted:
            raise CheckpointError("GGUF cannot hold this activation function", wanted=wanted, found=found)
        check_fixed(self.gguf_arch, full, self.fixed)
        heads, kv_heads, dim = self.heads(full)
        known = full | {"num_key_value_heads": kv_heads}
        values = {key: _plain(known[field], key) for key, field in self.numbers.items()}
        values |= {key: _plain(known[field], key) for key, field in self.optional.items() if known.get(field)}
        values["rope.dimension_count"] = self.rotary_dim(full)
        if dim * heads != full["hidden_size"]:
            values |= {"attention.key_length": dim, "attention.value_length": dim}
        return values | rope_metadata(self.rope(full), self.rope_kinds) | self.more(full)

    def more(self, config: dict[str, Any]) -> dict[str, Value]:
        """Further key-values below the architecture's name; `config` is complete."""
        return {}

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """Fields of config.json beside those of `numbers`, from a GGUF file's key-values and tensor names."""
        found = {field: metadata.get(f"{self.gguf_arch}.{key}") for key, field in self.optional.items()}
        fields = {field: value for field, value in found.items() if value is not None}
        ends, known = {name.partition(".")[2].partition(".")[2] for name in tensors}, filled({"model_type": self.kind})
        off = {field: False for field in self.optional.values() if known.get(field) is True}
        switches = {field: end in ends for field, end in SWITCHES.items() if field in known}
        fields = off | fields | switches | self.fixed
        heads, hidden = (
            positive(metadata, f"{self.gguf_arch}.{key}") for key in ("attention.head_count", "embedding_length")
        )
        dim = metadata.get(f"{self.gguf_arch}.attention.key_length") or hidden // heads
        rotated = metadata.get(f"{self.gguf_arch}.rope.dimension_count", dim)
        return fields | ({"partial_rotary_factor": rotated / dim} if self.partial or rotated != dim else {})

    def tensor_names(self, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], head: str) -> dict[str, str]:
        """Name in checkpoints -> name in GGUF. Raises CheckpointError: there is none."""
        table = name_map(self.gguf_arch, int(filled(config)["num_hidden_layers"]))
        found: dict[str, str] = {}
        for name in dict.fromkeys([*shapes, head]):
            asked = stacked(name)[0]
            for part, other in self.renames(config).items():
                asked = asked.replace(part, other)
            there = table.get_name(asked, try_suffixes=(".weight", ".bias"))
            if there is None and (name != head or head in shapes):
                raise CheckpointError(
                    f"the gguf package has no name for tensor {name} of architecture {self.gguf_arch}"
                )
            if there is not None:
                found[name] = there
        check_biases(self.gguf_arch, found)
        return found

    def renames(self, config: dict[str, Any]) -> Mapping[str, str]:
        """`names` of a model."""
        return self.names

    def extra_tensors(self, config: dict[str, Any]) -> dict[str, Tensor]:
        """Tensors that GGUF wants and the checkpoint only implies, float32."""
        rope, dim = self.rope(filled(config)), self.rotary_dim(filled(config))
        check_llama3(rope, dim)
        factors = llama3_factors(rope, dim)
        return {} if factors is None else {LLAMA3_TENSOR: factors}

    def rows(self, config: dict[str, Any], role: str) -> Tensor | None:
        """Order of rows in GGUF, int64 [N]; see `Family.gguf_rows`. Only the part of a head that is rotated changes."""
        if role not in self.gguf_permute:
            return None
        full = filled(config)
        (heads, kv_heads, dim), rotated = self.heads(full), self.rotary_dim(full)
        one = torch.arange(dim)
        one[:rotated] = torch.arange(rotated).view(2, rotated // 2).t().reshape(-1)
        count = kv_heads if role == "k" else heads
        return (torch.arange(count)[:, None] * dim + one).reshape(-1)

    def form(self, config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Form | None:
        """See `Family.gguf_form`; `config` is complete."""
        return None

    def equal(self, config: Mapping[str, Any], tied: bool) -> Equal | None:
        """What has to become of a model before GGUF can hold it, so that it computes the same; None: nothing.

        Args:
            config: config.json of the language model, complete.
            tied: whether its output layer uses the token embedding's matrix.
        """
        return None

    def straight(self, config: Mapping[str, Any]) -> Equal | None:
        """What has to become of a model from a GGUF file before transformers' class computes it; None: nothing."""
        return None

    def offset(self, name: str) -> float:
        """What GGUF adds to every value of a tensor."""
        return self.norm_offset if name.endswith("norm.weight") else 0.0


def _plain(value: Any, key: str) -> Value:
    """A number as GGUF stores it: epsilons and scales are floats, even whole ones."""
    floats = ("epsilon", "scale", "softcapping")
    return float(value) if key.endswith(floats) else value


def check_layers(arch: str, config: Mapping[str, Any], period: tuple[str, ...]) -> None:
    """Raises CheckpointError: kinds of attention do not come as llama.cpp knows them by heart, again and again."""
    count = int(config["num_hidden_layers"])
    check_fixed(arch, dict(config), {"layer_types": [period[i % len(period)] for i in range(count)]})


def conversion_of(kind: str) -> Conversion | None:
    """The conversion of a `model_type`; None: there is none."""
    return registry.load(ROOM, kind)() if kind in registry.names(ROOM) else None


def filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what transformers assumes where it says nothing."""
    found: dict[str, Any] = json.loads(_filled(json.dumps(dict(config), sort_keys=True)))
    return found


@lru_cache(maxsize=16)
def _filled(text: str) -> str:
    from transformers import AutoConfig

    from qtool.checkpoint.derived.skeleton import LEFT_OUT, finite_again, quiet

    config = {field: value for field, value in json.loads(text).items() if field not in LEFT_OUT}
    with quiet():
        return json.dumps(AutoConfig.for_model(**finite_again(config)).to_dict(), default=str)
