"""`qtool eval`."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qtool.cli import options, ranks
from qtool.cli.console import Console, document, result, table
from qtool.errors import UsageError
from qtool.report.meaning import meaning
from qtool.report.units import verdicts

if TYPE_CHECKING:
    from qtool.evaluate.result import Evaluation, TaskEvaluation

Text = Annotated[Path | None, typer.Option("--text", metavar="FILE", help="UTF-8 text to score.", show_default=False)]
Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        metavar="NAME,...",
        help="Instead of a text, tasks of lm-evaluation-harness that score given answers, or YAML files of such tasks.",
        show_default=False,
    ),
]
Fewshot = Annotated[
    int | None, typer.Option(min=0, help="Examples before each question of --tasks.", show_default="as each task says")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Questions of each of --tasks at most.", show_default="all")]
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
        help="Exit with code 9 if the limit is missed: kld=0.05, ppl_ratio=1.02, top1=0.9; of a task, in percentage "
        "points that it may lose, arc_easy_drop=0.5. May be repeated.",
        show_default=False,
    ),
]


def command(
    ctx: typer.Context,
    artifact: options.ArtifactPath,
    text: Text = None,
    tasks: Tasks = None,
    baseline: Baseline = None,
    context: Context = 512,
    chunks: Chunks = None,
    fewshot: Fewshot = None,
    limit: Limit = None,
    runtime: Runtime = "qtool",
    gate: Gates = None,
    out: JsonOut = None,
    update: Update = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    jobs: options.Jobs = 1,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Measure ARTIFACT on a text, or in tasks: perplexity, the divergence from a baseline, answers that change.

    The protocol of texts is llama-perplexity's, that of tasks lm-evaluation-harness's, so numbers compare.

    Example: `qtool eval ./SmolLM2-135M-w4 --baseline ./SmolLM2-135M --text prose.txt --gate kld=0.05`
    """
    if (text is None) == (tasks is None):
        raise UsageError("wanted one of --text and --tasks")
    given: dict[str, Any] = {"artifact": artifact, "baseline": baseline, "runtime": runtime}
    given |= {"device": device, "dtype": dtype, "out": out, "update": update}
    found: Evaluation | TaskEvaluation
    with Console(quiet, verbose) as console:
        from qtool.evaluate.gates import parse_gates, parse_task_gates, refuse_missed

        if text:
            from qtool.pipeline.evaluate import EvaluateOptions
            from qtool.pipeline.evaluate import run as measure

            given |= {"text": text, "context": context, "chunks": chunks, "gates": parse_gates(gate or ())}
            found = measure(EvaluateOptions(**given, ranks=ranks.of(ctx)), console)
        else:
            from qtool.pipeline.tasks import TaskOptions
            from qtool.pipeline.tasks import run as answer

            if ranks.of(ctx).size > 1:
                raise UsageError("--tasks", wanted="one process", found="several; run it without torchrun")
            names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
            given |= {"tasks": names, "fewshot": fewshot, "limit": limit, "gates": parse_task_gates(gate or ())}
            found = answer(TaskOptions(**given), console)
    if json:
        document(found.model_dump(mode="json"))
    else:
        result(shown(found))
    refuse_missed(found.gates)


def shown(found: Evaluation | TaskEvaluation) -> str:
    """The verdict if there are gates, then every number."""
    from qtool.evaluate.result import TaskEvaluation

    lines = shown_tasks(found) if isinstance(found, TaskEvaluation) else shown_text(found)
    return "\n".join([*verdicts([found]), *lines])


def shown_tasks(found: TaskEvaluation) -> list[str]:
    """A line for each metric of each task."""
    from qtool.report.quality import TASK_HEADER, task_rows

    return [table(list(TASK_HEADER), [list(astuple(row)) for row in task_rows([found])], frozenset({2, 3, 4, 5}))]


def shown_text(found: Evaluation) -> list[str]:
    """What the divergence means, then every number."""
    values = found.model_dump(mode="json", exclude={"gates"}, exclude_none=True)
    rows = [[k, f"{v:.6g}" if isinstance(v, float) else str(v)] for k, v in values.items()]
    words = [] if found.kld_mean is None else [meaning(found.kld_mean)]
    return [*words, table(["measure", "value"], rows)]
