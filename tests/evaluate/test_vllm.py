"""GPTQ and AWQ folders in vLLM itself: right ones pass, and mistakes of a conversion are caught.

And what it selects for every recipe is what docs/runtimes.md says. Without vLLM these tests say that they are skipped;
`make test-vllm` has it, in a virtual environment for itself, since it brings its own releases of what qtool builds on.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import schemes
from qtool.artifact._base import Reading
from qtool.artifact.awq import AWQ
from qtool.artifact.compressed_tensors import CompressedTensors
from qtool.artifact.gptq import GPTQ
from qtool.errors import VerifyError
from qtool.evaluate.proof import apart, in_type, prove
from qtool.evaluate.readers import by_vllm
from qtool.formats._spelling import parse_format
from qtool.numerics.threads.processor import has
from qtool.residuals._base import Correction, Matrix
from qtool.residuals.low_rank import LowRank
from tests.artifact.conftest import quantize as in_memory
from tests.evaluate.packed_folders import MISTAKES, saved, spoil, written

pytestmark = [pytest.mark.proven, pytest.mark.timeout(1800)]  # it starts for minutes on a busy processor
TOKENS = list(range(3, 27))


@pytest.fixture(scope="module", autouse=True)
def vllm():
    return pytest.importorskip("vllm", reason="needs vLLM; `make test-vllm` has it")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    if not has("avx512_f"):
        pytest.skip("vLLM's build for processors multiplies 4-bit weights with AVX-512, which this one lacks")
    return saved(tmp_path_factory.mktemp("qwen2"))


@pytest.mark.parametrize("kind", [GPTQ, AWQ])
def test_vllm_computes_what_we_compute(kind, source, tmp_path):
    found = prove(kind(), *written(kind(), source, tmp_path))
    assert found.reader.startswith("vLLM ") and found.tokens == 24
    assert found.distance < 5e-3


def test_vllm_computes_with_branches_of_low_rank(source, tmp_path):
    """Of two ranks, in layers that vLLM merges and in others; without them logits are far from these."""
    model, found = in_memory(source, parse_format("int4-g128")), {}
    for module in list(model.layers):
        residual, codes = LowRank(rank=3 if "down" in module else 8, whiten=False), model.matrices[module]
        w = model.origin.tensor(f"{module}.weight").float()
        found[module] = Matrix(codes, (Correction(residual, residual.fit(w - codes.decode(), None)),))
        model.layers[module] = replace(model.layers[module], residuals=(residual,))
    plain = in_type(model, TOKENS, torch.float32)
    model.matrix = found.__getitem__
    wanted = in_type(model, TOKENS, torch.float32)
    CompressedTensors().write(model, tmp_path, {})
    logits = by_vllm(CompressedTensors().open(tmp_path), TOKENS, Reading("vLLM")).logits
    assert apart(logits, wanted, several=False) < 5e-3
    assert apart(plain, wanted, several=False) > 0.05


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(mistake, source, tmp_path):
    opened, model = written(GPTQ(), source, tmp_path)
    spoil(tmp_path, mistake)
    with pytest.raises(VerifyError, match=r"vLLM \d.* computes something else"):
        prove(GPTQ(), opened, model)


def test_it_selects_what_the_table_says():
    assert schemes.selected(Path(sys.executable)) == schemes.stored()
