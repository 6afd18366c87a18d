"""Tables of docs/budgets.md: what benchmarks measured is kept, and replaced when it is measured again."""

from __future__ import annotations

from benchmarks import divided
from benchmarks.budgets import Row
from benchmarks.scores import Line


def test_what_was_measured_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(divided, "KEPT", tmp_path / "divided.json")
    assert (list(divided.sibling_rows()), list(divided.way_rows())) == ([], [])
    divided.keep_row(Row("q2_k", "evaluation", 80, 79, 0.5, 0.3))
    divided.keep_row(Row("q3_k_m", "prose", 1234567, 1234560, 0.2, 0.1))
    divided.keep_ways([Line("second-order", 0.0123456, 0.0004, 3)])
    divided.keep_row(Row("q2_k", "evaluation", 80, 79, 0.5, 0.2))
    assert list(divided.sibling_rows()) == [
        ("`gguf-q3_k_m`", "1,234,567", "prose", "0.2000", "0.1000", "0.50"),
        ("`gguf-q2_k`", "80", "evaluation", "0.5000", "0.2000", "0.40"),
    ]
    assert list(divided.way_rows()) == [("second-order", "0.0123 ± 0.0004", "3")]
