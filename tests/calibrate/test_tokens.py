"""Samples are windows of the sources' text, chosen by the seed, in the shares that the recipe gives."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import types
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.calibrate import documents as documents_module
from qtool.calibrate import tokens as tokens_module
from qtool.calibrate.long_text import file_ids
from qtool.calibrate.tokenizer import beginning, load_tokenizer
from qtool.calibrate.tokens import load_tokens, shares
from qtool.checkpoint.gguf_checkpoint import GGUFCheckpoint
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import CheckpointError
from qtool.recipe.load import load_recipe
from qtool.recipe.schema import Calibration, Source
from tests.evaluate.test_run import add_bos


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return HFCheckpoint(tiny_checkpoint("llama"))


@pytest.fixture
def beginner(tiny_checkpoint, tmp_path):
    """A checkpoint whose tokenizer begins every text with token 1."""
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "beginner")
    add_bos(folder)
    return HFCheckpoint(folder)


def stream_of(checkpoint, *texts):
    tokenizer = load_tokenizer(checkpoint)
    return list(itertools.chain(*(tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)))


def numbers(path, start, count):
    """A text in which no stretch occurs twice."""
    path.write_text(" ".join(str(n * n) for n in range(start, start + count)), encoding="utf-8")
    return str(path)


def places(tokens, stream):
    """Where in a token stream each sample begins."""
    found = []
    for row in tokens.tolist():
        starts = [i for i in range(len(stream) - len(row) + 1) if stream[i : i + len(row)] == row]
        assert len(starts) == 1, "not in the text, or not only once"
        found += starts
    return found


def test_windows_are_disjoint_pieces_of_the_text(checkpoint, tmp_path):
    data = numbers(tmp_path / "a.txt", 100, 800)
    found = load_tokens(Calibration(data=data, samples=20, length=32), checkpoint)
    assert (found.shape, found.dtype) == ((20, 32), torch.int64)
    starts = places(found, stream_of(checkpoint, (tmp_path / "a.txt").read_text()))
    assert len({start // 32 for start in starts}) == 20
    assert {start % 32 for start in starts} == {0}
    assert starts != sorted(starts)


def test_the_seed_decides(checkpoint):
    found = [load_tokens(Calibration(samples=16, length=32, seed=seed), checkpoint) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    rows = [set(map(tuple, tokens.tolist())) for tokens in found]
    assert len(rows[0] & rows[2]) < 8


def test_documents_follow_each_other_without_a_seam(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "PIECE", 150)
    data = numbers(tmp_path / "a.txt", 100, 300)
    text = (tmp_path / "a.txt").read_text()
    stream = stream_of(checkpoint, *(text[i : i + 150] for i in range(0, len(text), 150)))
    count = len(stream) // 16
    found = load_tokens(Calibration(data=data, samples=count, length=16), checkpoint)
    assert sorted(found.tolist()) == sorted(stream[i * 16 : i * 16 + 16] for i in range(count))


def test_all_of_a_text_that_is_just_long_enough(checkpoint, tmp_path):
    data = numbers(tmp_path / "a.txt", 100, 100)
    length = len(stream_of(checkpoint, (tmp_path / "a.txt").read_text()))
    assert load_tokens(Calibration(data=data, samples=1, length=length), checkpoint).shape == (1, length)
    with pytest.raises(CheckpointError) as caught:
        load_tokens(Calibration(data=data, samples=1, length=length + 1), checkpoint)
    assert str(caught.value) == (
        f"calibration data {data} is too short: wanted 1 samples of {length + 1} tokens, found {length} tokens, "
        "enough for 0; give more text, or lower calibration.samples or calibration.length"
    )
    with pytest.raises(CheckpointError, match=f"found {length} tokens, enough for {length // 16};"):
        load_tokens(Calibration(data=data, samples=length // 16 + 1, length=16), checkpoint)


def test_an_empty_text(checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(CheckpointError, match="found 0 tokens, enough for 0"):
        load_tokens(Calibration(data=str(tmp_path / "a.txt"), samples=1, length=16), checkpoint)


def test_endless_sources_are_read_as_far_as_there_is_choice(checkpoint, monkeypatch):
    hub = types.ModuleType("datasets")
    rows = map(lambda n: {"text": f"{n} {n * n} {n**3} "}, itertools.count(1))  # noqa: C417 (it would be closed)
    hub.load_dataset = lambda *_, **__: rows
    monkeypatch.setitem(sys.modules, "datasets", hub)
    found = load_tokens(Calibration(data="hf:endless", samples=4, length=16), checkpoint)
    read = int(next(rows)["text"].split()[0]) - 1
    stream = stream_of(checkpoint, *(f"{n} {n * n} {n**3} " for n in range(1, read + 1)))
    assert tokens_module.CHOICE * 4 * 16 <= len(stream) < tokens_module.CHOICE * 4 * 16 + 50
    assert len(set(places(found, stream))) == 4


def test_samples_begin_as_the_tokenizer_begins_a_text(beginner, checkpoint):
    calibration = Calibration(samples=16, length=32)
    bare, begun = load_tokens(calibration, checkpoint), load_tokens(calibration, beginner)
    assert set(begun[:, 0].tolist()) == {1}
    assert torch.equal(begun[:, 1:], bare[:, 1:])
    assert not (bare[:, 0] == 1).any()
    assert (beginning(load_tokenizer(beginner)), beginning(load_tokenizer(checkpoint))) == (1, None)


def test_a_mixture_takes_from_each_source(checkpoint, tmp_path):
    data = [numbers(tmp_path / "a.txt", 100, 500), numbers(tmp_path / "b.txt", 5000, 500)]
    mixture = (Source(data=data[0], weight=3), Source(data=data[1], weight=1.5))
    found = load_tokens(Calibration(data=mixture, samples=10, length=16), checkpoint)
    streams = [stream_of(checkpoint, (tmp_path / name).read_text()) for name in ("a.txt", "b.txt")]
    first = places(found[:7], streams[0])
    second = places(found[7:], streams[1])
    assert len(set(first)) == 7
    assert len(set(second)) == 3
    assert load_tokens(Calibration(data=mixture, samples=10, length=16, seed=1), checkpoint).tolist() != found.tolist()


def test_a_source_whose_share_is_nothing_is_not_opened(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "sampled", None)
    mixture = (Source(data="builtin", weight=50), Source(data="none.txt", weight=1), Source(data="self", weight=1))
    assert load_tokens(Calibration(data=mixture, samples=4, length=16), checkpoint).shape == (4, 16)


@pytest.mark.parametrize(
    ("weights", "samples", "counts"),
    [
        ((1,), 5, [5]),
        ((1, 1, 1), 7, [3, 2, 2]),
        ((2, 1, 1), 7, [3, 2, 2]),  # 3.5, 1.75, 1.75
        ((6, 3, 1), 8, [5, 2, 1]),  # 4.8, 2.4, 0.8
        ((0.1, 0.2, 0.7), 10, [1, 2, 7]),
        ((100, 1), 5, [5, 0]),
    ],
)
def test_shares_by_largest_remainder(weights, samples, counts):
    assert shares(tuple(Source(data="builtin", weight=w) for w in weights), samples) == counts


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 200))
def test_shares_are_as_close_as_whole_numbers_get(weights, samples):
    found = shares(tuple(Source(data="builtin", weight=w) for w in weights), samples)
    exact = [Fraction(samples * w, sum(weights)) for w in weights]
    assert sum(found) == samples
    assert all(abs(f - e) < 1 for f, e in zip(found, exact, strict=True))
    up = [e - int(e) for f, e in zip(found, exact, strict=True) if f > e]
    down = [e - int(e) for f, e in zip(found, exact, strict=True) if f <= e and e != int(e)]
    assert not up or not down or min(up) >= max(down)


def test_built_in_prose_is_enough_for_what_recipes_ask_by_default(demo_gguf):
    """For a vocabulary of 49152, and with room for larger ones, whose tokens are longer."""
    calibration = Calibration()
    assert calibration.data == "builtin"
    ample = calibration.model_copy(update={"samples": calibration.samples * 3 // 2})
    for asked in (calibration, ample):
        assert load_tokens(asked, GGUFCheckpoint(demo_gguf)).shape == (asked.samples, asked.length)


ROWS = {
    ".txt": "Nothing is said here that is not said again. " * 60,
    ".json": json.dumps([{"instruction": "Say it.", "output": "It was said, and said again. " * 3}] * 40),
    ".jsonl": (json.dumps({"prompt": "Say it.", "completion": "It was said, and said again. " * 3}) + "\n") * 40,
}


@pytest.mark.parametrize("suffix", ROWS)
def test_every_kind_of_file_is_a_source_that_recipes_may_name(suffix, checkpoint, tmp_path):
    path = tmp_path / f"said{suffix}"
    path.write_text(ROWS[suffix])
    told = load_recipe("w4a16-gptq", (f"calibration.data={path}", "calibration.samples=4", "calibration.length=16"))
    said = load_tokenizer(checkpoint).decode(load_tokens(told.calibration, checkpoint).flatten().tolist())
    assert "said again" in said


def test_an_id_beyond_any_vocabulary_is_found_in_the_tokens(tiny_checkpoint, tmp_path):
    """Whoever embeds them says that tokenizer and model do not belong together; counting them ends nothing."""
    folder, text = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "m"), tmp_path / "text.txt"
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["Ġa"] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    text.write_text("a " * 1_200_000, encoding="utf-8")
    checkpoint = HFCheckpoint(folder)
    tokens = load_tokens(Calibration(data=str(text), samples=1, length=16), checkpoint)
    assert int(tokens.max()) == 2**31
    ids, _ = file_ids(text, load_tokenizer(checkpoint), 1000)
    assert max(ids) == 2**31
