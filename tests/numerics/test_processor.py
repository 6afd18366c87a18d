"""What the processor can."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from numba import config

from qtool.numerics.threads.processor import compute_dtype, processor
from scripts import processors


def test_the_type_to_compute_in(monkeypatch):
    assert compute_dtype(torch.device("cuda")) == torch.bfloat16
    for capabilities, dtype in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx2": True}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert compute_dtype(torch.device("cpu")) == dtype
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in earlier versions
    assert compute_dtype(torch.device("cpu")) == torch.float32


def test_processors_that_give_other_bits_have_other_names(monkeypatch):
    here = processor()
    assert processor() == here
    name = "znver3" if not here.startswith("znver3") else "znver2"
    monkeypatch.setattr(config, "CPU_NAME", name)
    other = processor()
    assert other.startswith(f"{name}, torch ") and other != here
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "num_sockets": 1}, raising=False)
    hidden = processor()
    assert hidden.split(", ")[:2] == other.split(", ")[:2] and hidden != other
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "num_sockets": 2}, raising=False)
    assert processor() == hidden  # numbers are no instructions


def test_kernels_for_processors_that_this_one_cannot_execute_or_is_are_left_out_aloud(monkeypatch, capsys):
    monkeypatch.setattr(processors.llvm, "get_host_cpu_features", lambda: {"avx2": True, "avx512f": True})
    monkeypatch.setattr(processors.llvm, "get_host_cpu_name", lambda: "broadwell")
    ran = []

    def run(name, arguments):
        ran.append((name, arguments))
        return subprocess.CompletedProcess([], 5, "1 failed\n", "")

    monkeypatch.setattr(processors, "run", run)
    monkeypatch.setattr(sys, "argv", ["processors", "generic", "skylake-avx512", "--", "tests/x.py"])
    with pytest.raises(SystemExit) as ended:
        processors.main()
    assert ended.value.code and ran == [("generic", ["tests/x.py"])]
    assert capsys.readouterr().out.splitlines()[:2] == [
        "skylake-avx512: skipped, since this processor lacks bmi2, fma, avx512bw, avx512cd, avx512dq, avx512vl",
        "generic: 1 failed",
    ]
    monkeypatch.setattr(sys, "argv", ["processors", "znver3", "--", "tests/x.py"])
    with pytest.raises(SystemExit, match="True"):  # nothing was tested
        processors.main()
    monkeypatch.setattr(
        processors.llvm, "get_host_cpu_features", lambda: dict.fromkeys(processors.NEEDS["znver3"], True)
    )
    monkeypatch.setattr(processors.llvm, "get_host_cpu_name", lambda: "znver3")
    monkeypatch.setattr(sys, "argv", ["processors", "generic", "znver3", "--", "tests/x.py"])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="True"):
        processors.main()
    assert [name for name, _ in ran] == ["generic", "generic"]
    assert capsys.readouterr().out.startswith(
        "znver3: skipped, since this processor is one; `make test` is with kernels"
    )


def test_tests_run_with_the_name_and_nothing_compiled_before(tmp_path):
    probe = tmp_path / "test_probe.py"
    probe.write_text(
        "import os\nfrom qtool.numerics.threads.processor import processor\n\n\ndef test_probe():\n"
        "    assert processor().startswith('generic, ') and not os.listdir(os.environ['NUMBA_CACHE_DIR'])\n"
    )
    assert processors.run("generic", [str(probe)]).returncode == 0
    assert processors.run("znver3", [str(probe)]).returncode == 1
