"""`qtool export`."""

from __future__ import annotations

from typing import Annotated

import typer

from qtool.cli import options
from qtool.cli.console import Console, document, result
from qtool.report.units import size


def command(
    artifact: options.ArtifactPath,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="NAME",
            help="The layout to write: {artifact}.",
            autocompletion=options.layouts,
            show_default=False,
        ),
    ],
    out: options.Out,
    pre_tokenizer: options.PreTokenizer = None,
    split_max_size: options.SplitMaxSize = None,
    mmproj: options.VisionModel = None,
    overwrite: options.Overwrite = False,
    verify: Annotated[bool, typer.Option(help="Read the result back and compare.")] = True,
    push_to_hub: options.PushToHub = None,
    private: options.Private = False,
    revision: options.Revision = None,
    base_model: options.BaseModel = None,
    license: options.License = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Write ARTIFACT's codes in another layout: exactly, or not at all.

    Files that qtool wrote are held against their SHA256SUMS first, which takes about a second per gigabyte.

    Example: `qtool export ./SmolLM2-135M-w4g32 --to gguf -o ./SmolLM2-135M-gguf`
    """
    with Console(quiet, verbose) as console:
        from qtool.pipeline import export as stage

        asked = stage.ExportOptions(
            artifact,
            to,
            out,
            overwrite,
            verify,
            {"pre_tokenizer": pre_tokenizer, "split_max_size": split_max_size, "mmproj": mmproj},
            push_to=push_to_hub,
            private=private,
            revision=revision,
            base_model=base_model,
            license=license,
        )
        written = stage.run(asked, console)
    if json:
        document(written.model_dump(mode="json"))
    else:
        nbytes = sum(f.nbytes for f in written.files)
        checked = "verified" if written.verified else "not verified"
        checked = written.proof.words if written.proof and written.proof.tokens else checked
        result(f"{written.kind}, {size(nbytes)}, {checked}: {out}")
