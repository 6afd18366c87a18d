"""Mixtures of experts as GGUF: stacked tensors, metadata, and llama.cpp's logits beside those of transformers."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from qtool import registry
from qtool.artifact.gguf import GGUF
from qtool.checkpoint._base import modules
from qtool.checkpoint.gguf import GGUFCheckpoint
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import CheckpointError, PlanError
from qtool.evaluate.llamacpp import LlamaCpp
from qtool.formats.int import Int
from tests.artifact.test_gguf import TOKENS, distance, neutral, reference_logits, write
from tests.conftest import MIXTURES


@pytest.fixture(params=MIXTURES)
def folder(request, tiny_checkpoint) -> Path:
    return tiny_checkpoint(request.param)


def test_llama_cpp_computes_what_transformers_computes(folder, tmp_path):
    path = write(neutral(folder, tmp_path / "work"), tmp_path / "out")
    assert distance(LlamaCpp(path, 64).logits(TOKENS), reference_logits(folder)) < 1e-5
