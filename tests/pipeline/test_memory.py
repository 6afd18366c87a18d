"""What a process reports about its own memory."""

import subprocess
import sys

import pytest

from qtool.pipeline.memory import peak_bytes, resident_bytes

PROGRAM = """
from qtool.pipeline.memory import peak_bytes
before = peak_bytes()
block = b"x" * 100_000_000
del block
print(before, peak_bytes())
"""


def test_peak_is_the_process_own_and_stays():
    ballast = b"x" * 200_000_000
    found = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    before, after = map(int, found.stdout.split())
    assert before < len(ballast)  # the size of the process that started it does not count
    assert after - before == pytest.approx(100e6, rel=0.05)


def test_resident_is_at_most_the_peak():
    assert 0 < resident_bytes() <= peak_bytes()
