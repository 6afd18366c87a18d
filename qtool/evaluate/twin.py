"""A small random model that is converted like a large one: the same config.json but for its sizes.

Heads stay as long as they are, and whatever is said about rotary embeddings, windows, norms and experts; the model gets
fewer blocks, heads and experts, narrower layers and a vocabulary of bytes. In float32 a mistake of its conversion shows
far above what differs between two programs.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.artifact._base import Artifact
from qtool.artifact.gguf import GGUF
from qtool.checkpoint._base import Checkpoint, Layer, QuantizedCheckpoint, TensorInfo
from qtool.checkpoint.config import complete
from qtool.checkpoint.families._base import Family
from qtool.checkpoint.language import language_model
from qtool.errors import CheckpointError, QtoolError
from qtool.evaluate.proof import prove
from qtool.evaluate.readers import READERS
from qtool.evaluate.result import Proof
from qtool.residuals._base import Matrix

VOCABULARY = 288
"""Bytes, and some more."""
TOKENS = 240
"""As many as llama.cpp's shortest context holds; rotary embeddings that are scaled differ more the longer it is."""
BLOCKS = 6
"""At most; every kind of block comes among the first ones. llama.cpp tells some models by how many they have."""
SIZES = {
    **dict.fromkeys(("intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 192),
    **dict.fromkeys(("moe_intermediate_size", "moe_shared_expert_intermediate_size"), 96),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "n_group"), 2),
    "topk_group": 1,
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
}
"""Fields of config.json, and the largest that they are."""


def smaller(config: Mapping[str, Any], family: Family, most: int = BLOCKS) -> dict[str, Any]:
    """config.json of the twin, which has so many blocks at most.

    llama.cpp knows no other way to blend the dimensions of YaRN than with `truncate`, and users are told; the rest of
    the conversion is proven with it.
    """
    heads, kv_heads, dim = family.heads(dict(config))
    groups = 2 if kv_heads > 1 else 1
    few = groups * min(heads // kv_heads, 3)
    wide = few * dim if heads * dim == config["hidden_size"] else 96
    blocks = min(int(config["num_hidden_layers"]), most)
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if name in SIZES and isinstance(value, int):
            fields[name] = min(value, SIZES[name])
        elif isinstance(value, list) and len(value) == config["num_hidden_layers"]:
            fields[name] = value[:blocks]
        elif name in ("rope_scaling", "rope_parameters") and isinstance(value, dict):
            fields[name] = {part: said for part, said in value.items() if part != "truncate"}
        elif not name.endswith("_token_id"):
            fields[name] = value
    fields |= {"num_hidden_layers": blocks, "num_attention_heads": few, "num_key_value_heads": groups}
    fields |= {"head_dim": dim} if config.get("head_dim") or heads * dim != config["hidden_size"] else {}
    return fields | {"hidden_size": wide, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


class Twin(QuantizedCheckpoint):
    """Random weights in float32, nothing quantized.

    Args:
        config: its config.json.
        folder: where its tokenizer is written.
    """

    layers: Mapping[str, Layer] = {}

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        self.source = "a small random model of this kind"
        self.config, self.family = complete(config, folder / "config.json")
        self.files = write_tokenizer(folder)
        self.shapes = self.family.shapes(self.config)

    def names(self) -> list[str]:
        """See `Checkpoint.names`."""
        return list(self.shapes)

    def info(self, name: str) -> TensorInfo:
        """See `Checkpoint.info`."""
        return TensorInfo(self.shapes[name], torch.float32)

    def tensor(self, name: str) -> Tensor:
        """See `Checkpoint.tensor`: the same number for the same name, whatever was read before."""
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        values = torch.randn(self.shapes[name], generator=torch.Generator().manual_seed(seed))
        if values.ndim > 1:
            return values if name == f"{self.family.embedding}.weight" else values * values.shape[-1] ** -0.5
        norm = name.endswith(("norm.weight", "layer_scalar"))  # both multiply hidden states
        return values * 0.2 + (1.0 - self.family.gguf_offset(name) if norm else 0.0)

    def matrix(self, module: str) -> Matrix:
        """See `QuantizedCheckpoint.matrix`: there is none."""
        raise CheckpointError(f"{module} is not quantized")

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()


def write_tokenizer(folder: Path) -> dict[str, Path]:
    """A tokenizer that knows bytes, and nothing else."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = {text: i for i, text in enumerate([*sorted(ByteLevel.alphabet()), "th"])}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [["t", "h"]]}
    splitter = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({"model": model, "pre_tokenizer": splitter, "added_tokens": []}), encoding="utf-8")
    return {path.name: path}


def prove_twin(artifact: Artifact, model: Checkpoint) -> Proof | None:
    """Converts a small model of a model's kind, and has another program run it.

    Args:
        artifact: a layout.
        model: whose config.json is taken.

    Returns:
        What was found; None: nobody runs unquantized models in this layout, or no small one can be made; or of one
        with sparse activations (Gemma 3n), whose mean square llama.cpp takes over one number less: of few that shows.

    Raises:
        VerifyError: another program computes something else from it.
        CheckpointError: or does not run it.
    """
    if not isinstance(artifact, GGUF) or not READERS["llama.cpp"].installed or model.family.model_free:
        return None
    model = language_model(model)
    if any(model.config.get("activation_sparsity_pattern") or ()):
        return None
    return _proven(json.dumps(dict(model.config), sort_keys=True))


@lru_cache(maxsize=8)
def _proven(text: str) -> Proof | None:
    config = json.loads(text)
    with tempfile.TemporaryDirectory(prefix="qtool-") as name:
        folder = Path(name)
        (folder / "out").mkdir()
        try:
            family = complete(config, folder / "config.json")[1]
            twins = (Twin(smaller(config, family, most), folder) for most in (BLOCKS, config["num_hidden_layers"]))
            twin = next((twin for twin in twins if GGUF().supports(twin).possible), None)
        except (QtoolError, KeyError, TypeError, ValueError):  # sizes that do not go together in this class
            return None
        if twin is None:
            return None
        GGUF().write(twin, folder / "out", {})
        return prove(GGUF(), GGUF().open(folder / "out"), twin, TOKENS)
