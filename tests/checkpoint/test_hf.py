from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from qtool.checkpoint.hf import HFCheckpoint


def test_equals_state_dict(tiny_folder: Path) -> None:
    checkpoint = HFCheckpoint(tiny_folder)
    state = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype="auto").state_dict()
    if checkpoint.tied:
        assert torch.equal(state.pop("lm_head.weight"), state["model.embed_tokens.weight"])
    assert set(checkpoint.names()) == set(state)
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        assert tensor.dtype == state[name].dtype == checkpoint.info(name).dtype
        assert torch.equal(tensor, state[name])
        assert torch.equal(checkpoint.rows(name, 3, 9), state[name][3:9])
