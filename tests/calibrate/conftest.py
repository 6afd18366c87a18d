"""What the tests of calibration share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.calibrate.walker import Walker
from qtool.checkpoint.hf import HFCheckpoint
from tests.conftest import TINY, make_checkpoint, make_tokenizer

WINDOW = 8
"""Positions that the sliding model sees; the samples of these tests are longer."""


@pytest.fixture(scope="session")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mistral whose attention slides. Read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY, "mistral-sliding", {"dtype": "float32", "sliding_window": WINDOW})
        return make_checkpoint("mistral-sliding", tmp_path_factory.mktemp("sliding"), make_tokenizer())


@pytest.fixture
def llama(tiny_checkpoint) -> Walker:
    """A walker over the plainest model."""
    return Walker(HFCheckpoint(tiny_checkpoint("llama")), torch.device("cpu"), torch.float32)


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model, with its plainest attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
