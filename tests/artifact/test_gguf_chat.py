"""llama.cpp's server chats with a GGUF file: its chat template, its special tokens, its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.artifact.test_gguf import neutral, write

MESSAGES = [
    {"role": "system", "content": "You are a tiny model."},
    {"role": "user", "content": "What is the capital of France?"},
]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_answers_are_those_of_transformers(family: str, tiny_checkpoint, tmp_path: Path) -> None:
    import xllamacpp
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_checkpoint(family)
    params = xllamacpp.CommonParams()
    params.model.path = str(write(neutral(folder, tmp_path / "work"), tmp_path / "out"))
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.warmup = 256, 1, 1, False
    request = {"messages": MESSAGES, "max_tokens": 4, "temperature": 0}
    answer = xllamacpp.Server(params).handle_chat_completions(request)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    wanted = model.generate(prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1] :]
    assert answer["usage"]["prompt_tokens"] == prompt.shape[1]
    assert answer["usage"]["completion_tokens"] == len(wanted)
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(wanted, skip_special_tokens=True)
