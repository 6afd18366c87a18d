"""Programs that are not ours and compute logits from an artifact.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from typing import Any

import torch
from torch import Tensor

from qtool.artifact._base import Reading
from qtool.checkpoint._base import QuantizedCheckpoint
from qtool.checkpoint.derived.skeleton import named_class, quiet
from qtool.checkpoint.gguf_checkpoint import GGUFCheckpoint
from qtool.errors import CheckpointError, one_line


@dataclass(frozen=True)
class ForeignReader:
    """One of them.

    Attributes:
        package: that it comes in.
        needs: what must be installed for it, as `import` calls it.
        logits: (artifact, tokens, how it is to be read) -> float32 [T, V]. Raises CheckpointError: it does not run.
        threshold: most weights of a model that it runs by default: it is to take minutes, and fit into memory.
    """

    package: str
    needs: str
    logits: Callable[[QuantizedCheckpoint, list[int], Reading], Tensor]
    threshold: int

    @property
    def installed(self) -> bool:
        """Whether it is."""
        return find_spec(self.needs) is not None

    @property
    def version(self) -> str:
        """Of its package."""
        return version(self.package)


def by_llama_cpp(model: QuantizedCheckpoint, tokens: list[int], _: Reading) -> Tensor:
    """Runs a GGUF file in a process of its own."""
    from qtool.evaluate.llamacpp import try_file

    assert isinstance(model, GGUFCheckpoint)
    return try_file(model.parts[0], tokens)


def by_transformers(model: QuantizedCheckpoint, tokens: list[int], reading: Reading) -> Tensor:
    """Loads a folder in transformers, which decodes it with compressed-tensors."""
    from transformers import AutoModelForCausalLM

    made: Any = named_class(dict(model.config)) or AutoModelForCausalLM
    try:
        with quiet(), redirect_stderr(StringIO()), torch.inference_mode():
            loaded = made.from_pretrained(model.source, dtype=reading.dtype, device_map="cpu").eval()
            logits: Tensor = loaded(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()
    except Exception as error:  # code of others
        what = f"transformers cannot run {model.source}"
        raise CheckpointError(what, found=f"{type(error).__name__}: {one_line(error)}") from error
    return logits


READERS: Mapping[str, ForeignReader] = {
    "llama.cpp": ForeignReader("xllamacpp", "xllamacpp", by_llama_cpp, 8 * 10**9),
    "transformers": ForeignReader("transformers", "compressed_tensors", by_transformers, 2 * 10**9),
}
"""By what `Artifact.reading` calls them."""
