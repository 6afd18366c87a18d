"""Statistics in a folder: what comes back, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.calibrate.shards import INDEX, StatsFolder, StatsWriter, is_stats_folder, nbytes
from qtool.errors import CheckpointError
from qtool.stats._base import InputStats
from qtool.stats.channels import Channels
from qtool.stats.drift import Drift
from qtool.stats.gram import Gram
from qtool.stats.values import Values
from qtool.store.files import new_folder, write_sums

ABOUT = {"model": "tiny", "fingerprint": "ab12", "calibration": {"data": "builtin", "samples": 3, "tokens": 21}}
ALL = frozenset({Channels, Gram, Values, Drift})
WIDTHS = {"attn_in": 8, "mlp_in": 12, "head_in": 12}


@pytest.fixture
def measured():
    generator, stats = torch.Generator().manual_seed(0), {}
    for reads, k in WIDTHS.items():
        x, x_0 = torch.randn(2, 21, k, generator=generator)
        stats[reads] = InputStats(k, ALL)
        stats[reads].add(x, x_0[:10])
    return stats


@pytest.fixture
def folder(measured, tmp_path):
    with new_folder(tmp_path / "stats") as path:
        writer = StatsWriter(path, ABOUT)
        writer.add("block-0", {reads: measured[reads] for reads in ("attn_in", "mlp_in")})
        writer.add("head", {"head_in": measured["head_in"], "never": InputStats(4, ALL)})
        writer.close()
    return tmp_path / "stats"


def test_what_was_written_comes_back(folder, measured):
    assert is_stats_folder(folder) and not is_stats_folder(folder.parent)
    found = StatsFolder(folder)
    assert found.about == ABOUT
    assert {reads: held.channels for reads, held in found.index.inputs.items()} == WIDTHS
    for reads, want in measured.items():
        got = found.read(reads, ALL)
        assert got.tokens == 21
        for a, b in zip(got, want, strict=True):
            assert a.state().keys() == b.state().keys() and b.state()
            assert all(torch.equal(a.state()[n], t) for n, t in b.state().items())
    part = found.read("mlp_in", frozenset({Channels}))
    assert Gram not in part and torch.equal(part[Channels].sum_squares, measured["mlp_in"][Gram].matrix.diagonal())


def test_a_change_changes_the_digest(folder, measured, tmp_path):
    measured["head_in"].add(torch.ones(1, 12))
    with new_folder(tmp_path / "other") as path:
        writer = StatsWriter(path, ABOUT)
        writer.add("head", {"head_in": measured["head_in"]})
        writer.close()
    assert StatsFolder(folder).digest == StatsFolder(folder).digest != StatsFolder(tmp_path / "other").digest


def test_the_size_is_known_before(measured):
    needs = frozenset({Channels, Gram, Values})
    stats = InputStats(12, needs)
    stats.add(torch.ones(3, 12))
    assert nbytes(12, needs) == sum(t.nbytes for s in stats for t in s.state().values()) > 4 * 12 * 12


def rewrite(folder, shard, change):
    """Changes tensors of a shard (None: left out), and has the sums say so."""
    tensors = {n: t for n, t in (load_file(folder / shard) | change).items() if t is not None}
    save_file(tensors, folder / shard)
    write_sums(folder)


DAMAGE = {
    "a shard is missing": (
        lambda f: (f / "block-0.safetensors").unlink(),
        "block-0.* is missing, or other than SHA256",
    ),
    "a byte is changed": (
        lambda f: (f / "block-0.safetensors").write_bytes((f / "block-0.safetensors").read_bytes()[:-1] + b"x"),
        "block-0.* is missing, or other than SHA256",
    ),
    "a tensor is missing": (
        lambda f: rewrite(f, "block-0.safetensors", {"mlp_in.gram.matrix": None}),
        r"gram of mlp_in: wanted matrix float32 \[12, 12\], found nothing",
    ),
    "another shape": (
        lambda f: rewrite(f, "block-0.safetensors", {"mlp_in.gram.matrix": torch.eye(8)}),
        r"gram of mlp_in: wanted matrix float32 \[12, 12\], found matrix float32 \[8, 8\]",
    ),
    "no Gram matrix": (
        lambda f: rewrite(f, "block-0.safetensors", {"mlp_in.gram.matrix": -torch.eye(12)}),
        "gram of mlp_in: wanted a symmetric matrix without negative energies",
    ),
    "infinite": (
        lambda f: rewrite(f, "block-0.safetensors", {"mlp_in.channels.high": torch.full((12,), torch.inf)}),
        "channels of mlp_in: wanted finite numbers",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(damage, message, folder):
    damage(folder)
    found = StatsFolder(folder)
    found.read("head_in", ALL)
    with pytest.raises(CheckpointError, match=message):
        found.read("mlp_in", ALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "statistics.json: version: Input should be 2"),
        ({"inputs": {"a": {"shard": "../x.safetensors", "channels": 1, "tokens": 1, "kinds": []}}}, "inputs.a.shard"),
        ({"inputs": {"a": {"shard": "x.safetensors", "channels": 0, "tokens": 1, "kinds": []}}}, "inputs.a.channels"),
        ({"more": 1}, "more: Extra inputs"),
    ],
    ids=str,
)
def test_an_index_that_cannot_be(change, message, folder):
    index = json.loads((folder / INDEX).read_text()) | change
    (folder / INDEX).write_text(json.dumps(index))
    write_sums(folder)
    with pytest.raises(CheckpointError, match=message):
        StatsFolder(folder)
