"""Seconds of a block on a CUDA device: synthetic blocks of Llama-3-8B and of a mixture of experts, made on the machine.

    python -m benchmarks.gpu --work /tmp/gpu                    all rows; with --profile also what took how long
    python -m benchmarks.gpu --work /tmp/gpu --only w4 --blocks 3

Weights are random, and so are the words of the calibration text; neither changes what there is to compute. The first
block compiles kernels, so that what is told is the mean of those behind it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qtool.pipeline.events import Event
from qtool.pipeline.quantize import QuantizeOptions
from qtool.pipeline.quantize import run as quantize

SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
"""Of Llama-3-8B."""
MIXTURE = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
"""Of Qwen3-30B-A3B."""
VOCABULARY = 1000
TEXT_WORDS = 700_000
"""More than 256 x 2048 tokens."""


@dataclass(frozen=True)
class Row:
    """What is timed.

    Attributes:
        weights: format of all linear layers of the blocks.
        method: of the recipe.
        wanted: seconds that a block shall take at most; infinite: none are set; 0: twice those of moving its weights to
            the device.
        samples: of 2048 tokens.
        transforms: of the recipe.
        experts: of the mixture.
    """

    weights: str
    method: str
    wanted: float = math.inf
    samples: int = 256
    transforms: str = "[]"
    experts: bool = False


ROWS = {
    "w4": Row("int4-g128", "{gptq: {rounds: 1}}", 2.5),
    "w4-plain": Row("int4-g128", "{gptq: {rounds: 0, drift: 0}}", 2.0),
    "q4_k": Row("q4_k", "{gptq: {}}", 4.0),
    "nvfp4": Row("nvfp4", "{gptq: {}}", 4.0),
    "mxfp4": Row("mxfp4", "{gptq: {}}"),
    "iq3_xxs": Row("iq3_xxs", "{gptq: {}}", 15.0),
    "experts": Row("int4-g128", "{gptq: {rounds: 1}}", 10.0, experts=True),
    "q4_k-rtn": Row("q4_k", "rtn", 0.0),
    "q2_k-rtn": Row("q2_k", "rtn", 0.0),
    "w4-awq": Row("int4-g128", "rtn", 3.0, transforms="[awq]"),
    "w4-learned": Row("int4-g128", "{learned: {start: {gptq: {rounds: 0}}}}", 8.0, samples=128),
    "w4-learned-4": Row("int4-g128", "{learned: {batch: 4, start: {gptq: {rounds: 0}}}}", 8.0, samples=128),
    "w4-drawn": Row(
        "int4-g128",
        "{learned: {rounding: gumbel, optimizer: lion, start: {gptq: {rounds: 0}}}}",
        8.0,
        samples=128,
    ),
}

RECIPE = """
recipe: 1
name: benchmark
calibration: {{data: {text}, samples: {samples}, length: 2048}}
method: {method}
transforms: {transforms}
layers:
  - {{match: lm_head, keep: true}}
  - {{match: "*", weights: {format}}}
export: [{{to: {export}}}]
"""


def tokenizer(folder: Path) -> None:
    """Saves one that makes a token of each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"<eos>": VOCABULARY - 1}
    found = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<eos>", unk_token="<eos>").save_pretrained(folder)


