"""Uploads, against a server that implements the few routes of the hub that they use."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants

from qtool.errors import HubError, UsageError
from qtool.pipeline.upload import check_repository, claim
from qtool.store.hub import push_to_hub, refuse_stranger

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
        if self.path == f"/api/models/{REPO}/branch/next":
            self.server.branches.append("next")
            return self.answer({})
        if self.path in (f"/api/models/{REPO}/preupload/main", f"/api/models/{REPO}/preupload/next"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            return self.answer(
                {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            )
        if self.path == f"/{REPO}.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            hrefs = [{"upload": {"href": f"{self.server.address}/lfs/{o['oid']}"}} for o in objects]
            return self.answer({"objects": [{**o, "actions": a} for o, a in zip(objects, hrefs, strict=True)]})
        if self.path in (f"/api/models/{REPO}/commit/main", f"/api/models/{REPO}/commit/next"):
            self.server.committed = self.path.rpartition("/")[2]
            self.commit([json.loads(line) for line in body.splitlines()])
            return self.answer({"commitUrl": f"{self.server.address}/{REPO}/commit/1", "commitOid": "1" * 40})
        return self.answer({"error": f"no such route: {self.path}"}, 404)

    def do_GET(self):
        if self.path != "/api/whoami-v2" or self.headers["Authorization"] != "Bearer hf_secret":
            return self.answer({"error": "Invalid user token"}, 401)
        return self.answer({"type": "user", "name": "someone", "orgs": [{"name": "lab"}]})

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
    server.branches, server.committed = [], None
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
    assert not request.get("private")
    assert request.get("visibility") != "private"
    assert (hub.branches, hub.committed) == ([], "main")


def test_a_private_repository_and_a_branch(hub, folder, tree):
    push_to_hub(folder, REPO, "hf_secret", hub.address, private=True, revision="next")
    ((request, _),) = hub.created
    assert request.get("private") is True or request["visibility"] == "private"  # as releases of the library say it
    assert (hub.branches, hub.committed) == (["next"], "next")
    assert hub.files == tree(folder)


def test_a_repository_is_there_before_hours_of_work(hub):
    claim(None)
    claim(REPO, True, "next", hub.address, "hf_secret")
    ((request, _),) = hub.created
    assert request.get("private") is True or request["visibility"] == "private"
    assert (hub.branches, hub.files) == (["next"], {})
    with pytest.raises(HubError, match="wanted an owner among someone, lab, found stranger"):
        claim("stranger/tiny", endpoint=hub.address, token="hf_secret")
    hub.refuse = "/api/repos/create"
    with pytest.raises(HubError, match="cannot upload to someone/tiny-quantized"):
        claim(REPO, endpoint=hub.address, token="hf_secret")
    assert len(hub.created) == 1


def test_who_may_upload_is_asked_before(hub):
    refuse_stranger(REPO, "hf_secret", hub.address)
    refuse_stranger("lab/tiny", "hf_secret", hub.address)
    with pytest.raises(HubError, match="cannot upload to other/tiny: wanted an owner among someone, lab, found other"):
        refuse_stranger("other/tiny", "hf_secret", hub.address)
    with pytest.raises(HubError, match=r"cannot upload to .*; log in with `hf auth login`"):
        refuse_stranger(REPO, "hf_wrong", hub.address)
    with pytest.raises(HubError, match=r"cannot upload to .*refused"):
        refuse_stranger(REPO, "hf_secret", "http://127.0.0.1:9")
    assert hub.created == []


def test_flags_that_need_a_repository():
    check_repository(REPO, private=True, revision="next")
    for given, flag in (({"private": True}, "--private"), ({"revision": "next"}, "--revision")):
        with pytest.raises(UsageError, match=f"{flag}: wanted --push-to-hub OWNER/NAME beside it"):
            check_repository(None, **given)
    with pytest.raises(UsageError, match="wanted OWNER/NAME of a repository, found 'me and you/tiny'"):
        check_repository("me and you/tiny")


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
