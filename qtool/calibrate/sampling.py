"""Text that a model writes itself, from a random token on or from the beginning of a text.

Shape letters: S samples, T tokens per sample.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qtool.calibrate.foreign import CACHE_NAMES, assign, cache_argument, misfit
from qtool.calibrate.infinite import origin
from qtool.calibrate.meta import build_on_meta
from qtool.calibrate.tokenizer import beginning
from qtool.checkpoint._base import Checkpoint
from qtool.errors import CheckpointError
from qtool.numerics.checks import finite
from qtool.numerics.metrics import all_finite
from qtool.numerics.threads.processor import compute_dtype

CPU = torch.device("cpu")
PROMPT = 8
"""Of how many tokens of a sample one is given to the model that goes on from there."""
ABREAST = 128
"""Samples that are written at a time, since each holds a cache."""


def whole_model(checkpoint: Checkpoint, what: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of transformers with all of its weights.

    Args:
        checkpoint: which.
        what: asks for it, in the words of a recipe.
        dtype: of weights and of what they compute.
        device: where they are.

    Raises:
        CheckpointError: its family is derived, and only blocks of it are known.
    """
    if checkpoint.family.derived:
        reason = f"{checkpoint.family.architecture} writes no text here: it has no family file"
        raise CheckpointError(f"{what}: {reason}", hint="take builtin, or texts of your own")
    model = build_on_meta(checkpoint.config, dtype, checkpoint.family.attention)
    tied = {"lm_head.weight": f"{checkpoint.family.embedding}.weight"} if checkpoint.tied else {}
    names = {name: tied.get(name, name) for name, _ in model.named_parameters(remove_duplicate=False)}
    read = {name: checkpoint.tensor(name).to(dtype) for name in dict.fromkeys(names.values())}
    assign(model, {name: read[source] for name, source in names.items()})
    return model.eval().to(device)


def sampled(checkpoint: Checkpoint, tokenizer: Any, samples: int, length: int, generator: torch.Generator) -> Tensor:
    """Text that the model writes itself, from a random first token on (https://arxiv.org/abs/2305.17888).

    The whole model is in memory meanwhile, in float32. Returns int64 [samples, T].

    Raises:
        CheckpointError: see `whole_model`.
        NumericsError: the model's logits are not finite.
    """
    model = whole_model(checkpoint, "calibration.data: self", torch.float32, CPU)
    known = min(len(tokenizer), model.config.vocab_size)
    first = torch.randint(known, (samples, 1), generator=generator)
    begin = beginning(tokenizer)
    prompt = first if begin is None else torch.cat([torch.full_like(first, begin), first], dim=1)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(generator.initial_seed())
        return sample_from(model, prompt, length)


@torch.inference_mode()
def continued(checkpoint: Checkpoint, tokens: Tensor, times: int, seed: int, device: torch.device) -> Tensor:
    """Samples that begin as others do, and that the model goes on with.

    The whole model is in memory meanwhile, on the device.

    Args:
        checkpoint: of the model.
        tokens: those that begin, int64 [S, T].
        times: how often the model goes on from each beginning.
        seed: of what is drawn.
        device: where the model runs.

    Returns:
        int64 [times S, T]: each sample once, then each of them again.

    Raises:
        CheckpointError: see `whole_model`.
        NumericsError: the model's logits are not finite.
    """
    model = whole_model(checkpoint, "calibration.continued", compute_dtype(device), device)
    generator = torch.Generator(device).manual_seed(seed)
    prompts = tokens[:, : max(1, tokens.shape[1] // PROMPT)].repeat(times, 1).to(device)
    parts = [sample_from(model, part, tokens.shape[1], generator).cpu() for part in torch.split(prompts, ABREAST)]
    return torch.cat(parts)


def sample_from(model: nn.Module, tokens: Tensor, length: int, generator: torch.Generator | None = None) -> Tensor:
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
        fresh = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, fresh], dim=1)
    return tokens
