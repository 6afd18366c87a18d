"""The unquantized model beside the quantized one is asked no more often than somebody looks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import pytest
import torch
from torch import Tensor

from qtool.calibrate import walker as walker_module
from qtool.calibrate.hidden import Hidden
from qtool.calibrate.reference import Reference
from qtool.calibrate.walker import Walker
from qtool.models import open_model
from qtool.stats.drift import Drift
from qtool.stats.gram import Gram


@pytest.mark.parametrize("limit", [0, 1 << 40])
@pytest.mark.parametrize("needs", [{Gram, Drift}, {Gram}])
def test_samples_that_nobody_compares_go_through_once(
    limit: int, needs: set[type], tiny_checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where batches start anew at each input; outputs are those of a walk through the unquantized model."""
    monkeypatch.setattr(walker_module, "waiting_limit", lambda *_: limit)
    walker = Walker(open_model(str(tiny_checkpoint("qwen3"))), torch.device("cpu"), torch.float32)
    monkeypatch.setattr(Walker, "parts", lambda self, hidden: [slice(i, i + 1) for i in range(hidden.samples)])
    tokens = torch.randint(0, 100, (8, 16), generator=torch.Generator().manual_seed(1))
    hidden, reference, asked = walker.embed(tokens), Reference(walker, tokens, every=True), Counter[tuple[int, bool]]()
    compute = reference.compute

    def counted(part: slice, wanted: Collection[str] | None = None) -> tuple[dict[str, Tensor], Tensor | None]:
        found = compute(part, wanted)
        asked[part.start, found[1] is not None] += 1
        assert wanted is None or found[0].keys() == set(wanted)
        return found

    monkeypatch.setattr(reference, "compute", counted)
    block, plain = walker.load_block(0), Hidden(*hidden.values.shape, hidden.values.dtype)
    plain.values.copy_(hidden.values)
    plain.tokens = hidden.tokens
    inputs = dict.fromkeys((m.reads for m in walker.modules[0]), frozenset(needs))
    assert len(list(walker.steps(block, 0, hidden, inputs, reference))) == 4
    walker.advance(walker.load_block(0), 0, plain)
    assert torch.equal(reference.outputs.values, plain.values)
    assert reference.compared == 2
    through = {(i, True): 1 for i in range(8)}
    anew = {(i, False): 5 for i in range(reference.compared)}  # up to each of four inputs, and for none at the end
    assert asked == (through | anew if limit == 0 and Drift in needs else through)
