"""How much the loss of the whole model changes with the outputs of its layers: squared gradients, token by token.

An error of one token may be felt by every token behind it, that of another by none. Two sweeps over the blocks of the
original model find out: one carries hidden states forward and keeps those in front of every block; the other begins
with the gradient of the loss by the last ones, and runs every block again to bring the gradient in front of it. So a
block and hidden states are in memory, and intermediates of few samples. Samples go some at a time if the hidden states
of all of them take too much room. The squares weigh the tokens of Gram matrices (GuidedQuant,
https://arxiv.org/abs/2505.07004).

The loss of a sample is the sum of -log p over its tokens but the first; of the text's own tokens, or of tokens that the
model itself draws, whose expected squared gradients are the diagonal of Fisher's matrix.

Shape letters: S samples, s of them, T tokens per sample, H hidden size, V vocabulary, N outputs of a module, B groups
of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from qtool.calibrate.blocks import TABLE_VALUES
from qtool.calibrate.copies import twin
from qtool.calibrate.foreign import run_block
from qtool.calibrate.hidden import Hidden, waiting_limit
from qtool.calibrate.walker import Walker
from qtool.numerics.product import float32_product
from qtool.numerics.threads.parallel import side_by_side

POSITIONS = 512
"""Tokens whose logits are in memory at a time."""

GradientHook = Callable[[str, Tensor], None]
"""Is shown the gradient by a layer's outputs."""

Tell = Callable[[int, int], None]
"""Told how many of how many steps are done."""


@dataclass(frozen=True)
class Squares:
    """Squared gradients of the loss.

    Attributes:
        modules: by a linear layer's outputs, mean over groups of these, float32 [S, T, B], by name. Experts, which do
            not read every token, are left out.
        blocks: by the outputs of each block, mean over H, float32 [S, T].
    """

    modules: dict[str, Tensor]
    blocks: list[Tensor]


def squared_gradients(
    walker: Walker,
    tokens: Tensor,
    groups: Mapping[str, int],
    labels: Literal["text", "sampled"],
    seed: int,
    tell: Tell = lambda done, of: None,
) -> Squares:
    """Squared gradients on some tokens.

    Args:
        walker: over the original model.
        tokens: int64 [S, T].
        groups: B of modules, by name; of no others are gradients kept.
        labels: whose -log p is the loss.
        seed: of labels that are sampled.
        tell: called with progress.
    """
    samples, length = tokens.shape
    found = {name: torch.zeros(samples, length, b) for name, b in groups.items()}
    squares = Squares(found, [torch.zeros(samples, length) for _ in walker.blocks])
    step = at_a_time(walker, length)
    parts = [slice(a, min(a + step, samples)) for a in range(0, samples, step)]
    steps = 2 * len(walker.blocks)
    for p, part in enumerate(parts):
        here = partial(lambda p, done: tell(p * steps + done, len(parts) * steps), p)
        fronts = forward_sweep(walker, tokens[part], here)
        own = {name: t[part] for name, t in found.items()}
        behind = [t[part] for t in squares.blocks]
        numbers = [walker.ranks.rank + walker.ranks.size * s for s in range(part.start, part.stop)]
        generators = [torch.Generator(walker.device).manual_seed(seed + number) for number in numbers]
        drawn = generators if labels == "sampled" else None
        backward_sweep(walker, tokens[part], fronts, Squares(own, behind), drawn, here)
    return squares


