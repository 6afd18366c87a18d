"""Export, inspect, evaluate, upload, plan: each stage by itself."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from qtool.calibrate.store import write_stats
from qtool.cli.app import app
from qtool.cli.inspect import ranges, show
from qtool.errors import CheckpointError, HubError, PlanError, UsageError
from qtool.pipeline import inspect, measured
from qtool.pipeline.evaluate import EvaluateOptions
from qtool.pipeline.evaluate import run as evaluate
from qtool.pipeline.export import ExportOptions
from qtool.pipeline.export import run as export
from qtool.pipeline.prepare import prepare
from qtool.pipeline.quantize import QuantizeOptions
from qtool.pipeline.quantize import run as quantize
from qtool.pipeline.upload import upload
from qtool.stats._base import InputStats
from qtool.stats.channels import Channels
from qtool.store.imatrix import ImportanceEntry, ImportanceMatrix, write_imatrix


@pytest.fixture(scope="module")
def compressed(tiny_checkpoint, recipes, tmp_path_factory):
    """Output folder of a run to compressed-tensors and the neutral checkpoint. Read only."""
    out = tmp_path_factory.mktemp("compressed") / "out"
    quantize(QuantizeOptions(str(tiny_checkpoint("llama")), recipes["compressed"], out))
    return out


def tensors_of(path):
    """Name -> decoded values of a GGUF file, by its own library."""
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("layout", ["compressed-tensors", "qtool"])
def test_export_keeps_every_value(layout, compressed, tmp_path):
    entry = export(ExportOptions(compressed / layout, "gguf", tmp_path / "out"))
    assert entry.verified
    (path,) = (tmp_path / "out").glob("*.gguf")
    found = tensors_of(path)
    model = AutoModelForCausalLM.from_pretrained(compressed / "compressed-tensors", dtype=torch.float32)
    model(torch.zeros(1, 4, dtype=torch.long))
    state = model.state_dict()
    for there, here in (("blk.1.ffn_up.weight", "mlp.up_proj"), ("blk.1.attn_v.weight", "self_attn.v_proj")):
        wanted = state[f"model.layers.1.{here}.weight"].numpy()
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(found[there], wanted, atol=4e-3)  # transformers decodes in bfloat16


def test_export_refuses_what_does_not_fit(gguf_run, tmp_path):
    _, out, _, _ = gguf_run
    with pytest.raises(PlanError, match=r"AWQ holds 4-bit integers .*, not q8_0"):
        export(ExportOptions(out, "awq", tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_export_wants_a_quantized_model(tiny_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="holds no quantized artifact"):
        export(ExportOptions(tiny_checkpoint("llama"), "gguf", tmp_path / "out"))


def test_inspect_adds_up_to_the_file(gguf_run):
    _, out, report, _ = gguf_run
    contents = inspect.run(str(out))
    assert (contents.kind, contents.family) == ("gguf", "qwen3")
    (path,) = out.glob("*.gguf")
    stored = gguf.GGUFReader(path).tensors
    assert contents.bits == 8 * sum(t.n_bytes for t in stored)
    assert contents.parameters == report.parameters
    roles = {(r.name, r.type): (r.tensors, r.parameters) for r in contents.roles}
    assert roles["up", "q4_0"] == (3, 3 * 64 * 128)
    assert roles["head", "q8_0"] == (1, 512 * 64)
    assert roles["embedding", "bf16"] == (1, 512 * 64)
    assert {r.bits / r.parameters for r in contents.roles if r.name in ("up", "down", "gate")} == {4.5}


def test_inspect_says_which_blocks_and_what_the_header_holds(tiny_checkpoint, tmp_path):
    (tmp_path / "r.yaml").write_text(
        'recipe: 1\nname: t\nlayers:\n  - {match: "role:v", blocks: [0, 2], weights: q8_0}\n'
        '  - {match: "*", weights: q4_0}\nexport: [{to: gguf, split_max_size: 60000}]\n'
    )
    quantize(QuantizeOptions(str(tiny_checkpoint("qwen3")), str(tmp_path / "r.yaml"), tmp_path / "out"))
    contents = inspect.run(str(tmp_path / "out"))
    roles = {(r.name, r.type): r.blocks for r in contents.roles}
    assert (roles["v", "q8_0"], roles["v", "q4_0"], roles["k", "q4_0"]) == ((0, 2), (1,), (0, 1, 2))
    assert (roles["head", "q4_0"], roles["other", "f32"]) == ((), ())
    assert {t.name: t.blocks for t in contents.tensors}["model.layers.2.mlp.up_proj.weight"] == (2,)
    assert contents.parts == {path.name: path.stat().st_size for path in sorted((tmp_path / "out").glob("*.gguf"))}
    assert len(contents.parts) == contents.header["split.count"] > 2
    assert contents.header["qwen3.block_count"] == 3
    assert contents.header["general.file_type"] == "2 (MOSTLY_Q4_0)"
    assert contents.header["tokenizer.ggml.tokens"] == "512 items"
    text = show(contents, tensors=False)
    lines = text.splitlines()
    assert "general.file_type: 2 (MOSTLY_Q4_0)" in lines
    assert f"part: t-00002-of-0000{len(contents.parts)}.gguf" in text.replace("qwen30-", "")
    assert any(line.split() == ["v", "q8_0", "-", "0,", "2", "2", "8,192", "8.500", "8.7", "kB"] for line in lines)
    assert any(line.split()[:5] == ["k", "q4_0", "-", "0-2", "3"] for line in lines)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((), ""), ((3,), "3"), ((0, 1, 2), "0-2"), ((0, 1, 4, 6, 7), "0-1, 4, 6-7"), ((0, 2, 4), "0, 2, 4")],
)
def test_ranges_of_blocks(numbers, text):
    assert ranges(numbers) == text


def test_what_a_header_says_stays_on_its_line(gguf_run):
    contents = inspect.run(str(gguf_run[1]))
    hostile = contents.model_copy(update={"header": {"a\x1b[2J": "b\nc", "long": "x" * 1000}})
    lines = show(hostile, tensors=False).splitlines()
    assert lines[1:3] == ["a\\x1b[2J: b\\nc", "long: " + "x" * 151 + "..."]


def test_inspect_reads_plain_checkpoints(tiny_checkpoint):
    contents = inspect.run(str(tiny_checkpoint("qwen3")))
    assert contents.kind == "checkpoint"
    assert contents.metadata["hidden_size"] == 64
    assert contents.bits == 16 * contents.parameters
    assert "tokenizer.json" in contents.files


def test_inspect_shows_what_calibration_measured(tmp_path):
    x = torch.randn(30, 12, generator=torch.Generator().manual_seed(1))
    stats = InputStats(12, frozenset({Channels}))
    stats.add(x)
    write_stats(
        tmp_path / "stats", {"head_in": stats}, {"model": "m", "fingerprint": "f", "calibration": {"samples": 3}}
    )
    found = measured.run(str(tmp_path / "stats"))
    assert (found.kind, found.about) == ("statistics", {"model": "m", "samples": 3})
    (entry,) = found.inputs
    assert (entry.name, entry.channels, entry.tokens) == ("head_in", 12, 30)
    assert entry.rms == pytest.approx(float((x.double() ** 2).mean().sqrt()), rel=1e-6)
    assert entry.largest == x.abs().max()
    printed = CliRunner().invoke(app, ["inspect", str(tmp_path / "stats")]).stdout.splitlines()
    assert printed[-1].split() == ["head_in", "12", "30", f"{entry.rms:.4g}", f"{entry.largest:.4g}"]


def test_inspect_shows_an_importance_matrix(tmp_path):
    x = torch.randn(2, 30, 12, generator=torch.Generator().manual_seed(2))  # two experts
    entry = ImportanceEntry((x**2).sum(1), torch.tensor([30.0, 30.0]))
    write_imatrix(tmp_path / "i.gguf", ImportanceMatrix({"blk.0.ffn_up_exps.weight": entry}, ("a.txt", "b.txt"), 1, 30))
    found = measured.run(str(tmp_path / "i.gguf"))
    assert found.about == {"datasets": ["a.txt", "b.txt"], "chunks": 1, "tokens per chunk": 30}
    (line,) = found.inputs
    assert (line.channels, line.tokens, line.largest) == (24, 60, None)
    assert line.rms == pytest.approx(float((x.double() ** 2).mean().sqrt()), rel=1e-6)
    huge = ImportanceEntry(torch.full((1, 12), 3e38), torch.ones(1))
    write_imatrix(tmp_path / "huge.gguf", ImportanceMatrix({"blk.0.ffn_up.weight": huge}, ("a.txt",), 1, 1))
    assert measured.run(str(tmp_path / "huge.gguf")).inputs[0].rms == pytest.approx(3e38**0.5, rel=1e-6)
    assert "datasets: a.txt, b.txt" in CliRunner().invoke(app, ["inspect", str(tmp_path / "i.gguf")]).stdout


def test_a_model_is_no_file_of_measurements(gguf_run, tmp_path):
    (file,) = gguf_run[1].glob("*.gguf")
    (tmp_path / "text").write_text("some text")
    assert measured.run(str(file)) is measured.run(str(tmp_path)) is measured.run(str(tmp_path / "text")) is None


def test_plan_predicts_the_bytes(gguf_run, recipes):
    source, _, report, _ = gguf_run
    plan = prepare(str(source), recipes["gguf"]).plan
    assert sum(e.nbytes for e in report.layers) + report.other_bytes == plan.predicted_bytes


def test_seed_replaces_the_recipes(gguf_run, recipes):
    source, _, _, _ = gguf_run
    assert prepare(str(source), recipes["gguf"], seed=7).plan.recipe.calibration.seed == 7


def test_evaluation_of_a_model_with_itself_is_exact(tiny_checkpoint, tmp_path):
    source, text = tiny_checkpoint("llama"), tmp_path / "text.txt"
    text.write_text("In the beginning there was prose, and it was long enough to be scored. " * 20)
    options = EvaluateOptions(
        str(source), str(source), text, context=64, chunks=2, dtype="fp32", out=tmp_path / "e.json"
    )
    found = evaluate(options)
    assert (found.kld_mean, found.top1, found.chunks) == (0, 1, 2)
    ids = torch.tensor(AutoTokenizer.from_pretrained(source)(text.read_text())["input_ids"][:128]).view(2, 64)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids).logits[:, 32:-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, ids[:, 33:].flatten()).exp()
    assert found.ppl == pytest.approx(float(wanted), rel=1e-4)
    assert json.loads((tmp_path / "e.json").read_text())["ppl"] == found.ppl


def test_gates_without_a_baseline_are_refused_before_work(tiny_checkpoint, tmp_path):
    options = EvaluateOptions(str(tiny_checkpoint("llama")), None, tmp_path / "none.txt", gates={"kld": 0.1})
    with pytest.raises(UsageError, match="--baseline"):
        evaluate(options)


def test_a_missing_text_is_a_usage_error(tiny_checkpoint, tmp_path):
    with pytest.raises(UsageError, match=r"the evaluation text: wanted a UTF-8 file, found no file .*none\.txt"):
        evaluate(EvaluateOptions(str(tiny_checkpoint("llama")), None, tmp_path / "none.txt"))


# A hub of our own


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload of small files needs. `server.files` is what was committed."""

    def log_message(self, *_):
        """Says nothing."""

    def answer(self, value, status=200):
        """Sends JSON."""
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        """Creates a repository, says how to send files, takes a commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer secret":
            return self.answer({"error": "Invalid user token."}, 401)
        if self.path == "/api/repos/create":
            self.server.repository = json.loads(body)
            return self.answer({"url": f"{self.server.address}/me/tiny"})
        if self.path == "/api/validate-yaml":
            self.server.card = json.loads(body)["content"]
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            paths = [f["path"] for f in json.loads(body)["files"]]
            return self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(
                {"commitUrl": f"{self.server.address}/me/tiny/commit/1", "commitOid": "1", "success": True}
            )
        return self.answer({"error": self.path}, 404)

    def do_GET(self):
        """Says that there is nothing for strangers to see."""
        self.answer({"error": "Repository Not Found"}, 401)


@pytest.fixture
def hub():
    """A running hub."""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.address = {}, f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_upload_sends_every_file(gguf_run, hub):
    _, out, _, _ = gguf_run
    events = []
    address = upload(out, "me/tiny", events.append, endpoint=hub.address, token="secret")
    assert address == f"{hub.address}/me/tiny"
    assert (hub.repository["name"], hub.repository["organization"]) == ("tiny", "me")
    assert hub.files == {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert "base_model" not in hub.card  # a folder's name is none that the hub knows
    assert "qwen3" in hub.card
    assert [(e.stage, e.done) for e in events] == [("upload", 0), ("upload", 1)]


def test_a_refused_upload_names_the_next_step(gguf_run, hub):
    _, out, _, _ = gguf_run
    with pytest.raises(HubError, match=r"cannot upload to me/tiny: found .*401.*hf auth login"):
        upload(out, "me/tiny", lambda _: None, endpoint=hub.address, token="wrong")
    assert hub.files == {}


def test_a_hub_out_of_reach_is_a_hub_error(gguf_run):
    _, out, _, _ = gguf_run
    with pytest.raises(HubError, match="cannot upload to me/tiny"):
        upload(out, "me/tiny", lambda _: None, endpoint="http://127.0.0.1:9", token="secret")
