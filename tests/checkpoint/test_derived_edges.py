"""Edges of derived models: those that a family's file declares, and none that its model forbids."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.tiny import save_tiny, tiny_config
from qtool import registry
from qtool.api import quantize
from qtool.calibrate.walker import Walker
from qtool.checkpoint.derived import edges as derived_edges
from qtool.checkpoint.derived.derive import derive
from qtool.checkpoint.derived.family import family_of
from qtool.checkpoint.edits import STREAM, Edit, model_edges
from qtool.checkpoint.families._edges import Edge
from qtool.checkpoint.hf import HFCheckpoint
from qtool.checkpoint.rewritten import Rewritten
from qtool.models import open_model
from qtool.ops.orthogonal import Orthogonal
from qtool.ops.scale import Scale
from tests.checkpoint.test_derived import walked
from tests.checkpoint.test_edges import SIZES
from tests.conftest import MIXTURES, TINY, make_tokenizer


@cache
def edges(kind: str, i: int | None) -> tuple[Edge, ...]:
    config = tiny_config(kind).to_dict() | {"model_type": kind}
    return family_of(derive(config)).edges(config, i)


def kinds(kind: str, i: int | None = 0) -> set[str]:
    return {edge.kind for edge in edges(kind, i)}


def unordered(edge: Edge) -> object:
    fields = vars(edge) | {"readers": frozenset(edge.readers), "source": frozenset(edge.source)}
    return tuple(fields.items())


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "qwen2_moe"])
def test_a_derived_model_has_the_edges_of_its_family_s_file(name: str) -> None:
    family = registry.load("checkpoint/families", name)()
    config: dict[str, Any] = family.defaults | SIZES | (TINY | MIXTURES)[name] | {"model_type": name, "pad_token_id": 0}
    derived = family_of(derive(config))
    for i in (0, 1, None):
        assert set(map(unordered, derived.edges(config, i))) == set(map(unordered, family.edges(config, i)))


def test_edges_that_a_model_forbids_are_not_kept() -> None:
    assert "scores" not in kinds("olmo2")  # norms on queries and keys
    assert "norm" not in kinds("olmo2")  # all of them behind the layers
    assert {"scores", "heads"} <= kinds("nemotron")
    assert "product" not in kinds("nemotron")  # a squared activation
    assert "product" not in kinds("gpt_oss")  # a clamped one
    assert [edge.shifts for edge in edges("gpt_oss", 0) if edge.kind == "heads"] == [False]  # sinks take their share
    assert "stream" not in kinds("stablelm") | kinds("stablelm", None)  # norms that take the mean away


def test_an_edge_of_one_kind_of_block_is_no_edge_of_another() -> None:
    """Cohere 2 turns pairs of channels in the blocks that slide, and none in the others."""
    assert "scores" not in kinds("cohere2", 0)
    assert "scores" in kinds("cohere2", 3)


def test_a_class_that_does_not_shrink_has_no_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derived_edges, "smaller", lambda *_: iter([{"model_type": "granite", "num_hidden_layers": -1}]))
    derived_edges.held_patterns.cache_clear()
    config = tiny_config("granite").to_dict()
    assert family_of(derive(config)).edges(config, 0) == ()
    derived_edges.held_patterns.cache_clear()


@pytest.mark.parametrize("kind", ["granite", "gpt_neox", "deepseek_v3"])
def test_logits_stay_when_every_edge_is_rewritten_along(kind: str, tmp_path) -> None:
    model, draw = save_tiny(kind, tmp_path), torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 500, (1, 24), generator=draw)
    with torch.no_grad():
        wanted = model(input_ids=tokens, use_cache=False).logits
    checkpoint = HFCheckpoint(tmp_path)
    found, edits = model_edges(checkpoint), []
    for edge in found.values():
        if edge.kind in ("norm", "heads", "product"):
            edits.append(Edit(edge.name, Scale(torch.exp2(2 * torch.rand(edge.width, generator=draw) - 1))))
    if streams := [edge for edge in found.values() if edge.kind == "stream"]:
        edits += [Edit(edge.name) for edge in found.values() if edge.kind == "norm"]
        q = torch.linalg.qr(torch.randn(1, 64, 64, generator=draw)).Q
        edits.append(Edit(STREAM, Orthogonal(q)))
    assert bool(streams) == (kind != "gpt_neox")
    assert len(edits) >= 9
    walker = Walker(Rewritten(checkpoint, edits), torch.device("cpu"), torch.float32)
    hidden = walker.embed(tokens)
    for i in range(len(walker.blocks)):
        walker.advance(walker.load_block(i), i, hidden)
    assert float((walker.logits(hidden, 0) - wanted[0]).abs().max() / wanted.std()) < 1e-4


def test_awq_and_smoothquant_help_a_derived_model(tmp_path) -> None:
    """A few channels of what norms write are ten times as loud as the others, their weights five times as small."""
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    model = save_tiny("granite", folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter[::16] *= 10
            if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
                parameter[:, ::16] /= 5
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    text.write_text(" ".join(f"{i} times {i + 1} is {i * (i + 1)}." for i in range(400)))
    tokens = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))
    wanted = walked(folder, tokens)

    def error(**fields: Any) -> float:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        layers = [{"match": "lm_head", "keep": True}, {"match": "*", "method": "rtn", **fields.pop("layer")}]
        calibration = {"data": str(text), "samples": 2, "length": 32}
        recipe = {"recipe": 1, "name": "t", "calibration": calibration, "layers": layers, "export": [{"to": "qtool"}]}
        quantize(str(folder), recipe | fields, out, dtype="fp32")
        walker = Walker(open_model(str(out)), torch.device("cpu"), torch.float32)
        hidden = walker.embed(tokens)
        for i in range(len(walker.blocks)):
            walker.advance(walker.load_block(i), i, hidden)
        found = torch.stack([walker.logits(hidden, s) for s in range(2)])
        return float((found - wanted).square().mean())

    four, eight = {"weights": "int4-channel"}, {"weights": "int8-channel", "activations": "int8-token"}
    assert error(layer=four, transforms=["awq"]) < 0.5 * error(layer=four)
    assert error(layer=eight, transforms=["smooth"]) < 0.5 * error(layer=eight)
