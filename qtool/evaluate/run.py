"""Runs a text through a model, or through two side by side, and scores it.

The protocol is llama-perplexity's: the text is tokenized once, cut into chunks of `context` tokens without overlap (a
rest is dropped), each chunk's first token is replaced by BOS where the tokenizer adds one, and of each chunk the
positions from the middle on are scored, so that every one of them has seen at least half a context. Of 512 tokens
these are 255.

Each model is walked block by block with the hidden states of all chunks, so memory holds one block of weights, the
output matrix and one chunk of logits per model, however long the text or large the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qtool import __version__
from qtool.calibrate.long_text import file_ids
from qtool.calibrate.tokenizer import beginning, load_tokenizer
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Checkpoint
from qtool.checkpoint.gguf_checkpoint import GGUFCheckpoint
from qtool.errors import CheckpointError, UsageError
from qtool.evaluate.divergence import Scores
from qtool.evaluate.result import Evaluation
from qtool.numerics.checks import finite
from qtool.numerics.threads.ranks import ALONE, Ranks
from qtool.store.files import sha256

Progress = Callable[[int, int, str], None]
"""Told (steps done, steps in all, what was just finished)."""

Logits = Callable[[int], Tensor]
"""Chunk index -> float [P, V], logits of the scored positions."""


def evaluate(
    quantized: Checkpoint,
    baseline: Checkpoint | None,
    text: Path,
    *,
    context: int,
    chunks: int | None,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    runtime: Literal["qtool", "llama.cpp"] = "qtool",
    ranks: Ranks = ALONE,
    once: Callable[[Callable[[], Logits]], Logits] = lambda find: find(),
) -> Evaluation:
    """Perplexity of a model on a text, and its divergence from a baseline.

    Args:
        quantized: the model under test; activations are quantized where it says so.
        baseline: what to compare with; None: perplexity only.
        text: UTF-8 file.
        context: tokens per chunk.
        chunks: how many chunks to use at most; None: all that the text holds.
        device: where both models are run.
        dtype: of weights and hidden states in both.
        progress: called for each block and chunk.
        runtime: "llama.cpp" runs the tested model's GGUF file in llama.cpp; the baseline is run here in any case.
        ranks: who runs other chunks of the text.
        once: finds the baseline's logits, or gives those of an earlier call with the same text, device and dtype.

    Raises:
        UsageError: the text cannot be read, or is too short; llama.cpp is to run something else than GGUF.
        CheckpointError: no tokenizer, or the two models do not share a vocabulary.
        NumericsError: a model's logits are not finite.
    """
    file = gguf_file(quantized) if runtime == "llama.cpp" else None
    if ranks.first:
        tokens = chunked(*encode(text, baseline or quantized, chunks and chunks * context), context, chunks)
    tokens = ranks.broadcast(tokens if ranks.first else torch.empty(0))
    first = context // 2
    models = [m for m in (quantized, baseline) if m is not None]
    check_vocabulary(models, int(tokens.max()))
    walked = models[1:] if file else models
    targets, mine = tokens[:, first + 1 :], tokens[ranks.share(len(tokens))]
    steps = Steps(progress, sum(m.family.blocks(m.config) for m in walked) + len(mine))
    logits = partial(walk, tokens=mine, first=first, device=device, dtype=dtype, steps=steps)
    sources = [once(partial(logits, m)) if m is baseline else logits(m) for m in walked]
    steps.done = steps.total - len(mine)
    if file:
        sources.insert(0, llama_cpp(file, mine, first))
    scores = score_chunks(sources, mine[:, first + 1 :], steps)
    scores.combine(ranks, *targets.shape)
    how = {"context": context, "chunks": len(targets), "runtime": runtime, "qtool": __version__, "text": text.name}
    measured: dict[str, Any] = how | scores.summary()
    return Evaluation(
        tokens=targets.numel(),
        artifact=quantized.fingerprint(),
        baseline=baseline.fingerprint() if baseline else None,
        text_sha256=sha256(text),
        **measured,
    )


def check_vocabulary(models: Sequence[Checkpoint], largest: int) -> None:
    """Makes sure that logits can be compared and that every token has an embedding.

    Raises:
        CheckpointError: the models' output layers differ in size, or the text holds a token id beyond them.
    """
    rows = [m.info(f"{m.family.embedding if m.tied else m.family.head}.weight").shape[0] for m in models]
    if len(set(rows)) > 1:
        found = f"{rows[0]} and {rows[1]} tokens"
        raise CheckpointError("model and baseline cannot be compared", wanted="one vocabulary", found=found)
    if largest >= rows[0]:
        wanted = f"token ids below {rows[0]}"
        raise CheckpointError("tokenizer and model do not belong together", wanted=wanted, found=largest)


class Steps:
    """Counts steps for a listener."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.done, self.total = progress, 0, total
        progress(0, total, "")

    def step(self, message: str) -> None:
        """One more is done."""
        self.done += 1
        self.progress(self.done, self.total, message)


