"""A checkpoint that has names and shapes and nothing else: whoever reads a weight of it fails."""

from __future__ import annotations

from typing import Any

import torch

from qtool import registry
from qtool.artifact._base import Artifact, Carry
from qtool.checkpoint._base import Checkpoint, TensorInfo
from qtool.recipe.load import list_recipes
from qtool.recipe.schema import Recipe

SHIPPED = tuple(list_recipes())
"""All recipes, which are read once."""

TINY = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
QWEN3_600M = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


class Shapes(Checkpoint):
    """What a config implies, in bf16 unless told otherwise."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, digest: str = "0") -> None:
        self.source, self.files = "MODEL", {}
        self.family = registry.load("checkpoint/families", config["model_type"])()
        self.config = self.family.defaults | config
        self.shapes = self.family.shapes(self.config)
        self.dtype, self.digest = dtype, digest

    def names(self) -> list[str]:
        return list(self.shapes)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(tuple(self.shapes[name]), self.dtype)

    def tensor(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    def fingerprint(self) -> str:
        return self.digest


def carriers(recipe: Recipe) -> dict[str, Artifact]:
    """The artifacts of a recipe, asked about formats only: `Shapes` has no tokenizer."""
    made = {export.to: registry.load("artifact", export.to)(**export.options) for export in recipe.export}
    for artifact in made.values():
        artifact.supports = lambda model: Carry(True)
    return made