def model(folder: Path, blocks: int) -> Path:
    """A checkpoint of some blocks, one shard each, in bfloat16."""
    from transformers import LlamaConfig

    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)  # config.json, which comes last, tells whether it is whole
    tokenizer(folder)
    h, inner, kv = SHAPE["hidden_size"], SHAPE["intermediate_size"], 128 * SHAPE["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (h, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (inner, h),
        "mlp.up_proj": (inner, h),
        "mlp.down_proj": (h, inner),
    }
    where: dict[str, str] = {}

    def save(tensors: dict[str, torch.Tensor], name: str) -> None:
        save_file({key: t.cpu() for key, t in tensors.items()}, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))

    generator = torch.Generator("cuda").manual_seed(0)

    def random_matrix(n: int, k: int) -> torch.Tensor:
        return (torch.randn(n, k, device="cuda", generator=generator) * k**-0.5).bfloat16()

    for i in range(blocks):
        prefix = f"model.layers.{i}."
        tensors = {f"{prefix}{name}.weight": random_matrix(*shape) for name, shape in shapes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        save(tensors | {f"{prefix}{name}.weight": torch.ones(h).bfloat16() for name in norms}, f"block-{i}.safetensors")
    ends = {"model.embed_tokens.weight": random_matrix(VOCABULARY, h), "lm_head.weight": random_matrix(VOCABULARY, h)}
    save(ends | {"model.norm.weight": torch.ones(h).bfloat16()}, "ends.safetensors")
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=blocks, **SHAPE, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


def mixture(folder: Path, blocks: int) -> Path:
    """A checkpoint of some blocks of a mixture of experts, in bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "tokenizer.json").exists():  # which comes last
        torch.manual_seed(0)
        fields = {"vocab_size": VOCABULARY, "num_hidden_layers": blocks, "norm_topk_prob": True}
        config = AutoConfig.for_model("qwen3_moe", **fields, **MIXTURE)
        with torch.device("cuda"):
            made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        made.save_pretrained(folder)
        tokenizer(folder)
    return folder


def recipe_of(weights: str, method: str, words: Path, samples: int, transforms: str, export: str) -> str:
    """A recipe for all linear layers of the blocks."""
    return RECIPE.format(
        text=words, samples=samples, method=method, transforms=transforms, format=weights, export=export
    )


def text(path: Path) -> Path:
    """Random words, in documents of 5000."""
    rng = random.Random(0)
    words = [f"w{rng.randrange(VOCABULARY - 1)}" for _ in range(TEXT_WORDS)]
    documents = (" ".join(words[a : a + 5000]) for a in range(0, len(words), 5000))
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


def moved(source: Path) -> float:
    """Seconds in which the weights of a block go from its file, once read, to the device."""
    shard = source / "block-1.safetensors"
    for _ in range(2):
        begin = time.perf_counter()
        for tensor in load_file(shard).values():
            tensor.cuda()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return seconds


def measured(name: str, source: Path, work: Path, profile: bool = False) -> dict[str, float]:
    """Seconds of a block behind the first one, bytes on the device at their peak, and the seconds wanted.

    With a profile of the second block, which then takes longer, it prints what took how long.
    """
    row, recipe = ROWS[name], work / f"{name}.yaml"
    content = recipe_of(row.weights, row.method, work / "text.txt", row.samples, row.transforms, "qtool")
    recipe.write_text(content, encoding="utf-8")
    begun: list[float] = []

    def listen(event: Event) -> None:
        if event.stage == "quantize" and (event.done == 0 or event.message.startswith("block")):
            torch.cuda.synchronize()
            begun.append(time.perf_counter())
            print(name, event.message, f"{begun[-1] - begun[0]:.2f} s", flush=True)

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trace = work / f"{name}-trace.json" if profile else None
    options = QuantizeOptions(
        str(source), str(recipe), work / name, device="cuda", overwrite=True, verify=False, profile=trace
    )
    report = quantize(options, listen)
    for entry in report.profile:
        print(
            f"{entry.part:40} {entry.calls:6} x {entry.host_seconds:8.2f} s {entry.device_seconds:8.2f} s on the device"
        )
    steps = [b - a for a, b in pairwise(begun[1:])]
    peak = torch.cuda.max_memory_allocated()
    wanted = row.wanted or 2 * moved(source)
    return {"seconds": sum(steps) / len(steps), "first": begun[1] - begun[0], "device_bytes": peak, "wanted": wanted}


def main() -> None:
    """Measures the rows that were asked for and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--only", default=",".join(ROWS), help="rows, divided by commas")
    parser.add_argument("--blocks", type=int, default=5, help="how many, the first of which is not counted")
    parser.add_argument("--memory", type=float, help="GiB of a smaller device than this one; more is refused")
    parser.add_argument("--profile", action="store_true", help="tell what took how long")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.memory:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.memory * 2**30 / whole)
    text(options.work / "text.txt")
    found = {}
    for name in options.only.split(","):
        make = mixture if ROWS[name].experts else model
        source = make(options.work / f"{make.__name__}-{options.blocks}", options.blocks)
        found[name] = row = measured(name, source, options.work, options.profile)
        (options.work / "gpu.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        memory = row["device_bytes"] / 2**30
        print(f"{name:10} {row['seconds']:8.2f} s   wanted {row['wanted']:5.2f} s   {memory:6.1f} GiB on the device")


if __name__ == "__main__":
    main()
