import json
import math
import os
import re
from html.parser import HTMLParser

import pytest
import yaml

from qtool.errors import CheckpointError, StorageError
from qtool.evaluate.gates import judge
from qtool.report.model import CacheEntry
from qtool.report.render import html, markdown, read_report, write_report
from qtool.store.markdown import code_span, escape_markdown, fence

HOSTILE = "<script>alert('1')</script> | `x` [a](http://e.example) \" & </svg> {{ 7 * 7 }}\n# head"
CACHED = CacheEntry(block=3, keys="int4-channel", values="int4-token", scores_error_db=21.26, outputs_error_db=17.54)
VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """Collects text and attributes, and insists on balanced tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def hostile(report):
    """Every string that a model, a path or a user can choose is markup."""
    layer = report.layers[5].model_copy(
        update={"name": HOSTILE, "role": HOSTILE, "format": HOSTILE, "fallback": HOSTILE}
    )
    file = report.artifacts[0].files[0].model_copy(update={"name": HOSTILE})
    artifact = report.artifacts[0].model_copy(update={"kind": HOSTILE, "path": HOSTILE, "files": (file,)})
    evaluation = report.evaluations[0].model_copy(update={"text": HOSTILE})
    return report.model_copy(
        update={
            "recipe_name": HOSTILE, "recipe": {HOSTILE: HOSTILE}, "source": "/m/" + HOSTILE, "warnings": (HOSTILE,),
            "layers": (*report.layers, layer), "artifacts": (artifact,), "evaluations": (evaluation,),
            "environment": {HOSTILE: HOSTILE}, "calibration": {"data": HOSTILE},
            "kv_cache": (CACHED.model_copy(update={"keys": HOSTILE, "values": HOSTILE}),),
            "stages": (report.stages[0].model_copy(update={"name": HOSTILE}),),
        }
    )  # fmt: skip


def test_gates_come_first_on_both_pages(report):
    first = report.evaluations[0]
    gated = first.model_copy(update={"text": HOSTILE, "gates": judge(first, {"kld": 0.05, "top1": 0.95})})
    report = report.model_copy(update={"evaluations": (gated,)})
    page = html(report)
    Page(page)
    assert 'class="gates fail"' in page
    assert page.index("FAIL") < page.index("269.1 MB became")
    assert "<b>PASS</b> kld 0.04127 (95 % between 0.04027 and 0.04227), at most 0.05" in page
    assert "<b>FAIL</b> top1 0.9031, at least 0.95" in page
    text = markdown(report)
    assert text.index("**FAIL**") < text.index("269.1 MB became")
    assert "| top1 | FAIL | 0.9031 | at least 0.95 |" in text
    assert HOSTILE not in page


def test_three_files_that_repeat_to_the_byte(report, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = write_report(report, tmp_path / "a"), write_report(report, tmp_path / "b")
    assert [p.name for p in first] == ["report.json", "report.md", "report.html"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["report.html", "report.json", "report.md"]


def test_a_folder_that_does_not_exist(report, tmp_path):
    with pytest.raises(StorageError):
        write_report(report, tmp_path / "none")


def test_json_reads_back_equal_and_renders_equal(report, tmp_path):
    exact = report.layers[3].model_copy(update={"weight_error_db": math.inf, "output_error_db": -math.inf})
    report = report.model_copy(update={"layers": (*report.layers[:3], exact, *report.layers[4:])})
    again = read_report(write_report(report, tmp_path)[0])
    assert again == report
    assert html(again) == html(report)
    assert markdown(again) == markdown(report)


def test_json_is_standard_json(report, tmp_path):
    exact = report.layers[3].model_copy(update={"weight_error_db": math.inf})
    path = write_report(report.model_copy(update={"layers": (exact,)}), tmp_path)[0]

    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["version"] == 2
    assert content["layers"][0]["weight_error_db"] == "Infinity"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"version": 3}, "has another version: wanted at most 2, found 3; read it with a newer qtool"),
        (lambda c: c | {"more": 1}, "is damaged at more"),
        (lambda c: c | {"parameters": 0}, "is damaged at parameters"),
        (
            lambda c: c | {"layers": [c["layers"][0] | {"shape": [576, 0]}]},
            r"is damaged at layers\.0\.shape\.1: found .* greater than 0",
        ),
        (
            lambda c: c | {"source_bytes": 10**400},
            r"is damaged at source_bytes: found .* less than 9223372036854775808",
        ),
        (
            lambda c: c | {"stages": [c["stages"][0] | {"seconds": "Infinity"}]},
            r"is damaged at stages\.0\.seconds: found .* less than 9",
        ),
        (lambda c: c | {"stages": [{"name": "plan"}]}, r"is damaged at stages\.0\.seconds"),
        (lambda c: {k: v for k, v in c.items() if k != "source"}, "is damaged at source: found Field required"),
        (lambda c: {k: v for k, v in c.items() if k != "version"}, "is no report: wanted an object with a version"),
        (lambda c: [c], "is no report: wanted an object with a version, found list"),
    ],
    ids=[
        "newer",
        "unknown-key",
        "no-parameters",
        "no-columns",
        "huge",
        "endless",
        "half-stage",
        "no-source",
        "no-version",
        "list",
    ],
)
def test_what_is_no_readable_report(report, tmp_path, change, message):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(change(json.loads(report.model_dump_json()))))
    with pytest.raises(CheckpointError, match=message):
        read_report(path)


@pytest.mark.parametrize("content", [b"", b'{"version": 1', b"\xff\xfe\x00", b"[" * 100_000], ids=lambda c: repr(c[:9]))
def test_what_is_no_json(tmp_path, content):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is no report: wanted JSON|is damaged: wanted UTF-8 text"):
        read_report(path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "report.json")
    with pytest.raises(CheckpointError, match=r"report\.json is no regular file"):
        read_report(tmp_path / "report.json")


def test_a_report_that_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"report\.json cannot be read: No such file"):
        read_report(tmp_path / "report.json")


def test_the_page_says_everything(report):
    page = Page(html(report))
    text = " ".join(page.texts)
    for layer in report.layers:
        assert layer.name in text
    for wanted in (*report.warnings, report.source, report.source_fingerprint, "rtn instead of gptq: the Hessian"):
        assert wanted in text
    for file in report.artifacts[0].files:
        assert file.sha256 in text
    assert page.tags.count("svg") == 5
    assert page.tags.count("circle") == 210 + 2 * 6


def test_the_page_is_whole_in_itself(report):
    page = Page(html(report))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {name for name, _ in page.attributes} & {"src", "href", "onclick", "onload", "data"}
    assert "url(" not in html(report)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_hostile_strings_stay_text_in_html(report):
    report = hostile(report)
    page = Page(html(report))
    assert "script" not in page.tags
    assert "a" not in page.tags
    text = " ".join(page.texts)
    assert text.count("<script>alert('1')</script>") > 10
    assert "49" not in text.split("{{")[1][:8]  # templates do not evaluate what they show


def test_hostile_strings_stay_text_in_markdown(report):
    lines = markdown(hostile(report)).splitlines()
    headings = [line for line in lines if line.startswith("#") and not line.startswith("##")]
    assert len(headings) == 1
    for number, line in enumerate(lines):
        if line.startswith("| ---"):
            columns = line.count("|")
            rows = [lines[number - 1]]
            while lines[number + len(rows)].startswith("|"):
                rows.append(lines[number + len(rows)])
            assert {row.count("|") - row.count("\\|") for row in rows} == {columns}


@pytest.mark.parametrize("text", ["a`b", "``", "a|b", "line\nbreak", "plain"])
def test_code_spans_hold_any_text(text):
    span = code_span(text)
    fence_length = len(span) - len(span.lstrip("`"))
    inside = span[fence_length:-fence_length]
    assert "`" * fence_length not in inside
    assert inside.strip().replace("\\|", "|") == " ".join(text.split())


def test_a_fence_is_longer_than_any_inside():
    assert fence("```\n````", "yaml").splitlines() == ["`````yaml", "```", "````", "`````"]


def test_markdown_escapes():
    assert escape_markdown("a_b*c <d>\n| `e`") == r"a\_b\*c \<d\> \| \`e\`"


def test_the_recipe_in_markdown_is_yaml(report):
    text = markdown(report)
    inside = text.split("```yaml\n")[1].split("\n```")[0]
    assert yaml.safe_load(inside) == report.recipe


def test_a_run_without_data_gates_or_artifacts(report):
    layers = tuple(x.model_copy(update={"output_error_db": None, "tokens": 0}) for x in report.layers)
    bare = report.model_copy(
        update={"layers": layers, "evaluations": (), "artifacts": (), "stages": (), "calibration": {}, "warnings": ()}
    )
    text = html(bare)
    assert "Signal-to-error ratio of weights" in text
    assert "none: weights only" in text
    assert "Quality was not measured" in markdown(bare)
    assert Page(text).tags.count("svg") == 4


def test_exact_layers_are_called_exact_and_are_not_plotted(report):
    layers = tuple(
        x.model_copy(update={"output_error_db": None, "weight_error_db": math.inf, "fallback": None}) if x.format else x
        for x in report.layers
    )
    text = html(report.model_copy(update={"layers": layers, "warnings": ()}))
    page = Page(text)
    assert page.tags.count("svg") == 3
    assert text.count("exact") > 210
    assert "No fallbacks, no warnings." in text


def test_of_several_layers_in_one_place_the_worst_is_plotted(report):
    """Experts share role and block."""
    expert = report.layers[5].model_copy(update={"name": "expert.1", "output_error_db": -3.0})
    better = expert.model_copy(update={"name": "expert.2", "output_error_db": 60.0})
    text = html(report.model_copy(update={"layers": (*report.layers, expert, better)}))
    titles = re.findall(r"<circle[^>]*><title>([^<]*)</title>", text)
    assert len(titles) == 210 + 2 * 6
    assert "expert.1: -3.0 dB, int4-g64" in titles
    assert report.layers[5].name not in " ".join(titles)


def test_mixtures_show_tokens_per_expert_and_few_names(report):
    update = {"role": "gate", "fallback": "rounded to nearest: few tokens"}
    own = [{"name": f"expert.{e}", "block": 3, "expert": e, "tokens": 1000 + e} for e in range(31)]
    layers = [report.layers[5].model_copy(update=update | fields) for fields in own]
    mixture = report.model_copy(update={"layers": (*report.layers, *layers)})
    text = markdown(mixture)
    assert "## Tokens per expert" in text
    assert "| 3 | 31 | 1,000 | 1,015 | 1,030 |" in text
    assert "(31: `expert.0`, " in text
    assert "`expert.11`, ...)" in text
    assert "expert.12" not in text
    cells = "".join(f'<td class="n">{x}</td>' for x in ("3", "31", "1,000", "1,015", "1,030"))
    assert cells in html(mixture)
    assert "Tokens per expert" not in markdown(report) + html(report)


def test_colours_mean_the_same_role_in_every_plot(report):
    text = html(report)
    assert text.count('<li class="c6"><i></i>down</li>') == 3


def test_errors_of_attention_are_shown_where_a_cache_is_rounded(report):
    assert "KV cache" not in markdown(report)
    assert "KV cache" not in html(report)
    report = report.model_copy(update={"kv_cache": (CACHED, CACHED.model_copy(update={"scores_error_db": math.inf}))})
    assert "| 3 | int4-channel | int4-token | 21.3 | 17.5 |" in markdown(report)
    assert "| 3 | int4-channel | int4-token | exact | 17.5 |" in markdown(report)
    cells = [text for text in Page(html(report)).texts if text.strip()]
    start = cells.index("outputs", cells.index("KV cache")) + 1
    assert cells[start : start + 5] == ["3", "int4-channel", "int4-token", "21.3", "17.5"]


@pytest.mark.parametrize(("field", "value"), [("block", 10**400), ("expert", 10**400), ("bits_per_weight", 5e-324)])
def test_numbers_beyond_all_models_are_refused(field, value, report, tmp_path):
    path = write_report(report, tmp_path)[0]
    content = json.loads(path.read_text(encoding="utf-8"))
    content["layers"][0][field] = value
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match=field):
        read_report(path)
