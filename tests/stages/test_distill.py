"""Distillation of scales and norms: its gradients, what it keeps, and what formats store of it."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from qtool.calibrate import blocks
from qtool.calibrate import hidden as hidden_module
from qtool.checkpoint.open import open_checkpoint
from qtool.errors import PlanError
from qtool.formats._base import Quantized, expand
from qtool.formats._spelling import parse_format
from qtool.models import open_artifact
from qtool.pipeline.prepare import prepare
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.residuals._base import Matrix
from qtool.stages._base import StageTask
from qtool.stages._movable import MovableVector, Scales
from qtool.stages._student import Student, Teacher
from qtool.stages.distill import Distill

RECIPE = """
recipe: 1
name: distilled
calibration: {data: CALIBRATION, samples: 64, length: 32}
layers:
  - {match: lm_head, keep: true}
  - {match: "*.down_proj", weights: q4_k, fallback: q4_1, method: rtn}
  - {match: "*", weights: WEIGHTS, method: rtn, activations: ACTIVATIONS}
finish: FINISH
export: [{to: qtool}]
eval: {text: TEXT, context: 32, chunks: 40}
"""
CPU = torch.device("cpu")


@pytest.fixture
def recipe(texts, tmp_path):
    def write(weights="int3-g32", finish="[]", activations="null"):
        text = RECIPE.replace("WEIGHTS", weights).replace("FINISH", finish).replace("ACTIVATIONS", activations)
        text = text.replace("CALIBRATION", str(texts / "calibration.txt")).replace("TEXT", str(texts / "other.txt"))
        (tmp_path / "distilled.yaml").write_text(text.replace(", activations: null", ""))
        return str(tmp_path / "distilled.yaml")

    return write


def quantized(model, path, out):
    report = run(QuantizeOptions(str(model), path, out, device="cpu", dtype="fp32"))
    return report, open_artifact(str(out))


@pytest.fixture
def task(recipe, tiny_checkpoint, tmp_path):
    """The task of a tiny model, and its folder."""

    def make(name):
        source, path = tiny_checkpoint(name), recipe()
        _, model = quantized(source, path, tmp_path / name)
        job = prepare(str(source), path, device="cpu", dtype="fp32")
        tokens = torch.randint(3, 500, (6, 24), generator=torch.Generator().manual_seed(4))
        original = open_checkpoint(str(source))
        return StageTask(original, original, model, job.plan, tokens, CPU, torch.float32, lambda *_: None), source

    return make


def relaxed(matrix, factor, shift):
    """The matrix with relative changes of scales, and of offsets in scales, differentiable."""
    q = matrix.quantized
    scale, offset = q.format.affine(q.params)
    k, moved = q.codes.shape[1], scale * (1 + factor)
    offset = offset * (1 + factor) if shift is None else offset + scale * shift
    return q.format.levels()[q.codes.long()] * expand(moved, k) + expand(offset, k)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_gradients_are_those_of_the_whole_model(name, task, monkeypatch):
    """Against autograd of transformers' model, whose weights are functions of the same variables."""
    made, source = task(name)
    monkeypatch.setattr(blocks, "BATCH_TOKENS", 48)  # three parts
    student = Student(made, Teacher(made.walker(made.original), made.tokens), scales=True, norms=True)
    part = torch.tensor([1, 2, 4, 5])
    found = student.divergence(part, learn=True)
    original, model = (AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval() for _ in "ab")
    weights, variables = {}, {}
    for module, movable in student.everything().items():
        own = [v.clone().requires_grad_() for v in movable.variables()]
        variables[module] = own
        if isinstance(movable, MovableVector):
            weights[f"{module}.weight"] = movable.values.float() + movable.size * own[0]
        else:
            weights[f"{module}.weight"] = relaxed(movable.matrix, own[0], own[1] if len(own) > 1 else None)
    if name == "qwen3_moe":  # transformers stacks experts
        for i in range(3):
            prefix = f"model.layers.{i}.mlp.experts."
            if f"{prefix}0.down_proj.weight" in weights:
                each = [[weights.pop(f"{prefix}{e}.{r}_proj.weight") for e in range(6)] for r in ("gate", "up", "down")]
                gate, up, down = map(torch.stack, each)
                weights |= {f"{prefix}gate_up_proj": torch.cat([gate, up], 1), f"{prefix}down_proj": down}
    tokens = made.tokens[part]
    logits = torch.func.functional_call(model, weights, (tokens,)).logits
    p = original(tokens).logits.detach().log_softmax(-1)
    loss = (p.exp() * (p - logits.log_softmax(-1))).sum(-1).mean()
    assert found == pytest.approx(float(loss.detach()), rel=1e-3)
    assert found > 1e-3
    loss.backward()
    for module, movable in student.everything().items():
        for mine, wanted in zip(movable.variables(), variables[module], strict=True):
            assert wanted.grad is not None
            size = float(wanted.grad.abs().max())
            assert size > 0
            assert_close(mine.grad, wanted.grad, rtol=5e-3, atol=1e-3 * size, msg=f"{module}")


