"""Branches of low rank, which go into an adapter beside the model; see `qtool.checkpoint.adapter`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from qtool.checkpoint._base import Layer, Module, QuantizedCheckpoint, TensorInfo
from qtool.checkpoint.adapter import CONFIG, FOLDER, METADATA, WEIGHTS, infos, names, settings
from qtool.checkpoint.safetensors_io import SafetensorsWriter, header
from qtool.residuals._base import Residual
from qtool.residuals.low_rank import LowRank
from qtool.store.files import storage_errors

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that vLLM can be told to make room for."""


def carries(module: Module, residual: Residual) -> bool:
    """Whether runtimes know the branch: PEFT and vLLM name layers of decoder blocks that are no experts."""
    plain = module.kind == "linear" and module.block is not None and module.expert is None
    return plain and isinstance(residual, LowRank)


def refusal(layer: Layer) -> str | None:
    """Why the branch of a layer cannot be held; None if it can."""
    if len(layer.residuals) > 1:
        return "one branch of low rank beside the codes at most; the qtool artifact has more"
    if layer.residuals and layer.input_ops:
        return (
            "a branch of low rank reads inputs as the layer does, and runtimes do what is in front of it for codes only"
        )
    return None


def branches(layers: Mapping[str, Layer]) -> dict[str, LowRank]:
    """By module."""
    found = {module: residual for module, layer in layers.items() for residual in layer.residuals}
    return {module: residual for module, residual in found.items() if isinstance(residual, LowRank)}


def tensor_infos(model: QuantizedCheckpoint) -> dict[str, TensorInfo]:
    """What is in the file, in the model's order."""
    found: dict[str, TensorInfo] = {}
    for module, residual in branches(model.layers).items():
        n, k = model.info(f"{module}.weight").shape
        found |= infos(module, residual, n, k)
    return found


def overhead(model: QuantizedCheckpoint) -> int:
    """Bytes of the file that are not tensors."""
    found = tensor_infos(model)
    return len(header(found, METADATA)[0]) if found else 0


def write(model: QuantizedCheckpoint, out: Path) -> list[Path]:
    """Writes the adapter, if there are branches, into the folder of a model. Raises StorageError."""
    found = branches(model.layers)
    if not found:
        return []
    config, weights = out / FOLDER / CONFIG, out / FOLDER / WEIGHTS
    with storage_errors(out):
        config.parent.mkdir(exist_ok=True)
        config.write_text(json.dumps(settings(found), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    with SafetensorsWriter(weights, tensor_infos(model), METADATA) as writer:
        for module in found:
            (correction,) = model.corrections(module)
            for name, side in zip(names(module), ("left", "right"), strict=True):
                writer.add(name, correction.tensors[side])
    return [config, weights]


def caveats(layers: Mapping[str, Layer]) -> list[str]:
    """That runtimes have to be told to load it."""
    found = branches(layers)
    if not found:
        return []
    largest = max(residual.rank for residual in found.values())
    room = next((rank for rank in RANKS if rank >= largest), largest)
    beyond = f"; vLLM has no room for rank {largest}" if largest > RANKS[-1] else ""
    return [
        f"{len(found)} matrices are corrected by the LoRA adapter in the folder {FOLDER}; without it runtimes give "
        f"something else. vLLM loads it with --enable-lora --max-lora-rank {room} --lora-modules "
        f"corrected=FOLDER/{FOLDER}, and calls the model corrected then; transformers, where PEFT is installed, with "
        f'model.load_adapter("FOLDER/{FOLDER}") once it has computed something, which unpacks its weights{beyond}'
    ]
