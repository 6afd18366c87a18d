"""Rewritten models compute the same logits in transformers, and every other rewrite is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool import registry
from qtool.checkpoint._base import Checkpoint, TensorInfo
from qtool.checkpoint.edits import STREAM, Edit, model_edges, read_edits, write_edits
from qtool.checkpoint.families._edges import Edge
from qtool.checkpoint.hf import HFCheckpoint
from qtool.checkpoint.modules import verify
from qtool.checkpoint.rewritten import Rewritten
from qtool.checkpoint.safetensors_io import SafetensorsWriter
from qtool.errors import CheckpointError
from qtool.ops.hadamard import Hadamard
from qtool.ops.orthogonal import Orthogonal
from qtool.ops.permutation import Permutation
from qtool.ops.scale import Scale
from qtool.ops.shift import Shift
from qtool.transforms.ksort import sorting
from tests.conftest import MIXTURES, TINY

NAMES = [*TINY, *MIXTURES]
TOKENS = torch.arange(3, 45).view(2, 21)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def stack_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """gpt-oss as transformers holds it: all experts in one tensor, transposed, columns of gate and up in turns."""
    stacked: dict[str, dict[int, dict[str, Tensor]]] = {}
    plain = {}
    for name, tensor in state.items():
        if ".experts." in name:
            place, _, rest = name.partition(".experts.")
            expert, projection, kind = rest.split(".")
            stacked.setdefault(place, {}).setdefault(int(expert), {})[f"{projection}.{kind}"] = tensor
        else:
            plain[name] = tensor
    for place, experts in stacked.items():
        ordered = [experts[e] for e in range(len(experts))]
        for kind, ending in (("weight", ""), ("bias", "_bias")):
            both = [torch.stack((e[f"gate_proj.{kind}"], e[f"up_proj.{kind}"]), 1).flatten(0, 1) for e in ordered]
            down = [e[f"down_proj.{kind}"] for e in ordered]
            plain[f"{place}.experts.gate_up_proj{ending}"] = torch.stack([t.mT if t.ndim == 2 else t for t in both])
            plain[f"{place}.experts.down_proj{ending}"] = torch.stack([t.mT if t.ndim == 2 else t for t in down])
    return {name: tensor.contiguous() for name, tensor in plain.items()}


def logits(model: Checkpoint, folder: Path) -> Tensor:
    """Those of transformers in float64, float64 [2, T, V]."""
    from transformers import AutoModelForCausalLM

    verify(model)
    state = {name: model.tensor(name).double() for name in model.names()}
    assert all(model.info(name).shape == tensor.shape for name, tensor in state.items())
    if not model.family.separate_experts:
        state = stack_experts(state)
    folder.mkdir()
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in state.items()}
    with SafetensorsWriter(folder / "model.safetensors", infos, {"format": "pt"}) as writer:
        for name, tensor in state.items():
            writer.add(name, tensor)
    (folder / "config.json").write_text(json.dumps(model.config | {"dtype": "float64"}))
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    for module in theirs.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(rms, module, model.family.norm_offset)
    with torch.inference_mode():
        result: Tensor = theirs(TOKENS).logits
    return result


def factors(n: int) -> Scale:
    return Scale(torch.exp(torch.randn(n, dtype=torch.float64, generator=generator())))


def turns(edge: Edge) -> Orthogonal:
    shape = edge.width // edge.dim, edge.dim, edge.dim
    q, _ = torch.linalg.qr(torch.randn(shape, dtype=torch.float64, generator=generator()))
    return Orthogonal(q)


KEYS = "scores model.layers.0.self_attn.k_proj"


def signs(n: int) -> Tensor:
    return (torch.randint(0, 2, (n,), generator=generator()) * 2 - 1).to(torch.int8)


def within(edge: Edge) -> Permutation:
    """Another order of channels inside of each head; of all channels of a product."""
    dim = edge.dim if edge.kind == "heads" else edge.width
    return Permutation(torch.cat([torch.randperm(dim, generator=generator()) + d for d in range(0, edge.width, dim)]))


def in_pairs(edge: Edge) -> Scale:
    """Factors, the same for both channels that the rotary embedding mixes."""
    heads, half = factors(edge.width).factors.view(-1, edge.dim).clone(), edge.rotary // 2
    heads[:, half : edge.rotary] = heads[:, :half]
    return Scale(heads.flatten())


def sorted_keys(edge: Edge) -> Orthogonal:
    """Keys in another order, as far as the rotary embedding leaves that open."""
    sizes = factors(edge.width).factors.view(-1, edge.dim).float()
    return Orthogonal(torch.stack([sorting(own, edge.rotary) for own in sizes]))


def biased(model: Checkpoint, edge: Edge) -> bool:
    return edge.shifts and all(f"{m}.bias" in model.names() for m in (*edge.source, *edge.readers))


def rewrites(model: Checkpoint) -> Iterator[tuple[str, list[Edit]]]:
    """Everything that its edges allow."""
    edges = list(model_edges(model).values())
    norms, heads, products, scores, stream = (
        [edge for edge in edges if edge.kind == kind] for kind in ("norm", "heads", "product", "scores", "stream")
    )
    folded = [Edit(edge.name) for edge in norms]
    yield "factors", [Edit(edge.name, factors(edge.width)) for edge in (*norms, *heads, *products)]
    yield "folded", folded
    shifts = [Edit(e.name, Shift(factors(e.width).factors)) for e in heads if biased(model, e)]
    yield "orders and shifts", [*shifts, *(Edit(edge.name, within(edge)) for edge in (*heads, *products))]
    if scores:
        yield "keys", [Edit(edge.name, op(edge)) for edge in scores for op in (in_pairs, sorted_keys)]
    yield "heads turned", [Edit(edge.name, turns(edge)) for edge in heads]
    hadamards = [Edit(edge.name, Hadamard(edge.dim, signs(edge.width))) for edge in heads]
    if stream:
        width = stream[0].width
        yield "Hadamard", [*hadamards, *folded, Edit(STREAM, Hadamard(width, signs(width)))]
        several = [*folded, Edit(STREAM, turns(stream[0])), Edit(STREAM, within(replace(stream[0], kind="product")))]
        begin = [Edit(edge.name, factors(edge.width)) for edge in (*norms, *products)]
        again = [Edit(edge.name, factors(edge.width)) for edge in (*norms, *heads)]
        yield "all at once", [*begin, *several, *again, *hadamards, *shifts]


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes norms and softmax in float32, whatever the type of the model."""
    import torch.nn.functional as functional

    plain = functional.softmax
    monkeypatch.setattr(functional, "softmax", lambda x, dim=None, dtype=None: plain(x, dim))