def walk(
    model: Checkpoint, tokens: Tensor, first: int, device: torch.device, dtype: torch.dtype, steps: Steps
) -> Logits:
    """Takes all chunks, int64 [S, T], through all blocks; what is left is the output layer, chunk by chunk."""
    walker = Walker(model, device, dtype)
    hidden = walker.embed(tokens)
    for i in range(len(walker.blocks)):
        walker.advance(walker.load_block(i), i, hidden)
        steps.step(f"{model.source}: block {i}")
    return lambda s: finite(walker.logits(hidden, s, first)[:-1], f"logits of {model.source}, chunk {s + 1}")


def gguf_file(model: Checkpoint) -> Path:
    """What llama.cpp opens; other parts it finds beside the first. Raises UsageError: the model is no GGUF file."""
    if not isinstance(model, GGUFCheckpoint):
        raise UsageError("--runtime llama.cpp", wanted="a GGUF file", found=model.source)
    return model.parts[0]


def llama_cpp(file: Path, tokens: Tensor, first: int) -> Logits:
    """The same as `walk` by llama.cpp."""
    from qtool.evaluate.llamacpp import LlamaCpp, try_file

    try_file(file)
    runtime = LlamaCpp(file, tokens.shape[1])
    return lambda s: finite(runtime.logits(tokens[s])[first:-1], f"logits of {file}, chunk {s + 1}")


def score_chunks(sources: Sequence[Logits], targets: Tensor, steps: Steps) -> Scores:
    """Scores of all chunks.

    Args:
        sources: the model under test, then the baseline if there is one.
        targets: int64 [S, P], the tokens that follow the scored positions of each chunk.
        steps: counts chunks.

    Raises:
        NumericsError: a model's logits are not finite.
    """
    scores = Scores()
    for s, chunk in enumerate(targets):
        scores.add(sources[0](s), chunk, *(source(s) for source in sources[1:]))
        steps.step(f"chunk {s + 1}")
    return scores


def encode(text: Path, model: Checkpoint, most: int | None = None) -> tuple[Sequence[int], int | None]:
    """Token ids of a file, and BOS if the tokenizer begins texts with it.

    Special tokens that are spelled out in the text count as such.

    Args:
        text: UTF-8.
        model: whose tokenizer is used.
        most: ids that are needed, at least; the file is read no further. None: all of them.

    Raises:
        UsageError: the file cannot be read, or holds only white space.
        CheckpointError: the model has no tokenizer.
    """
    tokenizer = load_tokenizer(model)
    try:
        ids, blank = file_ids(text, tokenizer, most)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the evaluation text {text}", wanted="a readable UTF-8 file", found=error) from error
    if blank and len(ids):
        raise UsageError(f"the evaluation text {text}", wanted="words", found="only white space")
    return ids, beginning(tokenizer)


def chunked(ids: Sequence[int], bos: int | None, context: int, chunks: int | None) -> Tensor:
    """Cuts a tokenized text into int64 [S, context].

    Raises:
        UsageError: fewer tokens than one chunk.
    """
    if context < 4 or (chunks is not None and chunks < 1):
        wanted = "a context of at least 4 tokens and at least 1 chunk"
        raise UsageError("the evaluation", wanted=wanted, found=f"{context} and {chunks}")
    count = min(len(ids) // context, chunks or len(ids))
    if count == 0:
        raise UsageError(
            "the evaluation text is shorter than one chunk",
            wanted=f"at least {context} tokens",
            found=len(ids),
            hint="give a longer text or a smaller context",
        )
    tokens = torch.from_numpy(np.array(ids[: count * context], np.int64)).view(count, context)
    if bos is not None:
        tokens[:, 0] = bos
    return tokens
