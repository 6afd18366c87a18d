"""`qtool eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qtool.cli import options, ranks
from qtool.cli.console import Console, document, result, table
from qtool.report.meaning import meaning
from qtool.report.units import verdicts

if TYPE_CHECKING:
    from qtool.evaluate.result import Evaluation

Text = Annotated[Path, typer.Option("--text", metavar="FILE", help="UTF-8 text to score.", show_default=False)]
Baseline = Annotated[
    str | None,
    typer.Option("--baseline", metavar="MODEL", help="The unquantized model to compare with.", show_default=False),
]
JsonOut = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="OUT", help="Also write the JSON here.", show_default=False)
]
Update = Annotated[bool, typer.Option("--update", help="Add the result to ARTIFACT's report and model card.")]
Context = Annotated[int, typer.Option(min=4, help="Tokens per chunk; the second half is scored.")]
Chunks = Annotated[
    int | None, typer.Option(min=1, help="Score at most this many chunks.", show_default="all of the text")
]
Runtime = Annotated[
    Literal["qtool", "llama.cpp"], typer.Option(help="What runs the artifact; llama.cpp reads GGUF only.")
]
Gates = Annotated[
    list[str] | None,
    typer.Option(
        "--gate",
        metavar="NAME=LIMIT",
        help="Exit with code 9 if the limit is missed: kld=0.05, ppl_ratio=1.02, top1=0.9. May be repeated.",
        show_default=False,
    ),
]


def command(
    ctx: typer.Context,
    artifact: options.ArtifactPath,
    text: Text,
    baseline: Baseline = None,
    context: Context = 512,
    chunks: Chunks = None,
    runtime: Runtime = "qtool",
    gate: Gates = None,
    out: JsonOut = None,
    update: Update = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Measure ARTIFACT on a text: perplexity, and the divergence from a baseline.

    The protocol is llama-perplexity's, so numbers compare.

    Example: `qtool eval ./SmolLM2-135M-w4 --baseline ./SmolLM2-135M --text prose.txt --gate kld=0.05`
    """
    with Console(quiet, verbose) as console:
        from qtool.evaluate.gates import parse_gates, refuse_missed
        from qtool.pipeline import evaluate as stage

        gates = parse_gates(gate or ())
        found = stage.run(
            stage.EvaluateOptions(
                artifact=artifact,
                baseline=baseline,
                text=text,
                context=context,
                chunks=chunks,
                runtime=runtime,
                gates=gates,
                device=device,
                dtype=dtype,
                out=out,
                update=update,
                ranks=ranks.of(ctx),
            ),
            console,
        )
    if json:
        document(found.model_dump(mode="json"))
    else:
        result(shown(found))
    refuse_missed(found.gates)


def shown(found: Evaluation) -> str:
    """The verdict if there are gates, what the divergence means, then every number."""
    values = found.model_dump(mode="json", exclude={"gates"}, exclude_none=True)
    rows = [[k, f"{v:.6g}" if isinstance(v, float) else str(v)] for k, v in values.items()]
    words = [] if found.kld_mean is None else [meaning(found.kld_mean)]
    return "\n".join([*verdicts([found]), *words, table(["measure", "value"], rows)])
