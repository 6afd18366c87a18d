"""Outputs are whole or absent, and nothing that qtool did not write is ever replaced."""

import errno
import fcntl
import hashlib
import os
import pathlib
import stat
import subprocess
import sys
import threading
from contextlib import suppress

import pytest

from qtool.errors import StorageError
from qtool.store import files
from qtool.store.lock import lock

KILLED = """
import pathlib, sys, time
from qtool.store.files import new_folder
with new_folder(pathlib.Path(sys.argv[1])) as partial:
    (partial / "weights").write_bytes(bytes(1000))
    print("writing", flush=True)
    time.sleep(60)
"""


def write(out, text="weights", overwrite=False):
    with files.new_folder(out, overwrite) as partial:
        (partial / "a.bin").write_text(text)
        (partial / "sub").mkdir()
        (partial / "sub" / "b.txt").write_text("more")


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_folder_appears_whole_with_sums_that_sha256sum_accepts(tmp_path):
    out = tmp_path / "deep" / "out"
    write(out)
    assert set(tree(out)) == {"a.bin", "sub/b.txt", "SHA256SUMS"}
    assert files.read_sums(out)["a.bin"] == hashlib.sha256(b"weights").hexdigest()
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    subprocess.run(check, cwd=out, check=True)
    (out / "a.bin").write_text("weightz")
    assert subprocess.run(check, cwd=out, check=False).returncode == 1
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.new_folder(tmp_path / "out") as partial:
        (partial / "a.bin").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_empty_folder_is_taken(tmp_path):
    write(tmp_path)
    assert (tmp_path / "a.bin").read_text() == "weights"


def test_earlier_output_is_replaced_only_when_asked(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    with pytest.raises(StorageError, match=r"holds an earlier output: found .*out; pass --overwrite"):
        write(out, "new")
    assert (out / "a.bin").read_text() == "old"
    write(out, "new", overwrite=True)
    assert (out / "a.bin").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("stranger", ["notes.txt", "sub/notes.txt"])
def test_a_foreign_file_is_never_replaced(tmp_path, stranger):
    out = tmp_path / "out"
    write(out)
    (out / stranger).write_text("mine")
    before = tree(out)
    with pytest.raises(StorageError, match=rf"holds something else: found .*{stranger}; choose another folder"):
        write(out, "new", overwrite=True)
    assert tree(out) == before


def test_sums_that_qtool_did_not_write_prove_nothing(tmp_path):
    (tmp_path / "data").write_text("mine")
    (tmp_path / "SHA256SUMS").write_text(hashlib.sha256(b"mine").hexdigest() + "  data\n")
    with pytest.raises(StorageError, match="holds something else"):
        write(tmp_path, overwrite=True)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StorageError, match="wanted a new folder, found the file"):
        write(tmp_path / "out", overwrite=True)
    with pytest.raises(StorageError, match="cannot write"):
        write(tmp_path / "out" / "below")


