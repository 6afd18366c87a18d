"""Whole runs on tiny models, looked at with other libraries' readers."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qtool.artifact.gguf import GGUF
from qtool.artifact.gguf._reader import QuantizedGGUF
from qtool.checkpoint.open import open_checkpoint
from qtool.errors import GateError, NumericsError, StorageError, UsageError, VerifyError
from qtool.pipeline import solve
from qtool.pipeline.quantize import QuantizeOptions, conclude, run
from qtool.pipeline.statistics import Walked
from qtool.report.render import read_report

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def source_tensors(folder):
    """Every tensor of a checkpoint folder, through safetensors itself."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return tensors


def decibel(w, w_hat):
    """10 log10(|W|^2 / |W - W_hat|^2), in numpy."""
    w = w.double().numpy()
    return 10 * np.log10((w**2).sum() / ((w - w_hat) ** 2).sum())


def gguf_name(name):
    """model.layers.3.mlp.up_proj -> blk.3.ffn_up.weight."""
    if name == "lm_head":
        return "output.weight"
    _, _, block, *path = name.split(".")
    return f"blk.{block}.{GGUF_NAMES['.'.join(path)]}.weight"


def test_gguf_decoded_by_its_own_library_has_the_reported_errors(gguf_run):
    source, out, report, _ = gguf_run
    (path,) = out.glob("*.gguf")
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    original = source_tensors(source)
    quantized = [e for e in report.layers if e.format]
    assert len(quantized) == 3 * 7 + 1
    for entry in quantized:
        tensor = stored[gguf_name(entry.name)]
        assert tensor.tensor_type.name.lower() == entry.format
        assert tensor.n_bytes == entry.nbytes
        w_hat = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert decibel(original[f"{entry.name}.weight"], w_hat) == pytest.approx(entry.weight_error_db, abs=1e-3)
        assert entry.weight_error_db > {"q4_0": 19, "q8_0": 44}[entry.format]


def test_what_is_no_linear_is_copied_bit_for_bit(gguf_run):
    source, out, _, _ = gguf_run
    (path,) = out.glob("*.gguf")
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    original = source_tensors(source)
    norm = stored["output_norm.weight"].data
    assert np.array_equal(norm, original["model.norm.weight"].float().numpy())
    embedding = gguf.dequantize(stored["token_embd.weight"].data, stored["token_embd.weight"].tensor_type)
    assert np.array_equal(embedding, original["model.embed_tokens.weight"].float().numpy())


def test_every_matrix_is_accounted_for(gguf_run):
    source, _, report, _ = gguf_run
    matrices = {n.removesuffix(".weight"): tuple(t.shape) for n, t in source_tensors(source).items() if t.ndim == 2}
    assert {e.name: e.shape for e in report.layers} == matrices
    assert [e.name for e in report.layers if e.format is None] == ["model.embed_tokens"]
    assert report.parameters == sum(t.numel() for t in source_tensors(source).values())
    assert report.source_bytes == sum(t.nbytes for t in source_tensors(source).values())
    assert report.other_bytes == sum(t.nbytes for t in source_tensors(source).values() if t.ndim == 1)


