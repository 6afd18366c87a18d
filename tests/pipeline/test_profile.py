"""Where a block's seconds went."""

import json
import shutil
from dataclasses import replace

import pytest

from qtool.pipeline.profile import parts_of
from qtool.pipeline.quantize import NOT_PROFILED, QuantizeOptions, run
from qtool.report.render import read_report


def mark(name, ts, dur, tid=1):
    return {"cat": "user_annotation", "name": f"qtool: {name}", "ts": ts, "dur": dur, "tid": tid}


def launch(number, ts, tid=1, cat="cuda_runtime"):
    return {"cat": cat, "name": "cudaLaunchKernel", "ts": ts, "dur": 1, "tid": tid, "args": {"correlation": number}}


def work(number, dur, cat="kernel"):
    return {"cat": cat, "name": "some", "ts": 1e6, "dur": dur, "tid": 7, "args": {"correlation": number}}


def test_parts_of_a_trace():
    """Time within an inner part is not the outer one's; work of a device belongs to what launched it."""
    events = [
        {"ph": "M", "name": "process_name", "args": {}},
        mark("whole", 0, 1000),
        mark("walk", 100, 300),
        mark("walk", 500, 100),
        mark("scales", 150, 50),
        mark("read", 0, 40, tid=2),
        {"cat": "user_annotation", "name": "Optimizer.step", "ts": 110, "dur": 10, "tid": 1},
        launch(1, 120),
        launch(2, 170, cat="cuda_driver"),
        launch(3, 450),
        launch(4, 20, tid=2),
        launch(5, 5, tid=3),
        launch(9, 199.5),
        work(1, 2000),
        work(2, 3000),
        work(3, 400, "gpu_memset"),
        work(4, 700, "gpu_memcpy"),
        work(5, 60),
        work(6, 5),
    ]
    found = {e.part: (e.calls, round(e.host_seconds * 1e6), round(e.device_seconds * 1e6)) for e in parts_of(events)}
    assert found == {
        "whole": (1, 600, 400),
        "walk": (2, 350, 2000),
        "scales": (1, 50, 3000),
        "read": (1, 40, 700),
        "other threads": (0, 0, 65),
    }
    assert [e.part for e in parts_of(events)] == ["scales", "walk", "read", "whole", "other threads"]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_run_is_profiled(tiny_checkpoint, texts, tmp_path, method):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"recipe: 1\nname: r\nmethod: {method}\ncalibration: {{data: {texts / 'calibration.txt'}, "
        "samples: 4, length: 32}\n"
        'layers: [{match: "*", weights: int4-g32}]\nexport: [{to: qtool}]\n'
    )
    trace = tmp_path / "new" / "trace.json"
    options = QuantizeOptions(
        str(tiny_checkpoint("llama")), str(recipe), tmp_path / "out", device="cpu", profile=trace, verify=False
    )
    report = run(options)
    found = {e.part: e for e in report.profile}
    wanted = {"solving", "errors", "the rest", "weights read"}
    wanted |= {"forward passes", "statistics", "factors", "walk", "descent"} if method == "gptq" else set()
    assert wanted <= found.keys()
    assert all(e.host_seconds > 0 and e.device_seconds == 0 for e in found.values())
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "qtool: solving" in names
    assert read_report(tmp_path / "out" / "report.json").profile == report.profile
    for page in ("report.html", "report.md"):
        assert "Where a block's seconds went" in (tmp_path / "out" / page).read_text()


def test_what_is_solved_already_is_not_profiled_and_that_is_said(tiny_checkpoint, recipes, tmp_path):
    trace, events = tmp_path / "trace.json", []
    options = QuantizeOptions(str(tiny_checkpoint("llama")), recipes["gguf"], tmp_path / "out", keep=True)
    run(options)
    shutil.rmtree(tmp_path / "out")
    report = run(replace(options, profile=trace), events.append)
    assert [e.message for e in events if e.warning] == [NOT_PROFILED]
    assert not trace.exists()
    assert report.profile == ()
    again = run(replace(options, profile=trace, take_over=True), (events := []).append)
    assert [e.message for e in events if e.warning] == [NOT_PROFILED]
    assert again == report
