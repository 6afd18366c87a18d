"""`qtool compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.cli import options
from qtool.cli.console import Console, document, result, table
from qtool.cli.evaluate import Baseline, Chunks, Context
from qtool.report.units import size

if TYPE_CHECKING:
    from qtool.report.comparison import Comparison


def command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="OUT...",
            help="Folders of `qtool quantize`, artifacts, GGUF files: two or more.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="PAGE", help="Write an HTML page here, and JSON beside it.", show_default=False
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="UTF-8 text to score.", show_default=False)
    ] = None,
    baseline: Baseline = None,
    context: Context = 512,
    chunks: Chunks = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Compare quantized models: size against divergence, and which of them no other beats.

    Divergences come from the reports; with --text and --baseline, models that lack one are measured. Where llama.cpp is
    installed, it says how many tokens per second it writes by GGUF files.

    Example: `qtool compare ./SmolLM2-135M-w4 ./SmolLM2-135M.Q4_K_M.gguf -o compare.html`
    """
    from qtool.errors import UsageError

    if (text is None) != (baseline is None):
        raise UsageError("--text and --baseline go together")
    with Console(quiet, verbose) as console:
        from qtool.pipeline import compare as stage
        from qtool.pipeline.evaluate import EvaluateOptions

        measure = None
        if text and baseline:
            measure = EvaluateOptions("", baseline, text, context, chunks, device=device, dtype=dtype)
        found = stage.run(stage.CompareOptions(tuple(models), out, measure), console)
    if json:
        document(found.model_dump(mode="json"))
    else:
        result(show(found))


def otherwise(text: str, found: Comparison) -> str:
    """Why a divergence on some text does not compare with the others."""
    return "in other chunks or from another baseline" if text == found.text else "on another text"


def show(found: Comparison) -> str:
    """A line per model, smallest first; a star for those that no other beats."""
    rows, timed = [], any(e.speed for e in found.entries)
    for e in found.entries:
        q = e.evaluation
        kld = f"{q.kld_mean:.4g} ± {q.kld_error or 0:.2g}" if q and q.kld_mean is not None else "-"
        note = "*" if e.name in found.best else "" if e.name in found.comparable or not q else otherwise(q.text, found)
        speed = [f"{e.speed[1]:.1f}" if e.speed else "-"] if timed else []
        rows.append([e.name, e.kind, size(e.nbytes), f"{e.bits_per_weight:.3f}", kld, *speed, note])
    extra = ["tokens per second"] if timed else []
    header = ["model", "kind", "size", "bits per weight of the whole model", "KL divergence, nats", *extra, ""]
    return table(header, rows, frozenset({2, 3, 4, 5} if timed else {2, 3, 4}))
