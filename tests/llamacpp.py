"""What else llama.cpp can do with a model that `LlamaCpp` has loaded: split a text into tokens, and answer."""

from __future__ import annotations

import ctypes

from qtool.evaluate.llamacpp import LlamaCpp


def tokenize(runtime: LlamaCpp, text: str, add_special: bool = True) -> list[int]:
    """Token ids of a text; special tokens spelled in it count as such, as in transformers."""
    data = text.encode()
    room = len(data) + 16
    ids = (ctypes.c_int32 * room)()
    flags = (ctypes.c_bool(add_special), ctypes.c_bool(True))
    return list(ids[: runtime.lib.llama_tokenize(runtime.vocab, data, len(data), ids, room, *flags)])


def generate(runtime: LlamaCpp, prompt: list[int], n: int) -> list[int]:
    """Up to n most likely tokens after a prompt; stops before a token that ends the text."""
    ends = runtime.lib.llama_vocab_is_eog
    ends.restype = ctypes.c_bool
    answer: list[int] = []
    while len(answer) < n:
        best = int(runtime.logits([*prompt, *answer])[-1].argmax())
        if ends(runtime.vocab, best):
            break
        answer.append(best)
    return answer
