"""What plots show and leave out, from numbers made for it."""

from __future__ import annotations

import re

import pytest

from qtool.report.charts import depth, percentiles, shade, shares, training
from qtool.report.model import BlockEntry, FinishEntry, course_entries
from qtool.report.plots import usual
from qtool.report.render import html, markdown


def test_one_spike_does_not_set_the_scale():
    assert usual([10.0, 11.0, 12.0, 13.0, 90.0]) == (10.0, 13.0)
    assert usual([10.0, 30.0, 20.0, 25.0]) == (10.0, 30.0)
    assert usual([5.0]) == (5.0, 5.0)


def test_what_lies_beyond_the_scale_is_marked_at_its_edge(report):
    spike = report.layers[20].model_copy(update={"output_error_db": 400.0})
    chart = depth(report.model_copy(update={"layers": (*report.layers[:20], spike, *report.layers[21:])}))
    assert "mark 1 layers beyond the scale" in chart.note or "mark 5 layers beyond the scale" in chart.note
    labels = [float(x) for x in re.findall(r'text-anchor="end">([\d.-]+)</text>', str(chart.svg))]
    assert max(labels) < 60
    assert f"{spike.name}: 400.0 dB" in str(chart.svg)
    assert 'class="ring"' in str(chart.svg)


def test_rings_are_for_exceptions(report):
    assert "Rings mark fallbacks." in depth(report).note
    layers = tuple(e.model_copy(update={"fallback": "another format"}) if e.format else e for e in report.layers)
    assert "Rings mark fallbacks." not in depth(report.model_copy(update={"layers": layers})).note


def test_shades_go_by_ratio():
    assert shade([4.25, 4.38]) == {4.25: "b4", 4.38: "b4"}  # 3 % more bits are no other colour
    assert shade([2.0, 4.0, 8.0]) == {2.0: "b0", 4.0: "b2", 8.0: "b4"}
    assert shade([1.0, 4.0, 16.0]) == {1.0: "b0", 4.0: "b2", 16.0: "b4"}
    assert shade([]) == {}


def test_the_embedding_is_seen_as_the_lever_it_is(report):
    chart = shares(report)
    assert "Not quantized, and the largest lever on size: embedding (49%)." in chart.note
    widths = {
        name: float(width)
        for width, name in re.findall(r'width="([\d.]+)" height="[\d.]+"><title>(\w+): ', str(chart.svg))
    }
    embedding, down = (sum(e.nbytes for e in report.layers if e.role == role) for role in ("embedding", "down"))
    assert widths["embedding"] / widths["down"] == pytest.approx(embedding / down, rel=0.02)
    assert max(widths, key=widths.get) == "embedding"
    assert "lever" not in shares(report.model_copy(update={"layers": report.layers[1:]})).note


def test_percentiles_are_decades_apart(report):
    first = report.evaluations[0].model_copy(update={"kld_median": 0.01, "kld_p90": 0.1, "kld_p99": 1.0})
    chart = percentiles(report.model_copy(update={"evaluations": (first,)}))
    at = {name: float(y) for y, name in re.findall(r'cy="([\d.]+)" r="3.2"><title>([^:]+):', str(chart.svg))}
    assert list(at) == ["median", "90 %", "95 %", "99 %", "99.9 %", "largest"]
    assert at["median"] - at["90 %"] == pytest.approx(at["90 %"] - at["99 %"], abs=0.05)
    assert percentiles(report.model_copy(update={"evaluations": ()})) is None


def test_a_training_has_both_losses_and_a_ring_at_what_was_kept(report):
    course = course_entries([(0, 0.2, 0.30000004), (25, 0.15, 0.25), (50, 0.1, 0.27), (75, 0.05, float("inf"))])
    assert course[0].held_out == 0.3
    svg = str(training(course))
    titles = re.findall(r"<title>(.*?)</title>", svg)
    assert titles[:4] == [
        "0: training 0.200, held out 0.300", "25: training 0.150, held out 0.250", "50: training 0.100, held out 0.270",
        "75: training 0.0500, held out inf",
    ]  # fmt: skip
    assert titles[4:] == titles[:3]
    assert re.findall(r'class="ring"><title>(.*?)</title>', svg) == ["25: training 0.150, held out 0.250"]
    epochs = course_entries([(0, None, 0.5), (1, 0.6, 0.4)])
    assert re.findall(r"<title>(.*?)</title>", str(training(epochs))) == [
        "1: training 0.600, held out 0.400", "0: held out 0.500", "1: training 0.600, held out 0.400",
    ]  # fmt: skip
    assert training(course_entries([(0, None, float("nan"))])) == ""
    losses = {"held out before": 0.3}
    blocks = (
        BlockEntry(block=0, method="learned", losses=losses, course=course),
        BlockEntry(block=1, method="another", losses=losses),
    )
    stage = FinishEntry(name="distill", changed=1, about={}, course=epochs)
    told = report.model_copy(update={"blocks": blocks, "finish": (stage,)})
    page = html(told)
    assert page.count(svg) == page.count(str(training(epochs))) == 1
    lines = [line for line in markdown(told).splitlines() if "| learned |" in line or "| another |" in line]
    assert lines == ["| 0 | learned | 25 | 0.300 |", "| 1 | another | - | 0.300 |"]
