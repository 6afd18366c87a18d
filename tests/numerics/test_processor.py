"""What the processor can."""

from __future__ import annotations

import torch

from qtool.numerics.threads.processor import compute_dtype


def test_the_type_to_compute_in(monkeypatch):
    assert compute_dtype(torch.device("cuda")) == torch.bfloat16
    for capabilities, dtype in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx2": True}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert compute_dtype(torch.device("cpu")) == dtype
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in earlier versions
    assert compute_dtype(torch.device("cpu")) == torch.float32
