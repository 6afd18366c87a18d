"""`qtool calibrate`."""

from __future__ import annotations

import typer

from qtool.cli import options, ranks
from qtool.cli.console import Console, document, result
from qtool.report.units import size


def command(
    ctx: typer.Context,
    model: options.Model,
    recipe: options.Recipe,
    out: options.Out,
    overrides: options.Overrides = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    seed: options.Seed = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Measure the inputs of MODEL's layers once, for reuse with `quantize --stats`.

    A file of per-channel statistics, which importance-weighted rounding needs. With --set calibration.propagate=float
    (every block reads the original model's hidden states) also all else that the recipe's methods measure, such as the
    Gram matrices of GPTQ, in a folder: several recipes can share it. A name that ends in .gguf gives an importance
    matrix as llama.cpp has it, for `quantize --imatrix` and for llama-quantize.

    Example: `qtool calibrate ./SmolLM2-135M -r gguf-q4_0 -o smollm2.imatrix.gguf`
    """
    with Console(quiet, verbose) as console:
        from qtool.pipeline import calibrate as stage

        measured = stage.run(
            stage.CalibrateOptions(
                model=model,
                recipe=options.named(recipe, console),
                out=out,
                overrides=tuple(overrides or ()),
                device=device,
                dtype=dtype,
                seed=seed,
                overwrite=overwrite,
                ranks=ranks.of(ctx),
            ),
            console,
        )
    if json:
        document({"path": str(out), "inputs": measured.inputs, "tokens": measured.tokens, "bytes": measured.nbytes})
    else:
        result(f"{measured.inputs} inputs on {measured.tokens} tokens, {size(measured.nbytes)}: {out}")
