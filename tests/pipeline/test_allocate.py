"""Budgets from recipe to file: sizes, scores, comparison with uniform plans, resuming, errors."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import safe_open

from qtool import registry
from qtool.allocate.decisions import applied, decisions, file_sizes, picked
from qtool.allocate.fit import fit, smallest
from qtool.allocate.knapsack import Group, total
from qtool.calibrate.inputs import quantize_tokens
from qtool.calibrate.walker import Walker
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import CheckpointError, PlanError, RecipeError, StorageError, UsageError, VerifyError
from qtool.formats._spelling import parse_format
from qtool.methods.rtn import RTN
from qtool.pipeline import sensitivity, trial
from qtool.pipeline.allocator import Allocator
from qtool.pipeline.budget import divided
from qtool.pipeline.curve import curve
from qtool.pipeline.events import silent
from qtool.pipeline.held_out import tokens_for
from qtool.pipeline.prepare import prepare
from qtool.pipeline.quantize import QuantizeOptions, refuse_too_large, run
from qtool.pipeline.scores import ScoreFile
from qtool.pipeline.sensitivity import Pricing
from qtool.plan import Planned
from qtool.report.model import AllocationEntry, ArtifactEntry, FileEntry

BODY = """
recipe: 1
name: fit
calibration: {data: builtin, samples: 4, length: 64}
layers:
  - {match: "role:embedding", weights: q8_0}
  - {match: "*", weights: q8_0}
budget: {formats: [q4_0, q5_0, q8_0], samples: 3, held_out: 4}
export: [{to: gguf}]
"""
MIXED = """
recipe: 1
name: mixed
calibration: {data: builtin, samples: 4, length: 64}
layers:
  - {match: lm_head, keep: true}
  - {match: "*", weights: int8-channel, activations: int8-token}
budget:
  formats: [int4-g32, {weights: int8-channel, activations: int8-token}, {weights: fp8-channel, activations: fp8-tensor}]
  samples: 3
  held_out: 4
