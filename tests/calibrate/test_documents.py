"""Texts of every source, whole and in order; files that lie get one line, with the place."""

from __future__ import annotations

import ast
import itertools
import json
import pydoc_data.topics
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from qtool.calibrate import chat, child
from qtool.calibrate import documents as module
from qtool.calibrate.documents import documents
from qtool.errors import CheckpointError, HubError, MissingExtra
from scripts import prose

CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
SHAREGPT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
LAID_OUT = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n"


@pytest.fixture
def tokenizer(tiny_checkpoint):
    return AutoTokenizer.from_pretrained(tiny_checkpoint("llama"))


def texts(source, tokenizer=None, chat_template=False):
    return list(documents(str(source), tokenizer, chat_template))


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_builtin_is_the_language_reference_in_alphabetical_order(monkeypatch):
    topics = pydoc_data.topics.topics
    want = [topics[name] for name in sorted(topics)]
    assert texts("builtin") == want
    monkeypatch.setattr(pydoc_data.topics, "topics", dict(reversed(topics.items())))
    assert texts("builtin") == want


def test_code_is_source_of_modules_that_compiles_and_that_nothing_is_evaluated_on():
    found = texts("code")
    assert len(found) > 25
    assert sum(map(len, found)) > 400_000
    for source in found:
        compile(source, "module", "exec", dont_inherit=True, flags=ast.PyCF_ONLY_AST)
    evaluated = {*prose.code().split("\n\n"), *prose.prose().split("\n\n")}
    shared = [part for source in found for part in source.split("\n\n") if len(part) > 200 and part in evaluated]
    assert not shared


def test_text_comes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 10)
    (tmp_path / "a.txt").write_text("Zwölf Boxkämpfer jagen", encoding="utf-8")
    assert texts(tmp_path / "a.txt") == ["Zwölf Boxk", "ämpfer jag", "en"]


def test_text_that_is_none(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(CheckpointError) as caught:
        texts(path)
    assert str(caught.value) == f"{path} is not text: wanted UTF-8, found byte 3 of a piece"


def test_files_that_are_not_there_or_not_files(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("none.txt", "folder.jsonl", "none.parquet"):
        with pytest.raises(CheckpointError) as caught:
            texts(tmp_path / name)
        hint = "give a .txt, .json, .jsonl or .parquet file"
        assert str(caught.value) == f"there is no calibration file {tmp_path / name}; {hint}"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_files_that_the_system_cannot_read(name, tmp_path):
    (tmp_path / name).symlink_to("/proc/self/mem")  # a file by all accounts; reading its start fails
    with pytest.raises(CheckpointError, match=rf"{name} (cannot be read: Input/output error|is not a readable Parq)"):
        texts(tmp_path / name)


ROWS = [
    {"text": "one"},
    "two",
    {"content": "three", "id": 3},
    {"prompt": "four"},
    {"text": ""},
    {"messages": [], "text": "six"},
    {"messages": None, "text": "seven"},
    {"text": "eight", "messages": CHAT},
    {"conversations": SHAREGPT},
    CHAT,
    {"messages": CHAT, "tools": [1]},
]
PLAIN = ["one", "two", "three", "four", "", "six", "seven", *["Why?\n\nBecause."] * 4]


def test_rows_of_json(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", *ROWS)
    assert texts(path) == PLAIN
    assert texts(path, tokenizer, chat_template=True) == PLAIN[:7] + [LAID_OUT] * 4


def test_lines_without_anything_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "one"}\n  \r\n{"text": "zw\\u00f6lf"}')
    assert texts(tmp_path / "a.jsonl") == ["one", "zwölf"]


def test_halves_of_characters(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b"}\n{"text": "\\ud83d\\ude00"}')
    assert texts(tmp_path / "a.jsonl") == ["a? b", "\N{GRINNING FACE}"]


@pytest.mark.parametrize(
    "line",
    [b'{"text": ', b"hello", b"{'text': 1}", b'"\xff"', b"[" * 200_000, b'{"text": "a"} {}'],
    ids=lambda b: b[:9],
)
def test_broken_lines_are_named(line, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    found = documents(str(path), None, False)
    assert next(found) == "fine"
    with pytest.raises(CheckpointError) as caught:
        next(found)
    assert str(caught.value).startswith(f"{path}:3 is not JSON: found ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"words": "a", "id": 1}, "words, id"),
        ({}, ""),
        ({"text": 7}, "text"),
        ({"text": {"a": 1}}, "text"),
        (7, "int"),
        (None, "NoneType"),
        (True, "bool"),
        ({"k" * 500: 1}, "k" * 100),
    ],
    ids=lambda value: str(value)[:30],
)
def test_rows_without_text(row, found, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", row, {"text": "fine"}, row, {"text": "too"})
    wanted = "messages, conversations, conversation, text, content, prompt, or what is asked and answered"
    wrong = f"row 1 of {path} has no text: wanted {wanted}, found {found}"
    told = []
    assert list(documents(str(path), None, False, told.append)) == ["fine", "too"]
    assert told == [f"2 of 4 rows of {path} have no text and are left out; the first: {wrong}"]
    with pytest.raises(CheckpointError) as caught:
        texts(write_lines(path, row, row))
    assert str(caught.value) == wrong


def test_patience_ends(hub):
    hub.rows = map(lambda i: {"id": i}, itertools.count())  # noqa: C417 (a generator would be closed)
    with pytest.raises(CheckpointError, match=r"^row 1 of hf:some/set has no text"):
        texts("hf:some/set")
    assert next(hub.rows) == {"id": module.PATIENCE}


def test_rows_that_do_not_fit_are_told_of_when_nobody_reads_on(hub):
    hub.rows, told = [{"id": 1}, {"text": "one"}, {"text": "two"}], []
    found = documents("hf:some/set", None, False, told.append)
    assert next(found) == "one"
    found.close()
    assert [text.partition(" of hf:")[0] for text in told] == ["1 of 2 rows"]


PARTS = [{"type": "text", "text": "Why"}, {"type": "image", "url": "a.png"}, {"type": "text", "text": "?"}]
CALL = [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}]
ASKED = [
    ({"messages": [{"role": "user", "content": PARTS}, CHAT[1]]}, "Why?\n\nBecause.", LAID_OUT),
    (
        {"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": CALL}, CHAT[1]]},
        "Why?\n\nBecause.",
        LAID_OUT.replace("Because.", "<|im_end|>\n<|im_start|>assistant\nBecause.", 1),
    ),
    ({"instruction": "Why?", "input": "", "output": "Because."}, "Why?\n\nBecause.", LAID_OUT),
    (
        {"instruction": "Why?", "context": "Sky.", "response": "Because.", "category": "qa"},
        "Why?\n\nSky.\n\nBecause.",
        LAID_OUT.replace("Why?", "Why?\n\nSky."),
    ),
    ({"prompt": "Why?", "completion": "Because."}, "Why?\n\nBecause.", LAID_OUT),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "Why?\n\nBecause.", LAID_OUT),
    ({"question": "Why?", "answer": "Because."}, "Why?\n\nBecause.", LAID_OUT),
    ({"instruction": "Why?", "output": "Because.", "text": "Both."}, "Both.", "Both."),
    ({"id": 1, "conversation": SHAREGPT}, "Why?\n\nBecause.", LAID_OUT),
    ({"prompt": "Alone"}, "Alone", "Alone"),
]


