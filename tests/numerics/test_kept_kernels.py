"""Where compiled kernels are kept when neither the package's folder nor the user's can be written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import qtool.numerics

KERNEL = """
from numba import njit
@njit(cache=True)
def twice(x):
    return 2 * x
"""


@pytest.fixture
def run(tmp_path):
    """Runs a kernel of a package whose `__pycache__` is no folder, with no home; returns where kernels were kept."""
    package, temporary = tmp_path / "package", tmp_path / "temporary"
    for folder in (package, temporary):
        folder.mkdir()
    (package / "__init__.py").write_text(Path(qtool.numerics.__file__).read_text())
    (package / "kernel.py").write_text(KERNEL)
    (package / "__pycache__").touch(mode=0o600)

    def found() -> Path:
        program = "import numba; from package.kernel import twice; print(twice(21), numba.config.CACHE_DIR)"
        usual = {key: value for key, value in os.environ.items() if key not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
        environ = usual | {"HOME": "/proc/nobody", "TMPDIR": str(temporary), "PYTHONPATH": str(tmp_path)}
        ran = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
        answer, folder = ran.stdout.split()
        assert answer == "42"
        return Path(folder)

    found.temporary = temporary
    return found


def test_kernels_are_kept_in_a_folder_of_this_user(run):
    folder = run()
    assert folder.parent == run.temporary
    assert folder.stat().st_mode & 0o777 == 0o700
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.nb[ic]")}
    assert len(kept) == 2
    assert run() == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.nb[ic]")} == kept


def test_a_folder_that_others_can_write_is_not_used(run):
    folder = run.temporary / f"qtool-kernels-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    assert run() != folder
    assert [*run.temporary.iterdir()] == [folder]  # the other one went with its process
    assert not [*folder.iterdir()]


@pytest.mark.parametrize("home", [True, False])
def test_commands_have_triton_keep_kernels_there_where_there_is_no_home(home, tmp_path):
    program = (
        "import os; from qtool.cli.boundary import prepare_process; prepare_process();"
        "print(os.environ.get('TRITON_CACHE_DIR'))"
    )
    usual = {key: value for key, value in os.environ.items() if key != "TRITON_CACHE_DIR"}
    environ = usual | {"HOME": str(tmp_path) if home else "/proc/nobody", "TMPDIR": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
    wanted = None if home else tmp_path / f"qtool-kernels-{os.getuid()}" / "triton"
    assert found.stdout == f"{wanted}\n"
