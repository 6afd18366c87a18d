"""Statistics on disk: what was written comes back, and nothing else is believed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qtool.calibrate.store import read_stats, write_stats
from qtool.errors import CheckpointError, StorageError
from qtool.stats._base import InputStats
from qtool.stats.channels import Channels
from qtool.stats.gram import Gram

ABOUT = {"model": "tiny", "fingerprint": "ab12", "calibration": {"data": "builtin", "samples": 3, "tokens": 21}}


@pytest.fixture
def measured():
    generator = torch.Generator().manual_seed(6)
    stats = {}
    for reads, k in (("model.layers.0.attn_in", 12), ("model.layers.0.mlp_mid", 20), ("head_in", 12)):
        stats[reads] = InputStats(k, frozenset({Gram, Channels}))
        stats[reads].add(torch.randn(21, k, generator=generator))
    return stats


@pytest.fixture
def path(measured, tmp_path):
    write_stats(tmp_path / "stats", measured, ABOUT)
    return tmp_path / "stats"


def test_what_was_written_comes_back(path, measured):
    found, about = read_stats(path)
    assert about == ABOUT
    assert found.keys() == measured.keys()
    for reads, want in measured.items():
        got = found[reads]
        assert got.tokens == 21
        assert Gram not in got
        for part in ("sum_squares", "low", "high", "absmax", "importance"):
            assert torch.equal(getattr(got[Channels], part), getattr(want[Channels], part)), part
    assert not torch.equal(found["head_in"][Channels].low, found["head_in"][Channels].high)


def test_other_libraries_read_it(path, measured):
    tensors = load_file(path)
    assert len(tensors) == 4 * 3
    assert torch.equal(tensors["model.layers.0.mlp_mid.high"], measured["model.layers.0.mlp_mid"][Channels].high)
    assert tensors["head_in.tokens"].tolist() == [21]
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"qtool.statistics": "1", "about": json.dumps(ABOUT, sort_keys=True)}


def test_same_statistics_same_bytes(path, measured, tmp_path):
    write_stats(tmp_path / "again", measured, dict(reversed(ABOUT.items())))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_folder_that_is_not_there(measured, tmp_path):
    with pytest.raises(StorageError, match=r"cannot write .*: No such file"):
        write_stats(tmp_path / "none" / "stats", measured, ABOUT)


def changed(path, change, metadata=None):
    """Rewrites the file with some tensors replaced (None: left out) and other metadata."""
    tensors = {n: t for n, t in (load_file(path) | change).items() if t is not None}
    said = {"qtool.statistics": "1", "about": json.dumps(ABOUT)} | (metadata or {})
    save_file(tensors, path, {k: v for k, v in said.items() if v is not None})


FLAT = ("head_in.sum_squares", "head_in.low", "head_in.high")


def numbers(*values):
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_in.sum_squares": None}, "holds no tensor 'head_in.sum_squares'"),
        ({"head_in.tokens": None}, "holds a tensor that belongs to no input"),
        ({"more": numbers(1)}, "holds a tensor that belongs to no input"),
        ({"head_in.tokens": torch.tensor([0])}, "statistics of head_in hold impossible numbers"),
        ({"head_in.tokens": torch.tensor([-3])}, "statistics of head_in hold impossible numbers"),
        ({"head_in.tokens": torch.tensor([3, 4])}, "statistics of head_in: wanted float32 .K. three times"),
        ({"head_in.tokens": torch.tensor(3)}, "statistics of head_in: wanted float32 .K. three times"),
        ({"head_in.tokens": numbers(3)}, "statistics of head_in: wanted float32 .K. three times"),
        ({"head_in.tokens": torch.zeros(0, dtype=torch.int64)}, "statistics of head_in: wanted float32 .K. three"),
        ({"head_in.low": torch.zeros(11)}, "statistics of head_in: wanted float32 .K. three times"),
        ({"head_in.sum_squares": torch.zeros(3, 4)}, "statistics of head_in: wanted float32 .K. three times"),
        ({"head_in.high": torch.ones(12, dtype=torch.int32)}, "statistics of head_in: wanted float32 .K. three"),
        ({"head_in.sum_squares": torch.tensor(1.0)}, "statistics of head_in: wanted float32 .K. three times"),
        ({name: torch.ones(3, 4) for name in FLAT}, "statistics of head_in: wanted float32 .K. three times"),
        ({"head_in.high": torch.full((12,), torch.nan)}, "statistics of head_in hold impossible numbers"),
        ({"head_in.high": torch.full((12,), torch.inf)}, "statistics of head_in hold impossible numbers"),
        ({"head_in.low": torch.full((12,), 1e9)}, "statistics of head_in hold impossible numbers"),
        ({"head_in.sum_squares": torch.full((12,), -1.0)}, "statistics of head_in hold impossible numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_tensors_that_cannot_be(change, message, path):
    changed(path, change)
    with pytest.raises(CheckpointError, match=message):
        read_stats(path)


DEEP = '{"model":' * 100_000


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"qtool.statistics": None}, "does not hold calibration statistics: wanted version 1, found another kind of"),
        ({"qtool.statistics": "2"}, "wanted version 1, found 2; make one with: qtool calibrate"),
        ({"about": None}, "does not say what it was measured on: wanted model, fingerprint, calibration"),
        ({"about": "{"}, "does not say what it was measured on"),
        ({"about": "7"}, "does not say what it was measured on"),
        ({"about": DEEP}, "does not say what it was measured on"),
        ({"about": json.dumps(ABOUT | {"calibration": "builtin"})}, "does not say what it was measured on"),
        ({"about": json.dumps({"model": "tiny", "fingerprint": "ab12"})}, "does not say what it was measured on"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_metadata_that_cannot_be(metadata, message, path):
    changed(path, {}, metadata)
    with pytest.raises(CheckpointError, match=message):
        read_stats(path)


def test_files_that_are_something_else(path, tiny_checkpoint, tmp_path):
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:100], whole[:-1], whole + b"\0", b"\xff" * 8 + whole[8:]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="stats"):
            read_stats(path)
    with pytest.raises(CheckpointError, match="does not hold calibration statistics"):
        read_stats(tiny_checkpoint("llama") / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_stats(tmp_path / "none")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read_stats(tmp_path)
