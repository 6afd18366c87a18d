"""The source `self`: text that the model writes, against a loop that runs the whole model for every token."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from qtool.calibrate import sampling
from qtool.calibrate.sampling import sample_from, sampled
from qtool.calibrate.tokenizer import load_tokenizer
from qtool.calibrate.tokens import load_tokens
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import NumericsError, QtoolError
from qtool.recipe.schema import Calibration, Source
from tests.calibrate.conftest import load_reference
from tests.evaluate.test_run import add_bos

LENGTH = 24


def slowly(model, tokens, length, generator=None):
    """One whole forward pass for every new token."""
    while tokens.shape[1] < length:
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[:, -1]
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
    return tokens


def take(folder, seed=3, samples=5):
    checkpoint = HFCheckpoint(folder)
    generator = torch.Generator().manual_seed(seed)
    return sampled(checkpoint, load_tokenizer(checkpoint), samples, LENGTH, generator)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral-sliding", "gemma2", "gemma3_text", "phi3"])
def test_the_model_continues_random_first_tokens(name, tiny_checkpoint, sliding):
    folder = sliding if name == "mistral-sliding" else tiny_checkpoint(name)
    found = take(folder)
    assert (found.shape, found.dtype) == ((5, LENGTH), torch.int64)
    first = torch.randint(500, (5, 1), generator=torch.Generator().manual_seed(3))  # the tokenizer knows 500
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        want = slowly(load_reference(folder), first, LENGTH)
    assert torch.equal(found, want)
    assert len(set(found[:, 0].tolist())) > 1


@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
def test_the_cache_gives_the_probabilities_of_full_passes(name, tiny_checkpoint, sliding):
    model = load_reference(sliding if name == "mistral-sliding" else tiny_checkpoint(name))
    seen, fed = [], []

    def record(_, __, given, output):
        seen.append(output.logits[:, -1].log_softmax(-1))
        fed.append(given["input_ids"].shape[1])

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with model.register_forward_hook(record, with_kwargs=True):
            tokens = sample_from(model, torch.tensor([[7, 8], [9, 400]]), LENGTH)
        want = model(tokens, use_cache=False).logits.log_softmax(-1)
    assert fed == [2] + [1] * (LENGTH - 3)
    assert_close(torch.stack(seen, 1), want[:, 1:-1], rtol=1e-4, atol=1e-4)


class Forgetful(torch.nn.Module):
    """Gives the same logits for every token, and counts what it has seen."""

    def __init__(self, logits, counts=1):
        super().__init__()
        self.logits, self.counts, self.seen = logits, counts, 0

    def forward(self, input_ids, past_key_values, use_cache):
        self.seen += self.counts * input_ids.shape[1]
        kept = SimpleNamespace(get_seq_length=lambda: self.seen)
        return {"logits": self.logits.expand(*input_ids.shape, 3), "past_key_values": kept}


def test_a_cache_that_is_not_filled_is_noticed():
    with pytest.raises(QtoolError, match="Forgetful keeps 0 tokens in its cache instead of 1"):
        sample_from(Forgetful(torch.zeros(3), counts=0), torch.zeros(1, 1, dtype=torch.int64), 3)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    probabilities = torch.tensor([0.1, 0.6, 0.3])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens = sample_from(Forgetful(probabilities.log()), torch.zeros(2000, 1, dtype=torch.int64), 11)
    shares = tokens[:, 1:].flatten().bincount(minlength=3) / 20_000
    assert_close(shares, probabilities, rtol=0, atol=4 * (0.25 / 20_000) ** 0.5)


def test_the_seed_decides_and_nothing_else_is_disturbed(tiny_checkpoint):
    folder, state = tiny_checkpoint("llama"), torch.get_rng_state()
    found = [take(folder, seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_samples_begin_as_the_tokenizer_begins_a_text(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    add_bos(folder)
    found = take(folder)
    assert set(found[:, 0].tolist()) == {1}
    assert len(set(found[:, 1].tolist())) > 1


def test_part_of_a_mixture(tiny_checkpoint):
    checkpoint = HFCheckpoint(tiny_checkpoint("llama"))
    mixture = (Source(data="builtin"), Source(data="self"))
    found = load_tokens(Calibration(data=mixture, samples=5, length=LENGTH, seed=2), checkpoint)
    assert torch.equal(found[3:], take(tiny_checkpoint("llama"), seed=3, samples=2))


def test_samples_that_the_model_goes_on_with(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(sampling, "compute_dtype", lambda device: torch.float32)
    monkeypatch.setattr(sampling, "ABREAST", 4)
    checkpoint = HFCheckpoint(tiny_checkpoint("llama"))
    wanted = Calibration(samples=3, length=LENGTH, seed=5, continued=2)
    found, real = load_tokens(wanted, checkpoint), load_tokens(wanted.model_copy(update={"continued": 0}), checkpoint)
    assert torch.equal(found[:3], real)
    model, generator = load_reference(checkpoint.source), torch.Generator().manual_seed(5)
    prompts = real[:, :3].repeat(2, 1)  # an eighth of 24
    want = torch.cat([slowly(model, part, LENGTH, generator) for part in (prompts[:4], prompts[4:])])
    assert torch.equal(found[3:], want)
    assert not torch.equal(found[3:6], found[6:])


def test_a_tokenizer_that_knows_more_than_the_model(tiny_checkpoint):
    checkpoint = HFCheckpoint(tiny_checkpoint("llama"))
    found = sampled(checkpoint, LargeTokenizer(), 64, 16, torch.Generator().manual_seed(0))
    assert int(found.max()) < 512


class LargeTokenizer:
    """Knows tokens without an embedding."""

    def __len__(self):
        return 100_000

    def __call__(self, text, **_):
        return {"input_ids": [5]}


def test_a_model_with_infinite_weights(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericsError, match="tensor logits is not finite"):
        take(folder)
