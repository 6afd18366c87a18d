"""Runs tests with kernels compiled for several processors: `python -m scripts.processors NAMES -- PYTEST_ARGUMENTS`.

Each name has a process of its own, and a folder of its own for kernels, which are compiled anew: numba does not notice
when a kernel that another file calls was edited. Names that this processor cannot execute are left out, and named; so
is its own name, for which numba compiles the same instructions without being told.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import llvmlite.binding as llvm

NEEDS: Mapping[str, tuple[str, ...]] = {
    "generic": (),
    "znver3": ("avx2", "bmi2", "fma", "f16c", "lzcnt", "movbe"),
    "skylake-avx512": ("avx2", "bmi2", "fma", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
}
"""Instructions that LLVM uses for a name and that not every 64-bit processor has."""


def lacking(name: str, features: Mapping[str, bool]) -> list[str]:
    """What a processor with these features does not have of what kernels for a name use."""
    return [feature for feature in NEEDS[name] if not features.get(feature)]


def run(name: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs pytest with kernels for a processor of this name and no other features than it has by itself."""
    with tempfile.TemporaryDirectory() as cache:
        names = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": cache}
        command = [sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", *arguments]
        environment = {**os.environ, **names, "OMP_WAIT_POLICY": "PASSIVE"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def main() -> None:
    """Runs them, as many side by side as there are cores, and tells of each; exit code 1 if one fails."""
    at = sys.argv.index("--")
    names, arguments = sys.argv[1:at], sys.argv[at + 1 :]
    features, own = dict(llvm.get_host_cpu_features()), llvm.get_host_cpu_name()
    for name in names:
        if missing := lacking(name, features):
            sys.stdout.write(f"{name}: skipped, since this processor lacks {', '.join(missing)}\n")
        elif name == own:
            sys.stdout.write(f"{name}: skipped, since this processor is one; `make test` is with kernels for it\n")
    able = [name for name in names if name != own and not lacking(name, features)]
    failed = not able
    with ThreadPoolExecutor(os.cpu_count()) as lanes:
        for name, result in zip(able, lanes.map(partial(run, arguments=arguments), able), strict=True):
            failed |= result.returncode != 0
            said = result.stdout + result.stderr if result.returncode else result.stdout.strip().rpartition("\n")[2]
            sys.stdout.write(f"{name}: {said}\n")
            sys.stdout.flush()
    sys.exit(failed)


if __name__ == "__main__":
    main()
