"""Branches beside codes read inputs before they are rounded: against the products written out, solved and read back."""

from __future__ import annotations

import json

import torch
from torch.testing import assert_close

from qtool.calibrate.inputs import quantize_tokens
from qtool.calibrate.walker import Walker
from qtool.checkpoint.hf import HFCheckpoint
from qtool.methods.rtn import RTN
from qtool.models import open_artifact
from qtool.pipeline.quantize import QuantizeOptions, run
from tests.calibrate.test_walker import CPU, TOKENS
from tests.calibrate.test_walker_inputs import inputs_in_walk

RESIDUAL = {"low_rank": {"rank": 4, "whiten": False, "start": "weight"}}
RULE = {"match": "*", "weights": "int4-g32", "activations": "int4-g32", "residuals": [RESIDUAL]}


def quantized(source, folder):
    """The artifact of a model with a branch beside every matrix."""
    rules = [{"match": "lm_head", "keep": True}, RULE]
    told = {"recipe": 1, "name": "svd", "layers": rules, "method": "rtn", "export": [{"to": "qtool"}]}
    (folder / "recipe.json").write_text(json.dumps(told))
    report = run(QuantizeOptions(str(source), str(folder / "recipe.json"), folder / "out", device="cpu"))
    assert report.artifacts[0].verified
    return open_artifact(str(folder / "out"))


def test_a_layer_adds_up_codes_of_rounded_inputs_and_the_branch_of_others(tiny_checkpoint, tmp_path):
    model = quantized(tiny_checkpoint("llama"), tmp_path)
    walker = Walker(model, CPU, torch.float32)
    block, hidden = walker.load_block(0), walker.embed(TOKENS[:2, :16])
    plain = inputs_in_walk(walker, block, hidden)  # that nothing has rounded
    module = next(m for m in walker.modules[0] if m.role == "q")
    matrix, x = model.matrix(module.name), plain[module.name]
    (branch,) = matrix.residuals
    left, right = (branch.tensors[name].float() for name in ("left", "right"))
    seen = {}
    with walker.quantized_inputs(block, 0), torch.inference_mode():
        linear = walker.linear(block, module)
        hook = linear.register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y.clone()))
        walker.output(block, 0, hidden, slice(0, 2))
        hook.remove()
    rounded = quantize_tokens(x, model.layers[module.name].activations)
    assert_close(seen["x"], rounded)
    wanted = rounded @ matrix.quantized.decode().T + (x @ right.T) @ left.T
    assert_close(seen["y"], wanted, rtol=1e-4, atol=1e-5)
    other = rounded @ matrix.decode().T
    assert float((seen["y"] - other).abs().max()) > 1e-2 * float(wanted.abs().max())


def test_the_branch_is_the_leading_part_of_the_matrix_and_codes_hold_the_rest(tiny_checkpoint, tmp_path):
    source = HFCheckpoint(tiny_checkpoint("llama"))
    model = quantized(tiny_checkpoint("llama"), tmp_path)
    for name in list(model.layers)[:4]:
        w = source.tensor(f"{name}.weight").float()
        u, s, v = torch.linalg.svd(w.double(), full_matrices=False)
        leading = (u[:, :4] * s[:4]) @ v[:4]
        matrix = model.matrix(name)
        found = matrix.residuals[0].apply(torch.zeros_like(w))
        assert float((found - leading).norm() / leading.norm()) < 3e-3
        rest = RTN().solve(w - found, None, matrix.quantized.format).quantized.decode()
        assert_close(matrix.quantized.decode(), rest, rtol=0, atol=1e-6)