def test_chats_as_people_keep_them(tmp_path, tokenizer):
    rows, joined, laid_out = zip(*ASKED, strict=True)
    path = write_lines(tmp_path / "a.jsonl", *rows)
    assert texts(path) == list(joined)
    assert texts(path, tokenizer, chat_template=True) == list(laid_out)


def test_templates_see_calls_of_tools(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.tool_calls[0].function.name }}{% endfor %}"
    path = write_lines(tmp_path / "a.jsonl", {"messages": [{"role": "assistant", "content": None, "tool_calls": CALL}]})
    assert texts(path, tokenizer, chat_template=True) == ["<|im_start|>look"]


@pytest.mark.parametrize(
    ("spelled", "found"),
    [
        ('[{"text": "one"}, "two"]', ["one", "two"]),
        ('{"version": 1, "data": [{"text": "one"}]}', ["one"]),
        ('{"text": "one", "tags": ["a"]}', ["one"]),
        ('{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ('{"messages": ' + json.dumps(CHAT) + "}", ["Why?\n\nBecause."]),
    ],
)
def test_json_files(spelled, found, tmp_path):
    (tmp_path / "a.json").write_text(spelled)
    assert texts(tmp_path / "a.json") == found


@pytest.mark.parametrize("content", [b"[1, ", b"\xff", b"[" * 100_000, b""], ids=lambda b: str(b[:4]))
def test_broken_json_files(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.json is (not JSON: found [^\n]+|damaged: wanted UTF-8 text[^\n]+)$"):
        texts(tmp_path / "a.json")


def test_limits_of_files_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LINE", 24)
    monkeypatch.setattr(module, "ARRAY", 1 << 20)
    path = write_lines(tmp_path / "a.jsonl", {"text": "a" * 9}, {"text": "a" * 90})
    with pytest.raises(CheckpointError, match=r"a\.jsonl:2 is too long: wanted at most 24 bytes a row"):
        texts(path)
    (tmp_path / "a.json").write_text('["' + "a" * (1 << 20) + '"]')
    with pytest.raises(CheckpointError, match=r"a\.json is too large: wanted at most 1 MiB, found 1048580 bytes"):
        texts(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "wanted an end within 1 seconds",
        ),
        ("{{ (messages | length) ** (9 ** 9) }}", "wanted an end within 1 seconds"),
        ("{{ 'a' * 10 ** 12 }}", "found"),
        ("{% for i in range(9) %}{{ 'a' * 100000 }}{% endfor %}", "wanted at most 100000 bytes, found more"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "found access to attribute"),
    ],
)
def test_chat_templates_that_mean_harm(template, found, tmp_path, tokenizer, monkeypatch):
    fine = tokenizer.chat_template
    tokenizer.chat_template = "{% if messages | length > 2 %}" + template + "{% else %}" + fine + "{% endif %}"
    monkeypatch.setattr(chat, "SECONDS", 1.0)
    monkeypatch.setattr(child, "LONGEST", 100_000)
    path = write_lines(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": CHAT * 2}, {"messages": CHAT})
    told = []
    assert list(documents(str(path), tokenizer, True, told.append)) == [LAID_OUT, LAID_OUT]
    (remark,) = told
    assert remark.startswith(
        f"1 of 3 rows of {path} have no text and are left out; the first: the chat template cannot"
    )
    assert found in remark


@pytest.mark.parametrize(
    "message",
    [
        "Why?",
        {"role": "user"},
        {"content": "Why?"},
        {"role": "user", "content": None},
        {"role": 1, "content": "a"},
        {"role": "user", "content": [{"type": "image"}]},
    ],
    ids=str,
)
def test_messages_without_text(message, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"messages": [CHAT[0], message]})
    with pytest.raises(CheckpointError) as caught:
        texts(path)
    assert str(caught.value) == f"a message of row 1 of {path}: wanted text as role and content, found {message}"


@pytest.mark.parametrize(
    "template",
    [None, "{{ raise_exception('roles must alternate') }}", "{{ messages[9]['role'] }}", "{% if %}"],
    ids=str,
)
def test_chat_templates_that_fail(template, tmp_path, tokenizer):
    tokenizer.chat_template = template
    path = write_lines(tmp_path / "a.jsonl", {"messages": CHAT})
    with pytest.raises(CheckpointError, match=rf"^the chat template cannot lay out row 1 of {path}: found [^\n]+$"):
        texts(path, tokenizer, chat_template=True)


def test_rows_of_parquet(tmp_path, tokenizer):
    rows = [{"id": i, "text": f"text {i}"} for i in range(200)]  # more than one batch
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=50)
    assert texts(tmp_path / "a.parquet") == [row["text"] for row in rows]
    chats = pyarrow.Table.from_pylist([{"messages": CHAT, "text": None}, {"messages": None, "text": "plain"}])
    pyarrow.parquet.write_table(chats, tmp_path / "b.parquet")
    assert texts(tmp_path / "b.parquet", tokenizer, chat_template=True) == [LAID_OUT, "plain"]