def at_a_time(walker: Walker, length: int) -> int:
    """Samples whose hidden states in front of every block, and gradients, are in memory."""
    width = walker.checkpoint.info(f"{walker.family.embedding}.weight").shape[1]
    return max(1, waiting_limit(walker.device) // ((len(walker.blocks) + 2) * length * width * walker.dtype.itemsize))


def forward_sweep(walker: Walker, tokens: Tensor, tell: Callable[[int], None]) -> list[Hidden]:
    """Hidden states in front of every block, and behind the last."""
    fronts = [walker.embed(tokens)]
    for i in range(len(walker.blocks)):
        behind = fronts[-1].like()
        behind.values.copy_(fronts[-1].values)
        walker.advance(walker.load_block(i), i, behind, {})
        fronts.append(behind)
        tell(i + 1)
    return fronts


def backward_sweep(
    walker: Walker,
    tokens: Tensor,
    fronts: list[Hidden],
    squares: Squares,
    drawn: list[torch.Generator] | None,
    tell: Callable[[int], None],
) -> None:
    """Fills `squares` block by block, from the last one on, and lets go of hidden states on the way.

    Args:
        walker: over the original model.
        tokens: int64 [s, T].
        fronts: of `forward_sweep`.
        squares: of these samples.
        drawn: for labels that are sampled, one for each sample; None: labels are the text's own tokens.
        tell: told how many sweeps over blocks are done.
    """
    gradient, count = fronts.pop(), len(walker.blocks)
    for s in range(gradient.samples):
        error = partial(log_likelihood_error, tokens[s].to(walker.device), drawn[s] if drawn else None)
        gradient[s : s + 1], _ = head_gradient(walker, gradient[s : s + 1], error)
    for i in reversed(range(count)):
        x, block = fronts.pop(), walker.load_block(i)
        names = [m.name for m in walker.modules[i] if m.name in squares.modules]

        def run(part: slice, i: int = i, x: Hidden = x, block: nn.Module = block, names: list[str] = names) -> None:
            def count(name: str, g: Tensor) -> None:
                means = group_means(g.float().square(), squares.modules[name].shape[-1])
                squares.modules[name][part] = means.view(x[part].shape[0], gradient.length, -1).cpu()

            squares.blocks[i][part] = gradient[part].float().square().mean(-1).cpu()
            gradient[part] = block_gradient(walker, block, i, x[part], gradient[part], dict.fromkeys(names, count))

        parts = walker.parts(gradient)
        walker.block_arguments(gradient.length)  # recorded before threads ask for them
        side_by_side(run, parts, walker.shares(parts))
        tell(2 * count - i)


def block_gradient(
    walker: Walker, block: nn.Module, i: int, x: Tensor, gradient: Tensor, seen: Mapping[str, GradientHook]
) -> Tensor:
    """The gradient in front of a block, [s, T, H].

    Args:
        walker: over the model.
        block: from `load_block(i)`; stays as it is.
        i: its index.
        x: its inputs, [s, T, H].
        gradient: by its outputs, [s, T, H].
        seen: by linear layer, is given name and gradient of its outputs, [..., N], which change later.
    """
    block = twin(block)
    x = x.detach().to(walker.device).requires_grad_()

    def watch(name: str, _: nn.Module, __: object, y: Tensor | tuple[Tensor, ...]) -> None:
        product = y[0] if isinstance(y, tuple) else y  # routers tell what they chose as well
        product.register_hook(lambda g: seen[name](name, g))  # type: ignore[no-untyped-call]

    for m in (m for m in walker.modules[i] if m.name in seen):
        walker.linear(block, m).register_forward_hook(partial(watch, m.name))
    with torch.enable_grad():
        y = run_block(block, x, walker.block_arguments(x.shape[1])[i], None)
    return torch.autograd.grad(y, x, gradient.to(y.device, y.dtype))[0]


def group_means(x: Tensor, groups: int) -> Tensor:
    """Means over B groups of columns, [..., N] -> [..., B]; group b is N b / B to N (b + 1) / B, rounded down."""
    n = x.shape[-1]
    return torch.stack([x[..., n * b // groups : n * (b + 1) // groups].mean(-1) for b in range(groups)], -1)


def head_gradient(walker: Walker, x: Tensor, error: Callable[[Tensor, slice], Tensor]) -> tuple[Tensor, Tensor]:
    """The gradient of a loss by hidden states behind the last block of one sample, and by the final norm's weights.

    Args:
        walker: over the model.
        x: [1, T, H].
        error: the gradient by logits, float32 [t, V], given these and which positions they are of; may change them.

    Returns:
        ([1, T, H]; [H]).
    """
    norm, weight = walker.output_layer()
    cap = walker.family.logit_softcap(walker.checkpoint.config)
    x = x.detach().to(walker.device).requires_grad_()
    with torch.enable_grad():
        y = norm(x)
    gradient = torch.empty_like(y, dtype=torch.float32)
    for a in range(0, x.shape[1], POSITIONS):
        part = slice(a, a + POSITIONS)
        logits = float32_product(y[0, part].detach(), weight, TABLE_VALUES)
        slope = None
        if cap is not None:
            logits = logits.div_(cap).tanh_()
            slope = 1 - logits.square()
            logits = logits.mul_(cap)
        found = error(logits, part)
        if slope is not None:
            found = found * slope
        gradient[0, part] = (found.to(weight.dtype) @ weight).float()
    front, own = torch.autograd.grad(y, (x, norm.get_parameter("module.weight")), gradient.to(y.dtype))
    return front, own


def log_likelihood_error(tokens: Tensor, generator: torch.Generator | None, logits: Tensor, positions: slice) -> Tensor:
    """The gradient of the sum of -log p by logits, float32 [t, V].

    Args:
        tokens: of the whole sample, int64 [T]; the last one predicts nothing.
        generator: draws labels; None: they are the tokens that follow.
        logits: float32 [t, V].
        positions: of the tokens that predict.
    """
    p = logits.softmax(-1)
    following = tokens[positions.start + 1 : positions.start + 1 + len(p)]
    if generator is not None:
        following = torch.multinomial(p, 1, generator=generator)[: len(following), 0]
    p[len(following) :] = 0
    p[torch.arange(len(following), device=p.device), following] -= 1
    return p
