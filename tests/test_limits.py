"""What control groups let a process have, as files say it in both of their versions."""

import math
import os

import pytest
from typer.testing import CliRunner

from qtool import limits
from qtool.cli.app import app


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes files of a system, by their path below /; nothing else is there."""
    for name, path in (("GROUPS", "sys/fs/cgroup"), ("OWN", "proc/self/cgroup"), ("MACHINE", "proc/meminfo")):
        monkeypatch.setattr(limits, name, tmp_path / path)

    def write(files):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)

    return write


def test_without_groups(system):
    assert limits.quota() == limits.free_memory() == math.inf
    assert limits.cores() == len(os.sched_getaffinity(0))
    system({"proc/meminfo": "MemTotal:       99 kB\nMemAvailable:    123 kB\nHugePages_Total:   0\n"})
    assert limits.free_memory() == 123 * 1024


def test_the_second_version(system, monkeypatch):
    """The smallest of what the own group and those above it have."""
    groups = "sys/fs/cgroup"
    system(
        {
            "proc/self/cgroup": "0::/a/b\n",
            f"{groups}/a/b/cpu.max": "max 100000\n",
            f"{groups}/a/cpu.max": "250000 100000\n",
            f"{groups}/cpu.max": "900000 100000\n",
            f"{groups}/a/b/memory.max": "1000000\n",
            f"{groups}/a/b/memory.current": "700000\n",
            f"{groups}/a/b/memory.stat": "file 9\ninactive_file_x 1\ninactive_file 50000\nactive_file 7\n",
            f"{groups}/a/memory.max": "max\n",
            f"{groups}/a/memory.current": "1\n",
            "proc/meminfo": "MemAvailable: 12345 kB\n",
        }
    )
    assert limits.quota() == 2.5
    assert limits.free_memory() == 350000
    for cores, wanted in ((2, 2), (3, 3), (8, 3)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert limits.cores() == wanted


def test_the_first_version(system):
    """A container sees its own group as the root; another controller's limits are no concern."""
    groups = "sys/fs/cgroup"
    system(
        {
            "proc/self/cgroup": "9:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n3:cpuset:/docker/x\n1:name=systemd:/y\n",
            f"{groups}/cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
            f"{groups}/cpu,cpuacct/cpu.cfs_period_us": "50000\n",
            f"{groups}/cpuset/cpu.cfs_quota_us": "50000\n",
            f"{groups}/cpuset/cpu.cfs_period_us": "50000\n",
            f"{groups}/memory/memory.limit_in_bytes": "1000\n",
            f"{groups}/memory/memory.usage_in_bytes": "1200\n",
            f"{groups}/memory/memory.stat": "inactive_file 900\ntotal_inactive_file 300\n",
        }
    )
    assert limits.quota() == 3
    assert limits.free_memory() == 100
    system({f"{groups}/cpu,cpuacct/cpu.cfs_quota_us": "-1\n", f"{groups}/memory/memory.stat": ""})
    assert limits.quota() == math.inf
    assert limits.free_memory() == 0


def test_on_this_machine():
    assert 1 <= limits.cores() <= os.cpu_count()
    assert 1e6 < limits.free_memory() < 1e15


@pytest.mark.parametrize(("quota", "told", "wanted"), [(1.5, None, "2"), (1.5, "7", "7"), (math.inf, None, None)])
def test_commands_use_the_threads_that_they_have_the_time_for(quota, told, wanted, monkeypatch):
    monkeypatch.setattr(limits, "quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    assert CliRunner().invoke(app, ["recipes", "list"]).exit_code == 0
    assert os.environ.get("OMP_NUM_THREADS") == wanted
