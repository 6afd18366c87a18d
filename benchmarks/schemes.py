"""Which scheme vLLM selects for what each recipe writes: the table of docs/runtimes.md, and what caveats say of it.

    python -m benchmarks --only schemes --peer PYTHON

PYTHON has vLLM (`make .venv-vllm/ready` makes one with its CPU build). Nothing is quantized: a recipe is planned for a
small model of Llama's kind, and vLLM is asked about the configuration that a folder of it would have.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qtool import registry
from qtool.artifact._packed_artifact import PackedArtifact
from qtool.checkpoint._base import Layer
from qtool.errors import CheckpointError
from qtool.evaluate.twin import Twin
from qtool.pipeline.prepare import prepare
from qtool.recipe.load import list_recipes, load_recipe

CAPABILITIES = {75: "T4", 80: "A100", 89: "L40S", 90: "H100", 100: "B200", 120: "RTX 5090"}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
LAYERS = (
    ("self_attn.qkv_proj", 2048, 1024),
    ("self_attn.o_proj", 1024, 1024),
    ("mlp.gate_up_proj", 4096, 1024),
    ("mlp.down_proj", 1024, 2048),
)
"""What vLLM makes of the linear layers of a block: name, rows, columns."""
STORED = Path(__file__).with_suffix(".json")
HEADER = ("what is written", "by", *(f"{name} ({capability / 10:g})" for capability, name in CAPABILITIES.items()))


class Planned(Twin):
    """A small model whose layers have the formats of a plan; codes it has none.

    Args:
        layers: by module.
        folder: where its tokenizer is written.
    """

    def __init__(self, layers: Mapping[str, Layer], folder: Path) -> None:
        super().__init__(CONFIG, folder)
        self.layers = layers


def questions() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(recipe, what it writes in words, what config.json says of it) of all recipes that export what vLLM may read."""
    with tempfile.TemporaryDirectory() as name:
        for entry in list_recipes():
            for export in load_recipe(entry.name).export:
                kind = registry.load("artifact", export.to)
                if issubclass(kind, PackedArtifact) and "vLLM" in kind.runtimes:
                    job = prepare(Planned({}, Path(name)), entry.name, device="cpu")
                    layers = {p.module.name: p.layer for p in job.plan.layers if p.layer}
                    labels = " and ".join(sorted({layer.label for layer in layers.values()}))
                    config = job.artifacts[export.to]._config(Planned(layers, Path(name)))
                    yield entry.name, f"{export.to}: {labels}", config["quantization_config"]


def selected(peer: Path) -> dict[str, Any]:
    """What vLLM says: its version, and of each thing that is written the recipes, and a scheme by capability."""
    found: dict[str, dict[str, Any]] = {}
    for recipe, words, config in questions():
        found.setdefault(words, {"recipes": [], "config": config})["recipes"].append(recipe)
    layers = [(f"model.layers.0.{name}", *shape) for name, *shape in LAYERS]
    folders = {words: {"config": entry["config"], "layers": layers} for words, entry in found.items()}
    question = json.dumps({"capabilities": list(CAPABILITIES), "folders": folders})
    script = Path(__file__).with_name("peer_vllm.py")
    done = subprocess.run([peer, script], input=question, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckpointError(f"{peer} has no vLLM that answers", found=done.stderr.strip().splitlines()[-1])
    answer = json.loads(done.stdout)
    return {
        "version": answer["version"],
        "written": {
            words: {"recipes": sorted(found[words]["recipes"]), "schemes": {c: said(x) for c, x in own.items()}}
            for words, own in answer["folders"].items()
        },
    }


def said(layers: Mapping[str, str]) -> str:
    """What becomes of a folder: the schemes of its layers, or why there is none."""
    none = [words for words in layers.values() if words.startswith("none")]
    return none[0] if none else ", ".join(sorted(set(layers.values())))


def stored() -> dict[str, Any]:
    """What was found the last time."""
    found: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8"))
    return found


def rows() -> Iterator[tuple[str, ...]]:
    """The table of docs/runtimes.md."""
    for words, entry in sorted(stored()["written"].items()):
        schemes = (entry["schemes"][str(capability)] for capability in CAPABILITIES)
        cells = ("none" if text.startswith("none") else text for text in schemes)
        yield words, ", ".join(f"`{name}`" for name in entry["recipes"]), *cells


def ask(peer: Path) -> int:
    """Asks vLLM anew, and keeps what it says. Returns how many things were asked about."""
    found = selected(peer)
    STORED.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return len(found["written"])
