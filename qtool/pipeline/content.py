"""The first look at a source: every tensor is read once, refused if it is not finite, and goes into a checksum."""

from __future__ import annotations

from qtool.checkpoint._base import Checkpoint, finite
from qtool.numerics.checksum import Checksum
from qtool.numerics.metrics import all_finite
from qtool.pipeline.requantize import is_finite, stored_matrix
from qtool.pipeline.rows import row_parts


def read_content(checkpoint: Checkpoint) -> str:
    """Reads every tensor once.

    Returns:
        A checksum of all that was read, so that a run which continues sees whether it still has the same source;
        `Checkpoint.fingerprint`, which is there before anything else is, looks at samples only.

    Raises:
        NumericsError: a tensor holds NaN or infinity.
        CheckpointError: one cannot be read.
    """
    checksum = Checksum()
    for name in checkpoint.names():
        stored = stored_matrix(checkpoint, name.removesuffix(".weight"))
        if stored:
            quantized = stored.quantized
            checksum.add(f"{name} {quantized.format.label}", quantized.codes)
            for key, parameter in sorted(quantized.params.items()):
                checksum.add(f"{name} {key}", parameter)
            if is_finite(stored):
                continue
        for start, stop in row_parts(checkpoint.info(name).shape):
            rows = checkpoint.rows(name, start, stop)
            checksum.add(name, rows)
            if not all_finite(rows):
                finite(checkpoint.tensor(name), name)  # says where in the whole
    return checksum.hexdigest()
