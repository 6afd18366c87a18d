"""What a process reports about its own memory."""

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
