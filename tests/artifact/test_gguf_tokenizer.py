"""Tokenizers in GGUF files: llama.cpp cuts text as the original tokenizer does."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from qtool.artifact.gguf import GGUF
from qtool.artifact.gguf._tokenizer import model_name, tokenizer_metadata
from qtool.checkpoint.pretokenizers import RULES
from qtool.errors import CheckpointError
from qtool.evaluate.llamacpp import LlamaCpp
from qtool.recipe.export import Export
from tests.artifact.test_gguf import neutral, write
from tests.llamacpp import tokenize
from tests.tokenizers import TEXTS, byte_level, gemma_like, llama2_like, phi3_like, tokenizer_model


@pytest.fixture(scope="module")
def gguf_file(tiny_checkpoint, tmp_path_factory):
    """Writes a tiny model with the given tokenizer files."""

    def make(files: dict[str, str | bytes]) -> Path:
        root = tmp_path_factory.mktemp("tokenizer")
        shutil.copytree(tiny_checkpoint("llama"), root / "model")
        for old in (*root.glob("model/*token*"), *root.glob("model/chat_template*")):
            old.unlink()
        for name, content in files.items():
            (root / "model" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return write(neutral(root / "model", root / "work"), root / "out")

    return make


def rebuilt(path: Path) -> Tokenizer:
    """The tokenizer that we read back from a file."""
    model = GGUF().open(path)  # its files live as long as it does
    return Tokenizer.from_file(str(model.files["tokenizer.json"]))


@pytest.mark.parametrize("name", RULES)
def test_byte_level_tokenization(name, gguf_file):
    tokenizer = byte_level(name)
    path = gguf_file({"tokenizer.json": tokenizer.to_str()})
    runtime, again = LlamaCpp(path, 64), rebuilt(path)
    for text in TEXTS:
        assert tokenize(runtime, text) == again.encode(text).ids == tokenizer.encode(text).ids, text


SENTENCEPIECE = {
    "llama-2": (llama2_like, "<s>a</s> b<unk> ?"),
    "llama-2-without-prefix": (lambda: llama2_like(prefix=False), "<s>a</s> b<unk> ?"),
    "phi-3": (phi3_like, "<|user|>\n Hi <|end|>\n<|assistant|>  yes<|endoftext|> b"),
    "gemma": (gemma_like, "<start_of_turn>user\n\n Hi\n\n\n\t\tx<table> y<end_of_turn>\n<mask> z"),
}


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_sentencepiece_tokenization_from_tokenizer_json(kind, gguf_file):
    make, special = SENTENCEPIECE[kind]
    settings = {"bos_token": "<bos>"} if kind == "gemma" else {}
    path = gguf_file({"tokenizer.json": make().to_str(), "tokenizer_config.json": json.dumps(settings)})
    runtime, again = LlamaCpp(path, 64), rebuilt(path)
    for text in filter(None, [*TEXTS, special, *special.split("<")]):
        assert tokenize(runtime, text) == again.encode(text).ids == make().encode(text).ids, text
        assert tokenize(runtime, text, add_special=False) == make().encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize(
    ("make", "name", "stored"),
    [
        (phi3_like, "Phi-3-mini", "Phi-3-mini"),
        (phi3_like, "mine", "mine (Phi-3 vocabulary)"),
        (llama2_like, "llama-of-phi3", "llama-of-Phi 3"),
        (llama2_like, "mine", "mine"),
    ],
)
def test_names_that_llama_cpp_reads_a_tokenizer_out_of(make, name, stored, tmp_path: Path):
    make().save(str(tmp_path / "tokenizer.json"))
    assert model_name(name, {"tokenizer.json": tmp_path / "tokenizer.json"}) == stored
    assert model_name("mine", {}) == "mine"


def test_sentencepiece_tokenization_from_tokenizer_model(gguf_file):
    tokenizer = llama2_like()
    runtime = LlamaCpp(gguf_file({"tokenizer.model": tokenizer_model(tokenizer)}), 64)
    for text in filter(None, TEXTS):
        assert tokenize(runtime, text) == tokenizer.encode(text).ids, text


@pytest.mark.slow
def test_the_demo_models_tokenization(demo_gguf: Path):
    """Rebuilt tokenizer of the demo file against llama.cpp on the file itself."""
    model = GGUF().open(demo_gguf)  # its files live as long as it does
    tokenizer = Tokenizer.from_file(str(model.files["tokenizer.json"]))
    runtime = LlamaCpp(demo_gguf, 32)
    for text in TEXTS:
        assert tokenize(runtime, text) == tokenizer.encode(text).ids, text


def metadata(tmp_path: Path, tokenizer: Tokenizer | dict, size=512, config=None, pre=None, **files):
    spelled = tokenizer if isinstance(tokenizer, dict) else json.loads(tokenizer.to_str())
    paths = {}
    for name, content in {"tokenizer.json": spelled, **files}.items():
        name = name.replace("__", ".")
        paths[name] = tmp_path / name
        paths[name].write_text(content if isinstance(content, str) else json.dumps(content))
    return tokenizer_metadata(paths, {"vocab_size": size, **(config or {})}, pre)


def test_an_unknown_pre_tokenizer_is_an_error_that_names_the_option(tmp_path: Path):
    tokenizer = byte_level("gpt-2")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(CheckpointError, match=r"not recognized: wanted gpt-2, .*pre_tokenizer: NAME"):
        metadata(tmp_path, tokenizer)
    assert metadata(tmp_path, tokenizer, pre="mpt")["tokenizer.ggml.pre"] == "mpt"


def test_ignored_merges_are_part_of_the_rules(tmp_path: Path):
    spelled = json.loads(byte_level("llama-bpe").to_str())
    assert metadata(tmp_path, spelled)["tokenizer.ggml.pre"] == "llama-bpe"
    spelled["model"]["ignore_merges"] = False
    assert metadata(tmp_path, spelled)["tokenizer.ggml.pre"] == "smaug-bpe"
    spelled = json.loads(byte_level("gpt-4o").to_str())
    for ignores in (False, True):  # which is the same there
        spelled["model"]["ignore_merges"] = ignores
        assert metadata(tmp_path, spelled)["tokenizer.ggml.pre"] == "gpt-4o"


def test_types_of_tokens(tmp_path: Path):
    tokenizer = byte_level("gpt-2")
    tokenizer.add_tokens(["<tool>"])
    values = metadata(tmp_path, tokenizer, size=505)
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert (types[1], types[100], types[tokens.index("<tool>")], types[504]) == (3, 1, 4, 5)
    assert tokens[501:] == [f"[PAD{i}]" for i in range(501, 505)]
    values = metadata(tmp_path, llama2_like())
    assert values["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert values["tokenizer.ggml.token_type"][258:260] == [6, 1]


def test_a_score_is_the_rank_of_the_first_merge(tmp_path: Path):
    vocab = {text: i for i, text in enumerate(("a", "b", "c", "ab", "bc", "abc"))}
    merges = [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")]
    values = metadata(tmp_path, Tokenizer(models.BPE(vocab, merges, byte_fallback=True)), size=7)
    assert values["tokenizer.ggml.scores"] == [0.0, 0.0, 0.0, 0.0, -2.0, -1.0, 0.0]


def test_more_tokens_than_the_model_has_rows(tmp_path: Path):
    with pytest.raises(CheckpointError, match="does not fit the model: wanted 300 tokens, found 500"):
        metadata(tmp_path, byte_level("gpt-2"), size=300)


def test_special_tokens_by_name_and_by_number(tmp_path: Path):
    settings = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "unk_token": None}
    config = {"bos_token_id": 7, "eos_token_id": [8, 9], "pad_token_id": 5}
    values = metadata(tmp_path, byte_level("gpt-2"), config=config, tokenizer_config__json=settings)
    ids = {key: value for key, value in values.items() if key.endswith("token_id")}
    assert ids == {
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 5,
    }
    config = {"pad_token_id": -1, "bos_token_id": 500}  # as old Llama files say that there is none; one too many
    values = metadata(tmp_path, byte_level("gpt-2"), size=500, config=config, tokenizer_config__json={})
    assert not [key for key in values if key.endswith("token_id")]


@pytest.mark.parametrize(
    ("settings", "template", "bos", "eos"),
    [
        ({}, None, False, False),
        ({}, "<|im_start|> $A", True, False),
        ({}, "<|im_start|> $A <|im_end|>", True, True),
        ({"add_bos_token": True}, None, True, False),
        ({"add_bos_token": False}, "<|im_start|> $A", False, False),
    ],
)
def test_added_first_and_last_tokens(settings, template, bos, eos, tmp_path: Path):
    tokenizer = byte_level("gpt-2")
    if template:
        special = [("<|im_start|>", 1), ("<|im_end|>", 2)]
        tokenizer.post_processor = processors.Sequence(
            [processors.ByteLevel(), processors.TemplateProcessing(single=template, special_tokens=special)]
        )
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    values = metadata(tmp_path, tokenizer, tokenizer_config__json=names | settings)
    assert (values["tokenizer.ggml.add_bos_token"], values["tokenizer.ggml.add_eos_token"]) == (bos, eos)


def test_chat_templates(tmp_path: Path):
    plain = metadata(tmp_path, byte_level("gpt-2"), tokenizer_config__json={"chat_template": "{{ a }}"})
    assert plain["tokenizer.chat_template"] == "{{ a }}" and "tokenizer.chat_templates" not in plain
    named = [{"name": "default", "template": "{{ d }}"}, {"name": "tools", "template": "{{ t }}"}]
    several = metadata(tmp_path, byte_level("gpt-2"), tokenizer_config__json={"chat_template": named})
    assert several["tokenizer.chat_template"] == "{{ d }}"
    assert several["tokenizer.chat_template.tools"] == "{{ t }}" and several["tokenizer.chat_templates"] == ["tools"]
    newest = metadata(tmp_path, byte_level("gpt-2"), chat_template__jinja="{{ j }}", tokenizer_config__json={})
    assert newest["tokenizer.chat_template"] == "{{ j }}"
    (tmp_path / "latin1").write_bytes("{{ café }}".encode("latin-1"))
    with pytest.raises(CheckpointError, match="latin1 is damaged: wanted UTF-8 text, found byte 6 is none"):
        files = {"tokenizer.json": tmp_path / "tokenizer.json", "chat_template.jinja": tmp_path / "latin1"}
        tokenizer_metadata(files, {"vocab_size": 512})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is no SentencePiece model|BPE: wanted model type 2"),
        ("\xff" * 40, "is no SentencePiece model"),
        (tokenizer_model(llama2_like())[:999].decode("latin-1"), "is no SentencePiece model"),
        (tokenizer_model(llama2_like(), kind=1).decode("latin-1"), "wanted model type 2, found 1"),
    ],
    ids=["empty", "noise", "cut", "unigram"],
)
def test_bad_sentencepiece_models(content, reason, tmp_path: Path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=reason):
        tokenizer_metadata({"tokenizer.model": path}, {"vocab_size": 512})


def test_no_tokenizer_and_a_damaged_one(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"needs a tokenizer: wanted tokenizer\.json or tokenizer\.model"):
        tokenizer_metadata({}, {"vocab_size": 512})
    with pytest.raises(CheckpointError, match="wanted a BPE model, found WordPiece"):
        metadata(tmp_path, {"model": {"type": "WordPiece"}})
    with pytest.raises(CheckpointError, match="the tokenizer files are damaged"):
        metadata(tmp_path, {"model": {"type": "BPE", "byte_fallback": True, "vocab": [1]}})
    for number in (-1, 2**31):
        spelled = {"model": {"type": "BPE", "byte_fallback": True, "vocab": {"a": number}, "merges": []}}
        with pytest.raises(CheckpointError, match=r"impossible id of a token: wanted 0 to 16777215"):
            metadata(tmp_path, spelled)
    unspelled = {
        "model": {"type": "BPE", "byte_fallback": True, "vocab": {}},
        "added_tokens": [{"content": 5, "id": 0}],
    }
    with pytest.raises(CheckpointError, match="damaged: found TypeError: a token is no text"):
        metadata(tmp_path, unspelled)
    half = {"model": {"type": "BPE", "byte_fallback": True, "vocab": {"\ud800": 0}, "merges": []}}
    with pytest.raises(CheckpointError, match=r"damaged: found UnicodeEncodeError"):
        metadata(tmp_path, half)


@pytest.mark.parametrize("template", [5, "\ud800", [{"x": 1}], [{"name": "default", "template": None}], [1]])
def test_chat_templates_that_are_none(template, tmp_path: Path):
    with pytest.raises(CheckpointError, match="the tokenizer files are damaged"):
        metadata(tmp_path, byte_level("gpt-2"), tokenizer_config__json={"chat_template": template})


def test_a_recipe_can_name_the_pre_tokenizer():
    export = Export.model_validate({"to": "gguf", "pre_tokenizer": "mpt"})
    assert GGUF(**export.options).options.pre_tokenizer == "mpt"
    assert Export(to="gguf").options == {}
    with pytest.raises(ValueError, match="an option of gguf, not of 'qtool'"):
        Export.model_validate({"to": "qtool", "pre_tokenizer": "mpt"})
