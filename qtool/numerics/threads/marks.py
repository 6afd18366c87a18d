"""Names for the parts of a block's work, by which a profile tells what took how long; see `qtool.pipeline.profile`.

They cost a microsecond or two where nobody profiles, so they stand around pieces of work, not inside loops.
"""

from __future__ import annotations

from torch.profiler import record_function

PREFIX = "qtool: "
"""Of all names, which libraries mark their own work beside."""


def marked(name: str) -> record_function:
    """Marks what runs inside as a part of the work; what another part inside it does counts there.

    Greenlets may not be switched inside: marks of a thread have to end in the order in which they began.
    """
    return record_function(PREFIX + name)
