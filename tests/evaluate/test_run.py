"""The streamed evaluation against transformers' own forward pass in float64 and a loop over positions."""

import json
import math
import pydoc_data.topics
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from qtool.artifact.gguf import GGUF
from qtool.checkpoint._base import Layer, QuantizedCheckpoint
from qtool.checkpoint.open import open_checkpoint
from qtool.errors import CheckpointError, UsageError
from qtool.evaluate.run import evaluate
from qtool.formats.int import Int
from qtool.pipeline import evaluate as stage
from tests.artifact.test_gguf import neutral

CONTEXT, CHUNKS = 48, 3
SETTINGS = {"context": CONTEXT, "chunks": CHUNKS, "device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(pydoc_data.topics.topics["assert"][:2000], encoding="utf-8")
    return path


def noisy_copy(folder, target, share=0.15):
    """The same model with every matrix a little off, as quantization leaves it."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    for shard in target.glob("*.safetensors"):
        tensors = load_file(shard)
        generator = torch.Generator().manual_seed(3)
        for name, t in tensors.items():
            if t.ndim == 2 and "embed" not in name:
                noise = torch.randn(t.shape, generator=generator) * t.float().std() * share
                tensors[name] = (t.float() + noise).to(t.dtype)
        save_file(tensors, shard, metadata={"format": "pt"})
    return target


def load_reference(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()


def token_ids(folder, text):
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text.read_text(encoding="utf-8")).ids


def chunks_of(folder, text, bos=None):
    ids = token_ids(folder, text)
    rows = [ids[c * CONTEXT : (c + 1) * CONTEXT] for c in range(CHUNKS)]
    return [[bos, *row[1:]] for row in rows] if bos is not None else rows


def reference(model, base, chunks):
    """llama-perplexity's protocol, one position after the other."""
    found = {"nll": [], "base_nll": [], "kld": [], "dp": [], "same": []}
    for chunk in chunks:
        with torch.no_grad():
            q_rows, p_rows = (torch.log_softmax(m(torch.tensor([chunk])).logits[0], -1).numpy() for m in (model, base))
        for i in range(CONTEXT // 2, CONTEXT - 1):
            q, p, token = q_rows[i], p_rows[i], chunk[i + 1]
            found["nll"].append(-q[token])
            found["base_nll"].append(-p[token])
            found["kld"].append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
            found["dp"].append(math.exp(q[token]) - math.exp(p[token]))
            found["same"].append(q.argmax() == p.argmax())
    return {name: np.array(values, dtype=np.float64) for name, values in found.items()}


def assert_measured(found, want):
    nll, kld = want["nll"], want["kld"]
    assert found.tokens == len(nll) == CHUNKS * (CONTEXT // 2 - 1)
    assert found.chunks == CHUNKS
    assert found.ppl == pytest.approx(math.exp(nll.mean()), rel=2e-5)
    assert found.ppl_error == pytest.approx(math.exp(nll.mean()) * nll.std() / math.sqrt(len(nll) - 1), rel=2e-5)
    assert found.base_ppl == pytest.approx(math.exp(want["base_nll"].mean()), rel=2e-5)
    assert found.kld_mean == pytest.approx(kld.mean(), rel=1e-4)
    assert found.kld_error == pytest.approx(kld.std() / math.sqrt(len(kld) - 1), rel=1e-4)
    assert found.kld_median == pytest.approx(np.median(kld), rel=1e-3)
    assert found.kld_p99 == pytest.approx(np.quantile(kld, 0.99), rel=1e-3)
    assert found.kld_max == pytest.approx(kld.max(), rel=1e-3)
    assert found.top1 == want["same"].mean()
    assert found.dp_mean == pytest.approx(want["dp"].mean(), rel=1e-3, abs=1e-7)
    assert found.rms_dp == pytest.approx(math.sqrt((want["dp"] ** 2).mean()), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2"], ids=["untied", "tied"])
def test_equals_a_slow_loop_over_transformers(name, tiny_checkpoint, tmp_path, text):
    folder = tiny_checkpoint(name)
    noisy = noisy_copy(folder, tmp_path / "noisy")
    steps = []
    found = evaluate(
        open_checkpoint(str(noisy)),
        open_checkpoint(str(folder)),
        text,
        **SETTINGS,
        progress=lambda done, total, _: steps.append((done, total)),
    )
    want = reference(load_reference(noisy), load_reference(folder), chunks_of(folder, text))
    assert want["kld"].mean() > 0.01  # far from rounding errors
    assert_measured(found, want)
    assert (found.text, found.context, found.runtime) == ("prose.txt", CONTEXT, "qtool")
    total = 2 * 2 + CHUNKS
    assert steps == [(done, total) for done in range(total + 1)]


class EightBitInputs(QuantizedCheckpoint):
    """A plain model whose down projections round their inputs to 8 bits per token."""

    def __init__(self, plain):
        self.plain, self.source, self.config, self.family = plain, plain.source, plain.config, plain.family
        self.files = plain.files
        self.names, self.info, self.tensor, self.fingerprint = plain.names, plain.info, plain.tensor, plain.fingerprint
        layer = Layer(Int(bits=8, group="channel"), Int(bits=8, group="token", scales="minmax", scale_dtype="fp32"))
        self.layers = {f"model.layers.{i}.mlp.down_proj": layer for i in range(2)}

    names = info = tensor = fingerprint = matrix = None


def test_quantized_activations_are_simulated(tiny_checkpoint, text):
    folder = tiny_checkpoint("llama")
    model = load_reference(folder)

    def rounded(_, inputs):
        scale = inputs[0].abs().amax(-1, keepdim=True) / 127.5
        return (inputs[0] / scale).round().clamp(-128, 127) * scale

    for block in model.model.layers:
        block.mlp.down_proj.register_forward_pre_hook(rounded)
    plain = open_checkpoint(str(folder))
    found = evaluate(EightBitInputs(plain), plain, text, **SETTINGS, progress=lambda *_: None)
    want = reference(model, load_reference(folder), chunks_of(folder, text))
    assert found.kld_mean == pytest.approx(want["kld"].mean(), rel=0.05)  # a rounding that falls the other way shows
    assert found.kld_mean > 1e-6


def add_bos(folder):
    """Lets the tokenizer begin every text with token 1, as Llama's does."""
    from tokenizers import processors

    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.save(path)


def test_every_chunk_begins_with_bos_where_the_tokenizer_adds_it(tiny_checkpoint, tmp_path, text):
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    add_bos(folder)
    model = load_reference(folder)
    chunks = chunks_of(folder, text)
    assert [c[0] == 1 for c in chunks] == [True, False, False]
    found = evaluate(open_checkpoint(str(folder)), None, text, **SETTINGS, progress=lambda *_: None)
    want = [math.exp(reference(model, model, c)["nll"].mean()) for c in (chunks_of(folder, text, bos=1), chunks)]
    assert found.ppl == pytest.approx(want[0], rel=2e-5)
    assert abs(want[1] / want[0] - 1) > 1e-3  # the case tells the two apart
    assert found.kld_mean is None


def test_all_chunks_of_the_text_by_default(tiny_checkpoint, text):
    folder = tiny_checkpoint("llama")
    ids = len(token_ids(folder, text))
    found = evaluate(open_checkpoint(str(folder)), None, text, **{**SETTINGS, "chunks": None}, progress=lambda *_: None)
    assert found.chunks == ids // CONTEXT > CHUNKS


def refused(folder, text, baseline=None, **changes):
    base = None if baseline is None else open_checkpoint(str(baseline))
    evaluate(open_checkpoint(str(folder)), base, text, **{**SETTINGS, **changes}, progress=lambda *_: None)


def test_a_text_shorter_than_a_chunk(tiny_checkpoint, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(
        UsageError, match=r"shorter than one chunk: wanted at least 48 tokens, found \d+; give a longer"
    ):
        refused(tiny_checkpoint("llama"), short)


def test_a_text_that_is_not_there_or_not_utf8(tiny_checkpoint, tmp_path):
    with pytest.raises(UsageError, match=r"wanted a readable UTF-8 file, found .*No such file"):
        refused(tiny_checkpoint("llama"), tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(UsageError, match=r"wanted a readable UTF-8 file, found .*can't decode"):
        refused(tiny_checkpoint("llama"), tmp_path / "latin.txt")


@pytest.mark.parametrize("changes", [{"context": 3}, {"chunks": 0}], ids=str)
def test_settings_without_sense(tiny_checkpoint, text, changes):
    with pytest.raises(UsageError, match="wanted a context of at least 4 tokens and at least 1 chunk"):
        refused(tiny_checkpoint("llama"), text, **changes)


def test_llama_cpp_finds_what_we_find(tiny_checkpoint, tmp_path, text):
    """The file holds 32-bit floats: with blocks, llama.cpp rounds activations too, and both are right."""
    folder = tiny_checkpoint("qwen2")
    (tmp_path / "out").mkdir()
    noisy = noisy_copy(folder, tmp_path / "noisy")
    path = GGUF().write(neutral(noisy, tmp_path / "work"), tmp_path / "out", {})[0]
    found = {
        runtime: evaluate(
            GGUF().open(path), open_checkpoint(str(folder)), text, **SETTINGS, progress=lambda *_: None, runtime=runtime
        )
        for runtime in ("qtool", "llama.cpp")
    }
    ours, theirs = (
        {name: value for name, value in found[r].model_dump().items() if isinstance(value, int | float)}
        for r in ("qtool", "llama.cpp")
    )
    assert {"ppl", "base_ppl", "kld_mean", "top1"} <= theirs.keys()
    assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-6)
    assert found["llama.cpp"].runtime == "llama.cpp"
    assert found["llama.cpp"].kld_mean > 0.01
    want = reference(load_reference(noisy), load_reference(folder), chunks_of(folder, text))
    assert theirs["kld_mean"] == pytest.approx(want["kld"].mean(), rel=1e-3)


@pytest.mark.parametrize("limit", [None, 100_000], ids=["whole", "in parts"])
def test_llama_cpp_finds_the_file_in_a_folder(tiny_checkpoint, tmp_path, text, limit):
    (tmp_path / "out").mkdir()
    model = neutral(tiny_checkpoint("qwen2"), tmp_path / "work")
    files = GGUF(split_max_size=limit).write(model, tmp_path / "out", {})
    assert (len(files) > 3) == (limit is not None)
    options = stage.EvaluateOptions(str(tmp_path / "out"), None, text, context=SETTINGS["context"], chunks=2)
    ours, theirs = (stage.run(replace(options, runtime=runtime)) for runtime in ("qtool", "llama.cpp"))
    assert theirs.ppl == pytest.approx(ours.ppl, rel=1e-4)


def test_llama_cpp_wants_a_gguf_file(tiny_checkpoint, text):
    with pytest.raises(UsageError, match=r"--runtime llama\.cpp: wanted a GGUF file, found "):
        refused(tiny_checkpoint("llama"), text, runtime="llama.cpp")


def test_models_with_different_vocabularies(tiny_checkpoint, tmp_path, text):
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint("llama")
    larger = tmp_path / "larger"
    shutil.copytree(folder, larger)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(520, mean_resizing=False)
    model.save_pretrained(larger)
    with pytest.raises(CheckpointError, match="wanted one vocabulary, found 520 and 512 tokens"):
        refused(larger, text, folder)


def test_a_tokenizer_of_another_model(tiny_checkpoint, tmp_path, text):
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {k: v + 300 * (v > 250) for k, v in content["model"]["vocab"].items()}
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="do not belong together: wanted token ids below 512, found"):
        refused(folder, text)


def test_a_model_without_tokenizer(tiny_checkpoint, tmp_path, text):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_checkpoint("llama"), bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer: wanted one of tokenizer\.json"):
        refused(bare, text)
    (bare / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"the tokenizer of .* cannot be read"):
        refused(bare, text)
