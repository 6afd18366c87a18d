"""llama.cpp's C API by ctypes. Nothing here needs torch, so that a process of its own begins in a moment.

The package xllamacpp carries llama.cpp inside one shared object that exports the C API; ctypes calls that API
(https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h). Two of its structs are passed by value and grow
between versions: `ContextParams` is the layout of October 2026 up to the last field that is set here, with room behind
it, and is only used if the library's own defaults are found where this layout expects them.

The cache is F32 and flash attention is off, so that differences to another runtime come from the file.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from qtool.errors import CheckpointError, MissingExtra, QtoolError, UsageError

INTS = (
    *("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq"),
    *("n_threads", "n_threads_batch"),
    *("ctx_type", "rope_scaling_type", "pooling_type", "attention_type", "flash_attn_type"),
)
FLOATS = (
    *("rope_freq_base", "rope_freq_scale"),
    *("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"),
)
DEFAULTS = (
    *(("n_ctx", 512), ("n_batch", 2048), ("n_ubatch", 512), ("n_seq_max", 1), ("n_threads", 4), ("n_threads_batch", 4)),
    *(("rope_scaling_type", -1), ("pooling_type", -1), ("attention_type", -1), ("flash_attn_type", -1)),
    *(("yarn_ext_factor", -1.0), ("yarn_beta_slow", -1.0), ("defrag_thold", -1.0), ("type_k", 1), ("type_v", 1)),
)
"""What a library of the expected layout fills in."""
F32, OFF, ERROR = 0, 0, 4


class ContextParams(ctypes.Structure):
    """`llama_context_params` up to the types of the cache, and room for what follows."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in INTS),
        *((name, ctypes.c_float) for name in FLOATS),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        ("cb_eval", ctypes.c_void_p),
        ("cb_eval_user_data", ctypes.c_void_p),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("rest", ctypes.c_uint64 * 64),
    )

    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_outputs_max: int
    n_outputs_max_per_seq: int
    flash_attn_type: int
    type_k: int
    type_v: int


class ModelParams(ctypes.Structure):
    """`llama_model_params`, of which nothing is set here: the library's defaults are handed back to it."""

    _fields_ = (("all", ctypes.c_uint64 * 64),)


