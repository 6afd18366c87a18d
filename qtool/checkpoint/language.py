"""The language model of a model of several parts, such as a vision tower and a draft layer, as a model by itself.

Some layouts hold nothing else: GGUF keeps the other parts in a file of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from qtool import registry
from qtool.checkpoint._base import Checkpoint, Layer, QuantizedCheckpoint, TensorInfo
from qtool.checkpoint.config import FAMILIES, complete
from qtool.checkpoint.conversions._base import conversion_of, filled
from qtool.checkpoint.derived.skeleton import APART, OWN
from qtool.checkpoint.families._base import Value
from qtool.residuals._base import Matrix


class Kind(NamedTuple):
    """What the language model of a type is.

    Attributes:
        text: the `model_type` that it has by itself.
        gguf_arch: what llama.cpp calls it, which counts positions of pictures; empty: what it calls the text model.
        apart: whether its experts are in one tensor, which those of the text model by itself are not.
        fields: what config.json of the text model has to say, and the other one takes for granted.
    """

    text: str
    gguf_arch: str = ""
    apart: bool = False
    fields: Mapping[str, Any] = MappingProxyType({})


KINDS: Mapping[str, Kind] = {
    "qwen2_vl": Kind("qwen2", "qwen2vl"),
    "qwen2_5_vl": Kind("qwen2", "qwen2vl"),
    "qwen3_vl": Kind("qwen3", "qwen3vl"),
    "qwen3_vl_moe": Kind("qwen3_moe", "qwen3vlmoe", True, {"norm_topk_prob": True}),
    "llama4": Kind("llama4_text"),
    "gemma3n": Kind("gemma3n_text"),
    "gemma4": Kind("gemma4_text"),
    "qwen3_5": Kind("qwen3_5_text"),
    "qwen3_5_moe": Kind("qwen3_5_moe_text"),
}
"""By `model_type`. Positions of text are the same in all sections of a rotary embedding: it is the text model's."""
SECTIONS = ("mrope_section", "mrope_interleaved")
OUTER = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")


class LanguageModel(QuantizedCheckpoint):
    """See the module.

    Args:
        model: of several parts.
        kind: what its language model is; None: all that the model's class knows.
    """

    def __init__(self, model: Checkpoint, kind: Kind | None) -> None:
        self.whole, self.kind, self.source, self.files = model, kind, model.source, model.files
        self.config, self.family, self.about = model.config, model.family, dict[str, Value]()
        self.inner = {name: name for name in self.family.shapes(self.config)}
        if kind:
            full = filled(model.config)
            self.config, self.family = complete(language_config(model, full, kind), Path(model.source))
            if kind.gguf_arch:
                self.family.gguf_arch = kind.gguf_arch  # type: ignore[misc] # of this one
            self.about, self.inner = positions(full, kind), self._names()
        layers = model.layers if isinstance(model, QuantizedCheckpoint) else {}
        outside = {there.removesuffix(".weight"): here.removesuffix(".weight") for here, there in self.inner.items()}
        self.layers: Mapping[str, Layer] = {outside[m]: layer for m, layer in layers.items() if m in outside}
        self.cache = model.cache if isinstance(model, QuantizedCheckpoint) else None

    def _names(self) -> dict[str, str]:
        """Name here -> name in the whole."""
        here, there = (family.block_prefix.partition("layers.")[0] for family in (self.family, self.whole.family))
        ends = {self.family.embedding: self.whole.family.embedding, self.family.head: self.whole.family.head}
        found = {}
        for name in self.family.shapes(self.config):
            module, _, last = name.rpartition(".")
            found[name] = f"{ends[module]}.{last}" if module in ends else there + name.removeprefix(here)
        return found

    def names(self) -> list[str]:
        """See `Checkpoint.names`."""
        return list(self.inner)

    def info(self, name: str) -> TensorInfo:
        """See `Checkpoint.info`."""
        return self.whole.info(self.inner[name])

    def tensor(self, name: str) -> Tensor:
        """See `Checkpoint.tensor`."""
        return self.whole.tensor(self.inner[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Checkpoint.rows`."""
        return self.whole.rows(self.inner[name], start, stop)

    def matrix(self, module: str) -> Matrix:
        """See `QuantizedCheckpoint.matrix`."""
        assert isinstance(self.whole, QuantizedCheckpoint)
        return self.whole.matrix(self.inner[f"{module}.weight"].removesuffix(".weight"))

    def rounds(self, name: str) -> bool:
        """See `Checkpoint.rounds`."""
        return self.whole.rounds(self.inner[name])

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`."""
        return self.whole.fingerprint()


def language_config(model: Checkpoint, full: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """config.json of the language model by itself."""
    text = {field: value for field, value in full["text_config"].items() if value is not None}
    outer = {field: full[field] for field in OUTER if full.get(field) is not None}
    rope = text.get("rope_parameters")
    if kind.gguf_arch and isinstance(rope, dict):
        rope = {field: value for field, value in rope.items() if field not in SECTIONS}
        text |= {"rope_parameters": rope, "rope_scaling": None}
    outer |= {field: model.config[field] for field in OWN if field in model.config}
    own = {"model_type": kind.text, "architectures": None, "tie_word_embeddings": model.tied}
    return {**outer, **text, **kind.fields, **own}


def positions(full: Mapping[str, Any], kind: Kind) -> dict[str, Value]:
    """What GGUF files say about positions of pictures, below the architecture's name."""
    if not kind.gguf_arch:
        return {}
    sections = (full["text_config"].get("rope_parameters") or {}).get("mrope_section") or []
    about: dict[str, Value] = {f"{kind.gguf_arch}.rope.dimension_sections": [*map(int, sections), 0, 0, 0, 0][:4]}
    deep = (full.get("vision_config") or {}).get("deepstack_visual_indexes")
    return about | ({f"{kind.gguf_arch}.n_deepstack_layers": len(deep)} if deep else {})


def kind_of(config: Mapping[str, Any]) -> Kind | None:
    """What the language model is, if it is known; None: it is the model."""
    text = config.get("text_config")
    own = text.get("model_type") if isinstance(text, dict) else None
    return KINDS.get(str(config.get("model_type"))) or (Kind(own) if own in registry.names(FAMILIES) else None)


def language_model(model: Checkpoint) -> Checkpoint:
    """The language model, if a model is known to have other parts, or has tensors that its class does not know."""
    if not model.family.derived or model.family.model_free:
        return model
    kind, known = kind_of(model.config), model.family.shapes(model.config).keys()
    return LanguageModel(model, kind) if kind or set(model.names()) - known else model


def beside_language(model: Checkpoint) -> set[str]:
    """Names of the tensors that are no part of the language model."""
    part = language_model(model)
    return set(model.names()) - set(part.inner.values()) if isinstance(part, LanguageModel) else set()


def comes_apart(model: Checkpoint) -> bool:
    """Whether GGUF has a tensor for each of several linear layers that a model's class keeps in one, and we too."""
    if not model.family.derived or model.family.model_free or APART in model.config:
        return False
    kind = kind_of(model.config)
    naming = conversion_of(str(model.config.get("model_type")))
    return kind.apart if kind else naming is not None and naming.apart
