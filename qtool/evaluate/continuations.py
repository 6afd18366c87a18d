"""How likely a model finds continuations of contexts: what tasks with choices are scored by.

All requests are walked through a model block by block, so that memory holds one block of weights. Those of similar
length lie beside each other, padded on the right, which no token before sees.

Shape letters: S requests, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.calibrate.hidden import Hidden
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Checkpoint
from qtool.evaluate.run import Progress, Steps
from qtool.numerics.checks import finite

STEP = 16
"""Lengths are multiples of it."""


class Request(NamedTuple):
    """A continuation behind its context.

    Attributes:
        tokens: of both.
        first: of them that belongs to the continuation, at least 1.
    """

    tokens: tuple[int, ...]
    first: int


class Outcome(NamedTuple):
    """What a model makes of a continuation: its log-probability, and whether each token was the likeliest one."""

    log_probability: float
    greedy: bool


Scorer = Callable[[Sequence[Request]], list[Outcome]]


def streamed(model: Checkpoint, device: torch.device, dtype: torch.dtype, progress: Progress) -> Scorer:
    """Scores with qtool's own forward pass: weights decoded, inputs and KV cache rounded where the model says so.

    Args:
        model: any checkpoint.
        device: where it is run.
        dtype: of weights and hidden states.
        progress: is told about blocks and requests.
    """

    def score(requests: Sequence[Request]) -> list[Outcome]:
        walker, alike = Walker(model, device, dtype), by_length(requests)
        steps = Steps(progress, len(walker.blocks) + len(alike))
        hidden = {length: walker.embed(padded(requests, own, length)) for length, own in alike.items()}
        for i in range(len(walker.blocks)):
            block = walker.load_block(i)
            for each in hidden.values():
                walker.advance(block, i, each)
            steps.step(f"{model.source}: block {i}")
        found: dict[int, Outcome] = {}
        for length, own in alike.items():
            found |= {r: look(walker, hidden[length], s, requests[r]) for s, r in enumerate(own)}
            steps.step(f"{len(own)} requests of up to {length} tokens")
        return [found[r] for r in range(len(requests))]

    return score


def look(walker: Walker, hidden: Hidden, sample: int, request: Request) -> Outcome:
    """The outcome of a request that went through all blocks. Raises NumericsError: its logits are not finite."""
    logits = walker.logits(hidden, sample, request.first - 1)
    return outcome(finite(logits, f"logits of {walker.checkpoint.source}"), request)


def llama_cpp(file: Path, longest: int, progress: Progress) -> Scorer:
    """Scores in llama.cpp.

    Args:
        file: a GGUF file.
        longest: tokens that a request may have.
        progress: is told about requests.
    """
    from qtool.evaluate.llamacpp import LlamaCpp, try_file

    try_file(file)
    runtime = LlamaCpp(file, longest)

    def score(requests: Sequence[Request]) -> list[Outcome]:
        found, steps = [], Steps(progress, len(requests))
        for request in requests:
            logits = runtime.logits(torch.tensor(request.tokens[:-1]))[request.first - 1 :]
            found.append(outcome(finite(logits, f"logits of {file}"), request))
            steps.step("request")
        return found

    return score


def outcome(logits: Tensor, request: Request) -> Outcome:
    """What logits say.

    Args:
        logits: float32 [T, V], from the position before the continuation on; those behind its last token are ignored.
        request: what was run.
    """
    targets = torch.tensor(request.tokens[request.first :], device=logits.device)
    logits = logits[: len(targets)].float()
    found = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
    return Outcome(float(found.double().sum()), bool((logits.argmax(1) == targets).all()))


def by_length(requests: Sequence[Request]) -> dict[int, list[int]]:
    """Indices of requests by how many tokens of room they get; the last token of a request is never run."""
    found: dict[int, list[int]] = {}
    for r, request in enumerate(requests):
        found.setdefault(-(-(len(request.tokens) - 1) // STEP) * STEP, []).append(r)
    return found


def padded(requests: Sequence[Request], own: Sequence[int], length: int) -> Tensor:
    """Tokens of some requests, int64 [S, T]; token 0 stands behind them."""
    tokens = torch.zeros(len(own), length, dtype=torch.int64)
    for s, r in enumerate(own):
        run = requests[r].tokens[:-1]
        tokens[s, : len(run)] = torch.tensor(run)
    return tokens
