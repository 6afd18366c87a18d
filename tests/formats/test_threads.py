"""Formats choose the same bits on any number of threads: rows are on their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qtool.formats._spelling import parse_format
from tests.formats.test_ranges import LABELS


@pytest.mark.parametrize("label", LABELS)
def test_parameters_and_codes_do_not_depend_on_the_number_of_threads(
    label: str, use_threads: Callable[[int], None]
) -> None:
    fmt, g = parse_format(label), torch.Generator().manual_seed(4)
    w, importance = torch.randn(7, 512, generator=g) * 0.03, torch.rand(512, generator=g)
    found = []
    for threads in (1, 2, 3):
        use_threads(threads)
        params = fmt.fit(w, importance)
        found.append([fmt.snap(w, params, importance), *params.values()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