def rms(norm: Any, offset: float, x: Tensor) -> Tensor:
    """A norm as papers define it."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (norm.weight + offset)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", NAMES)
def test_logits_stay(name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = HFCheckpoint(tiny_checkpoint(name))
    expected = logits(model, tmp_path / "original")
    for what, edits in rewrites(model):
        changed = Rewritten(model, edits, dtype=torch.float64)
        found = logits(changed, tmp_path / what)
        error = float((found - expected).norm() / expected.norm())
        assert error < 1e-9, (what, error)
        touched = {name for name in changed.names() if name not in model or not same(model, changed, name)}
        assert bool(touched) == bool(edits), what


def same(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    return torch.equal(a.tensor(name).double(), b.tensor(name).double())


def everything(model: Checkpoint) -> list[Edit]:
    return [edit for what, edits in rewrites(model) if what == "all at once" for edit in edits]


@pytest.mark.parametrize("name", ["llama-tied", "phi3"])
def test_rows_are_those_of_the_tensor(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    changed = Rewritten(model := HFCheckpoint(tiny_checkpoint(name)), everything(model))
    for tensor_name in changed.names():
        tensor = changed.tensor(tensor_name)
        assert TensorInfo(tuple(tensor.shape), tensor.dtype) == changed.info(tensor_name)
        assert torch.equal(changed.rows(tensor_name, 3, 11), tensor[3:11])


def test_types_are_the_original_s_but_for_what_is_rounded_anyway(tiny_checkpoint: Callable[[str], Path]) -> None:
    model = HFCheckpoint(tiny_checkpoint("llama"))
    gate = "model.layers.0.mlp.gate_proj"
    changed = Rewritten(model, everything(model), wide=[gate])
    wide = {name for name in changed.names() if changed.tensor(name).dtype == torch.float32}
    assert wide == {f"{gate}.weight"}
    exact = Rewritten(model, everything(model), dtype=torch.float64)
    norm = "model.layers.0.post_attention_layernorm.weight"
    found, expected = (m.tensor(f"{gate}.weight").double() * m.tensor(norm).double() for m in (changed, exact))
    assert (found - expected).norm() < 1e-6 * expected.norm()


def test_a_tied_output_layer_gets_a_matrix_of_its_own_where_it_must(tiny_checkpoint: Callable[[str], Path]) -> None:
    model = HFCheckpoint(tiny_checkpoint("llama-tied"))
    inner = Rewritten(model, [Edit("norm model.layers.0.input_layernorm", factors(64))])
    assert inner.tied
    assert inner.config == model.config
    folded = Rewritten(model, [Edit("norm model.norm")], dtype=torch.float64)
    assert not folded.tied
    assert folded.config["tie_word_embeddings"] is False
    embedding, gain = model.tensor("model.embed_tokens.weight"), model.tensor("model.norm.weight")
    assert torch.equal(folded.tensor("lm_head.weight"), embedding.double() * gain.double())
    assert torch.equal(folded.tensor("model.embed_tokens.weight"), embedding)
    assert folded.tensor("model.norm.weight").eq(1).all()


def test_readers_make_up_for_the_rounding_of_norms(tiny_checkpoint: Callable[[str], Path]) -> None:
    model = HFCheckpoint(tiny_checkpoint("gemma2"))
    norm, up = "model.layers.0.pre_feedforward_layernorm", "model.layers.0.mlp.up_proj"
    changed = Rewritten(model, [Edit(f"norm {norm}", factors(64))], wide=[up])
    after = changed.tensor(f"{up}.weight").double() * (1 + changed.tensor(f"{norm}.weight").double())
    before = model.tensor(f"{up}.weight").double() * (1 + model.tensor(f"{norm}.weight").double())
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)
    assert changed.tensor(f"{norm}.weight").dtype == torch.bfloat16


def test_a_norm_that_is_zero_can_be_folded() -> None:
    edge = "norm model.layers.0.input_layernorm"
    model = Small({"model.layers.0.input_layernorm.weight": torch.tensor([2.0, 0.0])})
    changed = Rewritten(model, [Edit(edge)])
    assert changed.tensor("model.layers.0.input_layernorm.weight").tolist() == [1, 1]
    assert changed.tensor("model.layers.0.self_attn.q_proj.weight").tolist() == [[2, 0], [2, 0]]


class Small(Checkpoint):
    """A Llama with one block and hidden size 2, all ones but for some tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.source, self.family, self.files = "small", registry.load("checkpoint/families", "llama")(), {}
        self.config = {"vocab_size": 2, "hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1}
        self.config |= {"num_attention_heads": 1, "model_type": "llama", "attention_bias": False}
        self.tensors = {n: torch.ones(shape) for n, shape in self.family.shapes(self.config).items()} | tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(tuple(self.tensors[name].shape), self.tensors[name].dtype)

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def fingerprint(self) -> str:
        return "small"


def test_the_original_is_left_alone() -> None:
    model = Small({})
    kept = {name: tensor.clone() for name, tensor in model.tensors.items()}
    changed = Rewritten(model, everything(model))
    assert any(not torch.equal(changed.tensor(name), kept[name]) for name in kept)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.tensors.items())


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (Edit("norm model.layers.9.input_layernorm"), "norm model.layers.9"),
        (Edit("norm model.norm", Shift(torch.ones(64))), "norm model.norm"),
        (Edit("norm model.norm", Scale(torch.ones(32))), "norm model.norm"),
        (Edit("product model.layers.0.mlp.up_proj", Hadamard(4, signs(128))), "product"),
        (Edit("heads model.layers.0.self_attn.v_proj", Permutation(torch.arange(31, -1, -1))), "heads"),
        (Edit("heads model.layers.0.self_attn.v_proj", Shift(torch.ones(32))), "v_proj"),
        (Edit("stream model.embed_tokens", Hadamard(64, signs(64))), "stream model.embed"),
        (Edit(STREAM, Scale(torch.ones(64))), "stream"),
        (Edit(STREAM, Hadamard(64, signs(64))), "fold them away"),
        (Edit(KEYS, Scale(torch.arange(1.0, 33))), "k_proj"),
        (Edit(KEYS, Permutation(torch.arange(32).view(4, 8).flip(0).reshape(-1))), "k_proj"),
        (Edit(KEYS, Permutation(torch.arange(32).view(2, 2, 8).flip(1).reshape(-1))), "k_proj"),
        (Edit(KEYS, Permutation(torch.arange(32).view(2, 2, 4, 2).flip(3).reshape(-1))), "k_proj"),
        (Edit(KEYS, Shift(torch.zeros(32))), "k_proj"),
        (Edit("", Shift(torch.ones(64)), ("model.layers.0.mlp.up_proj",)), "up_proj"),
    ],
)
def test_what_would_change_the_model_is_refused(edit: Edit, found: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match=found):
        Rewritten(HFCheckpoint(tiny_checkpoint("llama")), [edit])


