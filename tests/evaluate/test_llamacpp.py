"""llama.cpp behind ctypes: the same tokens as transformers, and clear words where it cannot run."""

from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from qtool.artifact.gguf import GGUF
from qtool.errors import CheckpointError, MissingExtra, QtoolError, UsageError
from qtool.evaluate import llama_api, llamacpp
from qtool.evaluate.llamacpp import LlamaCpp, try_file
from tests.artifact.test_gguf import neutral
from tests.llamacpp import generate


@pytest.fixture(scope="module")
def model(tiny_checkpoint, tmp_path_factory) -> tuple[Path, Path]:
    """(folder, GGUF file) of one tiny model."""
    folder, root = tiny_checkpoint("qwen2"), tmp_path_factory.mktemp("llamacpp")
    (root / "out").mkdir()
    return folder, GGUF().write(neutral(folder, root / "work"), root / "out", {})[0]


def test_greedy_generation_is_that_of_transformers(model):
    from transformers import AutoModelForCausalLM

    folder, path = model
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = [5, 100, 17, 300]
    wanted = reference.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 4), max_new_tokens=20, do_sample=False, pad_token_id=0
    )[0, 4:]
    ended = [i for i, token in enumerate(wanted.tolist()) if token == 2]
    assert generate(LlamaCpp(path, 32), prompt, 20) == wanted[: ended[0] if ended else 20].tolist()


def test_logits_do_not_depend_on_what_was_run_before(model):
    runtime = LlamaCpp(model[1], 16)
    first = runtime.logits([1, 2, 3, 4])
    assert first.shape == (4, 512) and first.dtype == torch.float32
    runtime.logits([9] * 16)
    assert torch.equal(runtime.logits(torch.tensor([1, 2, 3, 4])), first)


def test_more_tokens_than_the_context(model):
    with pytest.raises(UsageError, match="wanted 1 to 16 tokens, found 17"):
        LlamaCpp(model[1], 16).logits([1] * 17)
    with pytest.raises(UsageError, match="found 0"):
        LlamaCpp(model[1], 16).logits([])


@pytest.fixture
def fresh_library():
    """The library is loaded anew in the test and after it."""
    llama_api.library.cache_clear()
    yield
    llama_api.library.cache_clear()


@pytest.mark.parametrize("spec", [None, ModuleSpec("xllamacpp", None)])
def test_the_package_is_missing(spec, monkeypatch, fresh_library):
    monkeypatch.setattr(llama_api, "find_spec", lambda name: spec)
    with pytest.raises(MissingExtra, match="needs the package xllamacpp; install it with: pip install 'xllamacpp>="):
        llama_api.library()


def test_another_layout_is_noticed(monkeypatch, fresh_library):
    shifted = [("new_field", llama_api.ctypes.c_int32), *llama_api.ContextParams._fields_]
    other = type("Other", (llama_api.ctypes.Structure,), {"_fields_": shifted})
    monkeypatch.setattr(llama_api, "ContextParams", other)
    with pytest.raises(QtoolError, match=r"differently \(field n_ctx\): wanted 512, found 2048"):
        llama_api.library()


@pytest.mark.parametrize(
    ("trial", "found"),
    [
        ("import os\nfor _ in sys.stdin: os.abort()", r"found the end of the process that did it \(SIGABRT\)$"),
        ("import time; time.sleep(60)", r"wanted an end within 0\.5 seconds, found none$"),
    ],
    ids=["aborts", "hangs"],
)
def test_a_file_that_ends_llama_cpp_ends_another_process(trial, found, monkeypatch, tmp_path):
    monkeypatch.setattr(llamacpp, "TRIAL", trial)
    monkeypatch.setattr(llamacpp, "SECONDS", 0.5 if "sleep" in trial else 60.0)
    with pytest.raises(CheckpointError, match=rf"^llama\.cpp cannot run {tmp_path / 'a.gguf'}: {found}"):
        try_file(tmp_path / "a.gguf")


def test_a_file_that_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"^llama\.cpp does not load .*a\.gguf: found "):
        try_file(tmp_path / "a.gguf")