def test_where_nothing_can_be_written_is_known_before(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (pathlib.Path("/proc/a/b"), tmp_path / "file" / "a"):
        for refuse in (files.check_free, files.check_file):
            with pytest.raises(StorageError, match=f"cannot write {out}.*: .*; choose another output"):
                refuse(out)
    files.check_free(tmp_path / "a" / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_appears_during_the_run_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(StorageError, match="holds something else"), files.new_folder(out) as partial:
        (partial / "a.bin").write_text("new")
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    assert tree(out) == {"notes.txt": b"mine"}


def test_full_disk_is_one_clear_line(tmp_path):
    with (
        pytest.raises(StorageError, match="No space left on device; free some space and run the same command again"),
        files.new_folder(tmp_path / "out") as partial,
    ):
        (partial / "a.bin").write_text("half")
        with open("/dev/full", "wb") as file:
            file.write(bytes(10))
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_runs_are_removed_and_live_runs_are_not(tmp_path):
    out = tmp_path / "out"
    runs = []
    for _ in range(2):
        runs.append(subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, text=True))
        assert runs[-1].stdout.readline() == "writing\n"
    assert len(list(tmp_path.iterdir())) == 2
    runs[0].kill()
    runs[0].wait()
    (tmp_path / ".out2.12345678.partial").mkdir()  # of another output
    write(out)
    assert len(list(tmp_path.glob(".out.*"))) == 1
    runs[1].kill()
    runs[1].wait()
    write(out, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out2.12345678.partial", "out"]
    for run in runs:
        run.stdout.close()


def test_lock_excludes_a_second_run(tmp_path):
    with lock(tmp_path), pytest.raises(StorageError, match=f"another run is writing {tmp_path}"), lock(tmp_path):
        pass
    with lock(tmp_path) as held:
        assert held


def test_files_are_locked_where_they_must_be_open_for_writing(tmp_path, monkeypatch):
    """As on NFS, which keeps its locks of bytes; folders have none there."""

    def nfs(descriptor, _):
        writable = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and not writable:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", nfs)
    with files.new_file(tmp_path / "page.html") as partial:
        partial.write_text("1")
    write(tmp_path / "out")
    assert (tmp_path / "page.html").read_text() == "1"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_without_locks_nothing_is_taken_for_dead(code, tmp_path, monkeypatch):
    def none(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    (other := tmp_path / ".out.12345678.partial").mkdir()
    write(tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [other, tmp_path / "out"]


def test_folders_that_cannot_be_brought_to_the_disk(tmp_path, monkeypatch):
    """By themselves: what is in them can."""
    fsync, code = os.fsync, errno.EINVAL

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    write(tmp_path / "out")
    code = errno.EIO
    with pytest.raises(StorageError, match="Input/output error"):
        write(tmp_path / "other")


def test_new_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "manifest.json"
    with files.new_file(path) as partial:
        partial.write_text("1")
    with pytest.raises(KeyboardInterrupt), files.new_file(path) as partial:
        partial.write_text("2")
        raise KeyboardInterrupt
    assert tree(tmp_path) == {"manifest.json": b"1"}
    with path.open() as reader:
        with files.new_file(path) as partial:
            partial.write_text("3")
        assert reader.read() == "1"  # whoever reads meanwhile sees the old file, whole
    assert tree(tmp_path) == {"manifest.json": b"3"}


def test_two_runs_never_write_one_file_at_once(tmp_path):
    path = tmp_path / "stats"
    with files.new_file(path) as partial:
        with pytest.raises(StorageError, match=r"another run is writing .*stats"), files.new_file(path):
            pass
        partial.write_text("whole")
    assert (path.read_text(), list(tmp_path.iterdir())) == ("whole", [path])


def aside(out):
    return out.with_name(f".{out.name}.superseded.partial")


def older(out):
    with files.new_folder(out) as partial:
        (partial / "old.txt").write_text("old")


REPLACED = """
import os, sys
from pathlib import Path
from qtool.store import exchange, files
out, moment, swaps = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "swaps"
if not swaps:
    exchange.exchange = lambda a, b: False
count = 0
def hook(event, values):
    global count
    if event in ("os.rename", "qtool.exchange", "os.rmdir", "os.remove") and str(out.parent) in str(values[0]):
        count += 1
        if count == moment:
            os._exit(9)
sys.addaudithook(hook)
with files.new_folder(out, overwrite=True) as partial:
    (partial / "new.txt").write_text("new")
os._exit(0)
"""


@pytest.mark.parametrize("swaps", ["swaps", "steps"])
def test_an_older_output_is_there_or_found_again_whenever_its_successor_is_killed(swaps, tmp_path):
    old, new = {"old.txt", "SHA256SUMS"}, {"new.txt", "SHA256SUMS"}
    seen = []
    for moment in range(1, 20):
        out = tmp_path / str(moment) / "out"
        older(out)
        code = subprocess.run([sys.executable, "-c", REPLACED, out, str(moment), swaps], check=False).returncode
        seen.append((set(tree(out)) if out.exists() else None, aside(out).exists()))
        assert seen[-1] in [(old, False), (new, False), (None, True), (new, True)]
        with suppress(StorageError):  # "holds an earlier output": what any next run does first
            files.check_free(out)
        assert set(tree(out)) in (old, new)
        assert not aside(out).exists()
        with files.new_folder(out, overwrite=True) as partial:
            (partial / "third.txt").write_text("third")
        assert [p.name for p in out.parent.iterdir()] == ["out"]
        if code == 0:
            break
    assert code == 0
    assert ((None, True) in seen) == (swaps == "steps")
    assert (old, False) in seen and (new, False) in seen


def test_files_are_hashed_and_brought_to_the_disk_meanwhile(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    synced, done = [], threading.Event()
    monkeypatch.setattr(files, "_sync", lambda path: synced.append(path.name))
    real = files.sha256
    monkeypatch.setattr(files, "sha256", lambda *args: (real(*args), done.set())[0])
    with files.settling([tmp_path / "a"]):
        assert done.wait(60)
    assert synced == ["a"]
    monkeypatch.setattr(files, "sha256", None)  # it is known
    assert files.hashes([tmp_path / "a"]) == [hashlib.sha256(b"x" * 3_000_000).hexdigest()]


def test_a_disk_that_refuses_is_told_and_whoever_fails_waits_for_no_hash(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x" * (5 << 20))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(StorageError, match="No space left"), files.settling([tmp_path / "a"]):
        pass
    (tmp_path / "a").write_bytes(b"y" * (5 << 20))
    over = threading.Event()
    over.set()
    assert files.hashes([tmp_path / "a"], over) == [""]
    assert files.hashes([tmp_path / "a"]) == [hashlib.sha256(b"y" * (5 << 20)).hexdigest()]
