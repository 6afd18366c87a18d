"""What the processor can."""

from __future__ import annotations

import torch
from numba import config

from qtool.numerics.threads.processor import compute_dtype, processor


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


def test_processors_that_give_other_bits_have_other_names(monkeypatch):
    here = processor()
    assert processor() == here
    monkeypatch.setattr(config, "CPU_NAME", "znver3")
    other = processor()
    assert other.startswith("znver3, torch ") and other != here
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "num_sockets": 1}, raising=False)
    hidden = processor()
    assert hidden.split(", ")[:2] == other.split(", ")[:2] and hidden != other
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "num_sockets": 2}, raising=False)
    assert processor() == hidden  # numbers are no instructions