def test_hidden_states_are_not_turned_where_norms_write_them(tiny_checkpoint: Callable[[str], Path]) -> None:
    model = HFCheckpoint(tiny_checkpoint("gemma2"))
    folded = [Edit(name) for name, edge in model_edges(model).items() if edge.kind == "norm"]
    with pytest.raises(CheckpointError, match="does not compute the same with a hadamard there: found stream"):
        Rewritten(model, [*folded, Edit(STREAM, Hadamard(64, signs(64)))])


def test_values_are_not_shifted_where_attention_has_sinks(tiny_checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match="does not compute the same with a shift"):
        edit = Edit("heads model.layers.0.self_attn.v_proj", Shift(torch.ones(64)))
        Rewritten(HFCheckpoint(tiny_checkpoint("gpt_oss")), [edit])


def test_an_operation_that_stays_is_made_up_for(tiny_checkpoint: Callable[[str], Path]) -> None:
    model, module = HFCheckpoint(tiny_checkpoint("llama-biased")), "model.layers.0.mlp.up_proj"
    ops = (Shift(torch.randn(64, generator=generator())), Hadamard(16, signs(64)), factors(64), turns64())
    changed = Rewritten(model, [Edit("", op, (module,)) for op in ops], dtype=torch.float64)
    assert changed.input_ops == {module: ops}
    x = torch.randn(5, 64, dtype=torch.float64, generator=generator())
    expected = x @ model.tensor(f"{module}.weight").double().T + model.tensor(f"{module}.bias").double()
    for op in ops:
        x = op.apply(x)
    found = x @ changed.tensor(f"{module}.weight").T + changed.tensor(f"{module}.bias")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # float32 factors and amounts


