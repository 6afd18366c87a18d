"""Models that GGUF wants changed compute the same behind it, tensor by tensor and some rows at a time."""

from __future__ import annotations

import pytest
import torch

from benchmarks import tiny
from benchmarks.architectures import logits_of
from benchmarks.tiny import save_tiny
from qtool.checkpoint._base import Layer
from qtool.checkpoint.conversions._equal import Change, Equal
from qtool.checkpoint.equal import EqualModel, equal_model
from qtool.checkpoint.hf import HFCheckpoint
from qtool.formats._spelling import parse_format
from tests.artifact.conftest import InMemory

TOKENS = torch.arange(24).view(1, -1) * 7
FIELDS = {
    "num_hidden_layers": 1,
    "tie_word_embeddings": True,
    "embedding_multiplier": 3.0,
    "lm_head_multiplier": 0.5,
    "ssm_multipliers": [0.5, 0.8, 1.1, 1.2, 0.9],
}


@pytest.fixture(scope="module")
def falcon(tmp_path_factory):
    """A tiny Falcon-H1 with multipliers and a tied output layer, and transformers' logits."""
    folder = tmp_path_factory.mktemp("falcon")
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setitem(tiny.PARTICULAR, "falcon_h1", FIELDS)
        logits = save_tiny("falcon_h1", folder)(input_ids=TOKENS, use_cache=False).logits
    return HFCheckpoint(folder), logits


def test_multipliers_are_in_the_weights_and_the_output_layer_gets_its_own(falcon):
    model, wanted = falcon
    found = equal_model(model)
    assert model.tied and not found.tied and found.config["tie_word_embeddings"] is False
    assert found.config["ssm_multipliers"] == [1.0] * 5 and equal_model(found) is found
    embedding = model.tensor("model.embed_tokens.weight")
    assert torch.equal(found.tensor("model.embed_tokens.weight"), 3 * embedding)
    assert torch.equal(found.tensor("lm_head.weight"), 0.5 * embedding)
    assert torch.allclose(logits_of(found, TOKENS), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    assert found.fingerprint() not in (model.fingerprint(), EqualModel(model, Equal({}, {}, "nothing")).fingerprint())


def test_some_rows_are_those_of_the_whole(falcon):
    model = falcon[0]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    rows = model.info("model.layers.0.mamba.in_proj.weight").shape[0]
    changes = {
        "mamba.in_proj.weight": Change(factors=torch.rand(rows) + 1),
        "self_attn.o_proj.weight": Change(columns=order),
        "embed_tokens.weight": Change(count=530),
    }
    found = EqualModel(model, Equal({"vocab_size": 530}, changes, "a test"))
    for end in changes:
        name = next(name for name in found.names() if name.endswith(end))
        whole, before = found.tensor(name), model.tensor(name)
        assert whole.shape == found.info(name).shape and whole.dtype == found.info(name).dtype
        for start, stop in ((0, 7), (5, len(whole)), (len(whole) - 3, len(whole))):
            assert torch.equal(found.rows(name, start, stop), whole[start:stop])
        if end == "embed_tokens.weight":
            assert torch.equal(whole[:512], before) and bool((whole[512:] == before[0]).all())
        elif end.endswith("o_proj.weight"):
            assert all(torch.equal(whole[:, i], before[:, int(order[i])]) for i in range(64))
        else:
            assert torch.allclose(whole, before * changes[end].factors[:, None].float(), rtol=1e-6)


def test_codes_stay_where_a_matrix_does_not_change(falcon):
    layer = Layer(parse_format("int4-g32"))
    model = InMemory(falcon[0], lambda module: layer if module.role in ("up", "down", "in_proj") else None)
    found, block = equal_model(model), "model.layers.0."
    assert found.layers.keys() == {f"{block}feed_forward.up_proj", f"{block}feed_forward.down_proj"}
    assert found.decoded.keys() == {f"{block}mamba.in_proj"} and "multipliers" in found.decoded[f"{block}mamba.in_proj"]
    for module in found.layers:
        assert torch.equal(found.matrix(module).quantized.codes, model.matrix(module).quantized.codes)