@pytest.mark.parametrize("label", ["int4-g32", "int4-g32-asym", "q4_k", "q4_1", "nvfp4", "mxfp4", "iq4_nl", "iq2_xs"])
def test_what_moves_stays_on_the_grid_of_its_format(label):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(8, 256, generator=g) * 0.1
    fmt = parse_format(label)
    fmt = fmt.with_largest(float(w.abs().max())) if fmt.needs_largest else fmt
    params = fmt.fit(w)
    quantized = Quantized(fmt.snap(w, params), params, fmt)
    movable = Scales(Matrix(quantized))
    assert torch.equal(movable.value(), quantized.decode())
    gradient = torch.randn(w.shape, generator=g)
    movable.pull(gradient)
    own = [v.clone().requires_grad_() for v in movable.variables()]
    value = relaxed(movable.matrix, own[0], own[1] if len(own) > 1 else None)
    assert_close(value, quantized.decode(), rtol=1e-5, atol=1e-7)
    (value * gradient).sum().backward()
    for mine, wanted in zip(movable.variables(), own, strict=True):
        assert_close(mine.grad, wanted.grad, rtol=1e-4, atol=1e-6)
    movable.factor += 0.3 + 0.7 * torch.rand(movable.factor.shape, generator=g)
    moved = movable.params()
    assert {n: (p.shape, p.dtype) for n, p in moved.items()} == {n: (p.shape, p.dtype) for n, p in params.items()}
    assert torch.equal(movable.value(), fmt.decode(quantized.codes, moved))
    wanted = fmt.affine(params)[0] * (1 + movable.factor)
    before, after = ((fmt.affine(p)[0] - wanted).abs().sum() for p in (params, moved))
    assert after < 0.6 * before


@pytest.mark.parametrize(
    ("weights", "activations", "left"), [("int2-g32", "null", 0.9), ("nvfp4", "nvfp4", 0.96), ("q3_k", "null", 0.9)]
)
def test_divergence_falls_on_a_text_of_its_own(weights, activations, left, recipe, tiny_checkpoint, tmp_path):
    model, finish = tiny_checkpoint("llama"), "[{distill: {epochs: 4, batch: 4, rate: 0.004}}]"
    before, start = quantized(model, recipe(weights, "[]", activations), tmp_path / "start")
    after, found = quantized(model, recipe(weights, finish, activations), tmp_path / "found")
    assert after.evaluations[0].kld_mean < left * before.evaluations[0].kld_mean
    (entry,) = after.finish
    assert entry.about["held out"] < entry.about["held out before"]
    assert entry.about["learned last"] < entry.about["learned first"]
    assert [at.step for at in entry.course] == [0, 1, 2, 3, 4]
    about = entry.about
    assert entry.course[0].held_out == pytest.approx(about["held out before"], rel=1e-5)
    assert min(at.held_out for at in entry.course) == pytest.approx(about["held out"], rel=1e-5)
    assert entry.course[int(about["best epoch"])].held_out == pytest.approx(about["held out"], rel=1e-5)
    for name in found.layers:
        assert torch.equal(found.matrix(name).quantized.codes, start.matrix(name).quantized.codes)
    norm = "model.layers.0.input_layernorm.weight"
    assert found.tensor(norm).dtype == start.tensor(norm).dtype
    assert not torch.equal(found.tensor(norm), start.tensor(norm))


def test_the_start_stays_where_training_only_harms(recipe, tiny_checkpoint, tmp_path):
    model, finish = tiny_checkpoint("llama"), "[{distill: {epochs: 1, batch: 2, rate: 0.1}}]"
    _, start = quantized(model, recipe(), tmp_path / "start")
    report, found = quantized(model, recipe(finish=finish), tmp_path / "found")
    (entry,) = report.finish
    assert entry.changed == 0 and entry.about["best epoch"] == 0
    assert entry.about["held out"] == entry.about["held out before"]
    for name in found.names():
        assert torch.equal(found.tensor(name), start.tensor(name))