class LlamaBatch(ctypes.Structure):
    """`llama_batch`; a null array means: positions count on, one sequence."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
complaints: list[str] = []
"""What llama.cpp logged as errors since the last load began."""


def _log(level: int, text: bytes, _: object) -> None:
    if level == ERROR:
        complaints.append(text.decode(errors="replace").strip())


_LOG = LogCallback(_log)  # kept alive for the library


@cache
def library() -> ctypes.CDLL:
    """llama.cpp's C API with its result types declared, quiet.

    Raises:
        MissingExtra: xllamacpp is not installed.
        QtoolError: its build lays structs out differently.
    """
    spec = find_spec("xllamacpp")
    objects = sorted(Path(spec.origin).parent.glob("xllamacpp*.so")) if spec and spec.origin else []
    if not objects:
        raise MissingExtra("xllamacpp", "llamacpp", "running a model in llama.cpp")
    lib = ctypes.CDLL(str(objects[0]))
    for name in ("model_load_from_file", "init_from_model", "model_get_vocab", "get_memory"):
        getattr(lib, f"llama_{name}").restype = ctypes.c_void_p
    lib.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    lib.llama_model_default_params.restype = ModelParams
    lib.llama_context_default_params.restype = ContextParams
    lib.llama_log_set(_LOG, None)
    defaults = lib.llama_context_default_params()
    for name, wanted in DEFAULTS:
        if getattr(defaults, name) != wanted:
            raise QtoolError(
                f"this build of xllamacpp lays llama_context_params out differently (field {name})",
                wanted=wanted,
                found=getattr(defaults, name),
                hint="install xllamacpp 2026.10.11549, or evaluate without --runtime llama.cpp",
            )
    lib.llama_backend_init()
    return lib


class Runtime:
    """A model loaded in llama.cpp, on the CPU or wherever the library was built to run.

    Args:
        path: a GGUF file.
        n_ctx: most tokens that are run at once.
        threads: how many compute.

    Raises:
        CheckpointError: llama.cpp does not load the file; with its own words.
    """

    def __init__(self, path: Path, n_ctx: int, threads: int) -> None:
        self.lib = library()
        self.n_ctx = n_ctx
        complaints.clear()
        model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        if not model:
            raise CheckpointError(f"llama.cpp does not load {path}", found=" / ".join(complaints) or "no reason given")
        self.model = ctypes.c_void_p(model)
        weakref.finalize(self, self.lib.llama_model_free, self.model)
        params = self.lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_outputs_max = params.n_outputs_max_per_seq = n_ctx
        params.n_ubatch = min(n_ctx, params.n_ubatch)
        params.flash_attn_type, params.type_k, params.type_v = OFF, F32, F32
        context = self.lib.llama_init_from_model(self.model, params)
        if not context:
            raise CheckpointError(f"llama.cpp cannot run {path}", found=" / ".join(complaints) or "no reason given")
        self.context = ctypes.c_void_p(context)
        weakref.finalize(self, self.lib.llama_free, self.context)
        self.lib.llama_set_n_threads(self.context, threads, threads)
        self.memory = ctypes.c_void_p(self.lib.llama_get_memory(self.context))
        self.vocab = ctypes.c_void_p(self.lib.llama_model_get_vocab(self.model))
        self.n_vocab = int(self.lib.llama_vocab_n_tokens(self.vocab))

    def decode(self, tokens: Sequence[int], wanted: Sequence[int], going_on: bool = False) -> None:
        """Runs tokens.

        Args:
            tokens: T of them.
            wanted: 1 for those whose logits are wanted, T of them.
            going_on: behind what was run before, instead of from the start of a context.

        Raises:
            UsageError: no tokens, or more than the context holds.
        """
        if not 0 < len(tokens) <= self.n_ctx:
            raise UsageError("llama.cpp's context", wanted=f"1 to {self.n_ctx} tokens", found=len(tokens))
        if not going_on:
            self.lib.llama_memory_clear(self.memory, ctypes.c_bool(True))
        ids = (ctypes.c_int32 * len(tokens))(*(int(token) for token in tokens))
        flags = (ctypes.c_int8 * len(tokens))(*wanted)
        status = self.lib.llama_decode(self.context, LlamaBatch(n_tokens=len(tokens), token=ids, logits=flags))
        if status:
            raise QtoolError(f"llama_decode failed with status {status}", found=" / ".join(complaints) or None)

    def speed(self, prompt: int, written: int) -> tuple[float, float]:
        """Tokens per second: of a prompt that is read at once, and of those that are written one by one behind it.

        Args:
            prompt: tokens of it.
            written: tokens behind it.
        """
        tokens, last = [i % self.n_vocab for i in range(prompt)], [0] * (prompt - 1) + [1]
        self.decode(tokens, last)  # so that weights are in memory
        begin = time.perf_counter()
        self.decode(tokens, last)
        self.lib.llama_synchronize(self.context)
        between = time.perf_counter()
        for token in range(written):
            self.decode([token % self.n_vocab], [1], going_on=True)
        self.lib.llama_synchronize(self.context)
        return prompt / (between - begin), written / (time.perf_counter() - between)

    def values(self, tokens: Sequence[int]) -> Any:
        """float32 [T, V] of numpy: what follows each of T tokens from the start of a context.

        Raises:
            UsageError: no tokens, or more than the context holds.
        """
        self.decode(tokens, [1] * len(tokens))
        found: Any = self.lib.llama_get_logits(self.context)
        return np.ctypeslib.as_array(found, shape=(len(tokens), self.n_vocab)).copy()
