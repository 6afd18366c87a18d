"""What a process reports about its own memory."""

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
from qtool.pipeline.memory import peak_bytes, resident_bytes
before, empty = peak_bytes(), resident_bytes()
block = b"x" * 100_000_000
full = resident_bytes()
del block
print(before, peak_bytes(), empty, full)
"""


def test_memory_is_the_process_own_and_its_peak_stays():
    ballast = b"x" * 200_000_000
    found = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    before, after, empty, full = map(int, found.stdout.split())
    assert before < len(ballast)  # the size of the process that started it does not count
    assert after - before == pytest.approx(100e6, rel=0.008)
    assert full - empty == pytest.approx(100e6, rel=0.008)


HEAP = """
from qtool.pipeline.memory import resident_bytes
from qtool.pipeline.stopwatch import Stopwatch
before = resident_bytes()
with Stopwatch().stage("one"):
    pieces = [bytes(range(250)) * 200 for _ in range(2000)]
    last = bytes(50_000)  # behind them, or they would go by themselves
    full = resident_bytes()
    del pieces
    kept = resident_bytes()
print(full - before, kept - before, resident_bytes() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="a C library without malloc_trim")
def test_a_stage_begins_without_what_the_one_before_left_on_the_heap():
    found = subprocess.run([sys.executable, "-c", HEAP], check=True, capture_output=True, text=True)
    full, kept, after = map(int, found.stdout.split())
    assert full > 95e6 and kept > 90e6
    assert after < 10e6


ITSELF = """
import torch
from qtool.evaluate.readers import empty
from qtool.pipeline.memory import resident_bytes
before, model = resident_bytes(), torch.nn.Linear(5000, 5000)
model.itself = [model]
with torch.no_grad():
    model.weight.fill_(1.0)
full = resident_bytes()
empty(model)
print(full - before, resident_bytes() - before)
"""


def test_a_model_that_refers_to_itself_lets_go_of_its_numbers():
    found = subprocess.run([sys.executable, "-c", ITSELF], check=True, capture_output=True, text=True)
    full, after = map(int, found.stdout.split())
    assert full > 90e6
    assert after < 20e6


MAPPED = """
import sys
from pathlib import Path
import torch
from qtool.numerics.heap import let_go_of_files
from qtool.pipeline.memory import resident_bytes
folder = Path(sys.argv[1])
size = {"size": 50_000_000, "dtype": torch.uint8}
whole, changed = (torch.from_file(str(folder / name), shared=False, **size) for name in "ab")
before = resident_bytes()
sums = int(whole.sum()), int(changed.sum())
full = resident_bytes()
changed[7] += 1
let_go_of_files(folder / "other")
kept = resident_bytes()
let_go_of_files(folder)
after = resident_bytes()
assert (int(whole.sum()), int(changed.sum())) == (sums[0], sums[1] + 1)
print(full - before, kept - before, after - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells mappings apart")
def test_pages_of_mapped_files_are_let_go_of_unless_they_were_changed(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(range(250)) * 200_000)
    command = [sys.executable, "-c", MAPPED, str(tmp_path)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    full, kept, after = map(int, found.stdout.split())
    assert full > 95e6 and kept > 95e6
    assert 45e6 < after < 75e6  # the other one was written into
