"""GPTQ and AWQ folders in GPTQModel: right ones pass, and mistakes of a conversion are caught.

Without GPTQModel these tests say that they are skipped; `make test-gptqmodel` has it.
"""

from __future__ import annotations

import pytest

from qtool.artifact.awq import AWQ
from qtool.artifact.gptq import GPTQ
from qtool.errors import VerifyError
from qtool.evaluate.proof import prove
from tests.evaluate.packed_folders import MISTAKES, saved, spoil, written

pytestmark = [pytest.mark.proven, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def installed():
    return pytest.importorskip("gptqmodel", reason="needs GPTQModel; `make test-gptqmodel` has it")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("qwen2"))


@pytest.mark.parametrize(
    ("kind", "spelling"),
    [
        (GPTQ, "int4-g128"),
        (GPTQ, "int3-g64-asym"),
        (GPTQ, "int8-g32"),
        (GPTQ, "int2-g32-asym"),
        (AWQ, "int4-g128-asym"),
    ],
)
def test_it_computes_what_we_compute(kind, spelling, source, tmp_path):
    found = prove(kind(), *written(kind(), source, tmp_path, spelling))
    assert found.reader.startswith("GPTQModel ") and found.tokens == 24
    assert found.distance < 5e-3


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(mistake, source, tmp_path):
    opened, model = written(GPTQ(), source, tmp_path)
    spoil(tmp_path, mistake)
    with pytest.raises(VerifyError, match=r"GPTQModel \d.* computes something else"):
        prove(GPTQ(), opened, model)
