"""Two thousand damaged files of every kind: each is read, or refused in a sentence; and the fuzzer sees what is not."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from qtool.errors import CheckpointError
from tests.fuzz import fuzz
from tests.fuzz.mutate import damaged

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(1200)
def test_damaged_files_end_in_a_model_or_a_sentence():
    command = [sys.executable, "-m", "tests.fuzz.fuzz", "--count", "2000", "--seed", "7"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert result.stdout, result.stderr
    found = json.loads(result.stdout)
    assert found["failures"] == []
    assert found["outcomes"]["read"] > 200
    assert found["outcomes"]["CheckpointError"] > 500
    assert sum(found["outcomes"].values()) == found["cases"] == 2000


def test_what_must_not_happen_is_seen(tmp_path, monkeypatch):
    """A traceback, a hang, a process that ends: each is counted with its number, and the cases behind it are read."""
    (tmp_path / "samples").mkdir()
    sample = tmp_path / "samples" / "model-x"
    sample.mkdir()
    (sample / "config.json").write_text("{}")

    def misbehave(rng, place, plain, victim):
        number = int(place.name.removeprefix("case-"))
        if number == 3:
            raise KeyError("traceback")
        if number == 5:
            os.abort()
        if number == 7:
            while True:
                pass
        if number == 8:
            bytearray(2 << 30)
        if number % 2:
            raise CheckpointError("a sentence")

    monkeypatch.setattr(fuzz, "READERS", {"model": misbehave})
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(fuzz, "write_samples", lambda _: {"model-plain": sample})
    monkeypatch.setattr(fuzz, "open_model", lambda _: None)
    found = fuzz.fuzz(range(12), 0, tmp_path)
    assert [number for number, _, _ in found["failures"]] == [3, 5, 7, 8]
    traceback, ended, slow, memory = (how for _, _, how in found["failures"])
    assert "KeyError" in traceback and "the process ended: -6" in ended
    assert "TooSlow" in slow and "MemoryError" in memory
    assert found["outcomes"] == {"read": 5, "CheckpointError": 3, "failure": 3}


def test_a_case_follows_from_its_number():
    content = json.dumps({"a": [1, {"b": "c"}], "d": 2}).encode()
    twice = [[damaged(random.Random(n), "config.json", content) for n in range(200)] for _ in range(2)]
    assert twice[0] == twice[1]
    assert len(set(twice[0])) > 100
