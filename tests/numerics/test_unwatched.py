"""Numbers that nobody waits for only to refuse them are refused where they are kept."""

import math
import threading

import pytest
import torch

from qtool.errors import NumericsError
from qtool.formats._spelling import parse_format
from qtool.numerics.checks import checked_later, unwatched


@pytest.mark.parametrize("label", ["int4-g32", "q8_0"])
def test_too_large_a_scale_is_refused_outside(label):
    fmt = parse_format(label)
    params = fmt.fit(torch.randn(2, 256))
    scale, offset = fmt.affine(params)
    wanted = torch.full_like(scale, math.inf if label == "int4-g32" else 1e38)
    with checked_later():
        fmt.refit(params, wanted, offset)
    with pytest.raises(NumericsError):
        fmt.refit(params, wanted, offset)


def test_only_this_thread_checks_later_and_only_so_long():
    x, seen = torch.zeros(1), []
    with checked_later():
        other = threading.Thread(target=lambda: seen.append(unwatched(x)))
        other.start()
        other.join()
        with checked_later():
            seen.append(unwatched(x))
        seen.append(unwatched(x))
    with pytest.raises(ValueError, match="leave"), checked_later():
        raise ValueError("leave")
    assert [*seen, unwatched(x)] == [False, True, True, False]
