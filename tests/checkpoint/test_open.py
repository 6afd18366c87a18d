from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qtool.checkpoint.gguf_checkpoint import GGUFCheckpoint
from qtool.checkpoint.hf import HFCheckpoint
from qtool.checkpoint.open import open_checkpoint
from qtool.errors import CheckpointError, HubError, StorageError

Find = Callable[[str], Path]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The few routes of the hub that a download uses, for one repository, `org/tiny`."""

    folder: Path
    asked: list[str]

    def log_message(self, *args: object) -> None:
        """Keeps quiet."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        if path.startswith("/api/models/org/gated"):
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        if path.startswith("/api/models/org/broken"):
            return self.send(500, b"{}", {}, body)
        if path.startswith("/api/models/org/tiny/revision/"):
            if path.endswith("/old"):
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            files = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
            return self.send(200, json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": files}).encode(), {}, body)
        if path == f"/api/models/org/tiny/tree/{COMMIT}":
            tree = [self.entry(file) for file in sorted(self.folder.iterdir())]
            return self.send(200, json.dumps(tree).encode(), {}, body)
        file = self.folder / path.rsplit("/", 1)[1]
        if path == f"/org/tiny/resolve/{COMMIT}/{file.name}" and file.exists():
            etag = hashlib.sha1(file.read_bytes()).hexdigest()
            return self.send(200, file.read_bytes(), {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)
        return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def entry(self, file: Path) -> dict[str, object]:
        oid = hashlib.sha1(file.read_bytes()).hexdigest()
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": oid}

    def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(tiny_checkpoint: Find, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """(address, paths that were asked for)."""
    Hub.folder = Path(shutil.copytree(tiny_checkpoint("qwen3"), tmp_path / "repository"))
    (Hub.folder / "pytorch_model.bin").write_bytes(b"pickle")
    (Hub.folder / "consolidated.safetensors").write_bytes(b"the same once more")
    (Hub.folder / "picture.png").write_bytes(b"png")
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Hub.asked
    server.shutdown()
    server.server_close()


def test_folder(tiny_checkpoint: Find) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint("llama")))
    assert isinstance(checkpoint, HFCheckpoint)
    assert checkpoint.source == str(tiny_checkpoint("llama"))


def test_home_folder(tiny_checkpoint: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint("llama")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_checkpoint(f"~/{folder.name}").names()


@pytest.mark.demo
def test_gguf(demo_gguf: Path) -> None:
    assert isinstance(open_checkpoint(str(demo_gguf)), GGUFCheckpoint)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("/no/such/folder", "no such file or folder"),
        ("a/b/c", "no such file"),
        ("../x", "no such file"),
    ],
)
def test_nothing_there(source: str, found: str) -> None:
    with pytest.raises(CheckpointError, match=f"wanted a folder with config.json .*hub id, found {found}"):
        open_checkpoint(source)


def test_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="found another kind of file"):
        open_checkpoint(str(tmp_path / "model.bin"))


def test_download_and_cache(hub: tuple[str, list[str]], tiny_checkpoint: Find, tmp_path: Path) -> None:
    endpoint, asked = hub
    checkpoint = open_checkpoint("org/tiny", endpoint=endpoint, cache=tmp_path / "cache")
    assert checkpoint.source == "org/tiny"
    assert checkpoint.fingerprint() == HFCheckpoint(tiny_checkpoint("qwen3")).fingerprint()
    fetched = {path.rsplit("/", 1)[1] for path in asked if "/resolve/" in path}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json"} < fetched
    assert not fetched & {"pytorch_model.bin", "consolidated.safetensors", "picture.png"}

    asked.clear()
    again = open_checkpoint("org/tiny", endpoint=endpoint, cache=tmp_path / "cache", offline=True)
    assert asked == []
    assert again.fingerprint() == checkpoint.fingerprint()
    unreachable = open_checkpoint("org/tiny", endpoint="http://127.0.0.1:9", cache=tmp_path / "cache")
    assert unreachable.fingerprint() == checkpoint.fingerprint()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("org/missing", "no folder and no hub repository is called org/missing; check the spelling"),
        ("org/gated", "the repository org/gated is gated; accept its terms"),
        ("org/tiny@old", "the repository org/tiny has no revision old"),
        ("org/broken", r"org/broken.* the hub cache lacks it: .*500"),
    ],
)
def test_the_hub_refuses(source: str, message: str, hub: tuple[str, list[str]], tmp_path: Path) -> None:
    with pytest.raises(HubError, match=message) as caught:
        open_checkpoint(source, endpoint=hub[0], cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_the_hub_cannot_be_reached(tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"hub cache lacks it: .*Connect.*; connect, or name a local folder"):
        open_checkpoint("org/tiny", endpoint="http://127.0.0.1:9", cache=tmp_path)


def test_offline_and_not_in_the_cache(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="hub cache lacks it: qtool is offline"):
        open_checkpoint("org/tiny", cache=tmp_path, offline=True)


def test_impossible_id(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nor a valid hub id"):
        open_checkpoint("org/a--b", cache=tmp_path)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(StorageError, match="the disk is too full to download org/tiny"):
        open_checkpoint("org/tiny", cache=tmp_path)
