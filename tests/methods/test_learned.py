"""Learned rounding: what a step does, what is kept, and what it wins, on a block of two layers."""

import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch

from qtool.formats._base import Quantized, expand
from qtool.formats._spelling import parse_format
from qtool.methods import learned
from qtool.methods._base import BlockTask, Solution
from qtool.methods._joined import joined
from qtool.methods._relaxed import ShiftedPlaces
from qtool.methods.learned import Errors, Gradients, Learned, relative_error

HIDDEN, WIDE, SAMPLES, TOKENS = 64, 128, 64, 32


class Held:
    """Hidden states in memory."""

    def __init__(self, values):
        self.values, self.samples = values, len(values)

    def __getitem__(self, part):
        return self.values[part]


def held_out(task, weights, part):
    return Errors(task, Learned()).held_out(weights, part)


def forward(x, weights, beside=None):
    """A gated block with a residual stream."""
    return x + torch.nn.functional.silu(x @ weights["up"].T) @ weights["down"].T


def make_task(label: str, seed: int = 0) -> BlockTask:
    """A task whose start is rounding to nearest, and whose inputs have drifted."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, TOKENS, HIDDEN, generator=g) * torch.linspace(0.2, 2, HIDDEN)
    x = x @ (torch.eye(HIDDEN) + 0.3 * torch.randn(HIDDEN, HIDDEN, generator=g) / 8)
    weights = {"up": torch.randn(WIDE, HIDDEN, generator=g) / 8, "down": torch.randn(HIDDEN, WIDE, generator=g) / 8}
    fmt = parse_format(label)
    formats = {name: fmt.with_largest(float(w.abs().max())) for name, w in weights.items()}
    found = {}
    for name, w in weights.items():
        params = formats[name].fit(w)
        found[name] = Solution(Quantized(formats[name].snap(w, params), params, formats[name]))
    drifted = x + 0.02 * torch.randn(x.shape, generator=g)
    return BlockTask(
        block=3,
        plans={},
        formats=formats,
        weights=weights,
        found=found,
        stats={},
        inputs=Held(drifted),
        original=Held(x),
        targets=Held(forward(x, weights)),
        forward=forward,
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=5,
    )


def mean_error(task, weights, part) -> float:
    """Of a block's outputs, relative to tokens' energies."""
    out, target = forward(task.inputs[part], weights), task.targets[part]
    return float(((out - target).square().sum(-1) / target.square().sum(-1)).mean())


def textbook(task: BlockTask, steps: int, batch: int, holdout: float) -> tuple[dict[str, torch.Tensor], list]:
    """AutoRound's loop for symmetric integers of 3 bits, its variables unbounded; the best of eight looks at codes.

    Returns:
        (codes; steps done, errors on some samples of the training and on those held out, from the start on).
    """
    train, unseen = task.split(holdout)
    best, kept, looks = torch.inf, {}, []

    def look(step, weights):
        some = train[: -(-len(unseen) // 2)]
        looks.append((step, mean_error(task, weights, some), mean_error(task, weights, unseen)))
        return looks[-1][2]

    look(0, {name: solution.quantized.decode() for name, solution in task.found.items()})
    generator = torch.Generator().manual_seed(task.seed + task.block)
    v, scale = {}, {}
    for name, w in task.weights.items():
        quantized = task.found[name].quantized
        scale[name] = expand(quantized.format.affine(quantized.params)[0], w.shape[1])
        place = w / scale[name]
        level = quantized.codes - 4.0
        v[name] = torch.where(place.round() == level, torch.zeros_like(w), (level - place).clamp(-9, 9))
        inside = (place + v[name]).clamp(level - 0.49, level + 0.49)
        v[name] = inside - place
    for i in range(steps):
        for value in v.values():
            value.requires_grad_()
        part = train[torch.randperm(len(train), generator=generator)[:batch]]
        hats = {}
        for name, w in task.weights.items():
            y = w / scale[name] + v[name]
            free = y.clamp(-4.5, 3.5)
            hats[name] = scale[name] * (free + (y.detach().round().clamp(-4, 3) - free.detach()))
        out, target = forward(task.inputs[part], hats), task.targets[part]
        loss = ((out - target).square().sum(-1) / target.square().sum(-1)).mean()
        grads = torch.autograd.grad(loss, list(v.values()))
        with torch.no_grad():
            rate = (1 / steps) * (1 - i / steps)
            v = {name: value - rate * grad.sign() for (name, value), grad in zip(v.items(), grads, strict=True)}
        if (i + 1) % (steps // 8) == 0:
            levels = {name: (w / scale[name] + v[name]).round().clamp(-4, 3) for name, w in task.weights.items()}
            error = look(i + 1, {name: scale[name] * level for name, level in levels.items()})
            if error < best:
                best, kept = error, {name: level.add(4).to(torch.uint8) for name, level in levels.items()}
    return kept, looks


def test_codes_and_what_is_said_of_the_training_are_those_of_the_textbook_loop():
    task = make_task("int3-g32")  # few steps: the sign of a gradient near zero is up to rounding, and decides the rest
    said = []
    task = replace(task, note=lambda losses, course: said.append((losses, course)))
    found = Learned(steps=8, batch=6, holdout=0.25).solve_block(task)
    kept, looks = textbook(task, 8, 6, 0.25)
    for name, codes in kept.items():
        assert (task.found[name].quantized.codes != codes).sum() > 500
        assert (found[name].quantized.codes != codes).sum() <= 2
    ((losses, course),) = said
    assert [step for step, *_ in course] == list(range(9))
    assert [pair for _, *pair in course] == [pytest.approx(pair, rel=1e-3) for _, *pair in looks]
    assert looks[0][1] > 1.01 * looks[-1][1] and looks[0][2] > 1.01 * looks[-1][2]
    best = min(course, key=lambda look: look[2])
    ends = [losses[f"{which} {when}"] for which in ("training", "held out") for when in ("before", "after")]
    assert ends == [course[0][1], best[1], course[0][2], best[2]]


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize(
    ("label", "won"),
    [("int2-g32", 0.72), ("int3-g32", 0.83), ("int4-g32-asym", 0.88), ("nvfp4", 0.9), ("mxfp4", 0.93), ("q4_0", 0.93)],
)
def test_unseen_samples_are_closer_than_with_the_start(label, won, scales):
    task = make_task(label)
    _, unseen = task.split(0.25)
    found = Learned(steps=80, batch=16, holdout=0.25, scales=scales).solve_block(task)
    start = held_out(task, {name: s.quantized.decode() for name, s in task.found.items()}, unseen)
    end = held_out(task, {name: s.quantized.decode() for name, s in found.items()}, unseen)
    assert end < won * start


def test_the_start_stays_where_training_only_harms():
    task = make_task("int4-g32")
    assert Learned(steps=8, batch=2, holdout=0.25, rate=1.0).solve_block(task) == {}


def test_same_task_same_codes():
    found = [Learned(steps=10, batch=4).solve_block(make_task("int3-g32")) for _ in range(2)]
    for name, solution in found[0].items():
        assert torch.equal(solution.quantized.codes, found[1][name].quantized.codes)


@pytest.mark.parametrize("scales", [False, True])
def test_nothing_of_a_trained_block_is_left(scales, monkeypatch):
    """What refers to itself would stay until somebody looks for such things, block after block."""
    made = []

    class Watched(Gradients):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(weakref.ref(self))

    monkeypatch.setattr(learned, "Gradients", Watched)
    gc.disable()
    try:
        Learned(steps=2, batch=2, scales=scales).solve_block(make_task("int3-g32"))
        assert [ref() for ref in made] == [None]
    finally:
        gc.enable()


def test_errors_count_relative_to_a_tokens_energy():
    target = torch.tensor([[[3.0, 4.0]], [[30.0, 40.0]]])
    output = torch.tensor([[[3.0, 5.0]], [[30.0, 40.0]]])
    assert float(relative_error(output, target)) == pytest.approx((1 / 25) / 2)
    assert float(relative_error(output, target, trim=0.25)) == 0


def test_errors_count_by_the_weights_of_tokens():
    target = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[30.0, 40.0], [0.0, 2.0]]])
    output = torch.tensor([[[3.0, 5.0], [1.0, 2.0]], [[30.0, 40.0], [0.0, 0.0]]])
    weights = torch.tensor([[2.0, 1.0], [0.1, 0.5]])
    error, energy = 2 * 1 + 1 * 4 + 0.5 * 4, 2 * 25 + 1 * 1 + 0.1 * 2500 + 0.5 * 4
    assert float(relative_error(output, target, weights=weights)) == pytest.approx(error / energy)


def test_training_follows_the_weights_of_tokens():
    """Codes that are learned for a half of the tokens serve that half best, on samples that are not seen."""
    task = make_task("int2-g32")
    first = torch.arange(TOKENS) < TOKENS // 2
    kinds = [torch.where(half, 1.0, 0.01).expand(SAMPLES, -1) for half in (first, ~first)]
    turned = task.inputs.values.clone()
    turned[:, ~first] = turned[:, ~first].flip(-1)  # the other half reads other channels
    task = replace(task, inputs=Held(turned), original=Held(turned), targets=Held(forward(turned, task.weights)))
    weighed = [replace(task, token_weights=weights) for weights in kinds]
    found = [Learned(steps=40, batch=16, holdout=0.25).solve_block(t) for t in weighed]
    decoded = [{name: s.quantized.decode() for name, s in solutions.items()} for solutions in found]
    _, unseen = task.split(0.25)
    errors = [[held_out(t, weights, unseen) for weights in decoded] for t in weighed]
    assert errors[0][0] < 0.9 * errors[0][1]
    assert errors[1][1] < 0.9 * errors[1][0]


@pytest.mark.parametrize(
    ("settings", "won"),
    [
        ({"rounding": "gumbel"}, 0.65),
        ({"rounding": "gumbel", "scales": True, "optimizer": "adam", "rate": 0.05}, 0.5),
        ({"rounding": "gumbel", "scales": True, "optimizer": "lion"}, 0.55),
        ({"rounding": "sigmoid", "optimizer": "adam", "rate": 0.1}, 0.78),
        ({"rounding": "weights", "scales": True, "optimizer": "adam", "rate": 0.02}, 0.7),
        ({"rounding": "divide", "optimizer": "adam", "rate": 0.02, "scales": True}, 0.65),
        ({"rounding": "low-rank", "optimizer": "adam", "rate": 0.02, "scales": True}, 0.75),
        ({"rounding": "none", "optimizer": "adam", "scales": True, "scale_rate": 0.003}, 0.985),
        ({"schedule": "cosine", "target": "present"}, 0.8),
        ({"loss": "plain", "optimizer": "lion"}, 0.8),
    ],
)
def test_every_way_gains_on_unseen_samples(settings, won):
    task = make_task("int2-g32")
    _, unseen = task.split(0.25)
    found = Learned(steps=80, batch=16, holdout=0.25, **settings).solve_block(task)
    start, end = ({n: s.quantized.decode() for n, s in part.items()} for part in (task.found, {**task.found, **found}))
    assert held_out(task, end, unseen) < won * held_out(task, start, unseen)


def test_targets_are_of_the_original_stream_or_of_the_inputs_that_are():
    task = make_task("int2-g32")
    part = torch.tensor([3, 5])
    original, present = (Errors(task, Learned(target=target)).targets(part) for target in ("original", "present"))
    assert torch.equal(original, forward(task.original[part], task.weights))
    assert torch.equal(present, forward(task.inputs[part], task.weights))
    assert not torch.allclose(original, present)


def test_plain_errors_are_relative_to_all_tokens_together():
    task = make_task("int2-g32")
    part, weights = torch.tensor([3, 5]), {n: s.quantized.decode() for n, s in task.found.items()}
    output, target = forward(task.inputs[part], weights), task.targets[part]
    wanted = (output - target).square().sum() / target.square().sum()
    errors = Errors(task, Learned(loss="plain"))
    assert float(errors(weights, errors.given(part))) == pytest.approx(float(wanted), rel=1e-5)


def test_nothing_won_for_long_ends_the_training(monkeypatch):
    looks = []
    held = Errors.held_out
    monkeypatch.setattr(Errors, "held_out", lambda self, *a: looks.append(1) or held(self, *a))
    Learned(steps=80, batch=2, holdout=0.25, rate=1.0, patience=2).solve_block(make_task("int4-g32"))
    assert len(looks) == 2 * (1 + 2)  # before, and twice in vain; on samples of both kinds


def test_lion_is_the_sign_of_a_mean_over_steps():
    from qtool.methods._optimizers import optimizer

    x, mean, by_hand = torch.tensor([1.0, -2.0], requires_grad=True), [0.0, 0.0], [1.0, -2.0]
    step = optimizer("lion", [(x, 0.1)])
    for gradients, share in (([1.0, -0.5], 1.0), ([-0.05, 2.0], 0.5), ([-3.0, 2.0], 0.25)):
        x.grad = torch.tensor(gradients)
        step(share)
        for j, g in enumerate(gradients):
            way = 0.9 * mean[j] + 0.1 * g
            by_hand[j] -= 0.1 * share * (1 if way > 0 else -1)
            mean[j] = 0.99 * mean[j] + 0.01 * g
        assert x.tolist() == pytest.approx(by_hand)
        assert x.grad is None


def gradients(task, part, scales, several_at_once=False, **settings):
    """(gradients by variables when steps are taken; how many samples went through the block at a time)."""
    seen = []

    def counted(x, weights, beside):
        seen.append(len(x))
        return forward(x, weights)

    watched = replace(task, forward=counted)
    variables = joined(ShiftedPlaces, task.weights, task.found, scales, torch.Generator())
    leaves = [[leaf for leaf, _ in several.relaxed.leaves()] for several in variables]
    taken = []

    def step(number):
        if not several_at_once:
            assert all(leaf.grad is None for own in leaves[:number] + leaves[number + 1 :] for leaf in own)
        taken.extend(leaf.grad for leaf in leaves[number])
        for leaf in leaves[number]:
            leaf.grad = None

    for several in variables:
        several.small = several_at_once
    errors = Errors(watched, Learned(**settings))
    Gradients(errors, variables, 0.0)(part, 0.5, [partial(step, n) for n in range(len(variables))])
    assert len(variables) == 2
    return taken, seen


@pytest.mark.parametrize("scales", [False, True])
def test_a_step_whose_samples_come_in_pieces_is_that_of_all_of_them(scales, monkeypatch):
    task, part = make_task("int3-g32"), torch.tensor([3, 1, 4, 9, 5, 2, 6])
    whole, seen = gradients(task, part, scales, several_at_once=True)
    assert seen == [7]
    monkeypatch.setattr(learned, "PIECE", 2 * TOKENS)
    pieces, seen = gradients(task, part, scales)
    assert seen == [2, 2, 2, 1]
    for a, b in zip(whole, pieces, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(a.abs().max()))
    assert gradients(task, part, scales, loss="plain")[1] == [7]  # tokens of one are weighed against those of others
    assert gradients(task, part, scales, trim=0.01)[1] == [7]
    assert gradients(replace(task, token_weights=torch.ones(SAMPLES, TOKENS)), part, scales)[1] == [7]
