"""Runs an MLX folder in mlx-lm itself, whose CPU build runs everywhere."""

from __future__ import annotations

TRIAL = """
import json
sys.path[:] = json.loads(sys.argv[1])
for line in sys.stdin:
    try:
        from pathlib import Path
        import mlx.core as mx
        import numpy
        from mlx_lm.utils import load_model
        model = load_model(Path(sys.argv[2]))[0]
        model.set_dtype(mx.float32)
        found = model(mx.array([json.loads(line)]))[0]
        numpy.save(sys.argv[3], numpy.array(found.astype(mx.float32)))
        said = ""
    except Exception as error:
        said = f"{type(error).__name__}: {error}"[:1000]
    print(json.dumps(said), flush=True)
"""
SECONDS = 600.0
"""To load a model and run some tokens."""
