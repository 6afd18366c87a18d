"""Runs a GPTQ or AWQ folder in GPTQModel, where that is installed.

On processors it decodes weights and computes in float16 or bfloat16.
"""

from __future__ import annotations

TRIAL = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what it logs is no answer
sys.path[:] = json.loads(sys.argv[1])
for line in sys.stdin:
    try:
        import numpy, torch
        from gptqmodel import BACKEND, GPTQModel
        model = GPTQModel.load(sys.argv[2], device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
        with torch.inference_mode():
            found = model(input_ids=torch.tensor([json.loads(line)]), use_cache=False).logits[0]
        numpy.save(sys.argv[3], found.float().numpy())
        said = ""
    except Exception as error:
        said = f"{type(error).__name__}: {error}"[:1000]
    print(json.dumps(said), file=answers, flush=True)
"""
SECONDS = 600.0
"""To load a model and run some tokens."""
