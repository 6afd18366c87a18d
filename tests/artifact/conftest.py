"""A quantized model in memory, which is what artifact tests write."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from transformers.models.llama.modeling_llama import LlamaAttention

from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Checkpoint, Layer, QuantizedCheckpoint
from qtool.checkpoint.hf import HFCheckpoint
from qtool.checkpoint.modules import modules
from qtool.formats._base import Quantized
from qtool.methods.rtn import RTN
from qtool.models import open_artifact
from qtool.residuals._base import Matrix
from tests.conftest import make_tokenizer


class InMemory(QuantizedCheckpoint):
    """A source whose modules are rounded as `choose` says, all in memory."""

    def __init__(self, origin: Checkpoint, choose: Callable[..., Layer | None]) -> None:
        self.origin = origin
        self.source, self.config, self.family, self.files = origin.source, origin.config, origin.family, origin.files
        self.layers = {m.name: layer for m in modules(origin) if (layer := choose(m)) is not None}
        self.matrices: dict[str, Quantized] = {}
        for name, layer in self.layers.items():
            weight = origin.tensor(f"{name}.weight").float()
            self.matrices[name] = RTN().solve(weight, None, layer.format).quantized

    def names(self):
        return self.origin.names()

    def info(self, name):
        return self.origin.info(name)

    def tensor(self, name):
        module = name.removesuffix(".weight")
        return self.matrix(module).decode() if module in self.layers else self.origin.tensor(name)

    def matrix(self, module):
        return Matrix(self.matrices[module])

    def fingerprint(self):
        return "in memory"


def quantize(folder: Path, fmt, activations=None, **per_role) -> InMemory:
    """Every linear of the blocks in one format, or in the one that its role names (None: kept)."""

    def choose(module):
        if module.block is None and module.role not in per_role:
            return None
        chosen = per_role.get(module.role, fmt)
        return Layer(chosen, activations) if chosen is not None else None

    return InMemory(HFCheckpoint(folder), choose)


def assert_same_model(found: QuantizedCheckpoint, wanted: QuantizedCheckpoint) -> None:
    """Equal configuration, formats, codes, parameters and kept tensors, bit for bit."""
    assert found.config == wanted.config
    assert found.names() == wanted.names()
    assert {m: layer.format.label for m, layer in found.layers.items()} == {
        m: layer.format.label for m, layer in wanted.layers.items()
    }
    for name in wanted.names():
        module = name.removesuffix(".weight")
        if module in wanted.layers:
            a, b = found.matrix(module).quantized, wanted.matrix(module).quantized
            assert torch.equal(a.codes, b.codes)
            assert a.params.keys() == b.params.keys()
            assert all(
                torch.equal(a.params[p], b.params[p]) and a.params[p].dtype == b.params[p].dtype for p in a.params
            )
            assert torch.equal(found.tensor(name), b.decode())
        else:
            assert found.tensor(name).dtype == wanted.tensor(name).dtype
            assert torch.equal(found.tensor(name), wanted.tensor(name))
        start, stop = (min(row, wanted.info(name).shape[0]) for row in (3, 17))
        assert torch.equal(found.rows(name, start, stop), wanted.tensor(name)[start:stop])


def assert_generates(folder: Path, device: str, tolerance: float, steps: int = 16) -> None:
    """transformers continues a text greedily from an artifact, with the logits that our evaluation computes.

    Args:
        folder: an artifact that transformers loads.
        device: where both run it.
        tolerance: of the difference between logits, relative to their norm.
        steps: new tokens.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=device).eval()
    prompt = torch.arange(3, 40, device=device).view(1, -1)
    asked = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "use_cache": True}
    asked |= {"output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **asked)
    assert found.sequences.shape == (1, prompt.shape[1] + steps)
    logits = torch.cat(found.logits).float().cpu()
    assert logits.isfinite().all()
    walker = Walker(open_artifact(folder), torch.device(device), torch.float32)
    hidden = walker.embed(found.sequences.cpu())
    for i in range(len(walker.blocks)):
        walker.advance(walker.load_block(i), i, hidden)
    expected = walker.logits(hidden, 0, prompt.shape[1] - 1)[:-1].cpu()
    assert float((logits - expected).norm() / expected.norm()) < tolerance


def save_llama(folder: Path, hidden: int, dtype: torch.dtype, blocks: int = 2) -> Path:
    """A Llama whose hidden size blocks of many columns divide, and whose intermediate size is twice that."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {"vocab_size": 512, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": blocks}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = AutoConfig.for_model("llama", **fields, **heads, initializer_range=0.1)
        AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def skip_if_cache_is_ignored() -> None:
    """compressed-tensors rounds nothing where attention's argument has another name than the one it looks for."""
    import compressed_tensors

    taken = inspect.signature(LlamaAttention.forward).parameters
    if "past_key_values" not in taken and Version(compressed_tensors.__version__) <= Version("0.20.1"):
        pytest.skip(f"compressed-tensors {compressed_tensors.__version__} ignores the KV cache in this transformers")
