"""One tiny valid model, or other file, of every kind that qtool reads; what the fuzzer damages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qtool import registry
from qtool.artifact._base import Artifact
from qtool.errors import PlanError
from qtool.formats._spelling import parse_format
from qtool.pipeline.calibrate import CalibrateOptions
from qtool.pipeline.calibrate import run as calibrate
from qtool.pipeline.quantize import QuantizeOptions, run
from tests.artifact.conftest import quantize, save_llama
from tests.conftest import make_checkpoint, make_tokenizer

LABELS = ("int4-g32", "int4-g32-asym", "int8-channel", "nvfp4", "mxfp4", "mxfp8", "fp8-channel", "fp8-block")
BLOCKS = ("q8_0", "q4_k", "q6_k", "iq4_xs", "iq2_xs", "tq1_0")
"""Block types of GGUF files; one file has them all."""
ROLES = ("q", "k", "o", "gate", "up", "down")


def write_samples(folder: Path) -> dict[str, Path]:
    """Writes them all: paths by name. Names begin with how they are read: "model", "stats", "work"."""
    plain = save_llama(folder / "model-plain", 256, torch.float16, blocks=1)
    samples = {"model-plain": plain, "model-shards": in_shards(plain, folder / "model-shards")}
    samples |= measurements(plain, folder) | {"model-experts": experts_in_blocks(folder / "model-experts")}
    for name, artifact, model in artifacts(plain):
        place = folder / f"model-{name}"
        place.mkdir()
        try:
            artifact.write(model, place, {})
        except PlanError:  # its scales have another type than the layout wants
            shutil.rmtree(place)
            continue
        samples[place.name] = place
    return samples


RECIPE = """
recipe: 1
name: sample
calibration: {samples: 2, length: 32}
layers:
  - {match: "*.down_proj", weights: int8-channel, activations: {type: int, bits: 8, group: tensor}}
  - {match: "*.mlp.*", weights: int4-g32, method: gptq}
  - {match: "*", keep: bf16}
kv_cache: fp8-tensor
export: [{to: qtool}]
"""


def measurements(plain: Path, folder: Path) -> dict[str, Path]:
    """Statistics as qtool and as llama.cpp store them, a work folder, and a report."""
    recipe = folder / "sample.yaml"
    recipe.write_text(RECIPE)
    samples = {}
    for suffix in ("stats", "gguf"):
        place = samples[f"stats-{suffix}"] = folder / f"stats-{suffix}"
        place.mkdir()
        calibrate(CalibrateOptions(str(plain), str(recipe), place / f"measured.{suffix}", device="cpu"))
    run(QuantizeOptions(str(plain), str(recipe), folder / "report", device="cpu", keep=True))
    (folder / "report.work").rename(folder / "work")
    for path in (folder / "report").iterdir():
        if path.name != "report.json":
            path.unlink()
    return {**samples, "work": folder / "work", "report": folder / "report"}


def artifacts(plain: Path) -> Iterator[tuple[str, Artifact, object]]:
    """(name, writer, model) for every layout with every format of `LABELS` that it holds."""
    for name in registry.names("artifact"):
        if name == "gguf":
            chosen = dict(zip(ROLES, map(parse_format, BLOCKS), strict=True))
            yield name, registry.load("artifact", name)(), quantize(plain, None, v=parse_format("q4_1"), **chosen)
            continue
        for label in LABELS:
            artifact: Artifact = registry.load("artifact", name)()
            model = quantize(plain, parse_format(label))
            try:
                artifact.check(model)
            except PlanError:
                continue
            yield f"{name}-{label}", artifact, model


def experts_in_blocks(out: Path) -> Path:
    """A tiny gpt-oss as OpenAI publishes it: blocks of MXFP4, here of any codes."""
    make_checkpoint("gpt_oss", out, make_tokenizer())
    tensors, draw = load_file(out / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = experts, rows, columns // 32
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=draw)
        tensors[f"{name}_scales"] = torch.randint(115, 128, shape, dtype=torch.uint8, generator=draw)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    return out


def in_shards(plain: Path, out: Path) -> Path:
    """The same checkpoint cut into two files with an index."""
    out.mkdir()
    for path in plain.iterdir():
        if path.suffix != ".safetensors":
            (out / path.name).write_bytes(path.read_bytes())
    tensors = sorted(load_file(plain / "model.safetensors").items())
    shards = {f"model-{i + 1:05}-of-00002.safetensors": dict(tensors[i::2]) for i in range(2)}
    for name, part in shards.items():
        save_file(part, out / name, {"format": "pt"})
    weight_map = {tensor: name for name, part in shards.items() for tensor in part}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return out
