"""The tokenizer that lies beside a model's weights."""

from __future__ import annotations

from typing import Any

from qtool.checkpoint._base import Checkpoint
from qtool.errors import CheckpointError, one_line

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""What holds a vocabulary; one of them is enough."""


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """transformers' tokenizer of a checkpoint, from its own files; nothing is downloaded and no code of it is run.

    Raises:
        CheckpointError: it has none, or one that transformers cannot read.
    """
    from transformers import AutoTokenizer

    folder = next((checkpoint.files[name].parent for name in FILES if name in checkpoint.files), None)
    if folder is None:
        raise CheckpointError(f"{checkpoint.source} has no tokenizer", wanted=f"one of {', '.join(FILES)}")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare ones on damaged files
        raise CheckpointError(f"the tokenizer of {checkpoint.source} cannot be read", found=one_line(error)) from error
