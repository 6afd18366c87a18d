"""Signed rounding by AutoRound, in groups of 64, on given tokens: what learned rounding is held against.

Runs in an environment of its own, so it imports nothing of qtool. https://github.com/intel/auto-round
"""

import sys

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model: str, tokens: str, out: str, bits: str, steps: str, device: str) -> None:
    """Quantizes the folder `model` with the rows of `tokens` ("tokens", int64 [S, T]); `out` is in bfloat16 again."""
    rows = load_file(tokens)["tokens"]
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(model)
    peer = AutoRound(
        source,
        tokenizer,
        scheme={"bits": int(bits), "group_size": 64, "sym": True, "data_type": "int", "act_bits": 16},
        dataset=DataLoader([{"input_ids": row} for row in rows], batch_size=8),
        nsamples=len(rows),
        seqlen=rows.shape[1],
        iters=int(steps),
        batch_size=8,
        device_map=device,
        enable_torch_compile=False,
    )
    found, _ = peer.quantize()
    found.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