def test_same_task_same_result_whether_blocks_are_kept_or_not(task, monkeypatch):
    made, _ = task("llama")
    stage = Distill(epochs=2, batch=3, rate=0.002)
    kept = stage.run(made)
    monkeypatch.setattr(hidden_module, "MEMORY_LIMIT", 0)
    again = stage.run(made)
    assert again.about == kept.about
    assert kept.about["best epoch"] > 0
    for module, params in kept.params.items():
        assert all(torch.equal(p, again.params[module][name]) for name, p in params.items())
    assert kept.tensors.keys() == again.tensors.keys() >= {"model.norm.weight"}
    assert all(torch.equal(t, again.tensors[name]) for name, t in kept.tensors.items())


def test_what_is_said_of_epochs_is_what_they_computed(task, monkeypatch):
    """Each call is written down by itself, and means are taken of that."""
    made, _ = task("llama")
    own, calls = Student.divergence, []

    def heard(self, samples, learn=False, **more):
        calls.append((learn, len(samples), own(self, samples, learn, **more)))
        return calls[-1][2]

    monkeypatch.setattr(Student, "divergence", heard)
    course = Distill(epochs=3, batch=3, rate=0.002).run(made).course
    wanted, count, total = [], 0, 0.0
    for learn, samples, loss in calls:
        if learn:
            count, total = count + samples, total + samples * loss
        else:
            wanted.append((len(wanted), total / count if count else None, loss))
            count, total = 0, 0.0
    assert len(course) == len(wanted) == 4
    assert course[0] == wanted[0] == (0, None, calls[0][2])
    assert list(course[1:]) == [pytest.approx(look, rel=1e-9) for look in wanted[1:]]


def test_nothing_that_moves_is_refused(recipe, tiny_checkpoint):
    path = recipe("int8-tensor", "[{distill: {norms: false}}]")
    overrides = ("layers.1.weights=int8-tensor",)
    with pytest.raises(PlanError, match="nothing moves"):
        prepare(str(tiny_checkpoint("llama")), path, overrides)


@pytest.mark.parametrize("way", ["gumbel", "sigmoid"])
def test_gradients_of_codes_are_finite_differences_of_the_whole_model(way, task):
    """Noise is the same forth and back; the direction is the gradient's, along which single precision is enough."""
    made, _ = task("llama")
    student = Student(made, Teacher(made.walker(made.original), made.tokens), scales=False, norms=False, rounding=way)
    part = torch.tensor([1, 2, 4, 5])
    found = student.divergence(part, learn=True, progress=0.3, seed=9)
    leaves = [v for movable in student.everything().values() for v in movable.decisive()]
    slopes = [v.grad.clone() for v in leaves]
    size = sum(float(g.double().square().sum()) for g in slopes)
    step, losses = 0.02 * found / size, []
    for sign in (1, -1):
        for v, g in zip(leaves, slopes, strict=True):
            v.data += sign * step * g
        losses.append(student.divergence(part, learn=True, progress=0.3, seed=9))
        for v, g in zip(leaves, slopes, strict=True):
            v.data -= sign * step * g
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(size, rel=0.005)
    assert (
        student.divergence(part, learn=True, progress=0.3, seed=10) != pytest.approx(found, rel=1e-5)
        or way == "sigmoid"
    )
    hard = {name: m.value() for name, m in student.everything().items()}
    assert student.divergence(part) > 0
    for name, movable in student.everything().items():
        assert not torch.equal(movable.value(), hard[name])  # as files hold it, and as it is trained
        assert torch.equal(movable.value(), made.model.matrix(name).decode())


def test_codes_that_learn_as_well_come_closer(recipe, tiny_checkpoint, tmp_path):
    """Than scales and norms alone; what the artifact's reader decodes was evaluated."""
    model, ways = tiny_checkpoint("llama"), ("{}", "{rounding: gumbel, rounding_rate: 0.05}")
    finishes = [f"[{{distill: {{epochs: 6, batch: 4, rate: 0.004, {way[1:-1]}}}}}]" for way in ways]
    scales, _ = quantized(model, recipe("int2-g32", finishes[0]), tmp_path / "scales")
    both, found = quantized(model, recipe("int2-g32", finishes[1]), tmp_path / "both")
    assert both.evaluations[0].kld_mean < 0.8 * scales.evaluations[0].kld_mean
    assert both.artifacts[0].verified
    _, start = quantized(model, recipe("int2-g32"), tmp_path / "start")
    changed = [
        (found.matrix(m).quantized.codes != start.matrix(m).quantized.codes).float().mean() for m in found.layers
    ]
    assert 0.01 < float(torch.stack(changed).mean()) < 0.5
