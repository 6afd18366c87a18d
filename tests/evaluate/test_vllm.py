"""GPTQ and AWQ folders in vLLM itself: right ones pass, and mistakes of a conversion are caught.

And what it selects for every recipe is what docs/runtimes.md says. Without vLLM these tests say that they are skipped;
`make test-vllm` has it, in a virtual environment for itself, since it brings its own releases of what qtool builds on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import schemes
from qtool.artifact.awq import AWQ
from qtool.artifact.gptq import GPTQ
from qtool.errors import VerifyError
from qtool.evaluate.proof import prove
from tests.evaluate.packed_folders import MISTAKES, saved, spoil, written

pytestmark = [pytest.mark.proven, pytest.mark.timeout(1800)]  # it starts for minutes on a busy processor


@pytest.fixture(scope="module", autouse=True)
def vllm():
    return pytest.importorskip("vllm", reason="needs vLLM; `make test-vllm` has it")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("qwen2"))


@pytest.mark.parametrize("kind", [GPTQ, AWQ])
def test_vllm_computes_what_we_compute(kind, source, tmp_path):
    found = prove(kind(), *written(kind(), source, tmp_path))
    assert found.reader.startswith("vLLM ") and found.tokens == 24
    assert found.distance < 5e-3


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(mistake, source, tmp_path):
    opened, model = written(GPTQ(), source, tmp_path)
    spoil(tmp_path, mistake)
    with pytest.raises(VerifyError, match=r"vLLM \d.* computes something else"):
        prove(GPTQ(), opened, model)


def test_it_selects_what_the_table_says():
    assert schemes.selected(Path(sys.executable)) == schemes.stored()