def turns64() -> Orthogonal:
    return turns(Edge("stream", (), (), 64, dim=32))


def test_edits_are_stored(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = HFCheckpoint(tiny_checkpoint("llama-biased"))
    edits = (*everything(model), Edit("", Shift(torch.ones(64)), ("model.layers.0.mlp.up_proj",)))
    write_edits(edits, tmp_path / "edits.safetensors", "run 3", ["so", "it is"])
    assert read_edits(tmp_path / "edits.safetensors") == (edits, "run 3", ("so", "it is"))
    tensors = load_file(tmp_path / "edits.safetensors")
    with safe_open(tmp_path / "edits.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors["0.factors"][3] *= 1.01
    save_file(tensors, tmp_path / "edits.safetensors", metadata)
    with pytest.raises(CheckpointError, match="holds other edits than were written"):
        read_edits(tmp_path / "edits.safetensors")
    with SafetensorsWriter(tmp_path / "other.safetensors", {}, {"edits": "[{}]"}):
        pass
    with pytest.raises(CheckpointError, match="no list of edits"):
        read_edits(tmp_path / "other.safetensors")


def test_the_fingerprint_is_that_of_model_and_edits(tiny_checkpoint: Callable[[str], Path]) -> None:
    model = HFCheckpoint(tiny_checkpoint("llama"))
    norm = "norm model.norm"
    one, other = Scale(torch.ones(64)), Scale(torch.ones(64).index_fill(0, torch.tensor(5), 1.5))
    lists = [], [Edit(norm)], [Edit(norm, one)], [Edit(norm, other)], [Edit("norm model.layers.0.input_layernorm", one)]
    prints = {Rewritten(model, edits).fingerprint() for edits in lists}
    assert len(prints | {model.fingerprint()}) == 6
    assert Rewritten(model, [Edit(norm, Scale(torch.ones(64)))]).fingerprint() in prints
