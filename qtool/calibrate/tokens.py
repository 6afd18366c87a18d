"""Calibration tokens: samples of equal length, cut from the sources that a recipe names.

Shape letters: S samples, T tokens per sample.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qtool.calibrate.documents import Tell, documents
from qtool.calibrate.foreign import CACHE_NAMES, assign, cache_argument, misfit
from qtool.calibrate.infinite import origin
from qtool.calibrate.meta import build_on_meta
from qtool.calibrate.tokenizer import batch_ids, load_tokenizer, token_ids
from qtool.checkpoint._base import Checkpoint
from qtool.errors import CheckpointError
from qtool.numerics.checks import finite
from qtool.numerics.metrics import all_finite
from qtool.recipe.schema import Calibration, Source

CHOICE = 8
"""How many samples' worth of text is read for each one that is used, if the source has that much."""
BATCH = 1 << 22
"""Characters that are tokenized at a time, as documents side by side; their ids take 100 times that memory."""


def load_tokens(calibration: Calibration, checkpoint: Checkpoint, tell: Tell = lambda _: None) -> Tensor:
    """The tokens that a recipe asks for, the same ones for the same seed: int64 [S, T].

    Text is tokenized as one stream and cut into windows of T, of which the seed chooses some. Where the tokenizer
    begins a text with a special token, each sample begins with it.

    Args:
        calibration: what is asked for.
        checkpoint: whose tokenizer is used.
        tell: told what is left out.

    Raises:
        CheckpointError: no tokenizer, no such file, or too little text in it.
        MissingExtra, HubError: see `documents`.
    """
    tokenizer = load_tokenizer(checkpoint)
    sources = calibration.data
    mixture = (Source(data=sources),) if isinstance(sources, str) else sources
    parts = []
    for number, (source, samples) in enumerate(zip(mixture, shares(mixture, calibration.samples), strict=True)):
        generator = torch.Generator().manual_seed(calibration.seed + number)
        if source.data == "self" and samples:
            parts.append(sampled(checkpoint, tokenizer, samples, calibration.length, generator))
        elif samples:
            parts.append(windows(source.data, tokenizer, samples, calibration, generator, tell))
    return torch.cat(parts)


def shares(mixture: tuple[Source, ...], samples: int) -> list[int]:
    """How many samples each source gives: in proportion to its weight, largest remainders rounded up."""
    total = sum(s.weight for s in mixture)
    exact = [samples * s.weight / total for s in mixture]
    counts = [int(e) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: samples - sum(counts)]:
        counts[i] += 1
    return counts


def windows(
    source: str, tokenizer: Any, samples: int, calibration: Calibration, generator: torch.Generator, tell: Tell
) -> Tensor:
    """Windows of a source's text, int64 [samples, T]; see `load_tokens`."""
    length = calibration.length
    enough, stream, blank = CHOICE * samples * length, array("I"), True
    with closing(documents(source, tokenizer, calibration.chat_template, tell)) as texts:
        while len(stream) < enough and (batch := some(texts, enough - len(stream))):
            blank = blank and not any(map(str.strip, batch))
            for ids in batch_ids(tokenizer, batch):
                if len(stream) < enough:
                    stream.extend(ids)
    if blank and len(stream):
        raise CheckpointError(
            f"calibration data {source} is only white space", hint="give text of the kind it will see"
        )
    found = len(stream) // length
    if found < samples:
        raise CheckpointError(
            f"calibration data {source} is too short",
            wanted=f"{samples} samples of {length} tokens",
            found=f"{len(stream)} tokens, enough for {found}",
            hint="give more text, or lower calibration.samples or calibration.length",
        )
    chosen = torch.randperm(found, generator=generator)[:samples]
    tokens = torch.from_numpy(np.array(stream[: found * length], np.int64)).view(found, length)[chosen]
    begin = beginning(tokenizer)
    if begin is not None:
        tokens[:, 0] = begin
    return tokens


def some(texts: Iterator[str], most: int) -> list[str]:
    """The next of some texts, until they have `most` characters or what a batch may have: at least one, if there is."""
    batch, characters = list[str](), 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= min(most, BATCH):
            break
    return batch


def beginning(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before every text, if it does."""
    ids, bare = token_ids(tokenizer, "a", special=True), token_ids(tokenizer, "a")
    return int(ids[0]) if ids and ids[:1] != bare[:1] else None


def sampled(checkpoint: Checkpoint, tokenizer: Any, samples: int, length: int, generator: torch.Generator) -> Tensor:
    """Text that the model writes itself, from a random first token on (https://arxiv.org/abs/2305.17888).

    The whole model is in memory meanwhile, in float32. Returns int64 [samples, T].

    Raises:
        NumericsError: the model's logits are not finite.
    """
    if checkpoint.family.derived:
        what = f"{checkpoint.family.architecture} writes no text here: it has no family file"
        raise CheckpointError(f"calibration.data: self: {what}", hint="take builtin, or texts of your own")
    model = build_on_meta(checkpoint.config, torch.float32, checkpoint.family.attention)
    tied = {"lm_head.weight": f"{checkpoint.family.embedding}.weight"} if checkpoint.tied else {}
    names = {name: tied.get(name, name) for name, _ in model.named_parameters(remove_duplicate=False)}
    read = {name: checkpoint.tensor(name).float() for name in dict.fromkeys(names.values())}
    assign(model, {name: read[source] for name, source in names.items()})
    known = min(len(tokenizer), model.config.vocab_size)
    first = torch.randint(known, (samples, 1), generator=generator)
    begin = beginning(tokenizer)
    prompt = first if begin is None else torch.cat([torch.full_like(first, begin), first], dim=1)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(generator.initial_seed())
        return sample_from(model.eval(), prompt, length)


def sample_from(model: torch.nn.Module, tokens: Tensor, length: int) -> Tensor:
    """Continues token sequences at temperature 1 until they have `length` tokens: int64 [S, any] -> [S, length]."""
    name = cache_argument(type(model))
    if name is None:
        raise misfit(model, f"takes no cache by any of the names {', '.join(CACHE_NAMES)}")
    cache, fresh = None, tokens
    while tokens.shape[1] < length:
        output = model(input_ids=fresh, use_cache=True, **{name: cache})
        cache = output[name]
        if (kept := cache.get_seq_length()) != tokens.shape[1]:
            raise misfit(model, f"keeps {kept} tokens in its cache instead of {tokens.shape[1]}")
        logits: Tensor = output["logits"][:, -1]
        if not all_finite(logits):
            first = origin(model, partial(model, input_ids=tokens, use_cache=False), {})
            finite(logits, "logits", f"it begins in {first}" if first else None)
        fresh = torch.multinomial(logits.softmax(-1), 1)
        tokens = torch.cat([tokens, fresh], dim=1)
    return tokens
