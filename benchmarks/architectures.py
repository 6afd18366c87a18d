"""Every type that transformers knows as a causal language model, by a tiny random model of it.

    python -m benchmarks --only architectures [--processes 16] [--work DIR] [--kind TYPE ...] [--write-page]

Types whose rows are in DIR/architectures.jsonl already are not tried again; `--kind` tries these anew. What a type may
take is counted in seconds of a processor, not of a clock, so that a machine under load finds what a quiet one does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import multiprocessing
import resource
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.tiny import save_tiny
from qtool.api import quantize
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Checkpoint
from qtool.checkpoint.derived.skeleton import named_class
from qtool.checkpoint.modules import modules
from qtool.errors import QtoolError, one_line
from qtool.evaluate.readers import load_in_transformers
from qtool.models import open_model

KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SECONDS = 300
"""Of a processor, for one type."""
BYTES = 12 << 30
"""Of memory, for one type: a process that the system kills would be waited for without an end."""
ALIKE = 1e-4
"""Nats per token: less says that transformers, which decodes our file, and our evaluation of it run one model."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of a type.

    Attributes:
        kind: `model_type`.
        passed: whether all of it went well.
        why: what did not, or what the model is made of.
        divergence: KL divergence between transformers and qtool, nats per token, the larger one of two files.
    """

    kind: str
    passed: bool
    why: str
    divergence: float | None = None


def logits_of(model: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    """Logits by our own evaluation, block by block: float32 [S, T, V]."""
    walker = Walker(model, torch.device("cpu"), torch.float32)
    hidden = walker.embed(tokens)
    for i in range(len(walker.blocks)):
        walker.advance(walker.load_block(i), i, hidden)
    return torch.stack([walker.logits(hidden, s) for s in range(len(tokens))])


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL divergence of logits, nats per token."""
    p, q = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def recipe(text: Path) -> dict[str, Any]:
    """4-bit weights in groups of 8 columns: the first block rounded to nearest, the others by GPTQ."""
    weights = {"weights": "int4-g8", "fallback": "int4-channel"}
    layers = [
        {"match": "lm_head", "keep": True},
        {"match": r"re:.*\.0\..*", **weights, "method": "rtn"},
        {"match": "*", **weights, "method": "gptq"},
    ]
    calibration = {"data": str(text), "samples": 2, "length": 32}
    return {
        "recipe": 1,
        "name": "study",
        "calibration": calibration,
        "layers": layers,
        "export": [{"to": "compressed-tensors"}],
    }


def attempt(kind: str, tokenizer: Any, folder: Path) -> Row:
    """Saves a tiny model, compares logits, quantizes it, and compares logits with what transformers reads."""
    text = folder / "text.txt"
    text.write_text(" ".join(f"{i} times {i + 1} is {i * (i + 1)}." for i in range(400)))
    source = folder / "model"
    model = save_tiny(kind, source)
    tokenizer.save_pretrained(source)
    tokens = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(input_ids=tokens, use_cache=False).logits
    checkpoint = open_model(str(source))
    if (worst := divergence(wanted, logits_of(checkpoint, tokens))) > ALIKE:
        return Row(kind, False, "block by block it computes something else", worst)
    out = folder / "quantized"
    quantize(str(source), recipe(text), out, dtype="fp32")
    with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        made = named_class(open_model(str(out)).config) or type(model)  # of a text model, where no other part is kept
        loaded, remark = load_in_transformers(made, out, torch.float32)
        found = loaded(input_ids=tokens, use_cache=False).logits
    worst = max(worst, abs(divergence(logits_of(open_model(str(out)), tokens), found)))
    linears = [module for module in modules(checkpoint) if module.kind == "linear" and module.block is not None]
    experts = f", {checkpoint.family.experts(checkpoint.config)} experts" if checkpoint.family.mixture else ""
    about = f"{len(linears)} matrices in {checkpoint.family.blocks(checkpoint.config)} blocks{experts}"
    about += f"; {remark}" if remark else ""
    return Row(kind, worst < ALIKE, about if worst < ALIKE else "transformers reads something else", worst)


def tried(kind: str) -> Row:
    """The row of one type, which may not take longer than `SECONDS`."""
    from tests.conftest import make_tokenizer

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return attempt(kind, make_tokenizer(), Path(folder))
        except QtoolError as error:
            return Row(kind, False, one_line(error).replace(f"{folder}/", ""))
        except Exception as error:  # noqa: BLE001 (whatever transformers raises)
            return Row(kind, False, f"{type(error).__name__}: {one_line(error)}".replace(f"{folder}/", ""))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


def late(*_: object) -> None:
    """A type took too long."""
    raise TimeoutError(f"more than {SECONDS} seconds")


def rows(store: Path) -> dict[str, Row]:
    """Rows that were found before, from lines of JSON; the last of a type counts."""
    lines = store.read_text().splitlines() if store.exists() else []
    return {row["kind"]: Row(**row) for row in map(json.loads, lines)}


def study(store: Path, kinds: list[str], processes: int = 1, tell: Callable[[Row], None] = lambda _: None) -> None:
    """Tries types, several side by side, and adds their rows to a file as they come.

    Args:
        store: the file.
        kinds: types.
        processes: how many side by side.
        tell: called with each row.
    """
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=4) as pool:
        for row in pool.imap_unordered(tried, kinds):
            with store.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(row)) + "\n")
            tell(row)


def run(work: Path, kinds: list[str], processes: int, write_page: bool) -> dict[str, float]:
    """Tries types, or all whose rows are missing, and says how many go through.

    Args:
        work: where rows are kept, in architectures.jsonl.
        kinds: to be tried, even again; none: all that were not.
        processes: see `study`.
        write_page: whether docs/architectures.md is written anew.
    """
    store = work / "architectures.jsonl"
    missing = [kind for kind in KINDS if kind not in rows(store)]
    study(store, kinds or missing, processes, lambda row: print(row.kind, row.passed, row.why, flush=True))
    known = rows(store)
    if write_page:
        Path("docs/architectures.md").write_text(page(known), encoding="utf-8")
    return {"types": len(known), "go through": sum(row.passed for row in known.values())}


INTRODUCTION = """# Model types

A model type without a family file goes through by derivation: transformers' class is built without memory for weights,
one forward pass is watched, and that tells which blocks there are, which layers read the same input, in which order
they run, and what checkpoints call their tensors. Below is what became of a tiny random model of each type tried:
its logits block by block against transformers', then 4-bit weights (the first block rounded to nearest, the others by
GPTQ) in compressed-tensors, read by transformers, whose logits have to be those of our own evaluation (KL divergence
below {alike:g} nats per token). A `no` may be the tiny configuration's fault.
`python -m benchmarks --only architectures --write-page` makes this page.

{passed} of {count} types go through (transformers {release}).

| type | goes through | what it is made of, or why not |
| --- | --- | --- |
"""


def page(known: dict[str, Row]) -> str:
    """The rows as a page of the documentation."""
    from transformers import __version__

    passed = sum(row.passed for row in known.values())
    text = INTRODUCTION.format(alike=ALIKE, passed=passed, count=len(known), release=__version__)
    for kind, row in sorted(known.items()):
        why = row.why.replace("|", "/").replace("<", "").replace(">", "").partition("; --model-free")[0]
        text += f"| `{kind}` | {'yes' if row.passed else 'no'} | {why:.160} |\n"
    return text
