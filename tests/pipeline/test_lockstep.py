"""Several recipes solved side by side: bytes and reports as alone, and what is found once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from qtool.calibrate.reference import Reference
from qtool.calibrate.walker import Walker
from qtool.errors import StorageError
from qtool.evaluate import run as evaluating
from qtool.pipeline import family, lockstep, quantize, tokens
from qtool.pipeline.quantize import QuantizeOptions
from tests.pipeline.test_family import weights_of

BODY = """
recipe: 1
name: {name}
calibration: {{data: builtin, samples: 12, length: 64{more}}}
method: {{gptq: {{drift: {drift}}}}}
layers:
  - {{match: lm_head, keep: true}}
  - {{match: "*", weights: {kind}}}
export: [{{to: qtool}}]
eval: {{text: {text}, context: 64, chunks: 2}}
"""


@pytest.fixture
def options(tiny_checkpoint, tmp_path):
    return QuantizeOptions(str(tiny_checkpoint("llama")), "", tmp_path / "out", device="cpu", dtype="fp32")


@pytest.fixture
def written(tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)

    def write(name, kind, drift=0.75, more=""):
        file = tmp_path / f"{name}.yaml"
        file.write_text(BODY.format(name=name, kind=kind, drift=drift, more=more, text=tmp_path / "text.txt"))
        return str(file)

    return write


@pytest.fixture
def three(written):
    return [written("four", "int4-g32"), written("eight", "int8-channel"), written("plain", "int3-g32", drift=0)]


def told(report):
    """What a report says, without times."""
    layers = [layer.model_copy(update={"seconds": 0}) for layer in report.layers]
    return layers, [e.model_dump() for e in report.evaluations], report.calibration


def test_three_are_as_each_alone(options, three, tmp_path, monkeypatch):
    seen, compute, load, walk = Counter(), Reference.compute, tokens.load_tokens, evaluating.walk

    def computed(self, part):
        seen["unquantized", self.index, part.start] += 1
        return compute(self, part)

    def loaded(*rest):
        seen["tokens"] += 1
        return load(*rest)

    def walked(model, **rest):
        seen["evaluated"] += 1
        return walk(model, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "walk", walked)
        patch.setattr(Reference, "compute", computed)
        patch.setattr(tokens, "load_tokens", loaded)
        reports = family.run(options, three)
    assert seen.pop("evaluated") == 4  # three results, and once the model
    assert set(seen.values()) == {1}
    assert {key[1] for key in seen if key[0] == "unquantized"} == {0, 1}
    for name, recipe, report in zip(("four", "eight", "plain"), three, reports, strict=True):
        alone = quantize.run(replace(options, recipe=recipe, out=tmp_path / name))
        assert weights_of(options.out / name) == weights_of(tmp_path / name) != {}
        assert told(report) == told(alone)
        assert report.stages[0].name == lockstep.STAGE
        assert report.run == alone.run


def test_an_interrupted_walk_goes_on(options, three, tmp_path, monkeypatch):
    """Each recipe keeps what it has, also where they have come to different blocks."""
    two = three[:2]
    real, solved = lockstep.Joined.proceed, []

    def proceed(self):
        if len(solved) == 3:
            raise KeyboardInterrupt
        real(self)
        solved.append(self.options.out.name)

    with monkeypatch.context() as patch:
        patch.setattr(lockstep.Joined, "proceed", proceed)
        with pytest.raises(KeyboardInterrupt):
            family.run(options, two)
    assert Counter(solved) == {"four": 2, "eight": 1}
    reports = family.run(options, two)
    for name, recipe, report in zip(("four", "eight"), two, reports, strict=True):
        alone = quantize.run(replace(options, recipe=recipe, out=tmp_path / name))
        assert weights_of(options.out / name) == weights_of(tmp_path / name) != {}
        assert told(report) == told(alone)
    monkeypatch.setattr(lockstep.Joined, "proceed", None)
    assert [report.run for report in family.run(options, two)] == [report.run for report in reports]
    with pytest.raises(StorageError, match="holds an earlier output"):
        family.run(replace(options, seed=5), two)


def test_what_is_measured_on_the_original_is_measured_once(options, written, tmp_path, monkeypatch):
    """Where no recipe looks behind its own quantized layers, and both want the same statistics."""
    original = ", propagate: float"
    recipes = [written("four", "int4-g32", more=original), written("eight", "int8-channel", more=original)]
    recipes.append(written("drifting", "int3-g32"))
    steps, seen = Walker.steps, Counter()

    def counted(self, block, i, *rest):
        seen[i] += 1
        return steps(self, block, i, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Walker, "steps", counted)
        reports = family.run(options, recipes)
    assert seen == {0: 2, 1: 2}
    for name, recipe, report in zip(("four", "eight", "drifting"), recipes, reports, strict=True):
        alone = quantize.run(replace(options, recipe=recipe, out=tmp_path / name))
        assert weights_of(options.out / name) == weights_of(tmp_path / name) != {}
        assert told(report) == told(alone)
