"""Bit operations and times beside bytes: what they add up to, plans that keep them, tables that cannot be read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from qtool.errors import PlanError, RecipeError
from qtool.pipeline.budget import divided
from qtool.pipeline.events import silent
from qtool.pipeline.prepare import prepare

BODY = """
recipe: 1
name: mixed
calibration: {data: builtin, samples: 4, length: 64}
layers:
  - {match: lm_head, keep: true}
  - {match: "model.layers.0.mlp.down_proj", weights: int4-g64}  # none of those below: stays
  - {match: "*", weights: int8-channel, activations: int8-token}
budget:
  formats: [int4-g32, {weights: int8-channel, activations: int8-token}, keep]
  samples: 2
  held_out: 2
  swaps: 0
export: [{to: compressed-tensors}]
"""
TABLE = """\
int4-g32: 9
int4-g64: 9
int8-channel with int8-token inputs: {SHAPES}
kept: 30
"""


@pytest.fixture
def asked(tiny_checkpoint, tmp_path):
    (tmp_path / "mixed.yaml").write_text(BODY)
    folder = str(tiny_checkpoint("llama"))

    def job(*overrides, **limit):
        recipe = str(tmp_path / "mixed.yaml")
        return prepare(folder, recipe, overrides, device="cpu", dtype="fp32", budget=limit)

    return job


def linears(job):
    return [p for p in job.plan.layers if p.module.kind != "embedding"]


def share(job):
    """Bit operations by hand: stored bits of weights times 8 or 16 bits of inputs, or 16 x 16."""
    used = 0.0
    for p in linears(job):
        n, k = p.module.shape
        bits = p.format.storage_bits(n, k) / (n * k) if p.format else 16
        used += n * k * bits * (8 if p.activations else 16)
    return used / sum(math.prod(p.module.shape) * 256 for p in linears(job))


def labels(job):
    return {p.label for p in linears(job) if p.module.name != "lm_head"}


def test_bit_operations(asked):
    """At a size that lets most layers be kept, the limit of operations decides, and a looser one costs less."""
    free, _ = divided(asked(size=10**9), None, silent)
    assert labels(free) == {"kept", "int4-g64"}
    assert 0.9 < share(free) < 1
    found = {}
    for most in (0.8, 0.6):
        job, entry = divided(asked(f"budget.operations={most}", size=10**9), None, silent)
        ((used, limit),) = entry.beside.values()
        assert (limit, used) == (most, pytest.approx(share(job), rel=1e-6))
        assert most - 0.1 < used <= most
        found[most] = entry.kld
    assert 0 < found[0.8] < found[0.6]


def test_time_by_a_table(asked, tmp_path):
    """Two limits beside bytes: all three are kept, and the plan of each alone breaks the other's."""
    shapes = {p.module.shape for p in linears(asked(size=10**9))}
    rows = ", ".join(f"{n}x{k}: {4e-6 * n * k}" for n, k in shapes)
    (tmp_path / "table.yaml").write_text(TABLE.replace("SHAPES", rows))

    def time(job):
        each = {"int4-g32": 9, "int4-g64": 9, "int8-channel with int8-token inputs": 4, "kept": 30}
        return sum(each[p.label] * math.prod(p.module.shape) for p in linears(job)) / 1e9

    whole = sum(math.prod(p.module.shape) for p in linears(asked(size=10**9)))
    limit = 18 * whole / 1e9
    table = f"budget.latency={{table: {tmp_path / 'table.yaml'}, milliseconds: {limit}}}"
    job, entry = divided(asked(table, "budget.operations=0.62", size=10**9), None, silent)
    (used, _), (spent, allowed) = entry.beside.values()
    assert spent == pytest.approx(time(job)) and spent <= allowed == pytest.approx(limit)
    assert used <= 0.62
    assert "time of a token, ms" in list(entry.beside)[1]
    (tmp_path / "table.yaml").write_text("int4-g32: 9\nint4-g64: 9\nkept: 30\n")
    with pytest.raises(RecipeError, match=r"has no time for 'int8-channel with int8-token inputs' of \d+x\d+; add it"):
        divided(asked(table, size=10**9), None, silent)
    for damaged in ("[1, 2]", "int4-g32: quick", "int4-g32: {4x4: -1}", "a: .inf", "{"):
        (tmp_path / "table.yaml").write_text(damaged)
        with pytest.raises(RecipeError, match=r"is no table|cannot read"):
            divided(asked(table, size=10**9), None, silent)
    Path(tmp_path / "table.yaml").unlink()
    with pytest.raises(RecipeError, match="cannot read"):
        divided(asked(table, size=10**9), None, silent)


def test_what_cannot_be_kept(asked):
    with pytest.raises(PlanError, match=r"bit operations: wanted at most 0.01 .* with the quickest formats"):
        divided(asked("budget.operations=0.01", size=10**9), None, silent)
    with pytest.raises(RecipeError, match="operations goes with size, bits or like, found kld"):
        asked("budget.operations=0.5", "budget.kld=0.1")
