"""Published FP8 that stays as it is, known by names only, against copying its files and bringing them to the disk.

Shape letters: E hidden size, F intermediate size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.measure import measure

WIDTH, INNER, WORDS = 2048, 6144, 4096
"""E, F, and rows of the embedding."""
MATRICES = {
    **dict.fromkeys((f"self_attn.{name}_proj" for name in "qkvo"), (WIDTH, WIDTH)),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (INNER, WIDTH)),
    "mlp.down_proj": (WIDTH, INNER),
}
SHARD = 10**9
"""Bytes of a file, about."""
BLOCK = 128
TIMES = 2
"""How often each way is measured; the quicker time counts."""
RECIPE = """recipe: 1
name: as-it-is
layers:
  - {match: lm_head, keep: true}
  - {match: "*", weights: fp8-block, activations: fp8-g128, method: rtn}
export: [{to: fp8}]
"""


def tensors(blocks: int) -> Iterator[tuple[str, Tensor]]:
    """Of a model that is stored as DeepSeek's are: FP8 with float32 scales of 128 x 128 weights."""
    draw = torch.Generator().manual_seed(0)
    yield "model.embed_tokens.weight", torch.randn(WORDS, WIDTH, generator=draw).bfloat16()
    bits = torch.randint(0, 256, (INNER * WIDTH,), generator=draw, dtype=torch.uint8)
    bits[(bits & 0x7F) == 0x7F] = 0
    for i in range(blocks):
        for name, (n, k) in MATRICES.items():
            base = f"model.layers.{i}.{name}.weight"
            yield base, bits[: n * k].roll(i).view(n, k).view(torch.float8_e4m3fn)
            yield f"{base}_scale_inv", torch.rand(n // BLOCK, k // BLOCK, generator=draw) * 1e-3 + 1e-4
        yield f"model.layers.{i}.input_layernorm.weight", torch.ones(WIDTH).bfloat16()
    yield "lm_head.weight", torch.randn(WORDS, WIDTH, generator=draw).bfloat16()


def published(folder: Path, nbytes: float) -> Path:
    """A checkpoint of so many bytes, made once."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shard, index = dict[str, Tensor](), dict[str, str]()

    def flush() -> None:
        name = f"model-{len(set(index.values())):05}.safetensors"
        save_file(shard, folder / name)
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in tensors(round(nbytes / sum(n * k for n, k in MATRICES.values()))):
        shard[name] = tensor
        if sum(t.nbytes for t in shard.values()) >= SHARD:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    how = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps({"model_type": "nobody_knows", "quantization_config": how}))
    return folder


def against_a_copy(program: Sequence[str], work: Path, nbytes: float, jobs: int) -> dict[str, float]:
    """Seconds of both ways, and their ratio.

    Args:
        program: qtool.
        work: where files go; three times as many bytes.
        nbytes: of the checkpoint.
        jobs: processes of qtool.
    """
    source, copy, out = published(work / f"published-{nbytes / 1e9:g}", nbytes), work / "copy", work / "as-it-is"
    (work / "as-it-is.yaml").write_text(RECIPE)
    quantize = [*program, "quantize", source, "-r", work / "as-it-is.yaml", "--model-free", "-o", out, "--quiet"]
    copied, made = [], []
    for _ in range(TIMES):
        for folder in (copy, out):
            shutil.rmtree(folder, ignore_errors=True)
        copied.append(measure(["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', source, copy], work / "cp.log").seconds)
        shutil.rmtree(copy)
        made.append(measure([*quantize, "--jobs", str(jobs)], work / "as-it-is.log").seconds)
    return {"copy_seconds": min(copied), "qtool_seconds": min(made), "time_ratio": min(made) / min(copied)}