def test_report_lists_the_files_with_their_digests(gguf_run):
    _, out, report, _ = gguf_run
    (artifact,) = report.artifacts
    assert artifact.verified
    assert artifact.kind == "gguf"
    for file in artifact.files:
        content = (out / artifact.path / file.name).read_bytes()
        assert (file.nbytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert read_report(out / "report.json") == report
    assert {"report.md", "report.html", "SHA256SUMS", "README.md"} <= {p.name for p in out.iterdir()}
    assert not out.with_name("out.work").exists()


def test_stages_and_memory_are_measured(gguf_run):
    _, _, report, _ = gguf_run
    assert [s.name for s in report.stages] == ["plan", "calibrate", "quantize", "write gguf", "verify gguf", "run gguf"]
    assert all(s.seconds >= 0 for s in report.stages)
    assert 50e6 < report.stages[-1].peak_bytes < 50e9


def test_events_count_units_and_tell_their_error(gguf_run):
    _, _, report, events = gguf_run
    steps = [e for e in events if e.stage == "quantize"]
    assert [(e.done, e.total, e.message) for e in steps] == [
        (0, 4, ""),
        (1, 4, "block-0"),
        (2, 4, "block-1"),
        (3, 4, "block-2"),
        (4, 4, "lm_head"),
    ]
    first = [e.weight_error_db for e in report.layers if e.block == 0]
    assert steps[1].values["error_db"] == pytest.approx(sum(first) / 7, abs=1e-6)


def test_nothing_in_an_artifact_names_a_path_or_a_time(gguf_run):
    source, out, _, _ = gguf_run
    for path in out.iterdir():
        if not path.name.startswith("report.") and path.name != "SHA256SUMS":
            assert str(source.parent).encode() not in path.read_bytes(), path.name


def test_several_artifacts_hold_the_same_weights(tiny_checkpoint, recipes, tmp_path):
    from transformers import AutoModelForCausalLM

    source, out = tiny_checkpoint("llama"), tmp_path / "out"
    report = run(QuantizeOptions(str(source), recipes["compressed"], out))
    assert [(a.kind, a.path) for a in report.artifacts] == [
        ("compressed-tensors", "compressed-tensors"),
        ("qtool", "qtool"),
    ]
    assert (out / "qtool" / "SHA256SUMS").exists()
    original = source_tensors(source)
    model = AutoModelForCausalLM.from_pretrained(out / "compressed-tensors", dtype=torch.float32)
    model(torch.zeros(1, 4, dtype=torch.long))  # compressed-tensors decodes in the first forward pass, or before
    state = model.state_dict()
    found = {
        e.name: decibel(original[f"{e.name}.weight"], state[f"{e.name}.weight"].double().numpy())
        for e in report.layers
        if e.format
    }
    assert found == pytest.approx({e.name: e.weight_error_db for e in report.layers if e.format}, abs=0.05)


def test_smoke_run_leaves_the_rest_untouched(tiny_checkpoint, recipes, tmp_path):
    events, out = [], tmp_path / "out"
    report = run(QuantizeOptions(str(tiny_checkpoint("qwen3")), recipes["gguf"], out, limit=1), events.append)
    assert report.limited_blocks == 1
    assert {e.block for e in report.layers if e.format} == {0}
    assert any("first 1 of 3" in w for w in report.warnings)
    assert any(e.warning and "first 1 of 3" in e.message for e in events)
    (path,) = out.glob("*.gguf")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["blk.1.ffn_up.weight"] == kinds["output.weight"] == "BF16"


# Failures


def test_nan_is_named_before_anything_is_written(tiny_checkpoint, recipes, tmp_path):
    source = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        run(QuantizeOptions(str(source), recipes["gguf"], tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_weights_that_no_scale_holds_are_named(tiny_checkpoint, recipes, tmp_path):
    source = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e7
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    named = r"^model\.layers\.1\.mlp\.up_proj: q4_0 stores scales in fp16: wanted at most 65504, found \S+$"
    with pytest.raises(NumericsError, match=named):
        run(QuantizeOptions(str(source), recipes["gguf"], tmp_path / "out"))


def test_an_occupied_output_is_left_alone(tiny_checkpoint, recipes, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(StorageError, match=r"holds something else.*letter\.txt"):
        run(QuantizeOptions(str(tiny_checkpoint("llama")), recipes["gguf"], tmp_path, overwrite=True))
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_overwrite_replaces_an_earlier_result(tiny_checkpoint, recipes, tmp_path):
    options = QuantizeOptions(str(tiny_checkpoint("llama")), recipes["gguf"], tmp_path / "out")
    run(options)
    with pytest.raises(StorageError, match="--overwrite"):
        run(options)
    other = QuantizeOptions(options.model, recipes["compressed"], options.out, overwrite=True)
    assert [a.kind for a in run(other).artifacts] == ["compressed-tensors", "qtool"]
    assert not list((tmp_path / "out").glob("*.gguf"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_tampered_artifact_does_not_pass(tiny_checkpoint, recipes, tmp_path, monkeypatch):
    honest = GGUF.open

    def scaled(self, path):
        model = honest(self, path)
        read = model.rows
        model.rows = lambda name, *part: read(name, *part) * (1.01 if name == "model.norm.weight" else 1)
        return model

    monkeypatch.setattr(GGUF, "open", scaled)
    options = QuantizeOptions(str(tiny_checkpoint("llama")), recipes["gguf"], tmp_path / "out")
    with pytest.raises(VerifyError, match=r"model\.norm\.weight read back differs"):
        run(options)
    assert [p.name for p in tmp_path.iterdir()] == ["out.work"]


def test_tampered_codes_do_not_pass(tiny_checkpoint, recipes, tmp_path, monkeypatch):
    honest = QuantizedGGUF.matrix

    def changed(self, module):
        matrix = honest(self, module)
        if module == "model.layers.1.mlp.up_proj":
            matrix.quantized.codes[-1, -1] ^= 1
        return matrix

    monkeypatch.setattr(QuantizedGGUF, "matrix", changed)
    options = QuantizeOptions(str(tiny_checkpoint("llama")), recipes["gguf"], tmp_path / "out")
    with pytest.raises(
        VerifyError, match=r"up_proj\.weight read back differs: found 1 of 8192 numbers, by up to 0\.\d+"
    ):
        run(options)


@pytest.mark.proven
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_the_parts_of_large_matrices_make_no_difference(
    rows, tiny_checkpoint, recipes, gguf_run, tmp_path, monkeypatch
):
    source, _, report, _ = gguf_run
    monkeypatch.setattr("qtool.pipeline.rows.PART", rows * 64)
    parts = run(QuantizeOptions(str(source), recipes["gguf"], tmp_path / "out"))
    assert [a.files for a in parts.artifacts] == [a.files for a in report.artifacts]
    errors = [[e.weight_error_db for e in r.layers if e.format] for r in (parts, report)]
    assert errors[0] == pytest.approx(errors[1], abs=1e-4)


def test_work_of_another_run_is_not_continued(tiny_checkpoint, recipes, tmp_path):
    events, out = [], tmp_path / "out"
    model = str(tiny_checkpoint("llama"))
    run(QuantizeOptions(model, recipes["gguf"], out, keep=True))
    shutil.rmtree(out)
    overrides = ("layers.0.weights=q5_0",)
    report = run(QuantizeOptions(model, recipes["gguf"], out, overrides), events.append)
    assert {e.format for e in report.layers if e.role == "up"} == {"q5_0"}
    assert [e.message for e in events if e.warning] == [f"{out}.work was begun with another recipe: starting anew"]


def test_work_of_the_same_run_is_not_done_again(tiny_checkpoint, recipes, tmp_path, monkeypatch):
    out, model = tmp_path / "out", str(tiny_checkpoint("llama"))
    first = run(QuantizeOptions(model, recipes["gguf"], out, keep=True))
    shutil.rmtree(out)
    monkeypatch.setattr("qtool.pipeline.solver.solve", None)
    assert run(QuantizeOptions(model, recipes["gguf"], out)).layers == first.layers


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_weights_that_the_walk_has_are_not_read_again(dtype, tiny_checkpoint, recipes, texts, tmp_path, monkeypatch):
    """But where it computes in another type than they are stored in; the codes are the same."""
    seen, honest = [], solve.read

    def read(checkpoint, source, module, start, stop):
        seen.append(module)
        return honest(checkpoint, source, module, start, stop)

    monkeypatch.setattr("qtool.pipeline.solve.read", read)
    model, text = str(tiny_checkpoint("llama")), f"calibration.data={texts / 'calibration.txt'}"
    small = (text, "calibration.samples=4", "calibration.length=32", "method=gptq")
    run(QuantizeOptions(model, recipes["gguf"], tmp_path / "out", small, device="cpu", dtype=dtype))
    (file,) = (tmp_path / "out").rglob("*.gguf")
    first = file.read_bytes()
    inside = {module for module in seen if ".layers." in module}
    stored = str(open_checkpoint(model).info("model.layers.0.mlp.up_proj.weight").dtype)
    assert bool(inside) == (stored != {"bf16": "torch.bfloat16", "fp32": "torch.float32"}[dtype])
    monkeypatch.setattr(Walked, "at_hand", lambda *_: {})
    run(QuantizeOptions(model, recipes["gguf"], tmp_path / "again", small, device="cpu", dtype=dtype))
    (file,) = (tmp_path / "again").rglob("*.gguf")
    assert file.read_bytes() == first


def test_a_run_killed_while_it_tidied_up_is_done(tiny_checkpoint, recipes, tmp_path, monkeypatch):
    out, model = tmp_path / "out", str(tiny_checkpoint("llama"))
    first = run(QuantizeOptions(model, recipes["gguf"], out, keep=True))  # leaves what such a run leaves
    with pytest.raises(StorageError, match="holds an earlier output"):
        run(QuantizeOptions(model, recipes["compressed"], out))
    monkeypatch.setattr("qtool.pipeline.quantize.produce", None)
    assert run(QuantizeOptions(model, recipes["gguf"], out)) == first
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_foreign_work_folder_is_left_alone(tiny_checkpoint, recipes, tmp_path):
    work = tmp_path / "out.work"
    work.mkdir()
    (work / "model.safetensors").write_text("mine")
    with pytest.raises(StorageError, match=r"work folder holds something else.*model\.safetensors"):
        run(QuantizeOptions(str(tiny_checkpoint("llama")), recipes["gguf"], tmp_path / "out"))
    assert (work / "model.safetensors").read_text() == "mine"


def test_a_damaged_work_folder_is_named_with_what_to_do(tiny_checkpoint, recipes, tmp_path):
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "manifest.json").write_text('{"version": 1')
    with pytest.raises(
        StorageError, match=r"the work folder is damaged: .* is not valid JSON.*; remove .*out\.work, or"
    ):
        run(QuantizeOptions(str(tiny_checkpoint("llama")), recipes["gguf"], tmp_path / "out"))


def test_two_runs_into_one_place_at_once_are_refused(tiny_checkpoint, recipes, tmp_path):
    options = QuantizeOptions(str(tiny_checkpoint("llama")), recipes["gguf"], tmp_path / "out")

    def second(event):
        if event.stage == "quantize":
            with pytest.raises(StorageError, match="another run"):
                run(options)

    run(options, second)
    assert (tmp_path / "out" / "report.json").exists()


def test_missing_device_is_a_usage_error(tiny_checkpoint, recipes, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="--device cuda: wanted a CUDA device"):
        run(QuantizeOptions(str(tiny_checkpoint("llama")), recipes["gguf"], tmp_path / "out", device="cuda"))


def test_a_missed_gate_fails_after_everything_is_written(tiny_checkpoint, recipes, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    overrides = (
        f"eval={json.dumps({'text': str(text), 'context': 64, 'chunks': 2, 'gates': {'top1': 1.0, 'kld': 0}})}",
    )
    model, out = str(tiny_checkpoint("llama")), tmp_path / "out"
    options = QuantizeOptions(model, recipes["gguf"], out, overrides, push_to="me/tiny")
    report, events = run(options), []
    with pytest.raises(GateError, match=r"kld wanted at most 0"):
        conclude(report, options, events.append)
    assert not events  # nothing was uploaded
    assert read_report(out / "report.json") == report
    assert report.evaluations[0].chunks == 2
    assert 0 < report.evaluations[0].kld_mean < 1
    assert f"{report.evaluations[0].kld_mean:.5f}" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "push_to",
            "me and you/tiny",
            "--push-to-hub: wanted OWNER/NAME of a repository, found 'me and you/tiny'",
        ),
        (
            "stats",
            Path("nowhere"),
            "--stats: wanted a file of `qtool calibrate` or llama-imatrix, found no file nowhere",
        ),
        ("imatrix", Path("nowhere"), "--imatrix: wanted a file of `qtool calibrate` or llama-imatrix, found no file"),
    ],
)
def test_what_would_fail_at_the_end_is_refused_at_once(field, value, message, recipes, tmp_path):
    with pytest.raises(UsageError, match=re.escape(message)):
        run(QuantizeOptions("no model", recipes["gguf"], tmp_path / "out", **{field: value}))
