"""Uploads, against a server that implements the few routes of the hub that they use."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants

from qtool.artifact._hub import push_to_hub
from qtool.errors import HubError

REPO = "someone/tiny-quantized"

# huggingface_hub 2.4 sends large files in a way that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class Hub(BaseHTTPRequestHandler):
    """Keeps what is committed in `server.files`. Weights come by the protocol for large files, as on the real hub."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuse and self.path.startswith(self.server.refuse):
            return self.answer({"error": "You have no right to do this"}, 403)
        if self.path == "/api/repos/create":
            self.server.created.append((json.loads(body), self.headers["Authorization"]))
            return self.answer({"url": f"{self.server.address}/{REPO}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path == f"/api/models/{REPO}/preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            return self.answer(
                {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            )
        if self.path == f"/{REPO}.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            hrefs = [{"upload": {"href": f"{self.server.address}/lfs/{o['oid']}"}} for o in objects]
            return self.answer({"objects": [{**o, "actions": a} for o, a in zip(objects, hrefs, strict=True)]})
        if self.path == f"/api/models/{REPO}/commit/main":
            self.commit([json.loads(line) for line in body.splitlines()])
            return self.answer({"commitUrl": f"{self.server.address}/{REPO}/commit/1", "commitOid": "1" * 40})
        return self.answer({"error": f"no such route: {self.path}"}, 404)

    def do_PUT(self):
        if "Content-Length" in self.headers:
            content = self.rfile.read(int(self.headers["Content-Length"]))
        else:
            content = b""
            while size := int(self.rfile.readline(), 16):  # HTTP's chunked encoding
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.server.large[self.path.removeprefix("/lfs/")] = content
        self.answer({})

    def commit(self, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.server.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.server.files[value["path"]] = content

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        """Keeps quiet."""


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its server side is not public
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    server.created, server.files, server.large, server.refuse = [], {}, {}, None
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Tiny\n")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "sub" / "config.json").write_text("{}")
    return tmp_path


def test_every_file_arrives_byte_by_byte(hub, folder, tree):
    assert push_to_hub(folder, REPO, token="hf_secret", endpoint=hub.address) == f"{hub.address}/{REPO}"
    assert hub.files == tree(folder)
    ((request, authorization),) = hub.created
    assert (request["organization"], request["name"]) == ("someone", "tiny-quantized")
    assert authorization == "Bearer hf_secret"


@pytest.mark.parametrize("route", ["/api/repos/create", f"/api/models/{REPO}/preupload", f"/api/models/{REPO}/commit"])
def test_refusals_are_one_line_with_a_next_step(route, hub, folder, tree):
    hub.refuse = route
    before = tree(folder)
    with pytest.raises(
        HubError, match=r"cannot upload to .*no right to do this.*; nothing is lost: log in with"
    ) as caught:
        push_to_hub(folder, REPO, token="hf_secret", endpoint=hub.address)
    assert "\n" not in str(caught.value)
    assert tree(folder) == before
    assert hub.files == {}


def test_a_failure_in_the_middle_names_its_cause(hub, folder):
    hub.refuse = f"/{REPO}.git"
    with pytest.raises(HubError, match="no right to do this"):
        push_to_hub(folder, REPO, token="hf_secret", endpoint=hub.address)
    assert hub.files == {}


def test_a_name_that_is_none(folder):
    with pytest.raises(HubError, match="cannot upload to no such/name/at all"):
        push_to_hub(folder, "no such/name/at all", token="hf_secret", endpoint="http://127.0.0.1:9")


def test_nobody_answers(folder):
    with pytest.raises(HubError, match=f"cannot upload to {REPO}: found .*refused"):
        push_to_hub(folder, REPO, token="hf_secret", endpoint="http://127.0.0.1:9")