export: [{to: compressed-tensors}]
"""


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budgets")
    for name, text in (("fit", BODY), ("mixed", MIXED)):
        (folder / f"{name}.yaml").write_text(text)
    return {name: str(folder / f"{name}.yaml") for name in ("fit", "mixed")}


def opened(folder, recipe, *overrides, **limit):
    return prepare(str(folder), recipe, overrides, device="cpu", dtype="fp32", budget=limit)


def span(job):
    """Bytes of the smallest file that a budget allows, and of the largest."""
    allocator = Allocator(job, {"base_model": "llama", "recipe_name": "fit"})
    ends = ([int(pick(sizes)) for sizes in allocator.bytes] for pick in (np.argmin, np.argmax))
    return [allocator.size(tuple(chosen)) for chosen in ends]


def half(folder, written):
    """A budget in the middle."""
    return sum(span(opened(folder, written["fit"]))) // 2


def tensors_of(folder):
    names = (".gguf", ".safetensors", ".json")
    return sum(p.stat().st_size for p in folder.iterdir() if p.suffix in names[:2] or "index.json" in p.name)


CASES = [("fit", family) for family in ("llama", "llama-tied", "qwen3", "gemma2", "phi3", "smollm3", "qwen3_moe")]
CASES += [("mixed", family) for family in ("llama", "qwen2", "qwen3_moe")]


@pytest.mark.parametrize(("recipe", "family"), CASES)
def test_no_plan_is_larger_than_its_budget(recipe, family, written, tiny_checkpoint):
    """20 random budgets for each of 10 models: the plan that is found fits, and no cheaper one by a swap does."""
    rng = np.random.default_rng(len(family))
    job = opened(tiny_checkpoint(family), written[recipe])
    (artifact,) = job.artifacts.values()
    open_ = decisions(job.plan, job.checkpoint, artifact)
    plans = [p for d in open_ for o in d.options for p in o]
    scores = {p.module.name: {} for p in plans}
    for p in plans:
        scores[p.module.name][p.label] = float(rng.lognormal(0, 2))
    known = {}

    def size(chosen):
        if chosen not in known:
            model = Planned(job.checkpoint, applied(job.plan, picked(open_, chosen)))
            known[chosen] = artifact.footprint(model, {"base_model": "m", "recipe_name": "r"}).total
        return known[chosen]

    groups = [Group(s, d.costs(scores)) for s, d in zip(file_sizes(open_, size), open_, strict=True)]
    least, most = size(smallest(groups)), size(tuple(int(g.sizes.argmax()) for g in groups))
    assert fit(groups, least - 1, size) is None
    for limit in (least, most, *rng.integers(least, most, 18).tolist()):
        chosen = fit(groups, limit, size)
        assert size(chosen) <= limit
        for i, j in itertools.product(range(len(groups)), range(3)):
            if j < len(groups[i].sizes):
                other = (*chosen[:i], j, *chosen[i + 1 :])
                assert size(other) > limit or total(groups, other) >= total(groups, chosen) * (1 - 1e-9)


@pytest.mark.parametrize(("recipe", "share"), [("fit", 0.3), ("fit", 0.8), ("mixed", 0.5)])
def test_the_emitted_file_fits(recipe, share, written, tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("llama-tied" if recipe == "fit" else "llama")
    least, most = span(opened(folder, written[recipe]))
    limit = int(least + share * (most - least))
    out = tmp_path / "out"
    options = QuantizeOptions(str(folder), written[recipe], out, device="cpu", dtype="fp32", limit_of={"size": limit})
    report = run(options)
    assert report.allocation.limit == limit
    assert tensors_of(out) == report.allocation.nbytes <= limit
    assert report.allocation.nbytes > limit - 0.15 * (most - least)
    assert len({e.format for e in report.layers}) > 1
    assert not (tmp_path / "out.scores.safetensors").exists()
    assert f"{report.allocation.nbytes:,} bytes" in (out / "report.md").read_text()
    assert "uniform plan" in (out / "report.html").read_text()


def test_bits_are_those_of_the_whole_file(written, tiny_checkpoint, tmp_path):
    job, allocation = divided(opened(tiny_checkpoint("llama"), written["fit"], bits=9.5), None, silent)
    numbers = sum(
        job.checkpoint.info(n).nbytes // job.checkpoint.info(n).dtype.itemsize for n in job.checkpoint.names()
    )
    assert allocation.limit == int(9.5 * numbers / 8)
    assert allocation.wanted == "9.5 bits per weight"


@pytest.mark.parametrize("recipe", ["fit", "mixed"])
def test_costs_are_those_of_a_slow_loop(recipe, written, tiny_checkpoint):
    job = opened(tiny_checkpoint("llama"), written[recipe])
    open_ = decisions(job.plan, job.checkpoint, next(iter(job.artifacts.values())))
    tokens, _ = tokens_for(job)
    pricing = Pricing(job, open_, tokens)
    found = pricing.run(silent)
    from qtool.allocate.slopes import Slopes

    slopes = Slopes(Walker(job.checkpoint, job.device, job.dtype), tokens, 0)
    seen = {name: s for _, block in slopes.blocks() for name, s in block.items()}
    name, label = ("model.layers.1.mlp.up_proj", "q4_0" if recipe == "fit" else "int8-channel with int8-token inputs")
    x, squares = seen[name].x.double(), seen[name].squares.double()
    w = job.checkpoint.tensor(f"{name}.weight").float()
    importance = x.float().square().mean(0)
    fmt = parse_format(label.split()[0])
    params = fmt.fit(w, importance)
    w_hat = fmt.decode(fmt.snap(w, params, importance), params).double()
    x_hat = x if recipe == "fit" else quantize_tokens(x.float(), parse_format("int8-token")).double()
    cost = 0.0
    for t in range(len(x)):
        error = w.double() @ x[t] - w_hat @ x_hat[t]
        cost += 0.5 * float((squares[t] * error * error).sum())
    assert found.costs[name][label] == pytest.approx(cost / tokens.numel(), rel=1e-4)


def test_some_rows_stand_for_all(written, tiny_checkpoint, monkeypatch):
    """Costs by 24 rows of each matrix against those by all of them, of which some have 512."""
    job = opened(tiny_checkpoint("llama-tied"), written["fit"])
    open_ = decisions(job.plan, job.checkpoint, next(iter(job.artifacts.values())))
    tokens, _ = tokens_for(job)
    found = []
    for rows in (10**6, 24):
        monkeypatch.setattr(sensitivity, "ROWS", rows)
        found.append(Pricing(job, open_, tokens).run(silent).costs)
    whole, part = found
    ratios = np.array([part[name][label] / cost for name, own in whole.items() for label, cost in own.items()])
    assert 0 < np.abs(ratios - 1).max() < 0.4
    assert ratios.mean() == pytest.approx(1, abs=0.05)


def test_the_cost_of_an_embedding_and_of_a_head(written, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(sensitivity, "ROWS", 10**6)
    job = opened(tiny_checkpoint("llama-tied"), written["fit"])
    open_ = decisions(job.plan, job.checkpoint, next(iter(job.artifacts.values())))
    tokens, _ = tokens_for(job)
    pricing = Pricing(job, open_, tokens)
    found = pricing.run(silent)
    from qtool.allocate.slopes import Slopes

    slopes = Slopes(Walker(job.checkpoint, job.device, job.dtype), tokens, 0)
    list(slopes.blocks())
    w = job.checkpoint.tensor("model.embed_tokens.weight").float()
    fmt = parse_format("q4_0")
    error = (w - RTN().solve(w, None, fmt).quantized.decode()).double()
    seen, cost = slopes.head.seen(torch.arange(len(w))), 0.0
    for t, token in enumerate(tokens.flatten().tolist()):
        cost += 0.5 * float((seen.squares[t].double() * (error @ seen.x[t].double()).square()).sum())
        cost += 0.5 * float((slopes.embedded.flatten(0, 1)[t].double() * error[token].square()).sum())
    assert found.costs["model.embed_tokens"]["q4_0"] == pytest.approx(cost / tokens.numel(), rel=1e-3)


def test_held_out_samples_are_in_no_other_use(written, tiny_checkpoint):
    from qtool.calibrate.tokens import load_tokens

    job = opened(tiny_checkpoint("llama"), written["fit"], "method=gptq")
    used = load_tokens(job.plan.recipe.calibration, job.original)
    scored, held_out = tokens_for(job)
    assert (len(used), len(scored), len(held_out)) == (4, 3, 4)
    others = {row.numpy().tobytes() for row in torch.cat([used, scored])}
    assert not others & {row.numpy().tobytes() for row in held_out}


def test_divergence_of_a_trial_is_that_of_the_written_file(written, tiny_checkpoint, tmp_path):
    """With a method that is rounding, the trial is the truth."""
    from qtool.models import open_artifact

    folder = tiny_checkpoint("llama")
    overrides, limit = ("method={rtn: {importance: true}}",), half(folder, written)
    options = QuantizeOptions(
        str(folder),
        written["fit"],
        tmp_path / "out",
        overrides,
        "cpu",
        "fp32",
        limit_of={"size": limit},
    )
    report = run(options)
    _, held_out = tokens_for(opened(folder, written["fit"], *overrides))
    model = open_artifact(next((tmp_path / "out").glob("*.gguf")))
    found = trial.Trials(HFCheckpoint(folder), held_out, torch.device("cpu")).of(model)
    assert report.allocation.kld == pytest.approx(found.mean, rel=0.05)  # importances are of other samples
    assert found.mean > 1e-4


def test_a_uniform_plan_that_is_better_is_taken(written, tiny_checkpoint, monkeypatch):
    folder = tiny_checkpoint("llama")
    job = opened(folder, written["fit"], size=half(folder, written))
    _, won = divided(job, None, silent)
    assert not won.fell_back
    assert won.kld <= won.uniform_kld

    def prefers_uniform(self, model):
        return trial.Divergence((0.1 if len({p.format for p in model.plans.values()}) == 1 else 0.2,) * 4)

    monkeypatch.setattr(trial.Trials, "of", prefers_uniform)
    decided, lost = divided(job, None, silent)
    assert lost.fell_back
    assert (lost.kld, lost.uniform_kld) == (0.1, 0.1)
    assert lost.uniform.endswith("for all layers")
    assert lost.nbytes == lost.uniform_nbytes <= lost.limit
    assert len({p.format for p in decided.plan.layers if p.format}) == 1


def test_scores_are_measured_once(written, tiny_checkpoint, tmp_path, monkeypatch):
    folder, file = tiny_checkpoint("llama"), tmp_path / "scores"
    first, one = divided(opened(folder, written["fit"], size=half(folder, written)), file, silent)
    monkeypatch.setattr(Pricing, "run", None)
    monkeypatch.setattr(trial.Trials, "of", None)
    again, same = divided(opened(folder, written["fit"], size=half(folder, written)), file, silent)
    assert (again.plan, same) == (first.plan, one)
    with safe_open(file, "pt") as content:
        assert "model.layers.0.attn_in" in set(content.keys())
    with pytest.raises(CheckpointError, match="measured on something else"):
        divided(opened(tiny_checkpoint("llama-tied"), written["fit"], bits=12), file, silent)
    with pytest.raises(StorageError, match=f"cannot write {file}/below"):  # before anything is measured
        divided(opened(folder, written["fit"], bits=12), file / "below", silent)


def test_scores_of_another_program_are_not_taken_over(written, tiny_checkpoint, tmp_path, monkeypatch):
    """A refit that was mended makes other costs, whatever the program's version says."""
    folder, kept, edited = tiny_checkpoint("llama"), tmp_path / "kept", tmp_path / "refit.py"
    kept.mkdir()
    edited.write_text("damp = 0.01")
    sources = [*registry.sources(), edited]
    monkeypatch.setattr(registry, "sources", lambda: sources)
    divided(opened(folder, written["fit"], bits=12), kept, silent)
    (file,) = kept.iterdir()
    edited.write_text("damp = 0.02")
    with pytest.raises(CheckpointError, match=r"measured on something else; name another file, or .* version of qtool"):
        divided(opened(folder, written["fit"], bits=12), file, silent)
    monkeypatch.setattr(Pricing, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        divided(opened(folder, written["fit"], bits=12), kept, silent)


def test_a_folder_of_scores(written, tiny_checkpoint, tmp_path, monkeypatch):
    """Each model has a file of its own, and a damaged one is measured anew."""
    for family in ("llama", "llama-tied"):
        first = divided(opened(tiny_checkpoint(family), written["fit"], bits=12), tmp_path, silent)
    files = list(tmp_path.iterdir())
    assert len(files) == 2
    with monkeypatch.context() as patch:
        patch.setattr(Pricing, "run", None)
        assert divided(opened(tiny_checkpoint(family), written["fit"], bits=12), tmp_path, silent)[1] == first[1]
    for file in files:
        file.write_bytes(b"damaged")
    assert divided(opened(tiny_checkpoint(family), written["fit"], bits=12), tmp_path, silent)[1] == first[1]


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_as_large_as_another_recipe(family, written, tiny_checkpoint, tmp_path):
    """The limit is the size of the file that its rules give, which the name of the recipe inside may move a little."""
    folder, overrides = str(tiny_checkpoint(family)), ("budget.like=gguf-q5_0", "budget.against=[gguf-q5_0]")
    report = run(QuantizeOptions(folder, written["fit"], tmp_path / "fit", overrides, "cpu", "fp32"))
    run(QuantizeOptions(folder, "gguf-q5_0", tmp_path / "own", ("method=rtn",), "cpu", "fp32"))
    sizes = [next((tmp_path / name).glob("*.gguf")).stat().st_size for name in ("fit", "own")]
    assert report.allocation.wanted == "the size of gguf-q5_0"
    assert abs(report.allocation.limit - sizes[1]) <= 32
    assert sizes[0] <= report.allocation.limit
    assert report.allocation.uniform in ("gguf-q5_0", "q5_0 for all layers")
    with pytest.raises(RecipeError, match="no file and no shipped recipe is called"):
        divided(opened(folder, written["fit"], "budget.like=gguf-q5_00"), None, silent)
    with pytest.raises(RecipeError, match="no file and no shipped recipe is called"):
        divided(opened(folder, written["fit"], "budget.against=[nothing]", bits=12), None, silent)
    assert opened(folder, written["fit"], *overrides, bits=12).plan.recipe.budget.like is None


def test_a_curve_is_what_ten_budgets_come_to(written, tiny_checkpoint, tmp_path, monkeypatch):
    folder, file = tiny_checkpoint("llama"), tmp_path / "scores"
    points = curve(opened(folder, written["fit"]), file, silent)
    least, most = span(opened(folder, written["fit"]))
    assert (points[0].nbytes, points[-1].nbytes, len(points)) == (least, most, 10)
    assert [p.nbytes for p in points] == sorted({p.nbytes for p in points})
    assert [p.kld for p in points] == sorted((p.kld for p in points), reverse=True)
    assert (set(points[0].formats), set(points[-1].formats)) == ({"q4_0"}, {"q8_0"})
    monkeypatch.setattr(Pricing, "run", None)  # costs are known from the curve
    job, allocation = divided(opened(folder, written["fit"], size=points[4].nbytes), file, silent)
    assert allocation.nbytes == points[4].nbytes or allocation.fell_back
    weights = Counter()
    for p in job.plan.layers:
        weights[p.label] += p.module.shape[0] * p.module.shape[1]
    assert dict(weights) == points[4].formats
    numbers = sum(job.checkpoint.info(n).nbytes // 2 for n in job.checkpoint.names())  # bfloat16
    assert points[4].bits == 8 * points[4].nbytes / numbers
    assert 0.5 < points[4].kld / allocation.kld < 2


def test_an_interrupted_run_goes_on_with_its_scores(written, tiny_checkpoint, tmp_path, monkeypatch):
    folder, out = tiny_checkpoint("llama"), tmp_path / "out"
    options = QuantizeOptions(
        str(folder), written["fit"], out, device="cpu", dtype="fp32", limit_of={"size": half(folder, written)}
    )
    with monkeypatch.context() as patch:
        patch.setattr(trial.Trials, "of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(options)
    with monkeypatch.context() as patch:
        patch.setattr(Pricing, "run", None)
        run(options)
    other = replace(options, out=tmp_path / "whole")
    run(other)
    assert next(out.glob("*.gguf")).read_bytes() == next((tmp_path / "whole").glob("*.gguf")).read_bytes()


def test_the_smallest_file_that_is_near_enough(written, tiny_checkpoint, tmp_path):
    folder, file = tiny_checkpoint("llama"), tmp_path / "scores"
    limits = []
    for kld in (0.008, 0.003):
        _, found = divided(opened(folder, written["fit"], kld=kld), file, silent)
        assert found.kld + trial.NORMAL * found.kld_error <= kld
        assert found.limit is None
        _, smaller = divided(opened(folder, written["fit"], size=int(found.nbytes * 0.97)), file, silent)
        assert smaller.kld + trial.NORMAL * smaller.kld_error > kld * 0.9
        limits.append(found.nbytes)
    assert limits[0] < limits[1]
    with pytest.raises(PlanError, match=r"wanted a KL divergence of at most 1e-09, found .* with the best formats"):
        divided(opened(folder, written["fit"], kld=1e-9), file, silent)


def test_what_cannot_be_divided(written, tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("llama")
    with pytest.raises(
        PlanError, match=r"wanted at most 1000 bytes .* found \d+ .* with the smallest formats"
    ) as caught:
        divided(opened(folder, written["fit"], size=1000), None, silent)
    least = int(str(caught.value).partition("found ")[2].split()[0])
    divided(opened(folder, written["fit"], size=least), None, silent)
    with pytest.raises(PlanError, match=f"wanted at most {least - 1} bytes"):
        divided(opened(folder, written["fit"], size=least - 1), None, silent)
    with pytest.raises(PlanError, match="no limit; give --fit SIZE, --bits BITS or --kld NATS"):
        divided(opened(folder, written["fit"]), None, silent)
    with pytest.raises(PlanError, match="no layer has a rule with one of its formats"):
        divided(opened(folder, written["fit"], "budget.formats=[q4_0, q4_1]", size=10**6), None, silent)
    with pytest.raises(UsageError, match="--fit, --bits exclude each other"):
        opened(folder, written["fit"], size=1, bits=2)
    for limit, found in ({"bits": float("inf")}, "inf"), ({"bits": 0.0}, "0"), ({"kld": float("nan")}, "nan"):
        with pytest.raises(UsageError, match=f"--(bits|kld): wanted a positive number, found {found}"):
            opened(folder, written["fit"], **limit)
    with pytest.raises(UsageError, match="--fit: wanted a recipe with a budget: such as gguf-fit, found gguf-q8_0"):
        opened(folder, "gguf-q8_0", size=1)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("qtool.scores", "9", "holds no scores"),
        ("costs", "[]", "wanted a mapping of costs"),
        ("costs", "{", "wanted a mapping of costs"),
        ("costs", '{"a": {"b": NaN}}', "damaged scores"),
        ("costs", '{"a": {"b": "1"}}', "damaged scores"),
        ("shares", '{"a": {"b": -1}}', "damaged scores"),
        ("measured", '{"a": 3}', "damaged scores"),
        ("statics", '{"a": {"b": [1]}}', "damaged scores"),
    ],
)
def test_damaged_scores(key, value, told, tmp_path):
    from safetensors.torch import save_file

    empty = dict.fromkeys(("costs", "shares", "statics", "measured"), "{}")
    metadata = {"qtool.scores": "1", "identity": "i", **empty}
    save_file({"x": torch.ones(3)}, tmp_path / "scores", metadata)
    assert ScoreFile(tmp_path / "scores", "i", True).found.importance["x"].tolist() == [1, 1, 1]
    assert ScoreFile(tmp_path / "scores", "j", False).found is None
    save_file({"x": torch.ones(3)}, tmp_path / "scores", metadata | {key: value})
    with pytest.raises(CheckpointError, match=told):
        ScoreFile(tmp_path / "scores", "i", True)


def test_a_file_that_came_out_too_large_is_refused():
    file = FileEntry(name="m.gguf", nbytes=11, sha256="")
    card = FileEntry(name="README.md", nbytes=500, sha256="")
    artifact = ArtifactEntry(kind="gguf", path=".", files=(file, card), runtimes=(), verified=True)
    entry = AllocationEntry(wanted="", limit=11, nbytes=11, kld=0, kld_error=0, tried=1, samples=1, held_out=1)
    refuse_too_large((artifact,), entry)
    with pytest.raises(VerifyError, match="larger than its budget: wanted 10, found 11"):
        refuse_too_large((artifact,), entry.model_copy(update={"limit": 10}))


def test_modules_that_runtimes_merge_are_one_decision(written, tiny_checkpoint):
    job = opened(tiny_checkpoint("llama"), written["mixed"])
    open_ = decisions(job.plan, job.checkpoint, registry.load("artifact", "compressed-tensors")())
    sets = {d.name: {p.module.role for p in d.options[0]} for d in open_}
    assert {"q", "k", "v"} in sets.values()
    assert {"gate", "up"} in sets.values()
    assert all("head" not in roles for roles in sets.values())
    job = opened(tiny_checkpoint("qwen3_moe"), written["fit"])
    open_ = decisions(job.plan, job.checkpoint, next(iter(job.artifacts.values())))
    assert sum(len(d.options[0]) == 6 for d in open_) == 2 * 3  # experts of a layer are one tensor


def test_numbers_of_a_layer_without_room_for_a_format(written, tiny_checkpoint):
    """Rows of 64 columns have no K-quants: each decision holds what they fall back to, once."""
    job = opened(tiny_checkpoint("llama"), written["fit"], "budget.formats=[q4_k, q5_k, q5_0, q8_0]", size=10**6)
    open_ = decisions(job.plan, job.checkpoint, next(iter(job.artifacts.values())))
    assert {tuple(o[0].label for o in d.options) for d in open_} == {("q5_0", "q5_1", "q8_0")}
    assert {d.candidates for d in open_} == {(0, 1, 0, 2)}
    assert {o[0].fallback is not None for o in open_[0].options[:2]} == {True}


def test_one_process_divides(written, tiny_checkpoint):
    from qtool.pipeline.quantize import refuse_together

    job = opened(tiny_checkpoint("llama"), written["fit"], size=10**6)
    refuse_together(job)
    ranks = SimpleNamespace(size=2)
    with pytest.raises(PlanError, match="2 processes: one process divides a budget; run it without torchrun"):
        refuse_together(replace(job, ranks=ranks))
