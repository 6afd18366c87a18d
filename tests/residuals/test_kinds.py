"""What a residual can be: planes, rows in more bits and extra columns, each a few lines in another package."""

from __future__ import annotations

import json

import pytest
import torch

from qtool import registry
from qtool.checkpoint.hf import HFCheckpoint
from qtool.models import open_artifact
from qtool.pipeline.quantize import QuantizeOptions, run
from tests.test_extending import extra, install, installed  # noqa: F401 (fixtures)

KINDS = '''
"""Kinds of residuals."""
import torch
from qtool.residuals._base import Residual


class Planes(Residual):
    """Sign planes, one bit a weight each, and a scale of every row for each: residual binarization."""

    count: int = 2

    def infos(self, n, k):
        return {"signs": ((self.count, n, -(-k // 8)), torch.uint8), "scale": ((self.count, n), torch.float16)}

    def fit(self, error, gram):
        signs, scales = [], []
        for _ in range(self.count):
            scale = error.abs().mean(1).half()
            up = torch.nn.functional.pad((error > 0).int(), (0, -error.shape[1] % 8)).unflatten(1, (-1, 8))
            signs.append((up << torch.arange(8)).sum(2).to(torch.uint8))
            scales.append(scale)
            error = error - scale.float()[:, None] * torch.where(error > 0, 1.0, -1.0)
        return {"signs": torch.stack(signs), "scale": torch.stack(scales)}

    def apply(self, w_hat, tensors):
        bits = (tensors["signs"].int()[..., None] >> torch.arange(8)) & 1
        planes = (2 * bits.flatten(2)[..., : w_hat.shape[1]] - 1) * tensors["scale"].float()[..., None]
        return w_hat + planes.sum(0)

    def rows(self, tensors, start, stop):
        return {name: t[:, start:stop] for name, t in tensors.items()}


class Rows(Residual):
    """The worst rows in more bits: the same share of every matrix, 8 bits on top of what they have."""

    share: float = 0.125

    def kept(self, n):
        return max(1, round(self.share * n))

    def infos(self, n, k):
        m = self.kept(n)
        return {"row": ((m,), torch.int32), "code": ((m, k), torch.int8), "scale": ((m,), torch.float32)}

    def fit(self, error, gram):
        row = error.square().sum(1).topk(self.kept(len(error))).indices.sort().values
        scale = error[row].abs().amax(1).clamp_min(1e-20) / 127
        code = (error[row] / scale[:, None]).round().to(torch.int8)
        return {"row": row.int(), "code": code, "scale": scale}

    def apply(self, w_hat, tensors):
        return w_hat.index_add(0, tensors["row"], tensors["code"].float() * tensors["scale"][:, None])

    def rows(self, tensors, start, stop):
        inside = (tensors["row"] >= start) & (tensors["row"] < stop)
        return {name: t[inside] - start if name == "row" else t[inside] for name, t in tensors.items()}

    def check(self, tensors, n, k):
        if not bool(((tensors["row"] >= 0) & (tensors["row"] < n)).all()):
            raise ValueError(f"row: wanted rows below {n}")
'''
POINTS = "[qtool.residuals]\nplanes = careless:Planes\nrows = careless:Rows\n"


@pytest.fixture
def kinds(tmp_path, extra, installed):  # noqa: F811
    """Installs them, and the page's columns."""
    installed(extra, install(tmp_path / "site", "careless", {"careless.py": KINDS}, POINTS))
    return {name: registry.load("residuals", name) for name in ("planes", "rows", "columns")}


def test_planes_rows_and_columns_from_recipe_to_artifact(kinds, tiny_checkpoint, tmp_path):
    residuals = [
        {"columns": {"count": 3}},
        {"rows": {"share": 0.25}},
        "planes",
        {"low_rank": {"rank": 2, "whiten": False}},
    ]
    rule = {"match": "*", "weights": "int2-g32", "residuals": residuals}
    told = {
        "recipe": 1,
        "name": "kinds",
        "layers": [{"match": "lm_head", "keep": True}, rule],
        "export": [{"to": "qtool"}],
    }
    (tmp_path / "recipe.json").write_text(json.dumps(told))
    source = tiny_checkpoint("llama")
    report = run(QuantizeOptions(str(source), str(tmp_path / "recipe.json"), tmp_path / "out", device="cpu"))
    assert report.artifacts[0].verified
    model, original = open_artifact(str(tmp_path / "out")), HFCheckpoint(source)
    entries = {e.name: e for e in report.layers if e.format}
    assert len(entries) == 14
    for name, entry in entries.items():
        matrix, w = model.matrix(name), original.tensor(f"{name}.weight").float()
        n, k = w.shape
        error = w - matrix.quantized.decode()
        before = error.square().sum()
        columns, rows, planes, _ = matrix.residuals
        worst = columns.tensors["index"].long()
        assert len(worst.unique()) == 3
        error[:, worst] -= error[:, worst].half().float()
        assert torch.equal(rows.tensors["row"].int(), error.square().sum(1).topk(n // 4).indices.sort().values.int())
        for row, code, scale in zip(rows.tensors["row"], rows.tensors["code"], rows.tensors["scale"], strict=True):
            error[row] -= code * scale
        for plane in range(2):
            scale = planes.tensors["scale"][plane].float()
            assert torch.allclose(scale, error.abs().mean(1), rtol=2e-3, atol=1e-6)
            error -= scale[:, None] * torch.where(error > 0, 1.0, -1.0)
        left = (w - matrix.decode()).square().sum()
        assert left < 1.001 * error.square().sum() < 0.3 * before
        assert torch.equal(matrix.rows(5, 40).decode(), matrix.decode()[5:40])
        bits = 3 * 32 + 3 * n * 16 + n // 4 * (32 + 8 * k + 32) + 2 * n * (k + 16) + 2 * (n + k) * 16
        assert 8 * entry.nbytes == matrix.quantized.format.storage_bits(n, k) + bits
