"""GPTQ by llm-compressor, 4 bits in groups of 64, on given tokens: what `make bench` holds qtool against.

Runs in an environment of its own (benchmarks/peer-requirements.txt), so it imports nothing of qtool.
https://github.com/vllm-project/llm-compressor
"""

import sys

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file


def main(model: str, tokens: str, out: str) -> None:
    """Quantizes the folder `model` with the rows of `tokens` ("tokens", int64 [S, T]) into the folder `out`."""
    rows = load_file(tokens)["tokens"].tolist()
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        output_dir=out,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
