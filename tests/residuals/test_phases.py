"""Phase planes: against complex numbers one by one, taken over exactly whatever arithmetic made the sums."""

from __future__ import annotations

import cmath
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.checkpoint.open import open_checkpoint
from qtool.formats._spelling import parse_format
from qtool.methods.rtn import RTN
from qtool.models import open_artifact
from qtool.numerics.grids.phases import may_be, recognized
from qtool.pipeline.prepare import prepare
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.pipeline.trained import trained_phases
from qtool.residuals._base import Correction, Matrix
from qtool.residuals.phases import Phases
from tests.artifact.conftest import save_llama

N, K = 12, 20
W = torch.randn(N, K, generator=torch.Generator().manual_seed(3)) * 0.05


def unit(z: complex) -> complex:
    """The nearest of 1, i, -1, -i, by its angle."""
    angle = cmath.phase(z)
    if -math.pi / 4 <= angle < math.pi / 4:
        return 1
    if math.pi / 4 <= angle < 3 * math.pi / 4:
        return 1j
    return -1j if -3 * math.pi / 4 <= angle < -math.pi / 4 else -1


def widely_linear(w: torch.Tensor) -> tuple[list[list[complex]], list[list[complex]]]:
    """U and V of a real matrix."""
    n, k, m = len(w) // 2, w.shape[1] // 2, w.tolist()
    u = [[complex(m[i][j] + m[n + i][k + j], m[n + i][j] - m[i][k + j]) / 2 for j in range(k)] for i in range(n)]
    v = [[complex(m[i][j] - m[n + i][k + j], m[n + i][j] + m[i][k + j]) / 2 for j in range(k)] for i in range(n)]
    return u, v


def by_the_paper(z: list[list[complex]], terms: int) -> list[list[complex]]:
    """Sums of units times mean lengths, term by term."""
    total, rest = [[0j] * len(z[0]) for _ in z], [list(row) for row in z]
    for _ in range(terms):
        units = [[unit(x) for x in row] for row in rest]
        pairs = [(x, c) for row, cs in zip(rest, units, strict=True) for x, c in zip(row, cs, strict=True)]
        re = [abs(x.real) for x, c in pairs if c in (1, -1)]
        im = [abs(x.imag) for x, c in pairs if c in (1j, -1j)]
        s_re, s_im = sum(re) / len(re), sum(im) / len(im)
        for i, row in enumerate(units):
            for j, c in enumerate(row):
                step = complex(c.real * s_re, c.imag * s_im)
                total[i][j] += step
                rest[i][j] -= step
    return total


def real_matrix(u: list[list[complex]], v: list[list[complex]], dtype: torch.dtype) -> torch.Tensor:
    """The real matrix of two complex ones, computed in a type."""
    parts = [torch.view_as_real(torch.tensor(z, dtype=torch.complex128)) for z in (u, v)]
    (ur, ui), (vr, vi) = (part.to(dtype).unbind(-1) for part in parts)
    return torch.cat([torch.cat([vr + ur, vi - ui], 1), torch.cat([vi + ui, ur - vr], 1)])


def corrected(w: torch.Tensor, terms: int) -> Matrix:
    residual = Phases(terms=terms)
    tensors = residual.fit(w, None)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == residual.infos(*w.shape)
    return Matrix(RTN().solve(w, None, parse_format("codeless")).quantized, (Correction(residual, tensors),))


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_what_is_on_no_grid_is_rounded_as_the_paper_does(terms):
    u, v = (by_the_paper(z, terms) for z in widely_linear(W.double()))
    assert torch.allclose(corrected(W, terms).decode(), real_matrix(u, v, torch.float64).float(), rtol=1e-6, atol=1e-8)
    x = torch.randn(K, dtype=torch.float64)
    z = torch.complex(x[: K // 2], x[K // 2 :])
    y = torch.tensor(u, dtype=z.dtype) @ z + torch.tensor(v, dtype=z.dtype) @ z.conj()
    wanted = torch.cat([y.real, y.imag])
    assert torch.allclose(corrected(W, terms).decode().double() @ x, wanted, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_what_a_model_was_trained_to_is_taken_over_exactly_whatever_rounded_its_sums(terms, dtype):
    big = torch.randn(96, 160, generator=torch.Generator().manual_seed(4)) * 0.05
    w = real_matrix(*(by_the_paper(z, terms) for z in widely_linear(big)), dtype)
    assert recognized(w.float(), terms) is not None
    assert torch.equal(corrected(w.float(), terms).decode().to(dtype), w)
    other = w.clone()
    other[5, 7] *= 1.25
    assert recognized(other.float(), terms) is None
    assert recognized(big, terms) is None
    some, spacing = torch.cat([w[:16], w[48:64]]).float(), torch.finfo(dtype).eps
    assert [may_be(some, t, spacing) for t in (terms - 1, terms)] == [False, True]
    plain = torch.cat([big[:16], big[48:64]]).to(dtype).float()
    plain[3, 5] = 2.0  # all others lie within a few spacings of it
    assert not may_be(plain, 3, spacing)


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_rows_are_those_of_the_whole(terms):
    matrix = corrected(W, terms)
    whole = matrix.decode()
    for a, b in ((0, 1), (3, 9), (5, 6), (6, 7), (0, N), (11, N)):
        assert torch.equal(matrix.rows(a, b).decode(), whole[a:b])
    assert torch.equal(matrix.rows(2, 10).rows(3, 6).decode(), whole[5:8])


def test_a_weight_takes_as_many_bits_as_there_are_terms():
    for terms in (1, 2, 3):
        table = 4 * 9**terms * 32
        assert Phases(terms=terms).storage_bits(64, 256) == 64 * 256 * terms + table
    assert parse_format("codeless").storage_bits(64, 256) == 64 * 16
    assert Phases().misfit(63, 256) == "63 x 256 cannot be halved both ways"


def test_a_trained_model_is_taken_over_and_said_to_be_rounded_off_its_grid_by_others(tmp_path):
    folder = save_llama(tmp_path / "in", 256, torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    for name, w in tensors.items():
        if "_proj" in name:
            tensors[name] = real_matrix(*(by_the_paper(z, 2) for z in widely_linear(w.float())), torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = run(QuantizeOptions(str(folder), "fairy2i", tmp_path / "out"))
    found = open_artifact(str(tmp_path / "out"))
    done = [entry for entry in report.layers if entry.format]
    assert len(done) == 14
    assert {entry.method for entry in done} == {"taken over"}
    for entry in done:
        name = f"{entry.name}.weight"
        assert torch.equal(found.tensor(name).bfloat16(), tensors[name]), name
        assert torch.equal(found.rows(name, 3, 40).bfloat16(), tensors[name][3:40]), name
    on = "on a grid that training left (sums of 2 units of 1, i, -1, -i)"
    assert any(f"matrices are {on} and taken over" in text for text in report.warnings)
    rules = [{"match": "lm_head", "keep": True}, {"match": "*", "weights": "int2-g64", "method": "rtn"}]
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps({"recipe": 1, "name": "other", "layers": rules}))
    warnings = prepare(str(folder), str(other)).plan.warnings
    assert any(f"matrices are {on} and rounded again to int2-g64" in text for text in warnings)


def test_numbers_that_are_too_many_are_not_searched_for_sums(tmp_path, monkeypatch):
    folder = save_llama(tmp_path, 256, torch.bfloat16)
    monkeypatch.setattr("qtool.numerics.grids.phases.recognized", lambda *_: pytest.fail("searched"))
    assert trained_phases(open_checkpoint(str(folder)), "model.layers.0.mlp.gate_proj") == 0
