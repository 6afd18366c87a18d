"""Calibration tokens: samples of equal length, cut from the sources that a recipe names.

Shape letters: S samples, T tokens per sample.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qtool.calibrate.documents import Tell, documents
from qtool.calibrate.sampling import CPU, continued, sampled
from qtool.calibrate.tokenizer import batch_ids, beginning, load_tokenizer
from qtool.checkpoint._base import Checkpoint
from qtool.errors import CheckpointError
from qtool.recipe.schema import Calibration, Source

CHOICE = 8
"""How many samples' worth of text is read for each one that is used, if the source has that much."""
BATCH = 1 << 22
"""Characters that are tokenized at a time, as documents side by side; their ids take 100 times that memory."""


def load_tokens(
    calibration: Calibration, checkpoint: Checkpoint, tell: Tell = lambda _: None, device: torch.device = CPU
) -> Tensor:
    """The tokens that a recipe asks for, the same ones for the same seed: int64 [S, T].

    Text is tokenized as one stream and cut into windows of T, of which the seed chooses some. Where the tokenizer
    begins a text with a special token, each sample begins with it.

    Args:
        calibration: what is asked for.
        checkpoint: whose tokenizer is used.
        tell: told what is left out.
        device: where the model runs, if it is to go on with samples; these come behind all others.

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
    if calibration.continued:
        parts.append(continued(checkpoint, torch.cat(parts), calibration.continued, calibration.seed, device))
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