def test_damaged_parquet(tmp_path):
    table = pyarrow.Table.from_pylist([{"text": f"some text {i}"} for i in range(500)])
    pyarrow.parquet.write_table(table, tmp_path / "whole.parquet")
    whole, path = (tmp_path / "whole.parquet").read_bytes(), tmp_path / "a.parquet"
    for content in (b"", b"PAR1", b"text" * 50, whole[:-1], whole[:200] + b"\0" * 400 + whole[600:], whole[100:]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"^{path} is not a readable Parquet file: found [^\n]+$"):
            texts(path)


@pytest.mark.parametrize(("package", "source"), [("pyarrow", "a.parquet"), ("datasets", "hf:some/set")])
def test_packages_that_are_missing(package, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra) as caught:
        texts(source)
    hint = "install it with: pip install 'datasets>=3.0' 'pyarrow>=15.0'"
    assert str(caught.value) == f"reading {source} needs the package {package}; {hint}"


@pytest.fixture
def hub(monkeypatch):
    """A module `datasets` of our own: what it was asked for, and rows to give."""
    fake = types.ModuleType("datasets")
    fake.asked, fake.rows = [], []

    def load_dataset(repo, config=None, *, split, streaming):
        fake.asked.append((repo, config, split, streaming))
        return fake.rows

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hf:some/set", ("some/set", None, "train", True)),
        ("hf:some/set:small", ("some/set", "small", "train", True)),
        ("hf:some/set:small:test", ("some/set", "small", "test", True)),
        ("hf:some/set::test", ("some/set", None, "test", True)),
    ],
)
def test_rows_of_the_hub(source, asked, hub, tokenizer):
    hub.rows = [{"text": "one"}, {"messages": CHAT}]
    assert texts(source, tokenizer, chat_template=True) == ["one", LAID_OUT]
    assert hub.asked == [asked]


def test_no_more_rows_are_fetched_than_asked_for(hub):
    hub.rows = map(lambda i: {"text": str(i)}, itertools.count())  # noqa: C417 (a generator would be closed)
    assert list(itertools.islice(documents("hf:endless", None, False), 3)) == ["0", "1", "2"]
    assert next(hub.rows) == {"text": "3"}


def test_a_hub_that_refuses(hub):
    def rows():
        yield {"text": "one"}
        raise ConnectionError("no\n  route")

    hub.rows = rows()
    with pytest.raises(HubError) as caught:
        texts("hf:some/set")
    assert str(caught.value) == "dataset some/set cannot be read: found no route"
