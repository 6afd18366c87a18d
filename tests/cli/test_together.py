"""The command line in two processes, of torchrun or its own: who speaks, what is left when one of them is killed."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qtool.errors import ProcessError
from qtool.models import open_model_free
from qtool.pipeline.quantize import QuantizeOptions
from qtool.pipeline.quantize import run as quantize

RECIPE = """
recipe: 1
name: together
calibration: {{data: {text}, samples: 4, length: 32}}
layers:
  - {{match: lm_head, keep: true}}
  - {{match: "*", weights: int4-g32, method: gptq}}
export: [{{to: qtool}}]
"""
ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("together.py")


def torchrun(program, *arguments):
    """Two processes of a program."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def two_jobs(program, *arguments):
    """The same in two processes of one command."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "BLOCK": "1"}
    command = [sys.executable, *program, *map(str, arguments), "--jobs", "2"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def errors(result):
    return [line for line in result.stderr.splitlines() if line.startswith("error:")]


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def quantized(ranks, source, recipe, out):
    quantize(QuantizeOptions(str(source), str(recipe), out, dtype="fp32", ranks=ranks))


STUCK = """
import hashlib, subprocess, sys
from functools import partial
from threading import Timer
from types import SimpleNamespace
from qtool.cli import boundary, ranks

ranks.GRACE = 0.2
boundary.prepare_process()
if sys.argv[1] == "lost":
    ranks.OTHERS.append(subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"]))
with ranks.watched(boundary.HEARD, partial(boundary.end_unheard, SimpleNamespace(ended=lambda: True))):
    Timer(1, print, ["waits"], {"flush": True}).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
"""Waits for minutes where no signal reaches the interpreter, as for a device."""


@pytest.mark.parametrize("cause", ["ended", "lost"])
def test_a_process_that_waits_for_a_device_ends_as_well(cause):
    command = [sys.executable, "-c", STUCK, cause]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "waits\n"
        if cause == "ended":
            child.terminate()
        _, said = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == 128 + signal.SIGTERM
    assert said.startswith("error: ended by SIGTERM, as by torchrun when another process has ended; run the same")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_one_line_and_the_same_command_continues(
    tiny_checkpoint, together, tmp_path
):
    (tmp_path / "text.txt").write_text("\n\n".join(list(pydoc_data.topics.topics.values())[:9]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(text=tmp_path / "text.txt"))
    source, out = tiny_checkpoint("llama"), tmp_path / "out"
    arguments = ("quantize", source, "-r", recipe, "-o", out, "--dtype", "fp32", "--json")

    ended = torchrun([str(PROGRAM)], *arguments)
    assert ended.returncode == 1
    assert len(errors(ended)) == 1
    assert errors(ended)[0].endswith("; run the same command again to continue")
    assert "qtool/" not in ended.stderr.partition("ChildFailedError")[0]  # torchrun shows its own traceback only
    assert not out.exists()
    assert (tmp_path / "out.work" / "block-0.safetensors").exists()
    assert not (tmp_path / "out.work" / "block-1.safetensors").exists()

    continued = torchrun(["-m", "qtool"], *arguments)
    assert continued.returncode == 0, continued.stderr
    assert "finished earlier" in continued.stderr
    assert continued.stderr.count("quantize 0/") == 1
    assert json.loads(continued.stdout)["layers"]
    together(quantized, source, recipe, tmp_path / "whole")
    assert weights(out) == weights(tmp_path / "whole")


@pytest.mark.slow
def test_what_all_processes_find_wrong_is_said_once(tiny_checkpoint, tmp_path):
    wrong = torchrun(["-m", "qtool"], "quantize", tiny_checkpoint("llama"), "-r", tmp_path / "none.yaml")
    assert len(errors(wrong)) == 1
    assert errors(wrong)[0].startswith("error: recipe not found")
    alone = torchrun(["-m", "qtool"], "plan", tiny_checkpoint("llama"), "-r", "gguf-q4_0")
    assert errors(alone) == ["error: qtool plan: wanted one process, found torchrun; run it without"]


@pytest.mark.slow
def test_jobs_end_and_continue_as_one_and_write_the_bytes_of_a_single_one(tiny_checkpoint, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(text="builtin").replace("gptq", "rtn").replace("qtool", "compressed-tensors"))
    source, out = tiny_checkpoint("llama"), tmp_path / "out"
    arguments = ("quantize", source, "-r", recipe, "-o", out, "--model-free")
    ended = two_jobs([str(PROGRAM)], *arguments)
    assert ended.returncode == ProcessError.exit_code
    assert len(errors(ended)) == 1
    assert errors(ended)[0].endswith("; run the same command again to continue")
    assert "Traceback" not in ended.stderr
    assert not out.exists()
    continued = two_jobs(["-m", "qtool"], *arguments)
    assert continued.returncode == 0, continued.stderr
    assert continued.stderr.count("verify compressed-tensors 0/") == 1
    quantize(QuantizeOptions(open_model_free(str(source)), str(recipe), tmp_path / "one"))
    assert weights(out) == weights(tmp_path / "one") != {}
